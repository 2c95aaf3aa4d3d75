"""The edge where calls leave: one file for each client library, over one core."""
