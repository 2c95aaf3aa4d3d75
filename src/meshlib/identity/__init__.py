"""Who is this process? Certificates, keys and trust bundles, from whoever issues them, and TLS made of them."""
