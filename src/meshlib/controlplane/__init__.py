"""The control plane: it tells every process of the mesh what to do. Objects come in, xDS goes out."""
