//go:build tools

// Which programs the tests run against, each with the name that make gives it. Nothing here is compiled into meshlib.
package tools

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver"          // kube-apiserver
	_ "k8s.io/kubernetes/cmd/kube-controller-manager" // kube-controller-manager
	_ "k8s.io/kubernetes/cmd/kube-proxy"              // kube-proxy
	_ "k8s.io/kubernetes/cmd/kube-scheduler"          // kube-scheduler
	_ "k8s.io/kubernetes/cmd/kubectl"                 // kubectl
	_ "k8s.io/kubernetes/cmd/kubelet"                 // kubelet
)
