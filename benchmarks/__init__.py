"""What does the mesh cost? One file for each measurement; README.md says how to read them."""
