"""Verified, paired timings against what people use today."""
