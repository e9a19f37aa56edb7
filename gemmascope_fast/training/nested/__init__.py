"""Training of nested codes, block by block and end to end."""
