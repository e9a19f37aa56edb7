"""Exact encode compared with other implementations: each ratio in one process, interleaved, verified before timing.

    python benchmarks/bench_exact.py [--cases 2304x16384,real] [--tokens 1,16,256] [--json exact.json]

Cases: Gemma Scope's shapes with calibrated synthetic weights and activations (gemmascope_fast.dev.testing: the
spectrum, the mean and the massive dimension of Gemma 3 270M's layer 12; L0 about 76 to 110), and `real`: the bundled
SAE on Gemma 3 270M's own activations of a text.  For few tokens every implementation cycles through enough copies of
its weights to exceed four times the last-level cache.  Ratios are medians of paired rounds.

Next to each ratio to eager fp32 is the largest that an int8 pass could reach in this run: eager's time divided by the
time to read the codes once, or of their integer products, whichever is longer, at the measured rates of the roof.
If int8 is only four times as fast as fp32, as on Zen 4, an exact result cannot be eight times as fast as eager for
many tokens.  If eager reads its weights at the roof's bandwidth, one token cannot be five times as fast: four bytes
per weight against one. Shares of the roof are for the encode called alone, repeatedly over the same copies.  The share
of int8 counts one product per weight and token, even if both digits of the activations are multiplied.

The synthetic activations are easier than real ones: with one digit of the activations 0.3 % of pairs are left that do
not fire, and 1.5 to 1.7 % for Gemma 3 270M's layer 12 (`real`; with two digits and one token 0.07 and 0.54 %; 3 to 6 %
before the screen balanced dimensions).

`real` gains less from 64 tokens on than Gemma Scope's shapes: 1.5 % of its pairs fire, three times the share of an SAE
of 16,384, and as many are false. Each is a dot of 640 in fp32 from the last-level cache, of a row and a token that no
tile shares.  In an encode of 256 tokens on Zen 5, half of the time is the products with their sums and three tenths is
those pairs (sampling profile; int8_share 0.31 in exact-real-zen5.json).  Eager has an encoder of 10 MB that stays in
the cache, so it does not wait for memory either.

Compared with bf16, when arithmetic is the limit, an int8 pass gains at most about a factor of two: VNNI multiplies
twice as many pairs per instruction as vdpbf16ps.  From 64 tokens on, ours reaches six tenths of the int8 peak, and the
exact result also needs the full-precision rows of what fires, at 64 tokens of 2304 × 16,384 nearly as many bytes as
codes.  So the whole SAE takes 1.8 and 1.9 times less there at 64 and 256 tokens than the best peer (bf16 linear,
embedding_bag), 2.0 to 2.5 at others (exact-2304x16384-zen5.json).  Tried without benefit: prefetching rows of
candidates while other features are multiplied, prefetching rows and tokens of the next pairs during exact products,
the second look if fewer than half of the candidates are false.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import CASES, FEW_TOKENS, copies, embedding_bag_decode
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import backends
from gemmascope_fast.dev import roof
from gemmascope_fast.dev.bench import peers
from gemmascope_fast.dev.bench.machine import describe
from gemmascope_fast.dev.bench.timing import interleave, paired, percentiles_ms
from gemmascope_fast.dev.testing import compare_support
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

SECONDS = 1.5  # approximate time for a set of implementations


# ---- what is compared ---------------------------------------------------------------------------------


def on_avx512(call: Callable[[], Any]) -> Any:
    with backends.forced_isa("avx512"):
        return call()


class Rotated:
    """Weights in the fastest layout for each implementation, with as many copies as needed for `tokens`; each call of
    `sae`, `fp32` and `bf16` returns the next copy."""

    def __init__(self, sae: JumpReLUSAE, tokens: int) -> None:
        # two copies for many tokens: otherwise a decode would find in cache the rows that its peer had just read
        self.sae = itertools.cycle(copies(sae, 2 if tokens > FEW_TOKENS else None)).__next__
        dense = copies(sae, 1 if tokens > FEW_TOKENS else None, bytes_read=4, prepare=False)
        self.fp32 = itertools.cycle([peers.Dense.of(s) for s in dense]).__next__
        self.bf16 = itertools.cycle(copies(sae, len(dense), torch.bfloat16, prepare=False)).__next__


def real_case() -> tuple[JumpReLUSAE, Tensor]:
    """The bundled SAE and layer-12 activations of a standard-library text."""
    from pydoc_data import topics

    model, tokenizer, sae, _layer = gsf.load_demo()
    text = "\n".join(topics.topics.values())[-60_000:]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : 5 * 256]
    rows = []
    hook = model.model.layers[12].register_forward_hook(
        lambda _m, _i, out: rows.append((out[0] if isinstance(out, tuple) else out).float()[0, 1:])
    )
    with torch.no_grad():
        for part in ids.split(256, 1):
            model(part)
    hook.remove()
    return sae.float().requires_grad_(False), torch.cat(rows)[:1024].contiguous()


# ---- the measurements ---------------------------------------------------------------------------------


def timed(row: dict[str, Any], what: str, calls: dict[str, Callable[[], Any]]) -> None:
    """Medians in ms, and how many times slower than ours each is, paired round by round."""
    times = interleave(calls, SECONDS)
    row[f"{what}_ms"] = {name: percentiles_ms(found)[0] for name, found in times.items()}
    row[f"{what}_vs"] = {name: paired(found, times["ours"]).median for name, found in times.items() if name != "ours"}


def measure(case: str, sae: JumpReLUSAE, x: Tensor, roofs: roof.Roof, chosen: set[str]) -> dict[str, Any]:
    T, F = x.shape[0], sae.d_sae
    check = compare_support(sae.encode_sparse(x, screen=True), x[:256], sae) if T <= 256 else None
    assert check is None or check.equal, check
    assert sae.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)
    weights, xb = Rotated(sae, T), x.bfloat16()
    screen = sae.screen_cache.screen
    stats = screen.call(x, sae.W_enc, sae.b_enc, sae.threshold)[3].tolist()
    latents = sae.encode_sparse(x)
    row: dict[str, Any] = {"case": case, "T": T, "d_in": sae.d_in, "d_sae": F, "l0": latents.nnz / T}
    row["false_after_digit_1"] = (stats[0] - latents.nnz) / (T * F)
    row["false_before_fp32"] = (stats[1] - latents.nnz) / (T * F)

    encoders: dict[str, Callable[[], Any]] = {
        "ours": lambda: weights.sae().encode_sparse(x),
        "full": lambda: weights.sae().encode_sparse(x, screen=False),
        "eager fp32": lambda: peers.eager_encode(weights.fp32(), x),
        "eager bf16": lambda: peers.eager_encode(weights.bf16(), xb),
    }
    if backends.isa() == "amx":
        encoders["ours on AVX-512"] = lambda: on_avx512(lambda: weights.sae().encode_sparse(x))
    timed(row, "encode", encoders)

    whole: dict[str, Callable[[], Any]] = {
        "ours": lambda: weights.sae()(x),
        "eager fp32": lambda: peers.eager_sae(weights.fp32(), x),
        "eager bf16": lambda: peers.eager_sae(weights.bf16(), xb),
        "bf16 linear + embedding_bag": lambda: peers.bag_sae(weights.bf16(), xb),
    }
    if "compile" in chosen:
        compiled = peers.compiled_sae()
        whole["torch.compile bf16"] = lambda: compiled(weights.bf16(), xb)
        whole["torch.compile fp32"] = lambda: compiled(weights.fp32(), x)
    timed(row, "sae", whole)

    # use alternating copies: the second to read the same rows would find them in cache
    decoders: dict[str, Callable[[], Any]] = {
        "ours": lambda: weights.sae().decode(latents),
        "embedding_bag": lambda: embedding_bag_decode(weights.sae(), latents),
    }
    timed(row, "decode", decoders)

    read = screen.code.nbytes + stats[0] * (screen.code2 is not None) * sae.d_in + stats[1] * 4 * sae.d_in
    # alone, as the roof is measured: the other calls above evict everything but weights from the caches
    seconds = statistics.median(interleave({"ours": encoders["ours"]}, SECONDS)["ours"])
    row["alone_ms"] = 1e3 * seconds
    row["read_gb_s"] = read / seconds / 1e9
    row["bandwidth_share"] = row["read_gb_s"] / roofs.read_gb_s
    row["int8_share"] = 2 * T * sae.d_in * F / seconds / 1e9 / roofs.int8_gop_s
    least = max(2 * T * sae.d_in * F / 1e9 / roofs.int8_gop_s, screen.code.nbytes / 1e9 / roofs.read_gb_s)
    row["encode_at_most"] = row["encode_ms"]["eager fp32"] / 1e3 / least
    row["sae_at_most"] = row["sae_ms"]["eager fp32"] / 1e3 / least
    return row


def call_cost() -> float:
    """µs of overhead of an op call: the call for one token of an SAE so small that the kernel takes no time."""
    sae = JumpReLUSAE(*(torch.zeros(s) for s in ((64, 16), (16, 64), (16,), (64,))), torch.ones(16))
    screen = sae.requires_grad_(False).prepare().screen_cache.screen
    args = (torch.randn(1, 64), sae.W_enc, sae.b_enc, sae.threshold)
    times = []
    for _ in range(3000):
        start = time.perf_counter()
        screen.call(*args)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.threads:
        torch.set_num_threads(args.threads)
    roofs = roof.measure()
    rows = []
    with torch.inference_mode():
        cost = call_cost()
        for name in args.cases.split(","):
            sae, sample = real_case() if name == "real" else (CASES[name].sae, None)
            for T in (int(t) for t in args.tokens.split(",")):
                x = sample[:T] if sample is not None else CASES[name].x(T)
                rows.append(measure(name, sae, x, roofs, set(args.peers.split(","))))
                show(rows[-1])
    threads = torch.get_num_threads()
    return {"machine": describe(threads), "threads": threads, "roof": vars(roofs), "call_us": cost, "rows": rows}


def show(row: dict[str, Any]) -> None:
    numbers = [
        f"{row['case']} T={row['T']} L0 {row['l0']:.0f}",
        f"encode {row['encode_ms']['ours']:.2f} ms {vs(row['encode_vs'])}; fp32 at most {row['encode_at_most']:.1f}×",
        f"SAE {row['sae_ms']['ours']:.2f} ms {vs(row['sae_vs'])}; fp32 at most {row['sae_at_most']:.1f}×",
        f"decode {row['decode_ms']['ours']:.3f} ms " + vs(row["decode_vs"]),
        f"alone {row['alone_ms']:.2f} ms: {row['bandwidth_share']:.2f} of the bandwidth,"
        f" {row['int8_share']:.2f} of the int8 peak",
        f"false {100 * row['false_after_digit_1']:.2f} %, then {100 * row['false_before_fp32']:.3f} %",
    ]
    print("\n  ".join(numbers), flush=True)


def vs(ratios: dict[str, float]) -> str:
    return "(" + ", ".join(f"{name} {r:.1f}×" for name, r in ratios.items()) + ")"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="real,2304x16384,2304x65536,3584x16384")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024")
    parser.add_argument("--peers", default="", help="compile: also torch.compile (slow to start)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = run(args)
    print(f"roof {found['roof']}\nop call {found['call_us']:.1f} µs")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
