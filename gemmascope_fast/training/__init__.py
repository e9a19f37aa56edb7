"""Trainers of SAEs and of nested codes; what they produce is served by sae/ and quant/."""
