"""Exact, sparse and fast SAEs of the Gemma Scope family.

`__all__` is the public API.  Names are imported when they are first used: `gemmascope-fast --help` needs no PyTorch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gemmascope_fast._version import __version__

if TYPE_CHECKING:
    from gemmascope_fast.attach import Ablate, Add, Clamp, Direction, Mask, MinClamp, Scale, attach
    from gemmascope_fast.backends import backend
    from gemmascope_fast.bank import Bank, BankedSAE
    from gemmascope_fast.checkpoints.bundled import load_demo
    from gemmascope_fast.checkpoints.loading import SAE
    from gemmascope_fast.dropin import accelerate
    from gemmascope_fast.errors import (
        AttachError,
        BackendError,
        BankError,
        CheckpointError,
        GemmaScopeFastError,
        StaleScreenError,
    )
    from gemmascope_fast.ops.latents import SparseLatents
    from gemmascope_fast.quant.model import quantize_, set_bits
    from gemmascope_fast.quant.sae import MatryoshkaSAE
    from gemmascope_fast.sae.config import SAEConfig, SAEMetadata
    from gemmascope_fast.sae.embedding import scaled_embedding_sae
    from gemmascope_fast.sae.jumprelu import JumpReLUSAE, JumpReLUSkipTranscoder, JumpReLUTranscoder
    from gemmascope_fast.sae.multi_site import Crosscoder, CrossLayerTranscoder
    from gemmascope_fast.sae.sites import Site
    from gemmascope_fast.sae.topk import AbsTopKSAE, TopKSAE
    from gemmascope_fast.sae.topk_transcoder import TopKSkipTranscoder, TopKTranscoder

__all__ = [
    "SAE",
    "Ablate",
    "AbsTopKSAE",
    "Add",
    "AttachError",
    "BackendError",
    "Bank",
    "BankError",
    "BankedSAE",
    "CheckpointError",
    "Clamp",
    "CrossLayerTranscoder",
    "Crosscoder",
    "Direction",
    "GemmaScopeFastError",
    "JumpReLUSAE",
    "JumpReLUSkipTranscoder",
    "JumpReLUTranscoder",
    "Mask",
    "MatryoshkaSAE",
    "MinClamp",
    "SAEConfig",
    "SAEMetadata",
    "Scale",
    "Site",
    "SparseLatents",
    "StaleScreenError",
    "TopKSAE",
    "TopKSkipTranscoder",
    "TopKTranscoder",
    "__version__",
    "accelerate",
    "attach",
    "backend",
    "load_demo",
    "quantize_",
    "scaled_embedding_sae",
    "set_bits",
]

_FOLDERS = ("ops", "backends", "sae", "quant", "checkpoints", "bank", "dropin", "training", "analysis", "cli", "dev")
_MODULES = {  # public name -> the module that defines it
    "Ablate": "attach",
    "Add": "attach",
    "AttachError": "errors",
    "BackendError": "errors",
    "Bank": "bank",
    "BankError": "errors",
    "BankedSAE": "bank",
    "CheckpointError": "errors",
    "Clamp": "attach",
    "CrossLayerTranscoder": "sae.multi_site",
    "Crosscoder": "sae.multi_site",
    "Direction": "attach",
    "GemmaScopeFastError": "errors",
    "JumpReLUSAE": "sae.jumprelu",
    "JumpReLUSkipTranscoder": "sae.jumprelu",
    "JumpReLUTranscoder": "sae.jumprelu",
    "Mask": "attach",
    "MatryoshkaSAE": "quant.sae",
    "MinClamp": "attach",
    "SAE": "checkpoints.loading",
    "SAEConfig": "sae.config",
    "SAEMetadata": "sae.config",
    "Scale": "attach",
    "Site": "sae.sites",
    "SparseLatents": "ops.latents",
    "StaleScreenError": "errors",
    "TopKSAE": "sae.topk",
    "TopKSkipTranscoder": "sae.topk_transcoder",
    "TopKTranscoder": "sae.topk_transcoder",
    "AbsTopKSAE": "sae.topk",
    "accelerate": "dropin",
    "attach": "attach",
    "backend": "backends",
    "load_demo": "checkpoints.bundled",
    "quantize_": "quant.model",
    "scaled_embedding_sae": "sae.embedding",
    "set_bits": "quant.model",
}


class _Package(ModuleType):
    """`gsf.attach` is the function, also after the folder of that name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.attach if name == "attach" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f"gemmascope_fast.{_MODULES[name]}"), name)
    elif name in _FOLDERS:
        value = importlib.import_module(f"gemmascope_fast.{name}")
    else:
        raise AttributeError(f"module 'gemmascope_fast' has no attribute {name!r}")
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_FOLDERS})
