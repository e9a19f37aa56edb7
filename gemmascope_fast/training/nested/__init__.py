"""Training of nested codes, by blocks and end to end."""
