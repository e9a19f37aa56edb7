"""Pages about every feature of an SAE, made from extracted latents."""

from gemmascope_fast.analysis.dashboard.collect import Collected, collect
from gemmascope_fast.analysis.dashboard.pages import Dashboard

__all__ = ["Collected", "Dashboard", "collect"]
