"""Evaluation of SAEs as the Gemma Scope report does it."""

from gemmascope_fast.analysis.evaluation.losses import Losses
from gemmascope_fast.analysis.evaluation.reconstruction import Reconstruction
from gemmascope_fast.analysis.evaluation.run import Evaluation, evaluate

__all__ = ["Evaluation", "Losses", "Reconstruction", "evaluate"]
