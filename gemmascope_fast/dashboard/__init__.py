"""Pages about every feature of an SAE, made of extracted latents."""

from gemmascope_fast.dashboard.collect import Collected, collect
from gemmascope_fast.dashboard.pages import Dashboard

__all__ = ["Collected", "Dashboard", "collect"]
