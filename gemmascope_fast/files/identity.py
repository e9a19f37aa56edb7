"""Digests of what a job read: a model's weights and configuration, an SAE, a tokenizer, a text.

A job stores them in its folder (`claim`, `check`), so that using the folder with another model, SAE or text is an
error that says what differs.  A digest covers everything that was read, not only a name, a shape or a sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.files.atomic import make_folder
from gemmascope_fast.files.results import write_json

FILE = "identity.json"
BLOCK = 1 << 26  # bytes hashed at a time
SIZE = 32  # hexadecimal digits of a digest
# configuration fields that do not affect activations, or depend on where and by what it was loaded
_BESIDE = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict",
    "output_hidden_states", "output_attentions", "_attn_implementation", "_commit_hash",
}  # fmt: skip


def of_module(module: nn.Module) -> str:
    """Digest of a model or an SAE: class, configuration, and the name, type, shape and bytes of every parameter and
    stored buffer.  The same on every device.  ValueError if weights are not in memory.

    It takes about a second per gigabyte and thread.  It is not cached, because some edits of weights leave no trace.
    """
    state = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    once: dict[Any, Any] = {}
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        found = []
        for name, tensor in sorted(state.items()):
            # tied weights are hashed only once
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if _plain(tensor) else name
            if key not in once:
                once[key] = pool.submit(of_tensor, tensor.detach(), name)
            found.append((name, once[key]))
        weights = [(name, future.result()) for name, future in found]
    settings = [(name, _settings(part)) for name, part in module.named_modules() if _settings(part)]
    return of_json([type(module).__name__, weights, settings, _config(module)])


def of_tensor(tensor: Tensor, name: str = "tensor") -> str:
    """Digest of a tensor's type, shape and bytes, on any device."""
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass: hash the tensors inside it
        parts, context = tensor.__tensor_flatten__()
        held = [(part, of_tensor(getattr(tensor, part), f"{name}.{part}")) for part in parts]
        return of_json([type(tensor).__name__, held, str(context)])
    if tensor.is_meta:
        raise ValueError(f"{name}: expected weights in memory, got a tensor on the meta device")
    tensor, order = tensor.detach(), ""
    if tensor.dim() == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous():
        tensor, order = tensor.t(), "columns of "  # read in the order in which it is stored
    digest = hashlib.sha256(f"{order}{tensor.dtype} {tuple(tensor.shape)}".encode())
    for block in _blocks(tensor):
        digest.update(block.cpu().numpy().data)
    return digest.hexdigest()[:SIZE]


def of_tokenizer(tokenizer: Any) -> str:
    """Digest of what determines a transformers tokenizer's results: vocabulary, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
        rules: Any = [type(tokenizer).__name__, sorted(vocabulary.items())]
    else:
        rules = json.loads(backend.to_str())
        # settings of the last call, not of the tokenizer
        rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return of_json([rules, special])


def of_text(text: str) -> str:
    """Digest of a text in memory."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:SIZE]


def of_file(path: str | Path) -> str:
    """Digest of a file's bytes, equal to `of_text` of its text; cached until its size, times or inode change."""
    stat = Path(path).stat()
    return _of_file(str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@lru_cache(maxsize=256)
def _of_file(path: str, *_stamp: int) -> str:
    return digest_of(path)[:SIZE]


def digest_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def of_json(value: Any) -> str:
    """Digest of a value as JSON; parts that JSON cannot express are converted to text."""
    return of_text(json.dumps(value, sort_keys=True, default=str))


def check(
    where: str | Path, was: Mapping[str, Any], now: Mapping[str, Any], error: type[Exception] = ValueError
) -> None:
    """Raise `error` unless a file or folder belongs to what it is to be used for; the message says what differs."""
    was, now = (json.loads(json.dumps(dict(each))) for each in (was, now))
    differ = [key for key in {**now, **was} if was.get(key) != now.get(key)]
    if differ:
        what = ", ".join(f"{key} {was.get(key)!r:.80} (now {now.get(key)!r:.80})" for key in differ)
        names = [key.removesuffix("_fingerprint") for key in differ]
        others = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        raise error(f"{where}: it was started with another {others}: {what}; use another path, or delete it")


def claim(folder: Path, about: Mapping[str, Any], name: str = "--work") -> None:
    """Record in a folder what it belongs to, if nothing is recorded yet.  ValueError if it belongs to another."""
    path = folder / FILE
    if path.exists():
        try:
            was = dict(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: expected JSON that says what the folder is of: {error}") from error
        check(f"{name} {folder}", was, about)
        return
    make_folder(folder)
    write_json(path, dict(about))


def _plain(tensor: Tensor) -> bool:
    return not hasattr(tensor, "__tensor_flatten__") and not tensor.is_meta


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes as uint8, without copying everything."""
    if not tensor.numel():
        return
    if tensor.is_contiguous():
        flat = tensor.reshape(-1).view(torch.uint8)
        yield from flat.split(BLOCK)
        return
    for row in tensor:
        yield row.contiguous().reshape(-1).view(torch.uint8)


def _settings(module: nn.Module) -> dict[str, Any]:
    """Settings of a module of this package besides its tensors: k, widths, slicings."""
    if not type(module).__module__.startswith("gemmascope_fast."):
        return {}
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
    return {k: v for k, v in plain.items() if not k.startswith("_") and k != "training"}


def _config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    given: dict[str, Any] = getattr(config, "to_diff_dict", getattr(config, "to_dict", dict))()
    return _without(given)


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without(v) for k, v in value.items() if k not in _BESIDE}
    return [_without(v) for v in value] if isinstance(value, (list, tuple)) else value
