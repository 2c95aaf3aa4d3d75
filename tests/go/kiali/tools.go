//go:build tools

// Which programs the tests run against, each with the name that make gives it. Nothing here is compiled into meshlib.
package tools

import (
	_ "github.com/kiali/kiali" // kiali
)
