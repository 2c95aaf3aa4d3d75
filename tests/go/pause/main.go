// What holds a pod's network open: it waits to be ended, and takes the dead of a shared process table in.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for each := range signals {
		if each != syscall.SIGCHLD {
			return
		}
		for {
			if found, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); err != nil || found <= 0 {
				break
			}
		}
	}
}
