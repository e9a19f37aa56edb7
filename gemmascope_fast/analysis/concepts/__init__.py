"""AxBench's methods offline: which direction detects a concept in texts, and which one steers towards it."""

from gemmascope_fast.analysis.concepts.data import Example, load_examples
from gemmascope_fast.analysis.concepts.methods import Detector

__all__ = ["Detector", "Example", "load_examples"]
