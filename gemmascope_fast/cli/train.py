"""`gemmascope-fast train`: text → activations → a JumpReLU SAE in the package's own format."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemmascope_fast.cli.arguments import check_folder
from gemmascope_fast.files import atomic as files
from gemmascope_fast.files import identity

DEFAULTS = {
    "d_sae": 4096,
    "l0": 60.0,
    "steps": 3000,
    "batch": 1024,
    "lr": 2e-3,
    "bandwidth": 0.03,
    "nudge": 0.1,
    "seed": 0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="a transformers model or folder; 'demo' is Gemma 3 270M")
    parser.add_argument(
        "--model-dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="in which the model computes the activations (default: %(default)s)",
    )
    parser.add_argument("--layer", type=int, required=True, help="the layer whose output the SAE reads")
    parser.add_argument("--d-sae", type=int, default=DEFAULTS["d_sae"], help="features (default: %(default)s)")
    parser.add_argument("--l0", type=float, default=DEFAULTS["l0"], help="target L0 (default: %(default)s)")
    parser.add_argument(
        "--text",
        nargs="+",
        default=["pydoc", "stdlib"],
        metavar="TEXT",
        help="UTF-8 files, or 'pydoc' (the language reference), 'stdlib' (docstrings), 'sampled' (the model writes);"
        " named twice it counts twice; the last tenth of each is held out (default: pydoc stdlib)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="train on the first N tokens of each text, measure on a ninth as many held-out ones (default: all)",
    )
    parser.add_argument("--steps", type=int, default=DEFAULTS["steps"], help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=DEFAULTS["batch"], help="tokens per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=DEFAULTS["lr"], help="default: %(default)s")
    parser.add_argument(
        "--lr-decay", type=float, default=1 / 3, help="share of the steps over which lr falls to 0 (default: a third)"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=DEFAULTS["bandwidth"], help="ε and first threshold (default: %(default)s)"
    )
    parser.add_argument(
        "--nudge",
        type=float,
        default=DEFAULTS["nudge"],
        help="raise a rare feature's bias by so many learning rates a step until it fires (default: %(default)s)",
    )
    parser.add_argument(
        "--theta-to-input", action="store_true", help="send the threshold's gradient into the pre-activation too"
    )
    parser.add_argument("--seed", type=int, default=DEFAULTS["seed"])
    parser.add_argument(
        "--dtype", default="float16", choices=("float16", "bfloat16", "float32"), help="of the matrices"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the SAE, as .safetensors")
    parser.add_argument("--activations", type=Path, metavar="FOLDER", help="keep activations there for other runs")
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from OUT.run, where a run was cut off")


def run(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from gemmascope_fast.analysis.pair import load_model
    from gemmascope_fast.training.activations import Batches, collect, first_layers
    from gemmascope_fast.training.text import read_texts
    from gemmascope_fast.training.trainer import Scaling, Trainer

    console = Console()
    config = _config(args)
    state = args.out.with_name(args.out.name + ".run")
    _check(args, state)
    model, tokenizer = load_model(args.model)
    model_id = identity.of_module(model)  # before the cast: one folder of activations serves both dtypes
    model.to(getattr(torch, args.model_dtype))
    with first_layers(model, args.layer + 1):  # a layer that the model lacks is refused before anything is written
        pass
    texts = read_texts(args.text, model, tokenizer)
    folder = args.activations or args.out.with_name(args.out.name + ".activations")
    train, held = [], {}
    for text in texts:
        first, last = text.split()
        name = Path(text.name).stem
        train += collect(model, tokenizer, args.layer, first, folder, name, args.max_tokens, model_id)
        # what is held out is a ninth of what is trained on
        ninth = args.max_tokens and -(-args.max_tokens // 9)
        held[text.name] = collect(model, tokenizer, args.layer, last, folder, f"{name}-held-out", ninth, model_id)
    batches = Batches(train, config.batch, config.seed)
    about = {
        "model": args.model,
        "model_fingerprint": model_id,
        "tokenizer_fingerprint": identity.of_tokenizer(tokenizer),
        "dtype": args.model_dtype,
        "layer": args.layer,
        "text": [[text.name, identity.of_text(text.text)] for text in texts],
        "max_tokens": args.max_tokens,
    }
    if args.resume:
        trainer = _resume(state, config, about)
        console.print(f"Resumed at step {trainer.steps_done} of {config.steps}.")
    else:
        trainer = Trainer(config, Scaling.of(train))
    train_to_end(trainer, batches, state, about, args.save_every)
    figures = _finish(trainer, args, held, model)
    files.remove(state)
    console.print_json(json.dumps(figures))
    return 0


def train_to_end(trainer: Any, batches: Any, state: Path, about: dict[str, Any], save_every: int) -> None:
    """The steps that are left, with a progress bar; the run is saved every `save_every` steps."""
    from tqdm import trange

    from gemmascope_fast.training.checkpoint import save_run

    config = trainer.config
    bar = trange(trainer.steps_done, config.steps, initial=trainer.steps_done, total=config.steps, desc="training")
    for step in bar:
        seen = trainer.step(trainer.scaling.apply(batches[step]))
        if step % 10 == 0:
            bar.set_postfix(fvu=f"{seen.fvu:.4f}", l0=f"{seen.l0:.1f}", dead=seen.dead, revived=trainer.revived)
        if (step + 1) % save_every == 0 or step + 1 == config.steps:
            save_run(trainer, state, about)


def _config(args: argparse.Namespace) -> Any:
    from gemmascope_fast.training.trainer import TrainConfig

    return TrainConfig(
        d_sae=args.d_sae, l0=args.l0, steps=args.steps, batch=args.batch, lr=args.lr, bandwidth=args.bandwidth,
        lr_decay=args.lr_decay, threshold=args.bandwidth, theta_to_input=args.theta_to_input, nudge=args.nudge,
        seed=args.seed,
    )  # fmt: skip


def _check(args: argparse.Namespace, state: Path) -> None:
    """What can be wrong is found before the minutes are spent."""
    if args.max_tokens is not None and args.max_tokens < args.batch:
        raise ValueError(f"--max-tokens: expected at least one batch of {args.batch} tokens, got {args.max_tokens}")
    if args.save_every < 1:
        raise ValueError(f"--save-every: expected a number of steps, got {args.save_every}")
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a file name ending in .safetensors, got {args.out}")
    if args.out.is_dir():
        raise ValueError(f"--out: expected a file, got the folder {args.out}")
    check_folder("--out", args.out.parent)
    if args.activations is not None:
        check_folder("--activations", args.activations)
    if args.resume and not state.exists():
        raise ValueError(f"--resume: expected a run in {state}, which is not there")
    if not args.resume and state.exists():
        raise ValueError(f"--out: {state} is a run that was cut off: --resume goes on with it, or delete it")


def _resume(state: Path, config: Any, about: dict[str, Any]) -> Any:
    from gemmascope_fast.training.checkpoint import load_run

    trainer, was = load_run(state)
    identity.check(f"--resume {state}", was | asdict(trainer.config), about | asdict(config))
    return trainer


def _finish(trainer: Any, args: argparse.Namespace, held: dict[str, Any], model: Any) -> dict[str, Any]:
    """Write the SAE with its settings and its figures on the held-out activations; returns the figures."""
    import torch

    from gemmascope_fast.analysis.evaluation import Reconstruction
    from gemmascope_fast.checkpoints.bundled import MODEL_NAME
    from gemmascope_fast.checkpoints.native import save
    from gemmascope_fast.sae.config import SAEConfig, SAEMetadata
    from gemmascope_fast.sae.sites import Site

    name = MODEL_NAME if args.model == "demo" else args.model
    d_in = trainer.scaling.mean.numel()
    figures: dict[str, Any] = {"held_out": {}}
    cfg = SAEConfig(d_in, args.d_sae, d_in, Site("resid", args.layer), None, SAEMetadata(name))
    sae = trainer.to_sae(cfg, getattr(torch, args.dtype))
    total = Reconstruction(sae)
    for text, x in held.items():
        own = Reconstruction(sae)
        for part in (rows for file in x for rows in file.split(1024)):
            own.add(part)
            total.add(part)
        figures["held_out"][text] = own.figures()
    figures["held_out"]["all"] = total.figures()
    figures["settings"] = asdict(trainer.config) | {
        "text": args.text,
        "max_tokens": args.max_tokens,
        "model_dtype": args.model_dtype,
        "revived": trainer.revived,
    }
    cfg.metadata.extra["figures"] = figures
    save(sae, args.out, matrix_dtype=getattr(torch, args.dtype))
    return figures
