"""Time and memory of SAELens's JumpReLU SAE and of the accelerated one; run it in `.venv-saelens`.

    .venv-saelens/bin/python benchmarks/saelens_dropin.py [--json FILE]

2304 × 16,384 in fp32 (Gemma Scope 2B, width 16k) with seeded weights, about 76 latents a token.  Outputs are compared
before timing.  Times are medians of alternating calls; memory is the increase of the resident set.
"""

import argparse
from pathlib import Path

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

import gemmascope_fast as gsf
from gemmascope_fast.dev.bench.machine import describe, forget_peak, process_memory
from gemmascope_fast.dev.bench.timing import interleave, percentiles_ms
from gemmascope_fast.files.results import write_json

D_IN, D_SAE = 2304, 16384
TOKENS = (1, 16, 256)
SECONDS = 1.2  # for both


def build():
    generator = torch.Generator().manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(D_IN, D_SAE, generator=generator) / D_IN**0.5)
        sae.W_dec.copy_(torch.randn(D_SAE, D_IN, generator=generator) / D_IN**0.5)
        sae.threshold.fill_(2.6)
    return sae.requires_grad_(False)


def uses(sae, x):
    def with_error():
        sae._use_error_term = True
        try:
            return sae(x)
        finally:
            sae._use_error_term = False

    return {
        "forward": lambda: sae(x),
        "forward with error term": with_error,
        "run_with_cache, latents": lambda: sae.run_with_cache(x, names_filter=["hook_sae_acts_post"])[0],
        "run_with_cache, all points": lambda: sae.run_with_cache(x)[0],
    }


def risen(use):
    """MiB that the resident set rises above where it stands."""
    forget_peak()
    before = process_memory("VmRSS")
    use()
    return (process_memory("VmHWM") - before) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    plain = build()
    fast = gsf.accelerate(plain)
    fast.prepare()
    rows = []
    print("| tokens | | SAELens ms | accelerated ms | ratio | SAELens MiB | accelerated MiB |")
    print("|---|---|---|---|---|---|---|")
    for n in TOKENS:
        x = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(n))
        both = zip(uses(plain, x).items(), uses(fast, x).values(), strict=True)
        for (name, slow), quick in both:
            torch.testing.assert_close(quick(), slow(), rtol=1e-4, atol=1e-4)
            times = interleave({"saelens_ms": slow, "accelerated_ms": quick}, SECONDS)
            row = {"tokens": n, "use": name} | {key: percentiles_ms(found)[0] for key, found in times.items()}
            row |= {"saelens_mib": risen(slow), "accelerated_mib": risen(quick)}
            rows.append(row)
            print(
                f"| {n} | {name} | {row['saelens_ms']:.1f} | {row['accelerated_ms']:.1f}"
                f" | {row['saelens_ms'] / row['accelerated_ms']:.1f} | {row['saelens_mib']:.0f}"
                f" | {row['accelerated_mib']:.0f} |"
            )
    if given.json:
        write_json(given.json, {"machine": describe(torch.get_num_threads()), "rows": rows})


if __name__ == "__main__":
    main()
