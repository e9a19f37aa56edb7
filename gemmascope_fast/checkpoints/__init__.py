"""Checkpoint formats, one file for each. All of them return a `Checkpoint`."""

from gemmascope_fast.checkpoints.base import Checkpoint

__all__ = ["Checkpoint"]
