"""Latents of any amount of text, as Parquet shards for pyarrow, polars and DuckDB."""

from gemmascope_fast.analysis.extraction.run import Extractor, extract
from gemmascope_fast.analysis.extraction.sources import Document, documents, resolve
from gemmascope_fast.analysis.extraction.store import Store, StoreError

__all__ = ["Document", "Extractor", "Store", "StoreError", "documents", "extract", "resolve"]
