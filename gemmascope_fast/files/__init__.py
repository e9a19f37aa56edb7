"""Bytes on disk: files that appear whole, arrays read in blocks, digests; nothing about SAEs."""
