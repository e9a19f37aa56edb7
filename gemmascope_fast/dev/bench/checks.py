"""Every answer is held against fp64 before it is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.dev.bench.engine import Verdict, WrongAnswer
from gemmascope_fast.dev.bench.peers import eager_encode
from gemmascope_fast.dev.testing import dot_bound, pre_activations64
from gemmascope_fast.ops.encode import kappa
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

CHECKED_TOKENS = 256  # fp64 products of more would take longer than the timings
UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-9}


class Truth:
    """fp64 pre-activations of the first tokens of x, and what eager fp32 makes of them."""

    def __init__(self, sae: JumpReLUSAE, x: Tensor) -> None:
        self.sae, self.x = sae, x[:CHECKED_TOKENS]
        self.z = pre_activations64(self.x, sae)
        self.bound = dot_bound(self.x, sae.W_enc, sae.b_enc)
        self.tau = sae.threshold.detach().double().clamp(min=0)
        self.sure = (self.z - self.tau).abs() > self.bound
        self.fires = self.z > self.tau
        self.eager = eager_encode(sae, self.x) != 0

    def latents(self, found: SparseLatents | Tensor, dtype: str = "fp32") -> Verdict:
        """Raises WrongAnswer where a value is further from fp64 than its inputs' and its own rounding explain."""
        dense = found.to_dense() if isinstance(found, SparseLatents) else found
        dense = dense[: len(self.x)].double()
        stored = dense != 0
        both = stored & self.fires
        error = torch.where(both, (dense - self.z).abs(), 0.0)
        # activations, weights, bias and result are each rounded once to the type, half an ulp at most
        size = self.bound / kappa(self.sae.d_in)
        limit = self.bound if dtype == "fp32" else 1.01 * 4 * UNIT[dtype] * size + self.bound
        if dtype == "fp32" and not isinstance(found, SparseLatents):
            limit = self.bound * 16  # any order of summation: 16 lanes make the bound 16 times smaller
        worst = float((error / limit).max()) if both.any() else 0.0
        if worst > 1:
            raise WrongAnswer(f"a latent's error is {worst:.2g} times what {dtype} arithmetic allows")
        equal = not bool((stored != self.fires)[self.sure].any())
        return Verdict(float(error.max()), equal, int((stored != self.eager).sum()))

    def ours(self, found: SparseLatents) -> Verdict:
        """As `latents`, and the support must be fp64's outside the bound."""
        verdict = self.latents(found)
        if not verdict.support_equal:
            raise WrongAnswer("the support is not that of fp64 outside the bound of the dot")
        return verdict

    def reconstruction(self, found: Tensor, dtype: str = "fp32") -> Verdict:
        """x̂ against fp64's, support flips and all.

        Raises WrongAnswer where the relative error of the whole is more than 32 units of the type per root feature:
        a wrong formula is off by far more, rounding and a few flips by far less.
        """
        exact = (self.z * self.fires) @ self.sae.W_dec.detach().double() + self.sae.b_dec.detach().double()
        error = (found[: len(self.x)].double() - exact).abs()
        relative = float(error.norm() / exact.norm().clamp_min(1e-300))
        allowed = 32 * UNIT[dtype] * self.sae.d_sae**0.5
        if not relative <= allowed:
            raise WrongAnswer(f"the reconstruction is off by {relative:.2g} of its norm ({allowed:.2g} allowed)")
        return Verdict(float(error.max()))


def close(found: Tensor, exact: Tensor, size: Tensor, terms: int, dtype: str = "fp32") -> Verdict:
    """A sum of products against fp64: `size` is Σ|a||b| per element, `terms` the number of roundings on one path.

    Raises WrongAnswer beyond terms · 2⁻²⁴ · size, plus three roundings of the inputs and the result to a 16-bit type.
    """
    limit = 1.01 * terms * UNIT["fp32"] * size + 1e-30
    if dtype != "fp32":
        limit = limit + 1.01 * 3 * UNIT[dtype] * size
    error = (found.double() - exact).abs()
    worst = float((error / limit).max())
    if not worst <= 1:
        raise WrongAnswer(f"an element's error is {worst:.2g} times what {dtype} arithmetic allows")
    return Verdict(float(error.max()))
