"""The YAML that people write: read it, check it, translate it to what one process needs to know."""
