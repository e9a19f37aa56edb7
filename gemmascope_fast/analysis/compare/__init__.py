"""Compares features: between sets of texts, models, variants of one text, or turns of a conversation."""

from gemmascope_fast.analysis.compare.models import matched_features
from gemmascope_fast.analysis.compare.sets import compare_pairs, compare_sets

__all__ = ["compare_pairs", "compare_sets", "matched_features"]
