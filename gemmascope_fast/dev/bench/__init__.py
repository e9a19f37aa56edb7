"""Verified, paired timings against other libraries."""
