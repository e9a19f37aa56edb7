"""`gemmascope-fast train`: text → activations → an SAE in the package's own format."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.files import progress
from gemmascope_fast.files.atomic import make_folder, remove


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train an SAE on a model's activations.  --device and --dtype are those of the model; the SAE itself is"
        " trained on the CPU in fp32."
    )
    add = parser.add_argument
    common.add_model(parser)
    add("--layer", type=int, required=True, metavar="N", help=common.LAYER)
    common.add_device(parser)
    common.add_dtype(parser)
    add("--d-sae", type=int, default=4096, metavar="N", help="features")
    choices = ("jumprelu", "topk", "batchtopk")
    add("--activation", default="jumprelu", choices=choices, help="the SAE's activation function")
    add("--l0", type=float, default=60.0, metavar="X", help="target L0; the k of topk and batchtopk")
    note = (
        "; also 'sampled', which the model writes; a text named twice counts twice; the last tenth of each is held out"
    )
    common.add_text(parser, ["pydoc", "stdlib"], note)
    note = "train on the first N tokens of each text, measure on a ninth as many held-out ones (default: all)"
    add("--max-tokens", type=int, metavar="N", help=note)
    add("--steps", type=int, default=3000, metavar="N", help="training steps")
    add("--batch", type=int, default=1024, metavar="N", help="tokens of a step")
    add("--lr", type=float, default=2e-3, metavar="X", help="learning rate")
    note = "share of the steps over which the learning rate falls to 0 (default: a third)"
    add("--lr-decay", type=float, default=1 / 3, metavar="X", help=note)
    add("--bandwidth", type=float, default=0.03, metavar="X", help="the kernel's width ε, and the first threshold")
    note = "raise the bias of a feature that fires rarely by this many learning rates a step, until it fires"
    add("--nudge", type=float, default=0.1, metavar="X", help=note)
    note = "send the threshold's gradient into the pre-activation too"
    add("--theta-to-input", action="store_true", help=note)
    common.add_seed(parser)
    choices = ("float16", "bfloat16", "float32")
    add("--save-dtype", default="float16", choices=choices, help="type of the written matrices")
    common.add_out(parser, "the SAE, as .safetensors", required=True)
    note = "keep activations here for other runs (default: OUT.activations)"
    common.add_output(parser, "--activations", note, "kept folder")
    add("--save-every", type=int, default=250, metavar="N", help="save the run in OUT.run after every N steps")
    add("--resume", action="store_true", help="continue from OUT.run, a run that was stopped")


def run(args: argparse.Namespace) -> int:
    import torch

    from gemmascope_fast.analysis.pair import load_model
    from gemmascope_fast.files import identity
    from gemmascope_fast.training.activations import Batches, collect, first_layers
    from gemmascope_fast.training.text import read_texts
    from gemmascope_fast.training.trainer import Scaling, Trainer

    config = _config(args)
    state = args.out.with_name(args.out.name + ".run")
    _check(args, state)
    model, tokenizer = load_model(args.model, args.device)
    model_id = identity.of_module(model)  # before the cast: one folder of activations serves both dtypes
    model.to(getattr(torch, args.dtype))
    with first_layers(model, args.layer + 1):  # ValueError for a layer that the model lacks, before anything is written
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
        "dtype": args.dtype,
        "layer": args.layer,
        "text": [[text.name, identity.of_text(text.text)] for text in texts],
        "max_tokens": args.max_tokens,
    }
    if args.resume:
        trainer = _resume(state, config, about)
        progress.say(f"Resumed at step {trainer.steps_done} of {config.steps}.")
    else:
        trainer = Trainer(config, Scaling.of(train))
    train_to_end(trainer, batches, state, about, args.save_every)
    figures = _finish(trainer, args, held, model)
    remove(state)
    print(json.dumps(figures, indent=2))
    return 0


def train_to_end(trainer: Any, batches: Any, state: Path, about: dict[str, Any], save_every: int) -> None:
    """The steps that are left, with a progress bar; the run is saved every `save_every` steps."""
    from gemmascope_fast.training.checkpoint import save_run

    config = trainer.config
    left = range(trainer.steps_done, config.steps)
    bar = progress.bar(left, initial=trainer.steps_done, total=config.steps, desc="training")
    for step in bar:
        seen = trainer.step(trainer.scaling.apply(batches[step]))
        if step % 10 == 0:
            dead = f"{seen.dead / config.d_sae:.4f}"
            bar.set_postfix(fvu=f"{seen.fvu:.4f}", l0=f"{seen.l0:.1f}", dead_fraction=dead, revived=trainer.revived)
        if (step + 1) % save_every == 0 or step + 1 == config.steps:
            save_run(trainer, state, about)


def _config(args: argparse.Namespace) -> Any:
    from gemmascope_fast.training.trainer import TrainConfig

    return TrainConfig(
        d_sae=args.d_sae, l0=args.l0, steps=args.steps, batch=args.batch, lr=args.lr, bandwidth=args.bandwidth,
        lr_decay=args.lr_decay, threshold=args.bandwidth, theta_to_input=args.theta_to_input, nudge=args.nudge,
        seed=args.seed, activation=args.activation,
    )  # fmt: skip


def _check(args: argparse.Namespace, state: Path) -> None:
    """ValueError for bad options, before any work."""
    if args.max_tokens is not None and args.max_tokens < args.batch:
        raise ValueError(f"--max-tokens: expected at least one batch of {args.batch} tokens, got {args.max_tokens}")
    common.check_least(args, "save_every")
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a file name ending in .safetensors, got {args.out}")
    if args.resume and not state.exists():
        raise ValueError(f"--resume: expected a run in {state}, which is not there")
    if not args.resume and state.exists():
        raise ValueError(f"--out: {state} is a run that was stopped: continue it with --resume, or delete it")


def _resume(state: Path, config: Any, about: dict[str, Any]) -> Any:
    from gemmascope_fast.files import identity
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
    sae = trainer.to_sae(cfg, getattr(torch, args.save_dtype))
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
        "model_dtype": args.dtype,
        "revived": trainer.revived,
    }
    cfg.metadata.extra["figures"] = figures
    make_folder(args.out.parent)
    save(sae, args.out, matrix_dtype=getattr(torch, args.save_dtype))
    return figures
