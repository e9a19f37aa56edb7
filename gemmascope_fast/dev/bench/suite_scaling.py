"""Suite `scaling`: time and memory against width, time against tokens, features that fire, SAEs and threads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.dev.bench import peers
from gemmascope_fast.dev.bench.cases import Case, copies
from gemmascope_fast.dev.bench.engine import Bench, Candidate, Plan, Work, WrongAnswer
from gemmascope_fast.dev.bench.machine import available_memory
from gemmascope_fast.dev.bench.work import dense_sae_work, encode_work
from gemmascope_fast.dev.testing import compare_support, make_sae
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.screen import most_bytes

SIZES = tuple(2**p for p in range(14, 21))  # d_sae: 16k … 1m
TOKENS = (1, 4, 16, 64, 256, 1024)
LAYERS = (1, 2, 4, 9, 18)  # SAEs that one token passes: Gemma 3 270M has 18 layers
L0S = (10, 40, 160, 640)  # features that fire on a token
D_IN, L0 = 640, 80.0  # Gemma 3 270M's width: a million features of it are 2.7 GB in fp32
PART = 1 << 16  # features drawn at once: making an SAE holds its matrices, their random parts and a sample together
COPIES_AT_ONCE = 7


@dataclass(frozen=True)
class Drawn(Case):
    """A case whose SAE is drawn in parts of the width, so that making a wide one takes little more than it."""

    @functools.cached_property
    def sae(self) -> JumpReLUSAE:
        count = -(-self.d_sae // PART)
        if count == 1:
            return make_sae(0, self.d_in, self.d_sae, self.l0).requires_grad_(False)
        rows, decoder = torch.empty(self.d_sae, self.d_in), torch.empty(self.d_sae, self.d_in)
        bias, threshold = torch.empty(self.d_sae), torch.empty(self.d_sae)
        for i in range(count):
            here = slice(i * PART, min((i + 1) * PART, self.d_sae))
            size = here.stop - here.start
            part = make_sae(i, self.d_in, size, self.l0 * size / self.d_sae)
            rows[here], decoder[here] = part.W_enc.detach().t(), part.W_dec.detach()
            bias[here], threshold[here] = part.b_enc.detach(), part.threshold.detach()
        return JumpReLUSAE(rows.t(), decoder, bias, part.b_dec.detach(), threshold).requires_grad_(False)

    @property
    def made(self) -> bool:
        return "sae" in self.__dict__


def scaling_suite(cases: Sequence[Case], tokens: Sequence[int] | None = None) -> Iterator[Plan]:
    """Widths as far as memory allows at T = 1 and 64; tokens, L0 and threads at the last case's shape; SAEs in
    turn."""
    del tokens  # the curve is the point
    for width in SIZES:
        case = Drawn(f"{D_IN}x{width}", D_IN, width, L0)
        for T in (1, 64):
            yield _plan("width", case, T)
    shape = cases[-1]
    for T in TOKENS:
        yield _plan("tokens", shape, T)
    for l0 in L0S:
        sparse = replace(shape, name=f"{shape.name}, L0 {l0}", l0=float(l0))
        for T in (1, 256):
            yield _plan(f"l0 {l0}", sparse, T)
    for threads in range(1, torch.get_num_threads() + 1):
        for T in (1, 256):
            yield _plan("threads", shape, T, threads)
    case = Drawn(f"{D_IN}x{SIZES[0]}", D_IN, SIZES[0], L0)
    for layers in LAYERS:
        op = f"layers {layers}"
        yield Plan("scaling", op, 1, case.d_in, case.d_sae, functools.partial(_layers_bench, op, case, layers))


def _plan(op: str, case: Case, T: int, threads: int | None = None) -> Plan:
    build = functools.partial(_bench, op, case, T, threads)
    return Plan("scaling", op, T, case.d_in, case.d_sae, build)


def memory_needed(case: Case, T: int) -> int:
    """Bytes that making and timing a case takes at most; less what an SAE that was made already holds."""
    matrix = 4 * case.d_in * case.d_sae
    held = 0 if isinstance(case, Drawn) and case.made else 2 * matrix + most_bytes(case.d_in, case.d_sae)
    drawn = COPIES_AT_ONCE * 4 * case.d_in * min(PART if isinstance(case, Drawn) else case.d_sae, case.d_sae)
    # the dense layout of eager's encoder, and its five tensors [T, d_sae]
    return held + max(drawn, matrix + 5 * 4 * T * case.d_sae)


def _bench(op: str, case: Case, T: int, threads: int | None = None) -> Bench:
    """Whole SAE, ours against eager fp32, on one copy of the weights; support checked on up to 16 tokens."""
    need, free = memory_needed(case, T), available_memory()
    if need > free:
        why = f"takes {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        lacking = dict.fromkeys(("ours", "eager fp32"), why)
        return Bench("scaling", op, T, case.d_in, case.d_sae, None, threads, missing=lacking)
    sae, x = case.sae.prepare(), case.x(T)
    bench = Bench("scaling", op, T, case.d_in, case.d_sae, sae.encode_sparse(x).nnz / T, threads)
    if op == "width":
        bench.memory = held_bytes(sae)
    wide = peers.Dense.of(sae)
    bench.candidates = _pair(lambda: sae(x), lambda: peers.eager_sae(wide, x), sae, x)
    return bench


def _layers_bench(op: str, case: Case, layers: int) -> Bench:
    """So many SAEs after one another on one token, each with weights of its own, as in the hooks of a model."""
    x = case.x(1)
    saes = copies(case.sae, layers)
    wide = [peers.Dense.of(sae) for sae in saes]
    bench = Bench("scaling", op, 1, case.d_in, case.d_sae, float(saes[0].encode_sparse(x).nnz))
    ours, eager = (lambda: [sae(x) for sae in saes]), (lambda: [peers.eager_sae(w, x) for w in wide])
    bench.candidates = _pair(ours, eager, saes[0], x, layers)
    return bench


def _pair(
    ours: Callable[[], Any], eager: Callable[[], Any], sae: JumpReLUSAE, x: Tensor, times: int = 1
) -> list[Candidate]:
    """Both, each running so many such SAEs; on up to 16 tokens the support must be fp64's."""
    check = compare_support(sae.encode_sparse(x[:16]), x[:16], sae)  # in parts of a wide SAE, as `Truth` is not
    if not check.equal:
        raise WrongAnswer(f"{sae.d_in} × {sae.d_sae}: {check}")
    works = [
        Work(times * work.bytes, times * work.flops, work.arithmetic)
        for work in (encode_work(sae, x), dense_sae_work(sae, len(x)))
    ]
    return [Candidate("ours", "fp32", ours, works[0]), Candidate("eager fp32", "fp32", eager, works[1])]


def held_bytes(sae: JumpReLUSAE) -> dict[str, int]:
    """What this SAE's tensors take, beside what its shapes say that other forms would: d_in, d_sae, weights_bytes
    (as held), bf16_bytes, screen_bytes (as built)."""
    weights = sum(p.numel() * p.element_size() for p in sae.parameters())
    return {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "fp32_bytes": weights,
        "bf16_bytes": 2 * sum(p.numel() for p in sae.parameters()),
        "screen_bytes": sae.packed_bytes(),
    }
