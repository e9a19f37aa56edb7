"""Pages about every feature of an SAE, made of extracted latents."""

from gemmascope_fast.analysis.dashboard.collect import Collected, collect
from gemmascope_fast.analysis.dashboard.pages import Dashboard

__all__ = ["Collected", "Dashboard", "collect"]
