"""Suite `ops`: encode, decode, backward and nested linear layers, each op by itself."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast import backends, ops
from gemmascope_fast.dev.bench import peers
from gemmascope_fast.dev.bench.cases import FEW_TOKENS, Case, copy_count, rotated, rotated_dense, sae_copies
from gemmascope_fast.dev.bench.checks import UNIT, Truth, close
from gemmascope_fast.dev.bench.engine import Bench, Candidate, Plan, Verdict, Work, WrongAnswer
from gemmascope_fast.dev.bench.work import full_work, screened_work, uses_screen
from gemmascope_fast.dev.roof import last_level_cache
from gemmascope_fast.quant.linear import MatryoshkaLinear
from gemmascope_fast.sae.jumprelu import JumpReLUSAE


def ops_suite(cases: Sequence[Case], tokens: Sequence[int] | None = None) -> Iterator[Plan]:
    """The benches of every case and number of tokens."""

    def plan(op: str, T: int, d_in: int, d_sae: int, build: Callable[..., Bench], *args: Any) -> Plan:
        return Plan("ops", op, T, d_in, d_sae, functools.partial(build, *args))

    for case in cases:
        shape, most = (case.d_in, case.d_sae), max(tokens or case.tokens)
        for T in tokens or case.tokens:
            yield plan("encode", T, *shape, encode_bench, case, T)
            yield plan("decode", T, *shape, decode_bench, case, T)
        yield plan("forward and backward", most, *shape, backward_bench, case, most)
    for rows, columns in dict.fromkeys((4 * case.d_in, case.d_in) for case in cases):
        for T in (1, 64) if tokens is None else tokens:
            yield plan("linear", T, columns, rows, linear_bench, rows, columns, T)


# ---- encode -----------------------------------------------------------------------------------------


def encode_bench(case: Case, T: int) -> Bench:
    sae, x = case.sae, case.x(T)
    truth = Truth(sae, x)
    bench = Bench("ops", "encode", T, case.d_in, case.d_sae, sae.encode_sparse(x).nnz / T)
    pool, wide, half = rotated(sae, T), rotated_dense(sae, T), rotated(sae, T, torch.bfloat16)

    def ours(screen: bool | None, isa: str | None = None) -> Candidate:
        def call(s: JumpReLUSAE) -> Any:
            with backends.forced_isa(isa) if isa else nullcontext():
                return s.encode_sparse(x, screen=screen)

        verdict = truth.ours(call(sae))
        route = screen if screen is not None else uses_screen(sae, x)
        work = screened_work(sae, x) if route else full_work(sae, x)
        return _candidate("fp32", lambda: call(pool()), work, verdict, sae, call, T)

    def dense(encode: Callable[[Any, Tensor], Tensor], of: Callable[[], Any], dtype: str) -> Candidate:
        own, xs = of(), x if dtype == "fp32" else x.bfloat16()
        verdict = truth.latents(encode(own, xs), dtype)
        size = 4 if dtype == "fp32" else 2
        work = Work(
            size * (case.d_in * case.d_sae + T * (case.d_in + case.d_sae)),
            2 * T * case.d_in * case.d_sae,
            "fp32" if dtype == "fp32" else None,
        )
        return _candidate(dtype, lambda: encode(of(), xs), work, verdict, own, lambda s: encode(s, xs), T)

    for name, screen in (("ours", None), ("ours, screen", True), ("ours, no screen", False)):
        bench.add(name, functools.partial(ours, screen))
    if backends.isa() == "amx":
        bench.add("ours on AVX-512", lambda: ours(None, "avx512"))
    bench.add("eager fp32", lambda: dense(peers.eager_encode, wide, "fp32"))
    bench.add("eager bf16", lambda: dense(peers.eager_encode, half, "bf16"))
    bench.add("torch.compile fp32", lambda: dense(peers.compiled(peers.eager_encode), wide, "fp32"))
    return bench


# ---- decode and backward ----------------------------------------------------------------------------


def decode_bench(case: Case, T: int) -> Bench:
    sae = case.sae
    # different tokens each time: rows that fired a moment ago would still be in the cache
    each = 4 * T * case.d_in * case.l0
    several = max(1, min(256, int(4 * last_level_cache() / each))) if sae_copies(sae.W_enc.numel(), T) > 1 else 1
    many = sae.encode_sparse(case.x(T * several))
    parts = [many[i * T : (i + 1) * T] for i in range(several)]
    latents, pool = parts[0], rotated(sae, T)
    bench = Bench("ops", "decode", T, case.d_in, case.d_sae, latents.nnz / T)
    cost = ops.decode.cost(latents.crow_indices, latents.col_indices, latents.values, sae.W_dec)
    sparse = Work(cost.bytes, cost.flops)
    dense64 = latents.to_dense().double()
    exact = dense64 @ sae.W_dec.double() + sae.b_dec.double()
    size = dense64 @ sae.W_dec.abs().double() + sae.b_dec.abs().double()

    def build(inputs: list[Any], call: Callable[[JumpReLUSAE, Any], Any], terms: int, work: Work) -> Candidate:
        verdict = close(torch.as_tensor(call(sae, inputs[0])), exact, size, terms)
        following = itertools.cycle(inputs).__next__
        return _candidate(
            "fp32", lambda: call(pool(), following()), work, verdict, sae, lambda s: call(s, inputs[0]), T
        )

    most = int(latents.l0().max()) + 2
    bench.add("ours", lambda: build(parts, lambda s, p: s.decode(p), most, sparse))
    dense = [part.to_dense() for part in parts[:4]]
    whole = Work(4 * (sae.W_dec.numel() + T * (case.d_in + case.d_sae)), 2 * T * sae.W_dec.numel())
    terms = case.d_sae + 2
    bench.add("eager fp32", lambda: build(dense, peers.eager_decode, terms, whole))
    bench.add("embedding_bag", lambda: build(parts, peers.embedding_bag_decode, terms, sparse))

    def sparsify() -> Candidate:
        decode = peers.sparsify_decode()
        return build([peers.padded_topk(p) for p in parts], decode, terms, sparse)

    def scipy() -> Candidate:
        calls = [peers.scipy_decode(p) for p in parts]
        return build(calls, lambda s, call: call(s), terms, sparse)

    bench.add("sparsify", sparsify)
    bench.add("scipy.sparse", scipy)
    return bench


def backward_bench(case: Case, T: int) -> Bench:
    """Forward and backward of ‖x̂‖², gradients of x and every weight, against dense autograd."""
    sae, x = case.sae, case.x(T)
    bench = Bench("ops", "forward and backward", T, case.d_in, case.d_sae, sae.encode_sparse(x).nnz / T)
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    with torch.inference_mode(False):  # inference tensors take no part in a graph
        trained = JumpReLUSAE(*(getattr(sae, n).detach().clone() for n in (*names, "threshold")))
        inputs = [x.clone().requires_grad_(), *(getattr(trained, n) for n in names)]

    def gradients(forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(forward().square().mean(), inputs)

    calls = {
        "ours": lambda: gradients(lambda: trained(inputs[0])),
        "eager fp32": lambda: gradients(lambda: peers.eager_sae(trained, inputs[0])),
    }
    found = {name: call() for name, call in calls.items()}
    # the two differ by the order of fp32 sums only; a wrong term shows in every element
    distance = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(*found.values(), strict=True))
    if distance > 2.0**-24 * case.d_sae:
        raise AssertionError(f"backward: gradients differ from dense autograd by {distance:.2g} of their norm")
    products = 2 * T * sae.W_enc.numel()
    moved = 4 * 6 * sae.W_enc.numel()  # both matrices read in forward and backward, both gradients written
    for name, call in calls.items():
        work = Work(moved, products if name == "ours" else 6 * products)
        bench.candidates.append(Candidate(name, "fp32", call, work))
    return bench


# ---- nested linear layers ---------------------------------------------------------------------------


GROUP_BITS = 24  # an fp16 scale and an 8-bit zero point a group
LINEAR_POOLS = 11  # implementations, of which each has copies of its own in the memory that copies may take


def linear_bench(rows: int, columns: int, T: int, group_size: int | None = 32) -> Bench:
    """A layer [rows, columns] at 8, 4 and 2 bits of one nested code, against torch's and torchao's.

    group_size: weights that share a scale; None: a row (torch's 4 bits have groups of 128 then).  A layer is verified
    against fp64 products of the weights before rounding, within the error that its number of bits allows.
    """
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=g) / columns**0.5
    x = torch.randn(T, columns, generator=g)
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    bench = Bench("ops", "linear" if group_size == 32 else "linear, one scale a row", T, columns, rows, None)
    scale_bits = GROUP_BITS / (group_size or columns)
    exact, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()

    def add(name: str, dtype: str, width: float, make: Callable[[], Callable[[Tensor], Tensor]], check: Any) -> None:
        def build() -> Candidate:
            xs = x if dtype == "fp32" else x.bfloat16()
            held = 8 + scale_bits if name.startswith("ours") else width  # a nested layer holds all its planes
            count = copy_count(int(rows * columns * width / 8), T, int(LINEAR_POOLS * rows * columns * held / 8))
            layers = [make() for _ in range(count)]
            verdict = check(layers[0](xs))
            following = itertools.cycle(layers).__next__
            work = Work(int(rows * columns * width / 8) + 4 * T * (rows + columns), 2 * T * rows * columns, None)
            warm = (lambda: layers[0](xs)) if T <= FEW_TOKENS else None
            return Candidate(name, dtype, lambda: following()(xs), work, verdict, warm)

        bench.add(name, build)

    def by_bits(bits: int, dtype: str) -> Callable[[Tensor], Any]:
        return lambda y: _within_quantisation(y, exact, bits, x, weight, dtype)

    for bits in (8, 4, 2):
        nested = MatryoshkaLinear.from_linear(linear, group_size=group_size, bits=bits)
        make = functools.partial(copy.deepcopy, nested)  # quantised once: there may be hundreds
        add(f"ours, {bits} bits", "fp32", bits + scale_bits, make, by_bits(bits, "bf16"))
    add("eager fp32", "fp32", 32, lambda: _linear(weight), lambda y: close(y, exact, size, columns + 2))
    half = weight.bfloat16()
    add("eager bf16", "bf16", 16, lambda: _linear(half), lambda y: close(y, exact, size, columns + 2, "bf16"))
    packed = (
        ("_weight_int8pack_mm", 8, lambda: peers.int8_packed(weight), 8),
        ("_weight_int4pack_mm_for_cpu", 5, lambda: peers.int4_packed(weight, group_size or 128), 4),
        ("torchao int8", 8, lambda: peers.torchao_linear(weight, "int8"), 8),
        ("torchao int8 dynamic", 8, lambda: peers.torchao_linear(weight, "int8 dynamic"), 8),
        ("torchao int4", 5, lambda: peers.torchao_linear(weight, "int4"), 4),
    )
    for name, width, make_peer, bits in packed:
        add(name, "bf16", width, make_peer, by_bits(bits, "bf16"))
    add("_int_mm", "fp32", 8, lambda: peers.int_mm(weight), by_bits(8, "bf16"))
    bench.missing["torchao DA8W4"] = "torchao's wheel carries no CPU kernel for it"
    return bench


def _linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    own = weight.clone()
    return lambda x: nn.functional.linear(x, own)


def _within_quantisation(y: Tensor, exact: Tensor, bits: int, x: Tensor, weight: Tensor, dtype: str) -> Any:
    """Weights lie within one step of their grid: half a step of rounding, as much again for a shifted zero.

    A step is at most the row's range over 2^bits - 1; activations rounded to int8 or bf16 add one part in 127.
    """
    step = (weight.amax(1) - weight.amin(1)).double() / (2**bits - 1)
    limit = x.double().abs().sum(1, keepdim=True) * step
    spread = x.double().abs().amax(1, keepdim=True) / 127
    limit = limit + spread * weight.double().abs().sum(1) + 4 * UNIT[dtype] * exact.abs()
    error = (y.double() - exact).abs()
    if not bool((error <= limit).all()):
        raise WrongAnswer(f"an element is off by {float((error / limit).max()):.2g} times what {bits} bits allow")
    return Verdict(float(error.max()))


# ---- small things -----------------------------------------------------------------------------------


def _candidate(
    dtype: str, cold: Callable[[], Any], work: Work | None, verdict: Any, sae: Any, warm: Callable[[Any], Any], T: int
) -> Candidate:
    several = sae_copies(sae.W_enc.numel(), T) > 1
    return Candidate("", dtype, cold, work, verdict, (lambda: warm(sae)) if several else None)
