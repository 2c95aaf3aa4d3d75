"""meshlib: a service mesh without sidecars."""
