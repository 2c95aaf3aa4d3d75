"""What does Kubernetes say? Lists and watches, with nothing missed and nothing doubled."""
