"""gemmascope_fast: exact, sparse and fast JumpReLU SAEs of the Gemma Scope family."""

from gemmascope_fast._version import __version__
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
from gemmascope_fast.sae.topk import TopKSAE

__all__ = [
    "SAE",
    "Ablate",
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
    "__version__",
    "accelerate",
    "attach",
    "backend",
    "load_demo",
    "quantize_",
    "scaled_embedding_sae",
    "set_bits",
]
