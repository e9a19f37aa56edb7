"""Dimensions, site and origin of an SAE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gemmascope_fast.sae.sites import Site


@dataclass
class SAEMetadata:
    """Where an SAE comes from. All fields are optional."""

    model_name: str | None = None
    neuronpedia_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class SAEConfig:
    """Dimensions and site.  For an SAE, `d_out` equals d_in.  `site_out` is where a transcoder writes."""

    d_in: int
    d_sae: int
    d_out: int
    site: Site | None = None
    site_out: Site | None = None
    metadata: SAEMetadata = field(default_factory=SAEMetadata)

    @property
    def hook_name(self) -> str | None:
        return None if self.site is None else self.site.hook_name

    @property
    def hook_name_out(self) -> str | None:
        site = self.site_out or self.site
        return None if site is None else site.hook_name
