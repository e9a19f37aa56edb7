"""Finds a checkpoint: in a local folder, a Hugging Face repository, or by SAELens's name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gemmascope_fast.checkpoints import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope_1,
    gemma_scope_2,
    goodfire,
    llama_scope,
    names,
    native,
    openai,
    qwen_scope,
    saelens,
    sparsify,
)
from gemmascope_fast.checkpoints.bundled import SAE_FILE
from gemmascope_fast.checkpoints.hub import first_line, no_answer
from gemmascope_fast.errors import CheckpointError

# file name → format
FORMATS = {
    gemma_scope_1.FILE: "gemma-scope-1",
    gemma_scope_2.FILE: "gemma-scope-2",
    saelens.FILE: "saelens",
    native.FILE: "native",
    dictionary_learning.FILE: dictionary_learning.FORMAT,
}
LLAMA_SCOPE = f"checkpoints/{llama_scope.FILE}"  # within the folder of one SAE
SUFFIXES = (".safetensors", ".pt", ".pth")  # of a file that is a checkpoint by itself
# what the name of such a file says of its format
_NAMED = (
    (qwen_scope.NAME, qwen_scope.FORMAT),
    (goodfire.NAME, goodfire.FORMAT),
    (circuit_tracer.NAME, circuit_tracer.FORMAT),
)
_LAYER_FILE = re.compile(r"params_layer_\d+\.safetensors")
_BESIDE = ("config.json", "cfg.json", "hparams.json", llama_scope.CONFIG)


@dataclass(frozen=True)
class Found:
    """A local file or folder, and what is known from the name it was requested by."""

    path: Path
    named: names.Named | None = None


def locate(
    source: str | Path, sae_id: str | None = None, revision: str | None = None, force_download: bool = False
) -> Found:
    """The local path of a checkpoint, downloaded if necessary.  CheckpointError if it does not exist.

    The text "demo" means the bundled SAE, as on the command line. A folder of that name is Path("demo") or "./demo".
    """
    if source == "demo":
        if sae_id is not None:
            raise CheckpointError(f"sae_id: 'demo' is a single SAE, so no sae_id is expected, got {sae_id!r}")
        return Found(SAE_FILE)
    if sae_id is not None:
        parts = PurePosixPath(sae_id).parts
        if not parts or PurePosixPath(sae_id).is_absolute() or ".." in parts or set(sae_id) & set("*?[\\"):
            raise CheckpointError(f"sae_id: expected a path inside {source}, got {sae_id!r}")
    local = Path(source)
    if local.exists():
        return Found(inside(local, sae_id))
    named = names.lookup(str(source), sae_id)
    if named is not None:
        return Found(_download(named.repo, named.path, revision, force_download), named)
    return Found(_download(str(source), sae_id, revision, force_download))


def inside(folder: Path, sae_id: str | None) -> Path:
    """folder / sae_id.  CheckpointError if links lead outside (within a Hugging Face cache they may)."""
    path = folder / sae_id if sae_id else folder
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    check_inside(path, folder)
    return path


def check_inside(path: Path, folder: Path) -> None:
    """CheckpointError if `path` is outside `folder` after following links.

    The Hugging Face cache links snapshots/<revision>/… to blobs/… next to it; these stay within the repository.
    """
    root = folder.resolve()
    for parent in (root, *root.parents):
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            root = parent.parent
            break
    if not path.resolve().is_relative_to(root if root.is_dir() else root.parent):
        raise CheckpointError(f"{path}: links to {path.resolve()}, outside of {folder}")


def checkpoints_among(paths: Iterable[str]) -> dict[str, str]:
    """Checkpoint paths (files, or folders of params_layer_*) in a listing, in order → their format."""
    found: dict[str, str] = {}
    listing = sorted(paths)
    there = set(listing)
    for text in listing:
        path = PurePosixPath(text)
        named = next((kind for pattern, kind in _NAMED if pattern.fullmatch(path.name)), None)
        if _LAYER_FILE.fullmatch(path.name):
            found[path.parent.as_posix()] = "gemma-scope-2"
        elif path.as_posix().endswith(LLAMA_SCOPE):
            found[path.parent.parent.as_posix()] = llama_scope.FORMAT
        elif path.name in FORMATS:
            found[text] = _by_config(path, there) or FORMATS[path.name]
        elif named is not None:
            found[text] = named
        elif path.suffix in SUFFIXES and path.parent.name == "autoencoders":
            found[text] = openai.FORMAT
        elif path.suffix in SUFFIXES and len(path.parts) == 1:
            found[text] = "safetensors" if path.suffix == ".safetensors" else "torch.save"
    return found


def _by_config(path: PurePosixPath, there: Collection[str]) -> str | None:
    """The format of a file whose name two formats share, told by the config beside it."""
    has = {name: (path.parent / name).as_posix() in there for name in (sparsify.CONFIG, llama_scope.R1_CONFIG)}
    if path.name == sparsify.FILE and has[sparsify.CONFIG]:
        return sparsify.FORMAT
    if path.name == llama_scope.R1_FILE and has[llama_scope.R1_CONFIG] and not has[sparsify.CONFIG]:
        return llama_scope.FORMAT
    return None


def id_of(path: str) -> str:
    """What `sae_id` takes: the folder of a checkpoint, or the file where it lies at the top or beside others."""
    at = PurePosixPath(path)
    return at.parent.as_posix() if at.name in FORMATS and at.parent != PurePosixPath(".") else at.as_posix()


def repository_files(repo: str, revision: str | None = None) -> list[str]:
    """All paths in a Hugging Face repository.  CheckpointError if it cannot be reached."""
    from huggingface_hub import HfApi

    silent = no_answer(repo, revision)
    if silent is not None:
        raise CheckpointError(
            f"{repo}: not a local path, and Hugging Face cannot be reached to list it ({silent}); a checkpoint that is"
            " in the cache loads by its sae_id"
        )
    with _in_reach(repo):
        return HfApi().list_repo_files(repo, revision=revision)


@contextmanager
def _in_reach(repo: str) -> Iterator[None]:
    """Turn errors of the hub's client into CheckpointError: no such repository or revision, no access, no network."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # without a network, requests raises OSErrors; httpx's errors share a base class with HfHubHTTPError
    client: Iterator[type[Exception]] = (
        c for c in HfHubHTTPError.__mro__ if issubclass(c, Exception) and c is not Exception
    )
    errors: tuple[type[Exception], ...] = (
        OSError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        *client,
    )
    try:
        yield
    except errors as error:
        raise CheckpointError(
            f"{repo}: not a local path, and not a repository that can be reached: {first_line(error)}"
        ) from error


def _download(repo: str, path: str | None, revision: str | None, force: bool = False) -> Path:
    """The checkpoint at `path` in a repository. It comes from the cache if that is certain to be the requested version,
    or if Hugging Face does not answer."""
    from huggingface_hub import snapshot_download

    if path is None:
        path = _only_checkpoint(repo, revision)
    at = PurePosixPath(path)
    patterns = _patterns(at)
    commit = re.fullmatch("[0-9a-f]{40}", revision or "")
    cached = _cached(repo, path, patterns, revision) if commit and not force else None
    if cached is not None:
        return cached
    silent = no_answer(repo, revision)
    if silent is not None:
        cached = None if force else _cached(repo, path, patterns, revision)
        if cached is None:
            raise CheckpointError(
                f"{repo}: {path}: not a local path, not in the cache, and Hugging Face cannot be reached ({silent})"
            )
        return cached
    with _in_reach(repo):
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, force_download=force))
    if not (root / path).exists():
        raise CheckpointError(f"{repo}: {path}: no such checkpoint; `gemmascope-fast ls {repo}` lists them")
    return root / path


def _patterns(at: PurePosixPath) -> list[str]:
    """What is fetched of a repository for the checkpoint at a path: the file, or what a folder of one can hold, and the
    configs beside it.  A path that ends in .pt may be either."""
    is_file = at.suffix in (".npz", *SUFFIXES)
    files = [at.name, *_BESIDE] if is_file else []
    patterns = [(at.parent / name).as_posix() for name in files]
    if not is_file or at.suffix == ".pt":
        within = (*FORMATS, "params_layer_*.safetensors", LLAMA_SCOPE, *_BESIDE)
        patterns += [(at / name).as_posix() for name in within]
    # sparsify's config of the whole training, and circuit-tracer's
    return [*patterns, *((at.parent / "config.json").as_posix(),) * (not is_file), circuit_tracer.CONFIG]


def _cached(repo: str, path: str, patterns: list[str], revision: str | None) -> Path | None:
    """The checkpoint in Hugging Face's cache, without network requests; None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with _in_reach(repo):
            root = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True))
    except CheckpointError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            return None
        raise
    return root / path if (root / path).exists() else None


def _only_checkpoint(repo: str, revision: str | None) -> str:
    """The checkpoint of a repository that has just one; a repository with many is not downloaded whole."""
    found = list(checkpoints_among(repository_files(repo, revision)))
    if len(found) == 1:
        return found[0]
    shown = ", ".join(id_of(path) for path in found[:3])
    raise CheckpointError(
        f"sae_id: {repo} has {len(found)} checkpoints; name one"
        + (f", such as {shown}; `gemmascope-fast ls {repo}` lists them" if found else ": none in a known format")
    )
