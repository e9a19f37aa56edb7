"""Trainers of SAEs and of nested codes. sae/ and quant/ run the results."""
