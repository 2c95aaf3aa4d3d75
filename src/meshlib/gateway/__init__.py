"""How does a request from outside get in? An ingress reverse proxy, configured by Gateway and VirtualService."""
