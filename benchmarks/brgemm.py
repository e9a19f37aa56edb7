"""The screen's int8 matrix product compared with torch's `at::native::cpublas::brgemm`, on the same operands.

    python benchmarks/brgemm.py [--d-in 2304] [--d-sae 16384] [--tokens 256,1024] [--json brgemm.json]

Operands: the uint8 codes of the encoder's rows and the int8 digits of the activations.  brgemm gets them in the layout
in which it is fastest (digits packed four deep, blocks of the best size found here), and leaves its int32 sums in a
scratch block that stays in cache.  Ours is the whole op with thresholds that nothing exceeds: quantising the
activations, the product, the bound and the comparison of every pair, and no refinement.  So ours does more work.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import load_inline

from gemmascope_fast.dev import roof
from gemmascope_fast.dev.bench.machine import describe
from gemmascope_fast.dev.bench.timing import interleave, paired, percentiles_ms
from gemmascope_fast.dev.testing import make_activations, make_sae
from gemmascope_fast.files.results import write_json
from gemmascope_fast.ops.screen_rows import rows_of
from gemmascope_fast.sae.screen import Screen

SECONDS = 1.5  # for ours and brgemm together, and for each size of blocks

SOURCE = """
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

// code uint8 [F][K]; digits int8 [T/nb][K/4][nb][4].  Gives one number of every block, so that nothing is left out.
at::Tensor product(const at::Tensor& code, const at::Tensor& digits, int64_t mb, bool whole) {
  const int64_t F = code.size(0), K = code.size(1), blocks = digits.size(0), nb = digits.size(2);
  const int64_t rows = F / mb;
  at::Tensor out = whole ? at::empty({blocks, F, nb}, at::kInt) : at::empty({blocks, rows, 1}, at::kInt);
  const unsigned char* a = code.const_data_ptr<uint8_t>();
  const int8_t* b = digits.const_data_ptr<int8_t>();
  int32_t* o = out.mutable_data_ptr<int32_t>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> scratch(mb * nb);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t t = 0; t < blocks; ++t) {
        int32_t* c = whole ? o + (t * F + r * mb) * nb : scratch.data();
        at::native::cpublas::brgemm(mb, nb, K, K, nb, nb, false, a + r * mb * K,
                                    reinterpret_cast<const signed char*>(b) + t * K * nb, c);
        if (!whole) o[t * rows + r] = c[0];
      }
    }
    at::native::cpublas::brgemm_release();
  });
  return out;
}
"""


def packed(digits: Tensor, nb: int) -> Tensor:
    """int8 [T, K] → [T/nb, K/4, nb, 4]."""
    T, K = digits.shape
    return digits.reshape(T // nb, nb, K // 4, 4).transpose(1, 2).contiguous()


def best_blocks(product: Any, code: Tensor, digits: Tensor) -> tuple[int, int]:
    """Rows and tokens per block, among those tried, for which brgemm is fastest."""
    tried = {}
    for mb in (16, 32, 64, 128):
        for nb in (16, 32, 64):
            b = packed(digits, nb)
            tried[mb, nb] = min(interleave({"": lambda b=b, mb=mb: product(code, b, mb, False)}, SECONDS)[""])
    return min(tried, key=tried.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=2304, help="a multiple of 64")
    parser.add_argument("--d-sae", type=int, default=16384, help="a multiple of 128")
    parser.add_argument("--tokens", default="256,1024", help="multiples of 64")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    product = load_inline("gsf_brgemm", SOURCE, functions=["product"], extra_cflags=["-O3"]).product
    d, F = args.d_in, args.d_sae
    sae = make_sae(1, d, F, 76).requires_grad_(False)
    never = torch.full_like(sae.threshold, 1e9)
    screen = Screen.build(sae.W_enc, sae.b_enc, never, centre=sae.b_dec)
    code = rows_of(screen.code)[:F, :d].contiguous()
    rows = []
    for T in (int(t) for t in args.tokens.split(",")):
        x = make_activations(5, T, d)
        r = x - sae.b_dec
        digits = (r / (r.abs().amax(1, keepdim=True) / 127)).round().clamp(-127, 127).to(torch.int8)
        small = product(code[:128], packed(digits[:64], 64), 64, True)[0]
        assert torch.equal(small.long(), code[:128].long() @ digits[:64].long().t())
        mb, nb = best_blocks(product, code, digits)
        b = packed(digits, nb)
        weights = (sae.W_enc, sae.b_enc, never, 1)
        with torch.inference_mode():
            calls = {
                "ours": lambda x=x, w=weights: screen.call(x, *w),
                "brgemm": lambda b=b, mb=mb: product(code, b, mb, False),
            }
            times = interleave(calls, SECONDS)
        ours, theirs = (percentiles_ms(times[name])[0] for name in ("ours", "brgemm"))
        ratio = paired(times["brgemm"], times["ours"]).median
        work = T * d * F / 1e6
        row = {"T": T, "blocks": [mb, nb], "ours_ms": ours, "brgemm_ms": theirs, "ratio": ratio}
        rows.append(row | {"ours_gmac_s": work / ours, "brgemm_gmac_s": work / theirs})
        print(f"T={T} ours {ours:.1f} ms, brgemm {theirs:.1f} ms in blocks of {mb} x {nb}: {ratio:.2f}")
    machine = {**describe(torch.get_num_threads()), "roof": vars(roof.measure())}
    found = {"d_in": d, "d_sae": F, "machine": machine, "rows": rows}
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
