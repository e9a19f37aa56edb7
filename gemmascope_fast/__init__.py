"""gemmascope_fast: exact, sparse and fast JumpReLU SAEs of the Gemma Scope family."""

from gemmascope_fast._version import __version__
from gemmascope_fast.attach import Ablate, Add, Clamp, Direction, Mask, MinClamp, Scale, attach
from gemmascope_fast.backends import backend
from gemmascope_fast.bank import Bank, BankedSAE
from gemmascope_fast.coders import Crosscoder, CrossLayerTranscoder, TopKSAE, scaled_embedding_sae
from gemmascope_fast.demo_model import load_demo
from gemmascope_fast.dropin import accelerate
from gemmascope_fast.errors import (
    AttachError,
    BackendError,
    BankError,
    CheckpointError,
    GemmaScopeFastError,
    StaleScreenError,
)
from gemmascope_fast.latents import SparseLatents
from gemmascope_fast.loading import SAE
from gemmascope_fast.matryoshka.model import quantize_, set_bits
from gemmascope_fast.matryoshka.sae import MatryoshkaSAE
from gemmascope_fast.sae import (
    JumpReLUSAE,
    JumpReLUSkipTranscoder,
    JumpReLUTranscoder,
    SAEConfig,
    SAEMetadata,
)
from gemmascope_fast.sites import Site

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
