"""Evaluation of SAEs as in the Gemma Scope report."""

from gemmascope_fast.analysis.evaluation.losses import Losses
from gemmascope_fast.analysis.evaluation.reconstruction import Reconstruction
from gemmascope_fast.analysis.evaluation.run import Evaluation, evaluate

__all__ = ["Evaluation", "Losses", "Reconstruction", "evaluate"]
