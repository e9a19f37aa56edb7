"""`from_pretrained`: a checkpoint of any known format, local or on Hugging Face, as the right module."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import torch

from gemmascope_fast.checkpoints import gemma_scope_1, gemma_scope_2, native, saelens
from gemmascope_fast.checkpoints.base import Checkpoint
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.sae import JumpReLUSAE, JumpReLUSkipTranscoder, JumpReLUTranscoder, SAEConfig, SAEMetadata

_READERS = {
    "params.npz": gemma_scope_1.read,
    "params.safetensors": gemma_scope_2.read,
    "sae_weights.safetensors": saelens.read,
}
_CLASSES = {c.kind: c for c in (JumpReLUSAE, JumpReLUTranscoder, JumpReLUSkipTranscoder)}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def from_pretrained(
    repo_or_folder: str | Path,
    sae_id: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    revision: str | None = None,
) -> JumpReLUSAE:
    """The SAE or transcoder in a file, a folder, or sub-folder `sae_id` of a folder or Hugging Face repository.

    Raises CheckpointError for a checkpoint that is damaged, contradicts itself or is not there, ValueError for
    another dtype than float32, bfloat16 and float16.
    """
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if wanted not in _DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
    return build(open_checkpoint(_locate(repo_or_folder, sae_id, revision)), torch.device(device), wanted)


class SAE:
    """`SAE.from_pretrained(…)`: a checkpoint of any kind as the module of its kind."""

    from_pretrained = staticmethod(from_pretrained)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a file, or in a folder holding exactly one; its weights are not read yet."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in _READERS if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise CheckpointError(f"{path}: expected one checkpoint, found {[p.name for p in found]}")
        path = found[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    return _READERS.get(path.name, native.read)(path)


def build(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> JumpReLUSAE:
    """Read the weights block by block, cast on the way, into the module of the checkpoint's kind."""
    arrays = checkpoint.arrays
    (d_in, d_sae), d_out = arrays["W_enc"].shape, arrays["W_dec"].shape[1]
    extra = {"figures": checkpoint.figures} if checkpoint.figures else {}
    metadata = SAEMetadata(checkpoint.model_name, extra=extra)
    cfg = SAEConfig(d_in, d_sae, d_out, checkpoint.site, checkpoint.site_out, metadata)
    weights = {name: entry.read(device, dtype, transposed=name == "W_enc") for name, entry in arrays.items()}
    return _CLASSES[checkpoint.kind](cfg=cfg, **weights)


def _locate(repo_or_folder: str | Path, sae_id: str | None, revision: str | None) -> Path:
    if sae_id is not None and (PurePosixPath(sae_id).is_absolute() or ".." in PurePosixPath(sae_id).parts):
        raise CheckpointError(f"sae_id: expected a path inside {repo_or_folder}, got {sae_id!r}")
    local = Path(repo_or_folder)
    if local.exists():
        return local / sae_id if sae_id else local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [f"{sae_id}/*"] if sae_id else None
        folder = Path(snapshot_download(str(repo_or_folder), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{repo_or_folder}: neither a local path nor a repository in reach: {error}") from error
    return folder / sae_id if sae_id else folder
