"""The 26 residual SAEs of a release for a 2B model, attached with a budget of four: time, loads, peak memory.

    python benchmarks/bank_release.py --folder release --json bank.json

The SAEs are synthetic, with the real shape (2304 × 16,384; use --d-sae for less), and written once: 7.9 GB in float32,
half in bfloat16.  The model has Gemma 2 2B's residual stream and number of layers; --intermediate sets the width of
its MLPs.  All printed figures are measured on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch

import gemmascope_fast as gsf
from gemmascope_fast.attach import Activations
from gemmascope_fast.checkpoints import native
from gemmascope_fast.dev.bench.machine import describe, forget_peak, process_memory
from gemmascope_fast.files.results import write_json

D, LAYERS = 2304, 26


def write_release(folder: Path, d_sae: int, dtype: torch.dtype) -> None:
    """One SAE per layer; about 80 of 16,384 features fire on activations of unit variance."""
    for layer in range(LAYERS):
        path = folder / f"layer_{layer}" / "sae.safetensors"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        g = torch.Generator().manual_seed(layer)
        W_enc = (torch.randn(d_sae, D, generator=g) / D**0.5).to(dtype).t()
        weights = {"W_dec": (torch.randn(d_sae, D, generator=g) / D**0.5).to(dtype), "b_dec": torch.zeros(D).to(dtype)}
        weights |= {"b_enc": torch.zeros(d_sae).to(dtype), "threshold": torch.full((d_sae,), 2.58).to(dtype)}
        cfg = gsf.SAEConfig(D, d_sae, D, gsf.Site("resid", layer))
        native.save(gsf.JumpReLUSAE.from_weights(W_enc=W_enc, **weights, cfg=cfg), path)


def model_of(intermediate: int, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=256, hidden_size=D, intermediate_size=intermediate, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, attn_implementation="eager",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def measure(bank: gsf.Bank, model: torch.nn.Module, ids: torch.Tensor, passes: int) -> dict[str, object]:
    """Seconds of each pass with the bank attached; latents of three layers are compared with those of the SAEs."""
    checked = {layer: Activations() for layer in (0, LAYERS // 2, LAYERS - 1)}
    coders = {sae.cfg.site: sae for sae in bank.values()}
    seconds: list[float] = []
    alone: list[float] = []
    with torch.inference_mode():
        with gsf.attach(
            model, coders | {f"model.layers.{i}.output": a for i, a in checked.items()}, tokens="all"
        ) as run:
            model(ids)
        for layer in checked:
            sae = next(sae for sae in bank.values() if sae.cfg.site.layer == layer)
            x = run.activations[f"model.layers.{layer}.output"]
            if sae.encode_sparse(x) != run.latents[gsf.Site("resid", layer)]:
                raise SystemExit(f"layer {layer}: the bank's latents are not the SAE's")
        forget_peak()
        before = process_memory("VmRSS") - bank.held()["device"]["bytes"]
        for _ in range(passes):
            begin = time.perf_counter()
            model(ids)
            alone.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            with gsf.attach(model, bank, mode="splice+error", keep=False, tokens="all"):
                model(ids)
            seconds.append(time.perf_counter() - begin)
        bank.settle()
    held = bank.held()
    return {
        "tokens": ids.numel(),
        "seconds_without_saes": alone,
        "seconds": seconds,
        "loads": bank.stats.loads,
        "prefetched": bank.stats.prefetched,
        "hits": bank.stats.hits,
        "waits": bank.stats.waits,
        "seconds_waited": bank.stats.waited,
        "budget": held["device"]["budget"],
        "peak_counted": held["device"]["peak"],
        "peak_resident_growth": process_memory("VmHWM") - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the release; written if missing")
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--intermediate", type=int, default=9216, help="2B: 9216, which takes 4 GB in bfloat16")
    parser.add_argument("--saes", type=int, default=4, help="the budget, in SAEs")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--screen", action="store_true", help="build screens; they count against the budget")
    parser.add_argument("--ahead", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    write_release(args.folder, args.d_sae, dtype)
    sizes = gsf.Bank(args.folder, dtype=dtype, screen=args.screen)
    budget = args.saes * next(iter(sizes.values())).nbytes
    bank = gsf.Bank(args.folder, dtype=dtype, screen=args.screen, device_bytes=budget, ahead=args.ahead)
    ids = torch.randint(3, 256, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    figures = measure(bank, model_of(args.intermediate, torch.bfloat16), ids, args.passes)
    about = {name: str(value) for name, value in vars(args).items() if name not in ("json", "folder")}
    about["cpus"] = str(os.cpu_count())
    result = {"machine": describe(torch.get_num_threads()), "about": about, **figures}
    print(json.dumps(result, indent=1))
    if args.json is not None:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
