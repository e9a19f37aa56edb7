"""Forged files: well-formed, with the digests and checksums of their contents, but not written by any library.

Each one depends only on its random numbers, as in fuzz_files.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fuzz_files import any_json, mutate_json, safetensors, torch_file

from gemmascope_fast.checkpoints import packed
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.dev.testing import make_activations, make_sae
from gemmascope_fast.sae.screen import Screen, weights_digest

Files = dict[str, bytes]
SCREEN = ("code", "code2", "table", "centre", "directions", "scales")
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, 254.0, 255.0, 256.0, 1e30, -1e30, 3.4e38, -3.4e38, 1e-45, 2.0**-60, 2.0**31)
NUMBERS += (float("inf"), float("-inf"), float("nan"), 2.0**20, 2.0**21, 1e9)
INTEGERS = (0, 1, -1, 2, 63, 64, 65, -64, 70, 127, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 10**30)
TIME = 1_700_000_000_000_000_000  # of the checkpoint that a packed file belongs to, in ns
D_PACKED, F_PACKED = 6, 70  # two panels of 64


# ---- healthy files that other files' names and times belong to -----------------------------------------------


def screened(seed: int = 0) -> list[Files]:
    """SAEs with their screen: plain, and with directions and scales."""
    made = []
    for directions in (0, 2):
        with tempfile.TemporaryDirectory() as folder:
            sae = make_sae(seed, 64, 70, 3).requires_grad_(False)
            sae.prepare(sample=make_activations(1, 50, 64), directions=directions)
            save(sae, Path(folder) / "sae.safetensors", screen=True)
            made.append({"sae.safetensors": (Path(folder) / "sae.safetensors").read_bytes()})
    return made


def small_packed_files(put: Callable[[object, str, object], None] = setattr) -> None:
    """From here on panels have 64 features and headers 8 KB, not a megabyte."""
    put(packed, "PANEL_BYTES", 4 * D_PACKED * 64)
    put(packed, "HEADER", 1 << 13)


def packed_pair() -> list[Files]:
    """A checkpoint and its packed file, after `small_packed_files`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sae.safetensors"
        save(make_sae(0, D_PACKED, F_PACKED, 3).requires_grad_(False), path)
        os.utime(path, ns=(TIME, TIME))
        from_pretrained(path, rows="mmap")
        return [{p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}]


# ---- parts of files ------------------------------------------------------------------------------------------


def parts(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a healthy safetensors file."""
    from safetensors.numpy import load

    (length,) = struct.unpack("<Q", data[:8])
    return load(data), json.loads(data[8 : 8 + length]).get("__metadata__", {})


def lie(array: np.ndarray, draw: random.Random) -> np.ndarray:
    """Another array: values, shape or dtype."""
    how = draw.randrange(9)
    if how < 3 and array.size and array.dtype.kind == "f":
        out = array.copy()
        for _ in range(draw.choice((1, 1, 4))):
            out.reshape(-1)[draw.randrange(out.size) :: draw.choice((1, 7, out.size))] = draw.choice(NUMBERS)
        return out
    if how < 3 and array.size:
        info, out = np.iinfo(array.dtype), array.copy()
        out.reshape(-1)[draw.randrange(out.size)] = min(max(draw.choice(INTEGERS), info.min), info.max)
        return out
    if how == 3:
        return np.ascontiguousarray(array.T)
    if how == 4:
        return array.astype(draw.choice(("f2", "f4", "f8", "i1", "i4", "i8", "u1")))
    if how == 5 and array.ndim:
        return np.ascontiguousarray(array[draw.randrange(2) : array.shape[0] - draw.randrange(2)])
    if how == 6 and array.ndim:
        return np.concatenate([array, array[: draw.choice((0, 1, array.shape[0]))]])
    if how == 7:
        return array.reshape(draw.choice(((-1,), (1, *array.shape), (*array.shape, 1))))
    return np.zeros((draw.choice((0, 1, 2, 3000)), *array.shape[1:]), array.dtype)


def lie_among(arrays: dict[str, np.ndarray], draw: random.Random) -> None:
    """One array, or two, changed, lost or there under another name too."""
    for _ in range(draw.choice((1, 1, 2))):
        if not arrays:
            return
        name, how = draw.choice(sorted(arrays)), draw.randrange(12)
        if how == 0:
            del arrays[name]
        elif how == 1:
            arrays[draw.choice((*sorted(arrays), "x", "W_skip", "threshold"))] = arrays[name]
        else:
            with np.errstate(all="ignore"):
                arrays[name] = lie(arrays[name], draw)


def lie_about(about: dict[str, object], draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 2))):
        about[draw.choice(sorted(about))] = draw.choice((draw.choice(INTEGERS), any_json(draw)))


# ---- forgers --------------------------------------------------------------------------------------------------


def forge_screened(files: Files, draw: random.Random) -> Files:
    arrays, metadata = parts(files["sae.safetensors"])
    about = json.loads(metadata["gemmascope_fast"])
    screen = {n.removeprefix("screen."): arrays.pop(n) for n in list(arrays) if n.startswith("screen.")}
    for _ in range(draw.choice((1, 1, 2))):
        how = draw.randrange(8)
        if how < 4 and "table" in screen and screen["table"].ndim == 2 and screen["table"].dtype == np.float32:
            table = screen["table"] = screen["table"].copy()
            if table.size:
                row, first = draw.randrange(table.shape[0]), draw.randrange(table.shape[1])
                table[row, first : first + draw.choice((1, 16, 1000))] = draw.choice(NUMBERS)
        elif how < 6:
            lie_among(screen, draw)
        elif how == 6:
            lie_among(arrays, draw)
        else:
            lie_about(about, draw)
    tensors = {n: torch.from_numpy(np.atleast_1d(screen[n])) for n in SCREEN if n in screen}
    about["screen_data"] = Screen(*(tensors.get(name) for name in SCREEN)).digest()
    weights = [arrays.get(name) for name in ("W_enc", "b_enc", "threshold")]
    if all(w is not None and w.ndim for w in weights):
        with contextlib.suppress(RuntimeError):  # of more than two dimensions: refused for that
            about["screen"] = weights_digest(*(torch.from_numpy(np.ascontiguousarray(w)) for w in weights))
    held = arrays | {f"screen.{name}": array for name, array in screen.items()}
    return {"sae.safetensors": safetensors(held, {"gemmascope_fast": json.dumps(about)})}


def forge_packed(files: Files, draw: random.Random) -> Files:
    name = "sae.safetensors.packed"
    data = bytearray(files[name])
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"][packed.KEY])
    layout = packed.Layout(D_PACKED, F_PACKED, D_PACKED, 64, about["decoder"])
    for _ in range(draw.choice((1, 1, 2, 3))):
        if draw.random() < 0.4:
            lie_about(about, draw)
            continue
        array = draw.choice([n for n in layout.arrays() if n != packed.ROWS])
        dtype, shape, at = layout.arrays()[array]
        kind = np.dtype("f4") if dtype == torch.float32 else np.dtype("u1")
        values = np.frombuffer(data, kind, int(np.prod(shape)), at).copy().reshape(shape)
        rows = values.reshape(len(values) if array == packed.TABLE else 1, -1)
        row, first = draw.randrange(len(rows)), draw.randrange(rows.shape[1])
        value = draw.choice(NUMBERS) if kind == np.float32 else draw.randrange(256)
        rows[row, first : first + draw.choice((1, 16, 1000))] = value
        data[at : at + values.nbytes] = values.tobytes()
        if isinstance(about.get("checksums"), dict):
            tensor = torch.from_numpy(values)
            sums = [zlib.crc32(tensor[i].contiguous().numpy().tobytes()) for i in layout.pieces(array)]
            about["checksums"][array] = sums
    header["__metadata__"][packed.KEY] = json.dumps(about)
    text = json.dumps(header).encode()
    if len(text) <= length:
        data[8 : 8 + length] = text.ljust(length)
    return files | {name: bytes(data)}


def forge_latents(files: Files, draw: random.Random) -> Files:
    arrays, metadata = parts(files["latents.safetensors"])
    lie_among(arrays, draw)
    if draw.random() < 0.6:
        sizes = [draw.choice((*INTEGERS, 3, 10, 3, 10)) for _ in range(draw.choice((1, 2, 2, 2, 3, 9)))]
        metadata["shape"] = draw.choice((",", ", ", "x")).join(map(str, sizes)) if draw.random() < 0.9 else ""
    return {"latents.safetensors": safetensors(arrays, metadata)}


def forge_arrays(files: Files, draw: random.Random) -> Files:
    """Of any other format: other arrays, another config, each of them well-formed."""
    files = dict(files)
    name = draw.choice(sorted(files))
    if name.endswith(".json"):
        files[name] = mutate_json(files[name], draw)
    elif name.endswith(".npz"):
        with np.load(io.BytesIO(files[name])) as held:
            arrays = {n: held[n] for n in held.files}
        lie_among(arrays, draw)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        files[name] = buffer.getvalue()
    elif name.endswith(".pt"):
        held = torch.load(io.BytesIO(files[name]), weights_only=True)
        arrays = {n: t.numpy() for n, t in held.items() if isinstance(t, torch.Tensor)}
        values = {n: v for n, v in held.items() if n not in arrays}
        if values and draw.random() < 0.3:
            lie_about(values, draw)
        lie_among(arrays, draw)
        files[name] = torch_file(arrays, **values)
    elif not name.endswith(".yaml"):
        arrays, metadata = parts(files[name])
        lie_among(arrays, draw)
        if "gemmascope_fast" in metadata and draw.random() < 0.4:
            about = json.loads(metadata["gemmascope_fast"])
            lie_about(about, draw)
            metadata["gemmascope_fast"] = json.dumps(about)
        files[name] = safetensors(arrays, metadata)
    return files


FORGERS: dict[str, Callable[[Files, random.Random], Files]] = {
    "screened": forge_screened,
    "packed": forge_packed,
    "latents": forge_latents,
}


def forged(kind: str, files: Files, draw: random.Random) -> Files:
    """The folder of a format with something in it that is not so."""
    return FORGERS.get(kind, forge_arrays)(files, draw)
