"""Loads the model and the SAE named by --model, --sae, --sae-id and --layer; "demo" is the bundled pair."""

from __future__ import annotations

from typing import Any

import torch

from gemmascope_fast.attach.origin import check_site
from gemmascope_fast.checkpoints.bundled import MODEL_NAME, SAE_FILE, load_demo_model, load_demo_sae
from gemmascope_fast.checkpoints.hub import from_hub_or_cache
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.sites import Site

SEVERAL = ("cross_layer_transcoder", "crosscoder")  # kinds that read or write several sites


def load_model(name: str, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """(model, tokenizer) for --model: "demo", or a model of transformers; in eval mode.

    The model is of the class that its checkpoint names (a language model, a reward model, an encoder), a causal
    language model where it names none.  Raises ValueError for a device that does not exist.
    """
    check_device(device)
    if name == "demo":
        model, tokenizer = load_demo_model()
        return model.to(device, getattr(torch, dtype)), tokenizer
    import transformers

    with from_hub_or_cache(name) as local:
        named = transformers.AutoConfig.from_pretrained(name, **local).architectures or []
        own = next((getattr(transformers, each) for each in named if hasattr(transformers, each)), None)
        cls = own or transformers.AutoModelForCausalLM
        model = cls.from_pretrained(name, dtype=dtype, **local).eval().to(device)
        return model, transformers.AutoTokenizer.from_pretrained(name, **local)


def check_device(name: str) -> None:
    """Raise ValueError for a --device that torch does not know, or that does not exist."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this process sees no such CUDA device")


def full_names(settings: dict[str, Any]) -> tuple[str, str]:
    """(model, SAE) of an extraction's settings for titles; "demo" is replaced by its full name."""
    model, sae = str(settings.get("model", "a model")), str(settings.get("sae", "an SAE"))
    return MODEL_NAME if model == "demo" else model, SAE_FILE.stem if sae == "demo" else sae


def sae_place(name: str) -> str:
    """Where a command's SAE is stored: "demo" is the bundled file, any other name is unchanged."""
    return str(SAE_FILE) if name == "demo" else name


def load_sae(name: str, sae_id: str | None = None, device: str = "cpu") -> JumpReLUSAE:
    """The SAE for --sae, in fp32: "demo", or a file, folder or repository.

    Raises ValueError for a coder of several sites, which no command accepts.
    """
    check_device(device)
    if name == "demo":
        return load_demo_sae().to(device)
    sae = from_pretrained(name, sae_id, device)
    if sae.kind in SEVERAL or not isinstance(sae, JumpReLUSAE):
        raise ValueError(
            f"--sae {name}: expected an SAE or transcoder that reads one site and writes one, got a {sae.kind};"
            " use `attach` in Python"
        )
    return sae


def load_pair(
    model: str = "demo",
    sae: str = "demo",
    sae_id: str | None = None,
    layer: int | None = None,
    anywhere: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
) -> tuple[Any, Any, JumpReLUSAE, int]:
    """(model, tokenizer, sae, layer) for --model, --sae, --sae-id and --layer (None: the SAE's own), on --device, the
    model in --dtype.

    anywhere: `layer` may differ from the SAE's own, and replaces it.  Raises ValueError if neither the arguments nor
    the checkpoint name a residual-stream layer, AttachError if they name different ones.
    """
    loaded = load_sae(sae, sae_id, device)
    if layer is not None and loaded.cfg.site is not None:
        if anywhere:
            loaded.cfg.site = Site("resid", layer)
        else:
            check_site(layer, Site("resid", layer), loaded.cfg.site, None)
    if layer is None and loaded.cfg.site is not None and loaded.cfg.site.kind == "resid":
        layer = loaded.cfg.site.layer
    if layer is None:
        raise ValueError("--layer: expected a layer number, for the checkpoint names no residual-stream layer")
    return *load_model(model, device, dtype), loaded, layer
