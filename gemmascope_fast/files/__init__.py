"""Files on disk: atomic writes, arrays read in blocks, digests. Knows nothing about SAEs."""
