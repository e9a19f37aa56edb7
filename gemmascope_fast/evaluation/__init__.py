"""Evaluation of SAEs as the Gemma Scope report does it."""

from gemmascope_fast.evaluation.losses import Losses
from gemmascope_fast.evaluation.reconstruction import Reconstruction
from gemmascope_fast.evaluation.run import Evaluation, evaluate

__all__ = ["Evaluation", "Losses", "Reconstruction", "evaluate"]
