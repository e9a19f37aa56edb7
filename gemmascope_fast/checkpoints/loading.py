"""`from_pretrained`: loads a checkpoint of any known format, local or from Hugging Face, as the right module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.checkpoints import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope_1,
    gemma_scope_2,
    llama_scope,
    multi_layer,
    names,
    native,
    saelens,
    sparsify,
    torch_formats,
)
from gemmascope_fast.checkpoints.base import Checkpoint
from gemmascope_fast.checkpoints.kinds import KINDS
from gemmascope_fast.checkpoints.repository import LLAMA_SCOPE, SUFFIXES, check_inside, locate
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import BLOCK_BYTES
from gemmascope_fast.files.progress import progress_bar
from gemmascope_fast.files.regular import check_regular
from gemmascope_fast.sae.config import SAEConfig, SAEMetadata
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.multi_site import Crosscoder, CrossLayerTranscoder, MultiSiteConfig
from gemmascope_fast.sae.sites import Site


def _read_saelens(path: Path) -> Checkpoint:
    return llama_scope.read_r1(path) if llama_scope.is_r1(path) else saelens.read(path)


def _read_own(path: Path) -> Checkpoint:
    return sparsify.read(path) if sparsify.is_sparsify(path) else native.read(path)


_READERS = {
    gemma_scope_1.FILE: gemma_scope_1.read,
    gemma_scope_2.FILE: gemma_scope_2.read,
    saelens.FILE: _read_saelens,
    native.FILE: _read_own,
    dictionary_learning.FILE: torch_formats.read,
    llama_scope.FILE: llama_scope.read,
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def from_pretrained(
    repo_or_folder: str | Path | None = None,
    sae_id: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    revision: str | None = None,
    *,
    release: str | Path | None = None,
    force_download: bool = False,
    kind: str | None = None,
    site: Site | None = None,
    site_out: Site | None = None,
    progress: bool | None = None,
    rows: str = "memory",
) -> JumpReLUSAE | CrossLayerTranscoder | Crosscoder:
    """Load an SAE, transcoder or crosscoder, as the module of its kind.

    repo_or_folder, sae_id: a file or folder; a folder or Hugging Face repository and a path inside it; or SAELens's
    names ("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"); "demo" is the bundled SAE.
    release: SAELens's keyword for repo_or_folder.  force_download: download again even if it is in the cache.
    revision: that of the repository.
    kind, site, site_out: for a checkpoint that does not say them (a params.npz whose path does not name its
    repository); ValueError if the checkpoint says something else.
    progress: show a bar on stderr; None: for loads above 256 MB on a terminal.
    rows: "memory"; "mmap": only the 8-bit screen is in memory, and full-precision rows are read from a packed file
    next to the checkpoint, written at first use (`checkpoints/packed.py`); cpu and float32 only.  Decoder rows are
    read from the checkpoint itself if it stores them in usable form.  Such an SAE can be deep-copied without reading
    its rows, but not pickled.  "pinned": the encoder's rows in pinned host memory, everything else on the CUDA device
    (`JumpReLUSAE.pin_rows`); host memory needs twice the size of the rows during the copy.

    A repository in Hugging Face's cache loads without a network.

    Raises CheckpointError if the checkpoint is missing, damaged or contradicts itself, ValueError for a dtype other
    than float32, bfloat16 and float16, TypeError unless exactly one of repo_or_folder and release is given.
    """
    place = one_place(repo_or_folder, release)
    wanted = held_dtype(dtype)
    if rows not in ("memory", "mmap", "pinned"):
        raise ValueError(f'rows: expected "memory", "mmap" or "pinned", got {rows!r}')
    if rows == "mmap" and (torch.device(device).type != "cpu" or wanted != torch.float32):
        raise ValueError(f'rows: "mmap" needs float32 on cpu, got {wanted} on {device}')
    checkpoint = _told(find_checkpoint(place, sae_id, revision, force_download), kind, site, site_out)
    if rows == "mmap":
        from gemmascope_fast.checkpoints import mapped, packed

        file = checkpoint.path.with_name(checkpoint.path.name + ".packed")
        return mapped.open_packed(packed.pack(checkpoint, file, progress=progress), checkpoint)
    pinned = rows == "pinned"
    if pinned:
        from gemmascope_fast.sae.pinned import check_device

        check_device(torch.device(device))
        if checkpoint.layers and not checkpoint.extra.get("shared"):
            raise ValueError(f'{checkpoint.path}: rows: "pinned" needs a coder with one encoder, got {checkpoint.kind}')
    with _bar(checkpoint, progress):
        made = build(checkpoint, torch.device("cpu" if pinned else device), wanted)
    take_screen(made, checkpoint)
    return made.pin_rows(device) if pinned else made


def take_screen(made: Any, checkpoint: Checkpoint) -> None:
    """Give a module the screen stored with its weights, if there is one."""
    if checkpoint.format == "native" and isinstance(made, JumpReLUSAE):
        screen = native.read_screen(made, checkpoint.path)
        if screen is not None:
            made.screen_cache.adopt(made, screen)


def held_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype with this name; ValueError if an SAE cannot have it."""
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if wanted not in _DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
    return wanted


def one_place(repo_or_folder: str | Path | None, release: str | Path | None) -> str | Path:
    """The one of two names for the same argument that was given; TypeError for both or none."""
    given = [place for place in (repo_or_folder, release) if place is not None]
    if len(given) != 1:
        got = "both" if given else "neither"
        raise TypeError(f"from_pretrained: expected repo_or_folder or release, got {got}")
    return given[0]


def find_checkpoint(
    repo_or_folder: str | Path, sae_id: str | None = None, revision: str | None = None, force_download: bool = False
) -> Checkpoint:
    """The checkpoint that `from_pretrained` would load, downloaded if necessary. Its weights are not read yet."""
    found = locate(repo_or_folder, sae_id, revision, force_download)
    checkpoint = open_checkpoint(found.path)
    if found.named is not None:
        named = found.named
        extra = checkpoint.extra | ({"neuronpedia_id": named.neuronpedia_id} if named.neuronpedia_id else {})
        checkpoint = replace(checkpoint, model_name=checkpoint.model_name or named.model, extra=extra)
        if named.scale is not None and checkpoint.normalisation == "expected_average_only_in":
            checkpoint = _scaled(checkpoint, named.scale)
    return checkpoint


JumpReLUSAE._load = staticmethod(from_pretrained)


class SAE:
    """`SAE.from_pretrained(…)` loads a checkpoint of any kind as the module of its kind."""

    from_pretrained = staticmethod(from_pretrained)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a file, or in a folder with exactly one. Its weights are not read yet."""
    path = Path(path)
    if path.is_dir():
        if any(path.glob(multi_layer.PATTERN)):
            for file in path.glob(multi_layer.PATTERN):
                check_inside(file, path)
            return multi_layer.read(path)
        known = [path / name for name in (*_READERS, LLAMA_SCOPE) if (path / name).exists()]
        files = known or sorted(p for suffix in SUFFIXES for p in path.glob(f"*{suffix}"))
        if len(files) != 1:
            raise CheckpointError(
                f"{path}: expected one checkpoint, found {[p.name for p in files]}; `gemmascope-fast ls` lists what"
                " is in the folders below"
            )
        check_inside(files[0], path)
        path = files[0]
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    check_regular(path)
    found = _READERS.get(path.name, _reader_of(path))(path)
    if found.extra.get("neuronpedia_id") is None and not found.layers:
        page = names.neuronpedia_id(path)
        if page is not None:
            found.extra = found.extra | {"neuronpedia_id": page}
    return found


def _reader_of(path: Path) -> Callable[[Path], Checkpoint]:
    """What reads a file whose name alone says no format."""
    if path.suffix == ".npz":
        return gemma_scope_1.read
    if path.suffix in torch_formats.SUFFIXES:
        return torch_formats.read
    if circuit_tracer.NAME.fullmatch(path.name) and not native.is_own(path):
        return circuit_tracer.read
    return native.read


def build(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """Read the weights block by block, cast them, and put them into the module of the checkpoint's kind."""
    if checkpoint.normalisation != "none":
        raise CheckpointError(
            f"{checkpoint.path}: normalize_activations: expected none, got {checkpoint.normalisation!r}: fold it into"
            " the weights first (SAELens: fold_activation_norm_scaling_factor, fold_activation_whitening) or"
            " accelerate the SAELens object itself"
        )
    if checkpoint.extra.get("shared"):
        return _crosscoder(checkpoint, device, dtype)
    if checkpoint.layers:
        layers = [build(layer, device, dtype) for layer in checkpoint.layers]
        skips = [entry.read(device, dtype) for entry in checkpoint.arrays.values()]
        made = _made(checkpoint, CrossLayerTranscoder, layers, skips or None, _multi_site(checkpoint))
        made.kind = checkpoint.kind
        return made
    arrays, cfg = checkpoint.arrays, config_of(checkpoint)
    weights = {name: entry.read(device, dtype, transposed=name == "W_enc") for name, entry in arrays.items()}
    if checkpoint.threshold_value is not None and "threshold" not in weights:
        single = torch.tensor(checkpoint.threshold_value, dtype=torch.float64).to(device, dtype)
        if not bool(torch.isfinite(single)):
            raise CheckpointError(
                f"{checkpoint.path}: threshold: {checkpoint.threshold_value} is not finite in {dtype}"
            )
        weights["threshold"] = single.repeat(cfg.d_sae)
    if checkpoint.subtracts_b_dec:
        exact = arrays["b_enc"].read(device, torch.float64)
        weights["b_enc"] = folded_b_dec(weights["W_enc"], weights["b_dec"], exact)
        if not bool(torch.isfinite(weights["b_enc"]).all()):
            raise CheckpointError(f"{checkpoint.path}: b_enc: not finite once b_dec @ W_enc is taken from it")
    return _made(checkpoint, KINDS[checkpoint.kind], cfg=cfg, **weights, **checkpoint.fields)


def _made(checkpoint: Checkpoint, kind: Any, *args: Any, **more: Any) -> Any:
    """Make the module; errors about its weights name the checkpoint."""
    try:
        return kind(*args, **more)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def config_of(checkpoint: Checkpoint) -> SAEConfig:
    """The config of the module that `build` makes from a checkpoint of one site."""
    (d_in, d_sae), d_out = checkpoint.arrays["W_enc"].shape, checkpoint.arrays["W_dec"].shape[1]
    return SAEConfig(d_in, d_sae, d_out, checkpoint.site, checkpoint.site_out, _metadata(checkpoint))


def folded_b_dec(W_enc: Tensor, b_dec: Tensor, b_enc: Tensor) -> Tensor:
    """(x - b_dec) @ W_enc + b_enc = x @ W_enc + (b_enc - b_dec @ W_enc), in fp64 from the weights as loaded.

    W_enc [d_in, d_sae], b_dec [d_in], b_enc fp64 [d_sae] → the bias in W_enc's dtype.
    """
    subtracted, bias = b_dec.double(), b_enc.clone()
    step = max(1, BLOCK_BYTES // (8 * W_enc.shape[0]))
    for start in range(0, W_enc.shape[1], step):
        bias[start : start + step] -= subtracted @ W_enc[:, start : start + step].double()
    return bias.to(W_enc.dtype)


def _metadata(checkpoint: Checkpoint) -> SAEMetadata:
    extra: dict[str, Any] = {"figures": checkpoint.figures} if checkpoint.figures else {}
    if not checkpoint.kind_known:
        extra["kind_assumed"] = True
    return SAEMetadata(checkpoint.model_name, checkpoint.extra.get("neuronpedia_id"), extra)


def _multi_site(checkpoint: Checkpoint) -> MultiSiteConfig:
    sites, outs = zip(*((layer.site, layer.site_out) for layer in checkpoint.layers), strict=True)
    return MultiSiteConfig(
        checkpoint.d_in, checkpoint.d_sae, len(checkpoint.layers), sites, outs, _metadata(checkpoint)
    )


def _crosscoder(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Crosscoder:
    layers, d, d_sae = checkpoint.layers, checkpoint.d_in, checkpoint.d_sae
    n = len(layers)
    W_enc = torch.empty(d_sae, n * d, dtype=dtype, device=device).t()
    W_dec = torch.empty(d_sae, n * d, dtype=dtype, device=device)
    b_dec = torch.empty(n * d, dtype=dtype, device=device)
    for i, layer in enumerate(layers):
        at = slice(i * d, (i + 1) * d)
        if layer.d_sae != d_sae or layer.arrays["W_dec"].shape != (d_sae, d):
            raise CheckpointError(f"{layer.path}: w_dec: expected {(d_sae, d)}, got {layer.arrays['W_dec'].shape}")
        layer.arrays["W_enc"].read_into(W_enc[at])
        layer.arrays["W_dec"].read_into(W_dec[:, at])
        layer.arrays["b_dec"].read_into(b_dec[at])
    vectors = {name: layers[0].arrays[name].read(device, dtype) for name in ("b_enc", "threshold")}
    cfg = SAEConfig(n * d, d_sae, n * d, None, None, _metadata(checkpoint))
    sites = [layer.site for layer in layers]
    return _made(
        checkpoint, Crosscoder, W_enc=W_enc, W_dec=W_dec, b_dec=b_dec, **vectors, cfg=cfg, sites=sites, n_layers=n
    )


def _told(checkpoint: Checkpoint, kind: str | None, site: Site | None, site_out: Site | None) -> Checkpoint:
    """The checkpoint with the caller's information added; ValueError if the checkpoint says something else."""
    told: dict[str, Any] = {}
    if kind is not None and kind != checkpoint.kind:
        if checkpoint.kind_known:
            raise ValueError(f"kind: the checkpoint is of kind {checkpoint.kind!r}, got {kind!r}")
        told["kind"] = kind
    for name, value in (("site", site), ("site_out", site_out)):
        known = getattr(checkpoint, name)
        if value is not None and known not in (None, value):
            raise ValueError(f"{name}: the checkpoint says {known}, got {value}")
        if value is not None:
            told[name] = value
    return replace(checkpoint, kind_known=checkpoint.kind_known or kind is not None, **told)


def _scaled(checkpoint: Checkpoint, scale: float) -> Checkpoint:
    """Fold in SAELens's norm_scaling_factor: W_enc · s, W_dec / s, b_dec / s."""
    arrays = dict(checkpoint.arrays)
    arrays["W_enc"] = arrays["W_enc"].scaled(scale)
    arrays |= {name: arrays[name].scaled(1 / scale) for name in ("W_dec", "b_dec")}
    return replace(checkpoint, arrays=arrays, normalisation="none")


@contextmanager
def _bar(checkpoint: Checkpoint, progress: bool | None) -> Iterator[None]:
    """Show a progress bar over the bytes read, by wrapping the streams of the entries."""
    with progress_bar(checkpoint.nbytes, checkpoint.path.name, progress) as update:
        for part in (checkpoint, *checkpoint.layers):
            part.arrays = {name: replace(entry, seen=update) for name, entry in part.arrays.items()}
        yield
