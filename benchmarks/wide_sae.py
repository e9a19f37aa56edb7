"""A wide SAE with its rows on disk: time to pack, memory, time to encode and decode, rows read.

    python benchmarks/wide_sae.py --d-sae 1048576 --d-in 2304 --dtype float32 --folder wide [--compare] [--l0 60]

Writes a synthetic checkpoint (params.safetensors, as in Gemma Scope 2) into the folder if it is missing, in panels of
features, with thresholds calibrated to about --l0 latents a token of `gemmascope_fast.dev.testing.make_activations`.
Packs it and opens it with rows="mmap".  Each number of tokens is encoded and decoded once with none of the rows in the
page cache, then in warm rounds.  --compare also loads the SAE into memory, after memory is measured, and compares
bytes.
One JSON object on stdout; bytes and milliseconds.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints import packed
from gemmascope_fast.checkpoints.loading import open_checkpoint
from gemmascope_fast.checkpoints.packed import checksum
from gemmascope_fast.dev.bench.machine import describe, memory, process_memory
from gemmascope_fast.dev.testing import activations_mean, leaning_rows, make_activations, same_bytes, standard_cut
from gemmascope_fast.files.results import write_json
from gemmascope_fast.files.write import atomic
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

PANEL = 16384  # features written at a time
TOKENS = (1, 16, 64)
WARM_ROUNDS = 5
DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16)}


# ---- the checkpoint -----------------------------------------------------------------------------------


def write_checkpoint(folder: Path, d: int, F: int, l0: float, dtype: str) -> None:
    """Write params.safetensors and config.json of a random SAE, with W_enc column by column as in checkpoints."""
    name, kept = DTYPES[dtype]
    shapes = {"w_enc": (d, F), "w_dec": (F, d), "b_enc": (F,), "threshold": (F,), "b_dec": (d,)}
    header: dict[str, Any] = {}
    at = 0
    for array, shape in shapes.items():
        size = kept.itemsize * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[array] = {"dtype": name, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = {array: 8 + len(text) + header[array]["data_offsets"][0] for array in shapes}
    free = shutil.disk_usage(folder).free
    if free < 2.5 * at:
        sys.exit(f"--folder: needs {2.5 * at:.0f} bytes for checkpoint and packed file, the disk has {free}")
    with atomic(folder / "params.safetensors") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)

        def put(array: str, index: int, values: Tensor) -> None:
            file.seek(begin[array] + index * kept.itemsize)
            file.write(values.to(kept).contiguous().view(torch.uint8).numpy().data)

        put("b_dec", 0, activations_mean(d))
        for first, rows, bias, threshold in panels(d, F, l0):
            for k, column in enumerate(rows.t()):
                put("w_enc", k * F + first, column)
            noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2_000_000 + first))
            put("w_dec", first * d, rows + 0.01 * noise)
            put("b_enc", first, bias)
            put("threshold", first, threshold)
    write_json(folder / "config.json", {"architecture": "jump_relu", "type": "sae", "width": F})


def panels(d: int, F: int, l0: float) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(first feature, rows [n, d], b_enc [n], threshold [n]); one threshold for all, found on the first panel."""
    mean, sample, held_out = activations_mean(d), make_activations(1, 128, d), make_activations(2, 256, d)
    cut = None
    for first in range(0, F, PANEL):
        generator = torch.Generator().manual_seed(1_000_000 + first)
        rows = leaning_rows(generator, min(PANEL, F - first), sample - mean)
        bias = -(rows @ mean)
        z = held_out @ rows.t() + bias
        scale = z.std(dim=0)
        cut = standard_cut(z, scale, l0 / F) if cut is None else cut
        yield first, rows, bias, cut * scale


# ---- what is measured ---------------------------------------------------------------------------------


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    return memory("Anonymous", "/proc/self/smaps_rollup")


@contextmanager
def watched(peaks: dict[str, int], name: str) -> Iterator[None]:
    """The maximum anonymous memory within the block, sampled every 50 ms and at its end."""
    over, seen = threading.Event(), [anonymous()]

    def watch() -> None:
        while not over.wait(0.05):
            seen.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        peaks[name] = max(*seen, anonymous())


def forget(sae: JumpReLUSAE) -> None:
    """Remove the mapped files from the page cache; an unedited mapping loses nothing."""
    for mapping in sae.rows.mappings:
        mapping.buffer.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(mapping.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = call()
    return 1e3 * (time.perf_counter() - start), out


def typical_tokens(sae: JumpReLUSAE) -> Tensor:
    """TOKENS[-1] tokens [T, d_in], those with about the median number of latents first."""
    x = make_activations(100, TOKENS[-1], sae.d_in)
    counts = sae.encode_sparse(x).crow_indices.diff()
    return x[(counts - counts.median()).abs().argsort(stable=True)]


def measure(sae: JumpReLUSAE, x: Tensor, peaks: dict[str, int]) -> dict[str, Any]:
    tokens = x.shape[0]
    forget(sae)
    with watched(peaks, f"encode and decode {tokens}"):
        cold_encode, latents = timed(lambda: sae.encode_sparse(x))
        cold_decode, out = timed(lambda: sae.decode(latents))
    encode = [timed(lambda: sae.encode_sparse(x))[0] for _ in range(WARM_ROUNDS)]
    decode = [timed(lambda: sae.decode(latents))[0] for _ in range(WARM_ROUNDS)]
    weights, screen = (sae.W_enc, sae.b_enc, sae.threshold), sae.screen_cache.screen
    stats = screen.call(x, *weights, mapped=True)[3].tolist()
    return {
        "tokens": tokens,
        "l0": latents.nnz / tokens,
        "rows_read_per_token": stats[1] / tokens,
        "cold_encode_ms": cold_encode,
        "cold_decode_ms": cold_decode,
        "encode_ms": statistics.median(encode),
        "decode_ms": statistics.median(decode),
        "crc": [checksum(t) for t in (latents.crow_indices, latents.col_indices, latents.values, out)],
    }


def compare(folder: Path, mapped: JumpReLUSAE, sample: Tensor) -> bool:
    """Whether latents and reconstructions equal those of the SAE in memory, byte for byte; AssertionError if not."""
    resident = gsf.SAE.from_pretrained(folder / "params.safetensors", progress=False).requires_grad_(False)
    for tokens in TOKENS:
        x = sample[:tokens]
        latents = mapped.encode_sparse(x)
        assert latents == resident.encode_sparse(x, screen=False), f"latents of {tokens} tokens differ"
        assert same_bytes(mapped.decode(latents), resident.decode(latents)), f"outputs of {tokens} tokens differ"
    return True


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.folder.mkdir(parents=True, exist_ok=True)
    path, peaks = args.folder / "params.safetensors", {}
    if not path.exists():
        write_checkpoint(args.folder, args.d_in, args.d_sae, args.l0, args.dtype)
    checkpoint = open_checkpoint(path)
    if (checkpoint.d_in, checkpoint.d_sae) != (args.d_in, args.d_sae):
        sys.exit(f"--folder: {path} is {checkpoint.d_in} × {checkpoint.d_sae}, not {args.d_in} × {args.d_sae}")
    target, known = path.with_name(path.name + ".packed"), path.with_name(path.name + ".packed").exists()
    with watched(peaks, "pack"):
        pack_ms, _ = timed(lambda: packed.pack(checkpoint, target, progress=None))
    with watched(peaks, "open"):
        open_ms, sae = timed(lambda: gsf.SAE.from_pretrained(path, rows="mmap"))
    sample = typical_tokens(sae)
    runs = [measure(sae, sample[:tokens], peaks) for tokens in TOKENS]
    report: dict[str, Any] = {
        "machine": describe(torch.get_num_threads()),
        "d_in": args.d_in,
        "d_sae": args.d_sae,
        "dtype": args.dtype,
        "pack_s": None if known else pack_ms / 1e3,  # None: it existed
        "open_s": open_ms / 1e3,
        "files": {"checkpoint": path.stat().st_size, "packed": target.stat().st_size},
        "memory": {
            "anonymous_peak": max(peaks.values()),
            "anonymous_peaks": peaks,
            "high_water": process_memory("VmHWM"),
        },
        "resident": sae.packed_bytes(),
        "runs": runs,
    }
    if args.compare:
        report["equal"] = compare(args.folder, sae, sample)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=131_072)
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="dtype of the checkpoint's arrays")
    parser.add_argument("--l0", type=float, default=60, help="latents a token (default: %(default)s)")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the checkpoint; written if missing")
    parser.add_argument("--compare", action="store_true", help="also load the SAE into memory and compare bytes")
    args = parser.parse_args()
    with torch.inference_mode():
        print(json.dumps(run(args), indent=1))


if __name__ == "__main__":
    main()
