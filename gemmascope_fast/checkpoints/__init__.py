"""Checkpoint formats, one file each, all giving `Checkpoint`."""

from gemmascope_fast.checkpoints.base import Checkpoint

__all__ = ["Checkpoint"]
