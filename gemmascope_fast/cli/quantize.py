"""`gemmascope-fast quantize`: nested codes of a model's linear layers, as a file, and what each width costs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gemmascope_fast.analysis.widths.mixnmatch import WIDTHS
from gemmascope_fast.cli.arguments import check_outputs
from gemmascope_fast.files import identity
from gemmascope_fast.training.nested.recipe import METHODS as TRAINED

METHODS = ("minmax", *TRAINED)
STORED = (2, 3, 4, 6, 8)  # widths of a file of whole planes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="a transformers model or folder; 'demo' is Gemma 3 270M")
    parser.add_argument("--scope", choices=("ffn", "all-linear"), default="ffn", help="which layers (default: ffn)")
    parser.add_argument("--head", action="store_true", help="the output head too, as a code of its own")
    parser.add_argument(
        "--skip-experts", action="store_true", help="leave a mixture's experts as they are where they are fused weights"
    )
    parser.add_argument("--group-size", type=int, metavar="N", help="weights that share a scale (default: a row)")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="minmax",
        help="minmax: no training; omniquant: clipping and channel scales learned block by block; qat: the weights too",
    )
    parser.add_argument("--train-bits", default="8,4,2", help="widths trained together (default: %(default)s)")
    parser.add_argument("--lambdas", metavar="L,L,…", help="their weights in the loss (default: 0.1,0.1,1 for 8,4,2)")
    parser.add_argument(
        "--distill", type=float, default=0.1, help="weight of each width's teaching the next narrower one"
    )
    parser.add_argument("--no-scales", action="store_true", help="learn no channel scales")
    parser.add_argument("--feed", type=float, default=0.0, help="share of the teacher's activations between blocks")
    parser.add_argument(
        "--mode",
        choices=("prefix", "matquant", "alone"),
        default="prefix",
        help="the slicing trained for; alone: one width of --train-bits on a grid of its own",
    )
    parser.add_argument("--train-windows", type=int, default=80, help="training windows of 255 tokens")
    parser.add_argument(
        "--sampled-windows", type=int, default=0, metavar="N", help="and N of text that the model itself writes"
    )
    parser.add_argument(
        "--epochs", type=int, help="passes over them for each block (default: 2; qat with --steps: none, no blocks)"
    )
    parser.add_argument("--steps", type=int, default=0, help="qat: steps of end-to-end training")
    parser.add_argument("--batch", type=int, default=4, help="windows a step (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the codes there (safetensors)")
    parser.add_argument("--bits", type=int, default=8, help="width of that file: 2, 3, 4, 6 or 8 (default: 8)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure every width into this JSON; resumable")
    parser.add_argument("--text-file", type=Path, metavar="FILE", help="text to calibrate and measure on")
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 255 tokens, the text's last")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where training keeps its finished blocks")
    parser.add_argument("--quick", action="store_true", help="10 windows and a quarter of the training")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from gemmascope_fast.analysis.pair import load_model
    from gemmascope_fast.analysis.widths import measure
    from gemmascope_fast.quant import model as models
    from gemmascope_fast.training import arithmetic

    if args.quick:
        args.windows, args.train_windows = min(args.windows, 10), max(8, args.train_windows // 4)
    recipe = _check(args)
    model, tokenizer = load_model(args.model)
    model_id = identity.of_module(model)  # before the cast, which depends on the machine
    model = model.to(arithmetic.products())
    models.check_experts(model, args.scope, args.skip_experts)
    names = list(models.targets(model, args.scope))
    held_out, training = _windows(args, model, tokenizer)
    results = None if args.table is None else _table(args, model_id, held_out, training)
    codes = None if recipe is None else _train(args, recipe, model, training, model_id, tqdm)
    means = measure.input_means(model, names, training[:4])
    if results is not None:
        _show(measure.compare(model, held_out, cases(args), results, means, codes, lambda x: tqdm(x, desc="measuring")))
    if args.out is not None:
        models.quantize_(
            model,
            args.scope,
            group_size=args.group_size,
            mode="prefix" if args.mode == "prefix" else "matquant",
            head=args.head,
            means=means,
            codes=codes,
            skip_experts=args.skip_experts,
            progress=lambda x: tqdm(x, desc="packing"),
        )
        about: dict[str, Any] = {"model": args.model, "method": args.method, "scope": args.scope}
        size = models.save(model, args.out, args.bits, about)
        print(json.dumps({"file": str(args.out), "bytes": size, "layers": len(names), "bits": args.bits}))
    return 0


def _check(args: argparse.Namespace) -> Any:
    """The recipe of a method that trains, None for minmax; ValueError for what could not be done: asked before a model
    is loaded."""
    from gemmascope_fast.ops.codes import check_group_size
    from gemmascope_fast.training.nested.recipe import PUBLISHED, Recipe

    check_group_size(args.group_size)
    if args.out is None and args.table is None:
        raise ValueError("--out or --table: expected one of them, there is nothing to do")
    check_outputs(args, ("out", "table"), ("work",))
    if args.bits not in STORED and (args.mode == "prefix" or not 1 <= args.bits <= 8):
        raise ValueError(f"--bits must be 2, 3, 4, 6 or 8 (got {args.bits})")
    if args.steps and args.method != "qat":
        raise ValueError(f"--steps: expected method qat, got {args.method}")
    if args.method == "minmax":
        return None
    bits = tuple(int(b) for b in args.train_bits.split(","))
    weights = dict(PUBLISHED)
    if args.lambdas is not None:
        given = [float(value) for value in args.lambdas.split(",")]
        if len(given) != len(bits):
            raise ValueError(f"--lambdas: expected {len(bits)} weights for --train-bits {args.train_bits}, got {given}")
        weights = dict(zip(bits, given, strict=True))
    return Recipe(
        method=args.method,
        group_size=args.group_size,
        bits=bits,
        mode=args.mode,
        weights=weights,
        distill=args.distill,
        equivalent=not args.no_scales,
        feed=args.feed,
        epochs=(0 if args.steps else 2) if args.epochs is None else args.epochs,
        batch=args.batch,
    )


def _windows(args: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """(held-out windows, training windows)."""
    import torch
    from tqdm import tqdm

    from gemmascope_fast.training.nested import calibration

    text = args.text_file.read_text("utf-8") if args.text_file else None
    ids = calibration.python_topics(tokenizer) if text is None else calibration.windows(tokenizer, text)
    if ids.shape[0] < args.windows + args.train_windows:
        raise ValueError(f"--text-file: expected {args.windows + args.train_windows} windows, got {ids.shape[0]}")
    training = ids[: args.train_windows]
    if args.sampled_windows and args.method != "minmax":
        own = calibration.sampled(model, tokenizer.bos_token_id, args.sampled_windows, progress=tqdm)
        training = torch.cat([training, own])
    return ids[-args.windows :], training


def _table(args: argparse.Namespace, model_id: str, held_out: Any, training: Any) -> Any:
    """The figures of --table.  ValueError where they are of another model or text, or this method's of other settings:
    a figure that is there is not measured again."""
    from gemmascope_fast.analysis.widths.measure import Case, Results

    results = Results(args.table)
    results.claim("about", {"model": model_id, "text": identity.of_tensor(held_out)})
    settings: dict[str, Any] = {"training text": identity.of_tensor(training[:4])}
    if args.method != "minmax":
        names = ("lambdas", "distill", "no_scales", "feed", "epochs", "steps", "batch")
        settings = {name: getattr(args, name) for name in names} | {"training text": identity.of_tensor(training)}
    group = Case(args.scope, args.group_size).group
    results.claim(f"about/{args.scope}/{group}/{method_name(args)}", settings, first=True)
    return results


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "loss", "bits a weight")
    for key, figure in found.items():
        if "loss" in figure:
            table.add_row(key, f"{figure['loss']:.4f}", f"{figure.get('bits_per_weight', 16):.2f}")
    Console().print(table)


def _train(args: argparse.Namespace, recipe: Any, model: Any, training: Any, model_id: str, progress: Any) -> Any:
    from gemmascope_fast.training.nested.blocks import train
    from gemmascope_fast.training.nested.endtoend import finetune

    shared = {"work": args.work, "progress": progress, "model_id": model_id}
    codes = None
    if recipe.epochs:
        codes = train(model, training, recipe, scope=args.scope, **shared)
    if args.steps:
        codes = finetune(model, training, recipe, args.scope, steps=args.steps, start=codes, **shared)
    return codes


def cases(args: argparse.Namespace) -> list[Any]:
    """Every width under every slicing, with exact activations and with the kernel's int8."""
    from gemmascope_fast.analysis.widths.measure import Case

    frame = {"scope": args.scope, "group_size": args.group_size, "method": method_name(args)}
    rows = []
    slicings: tuple[str, ...] = ("prefix", "matquant", "matquant-extra")
    if args.method != "minmax":
        slicings = (args.mode,)
    if args.method != "minmax" and args.mode == "matquant":
        slicings = ("matquant", "matquant-extra")
    widths = WIDTHS if args.mode != "alone" else (int(args.train_bits),)
    for slicing in (*slicings, "alone") if args.method == "minmax" else slicings:
        for bits in widths:
            if bits == 8 and slicing != slicings[0]:
                continue  # no bit is dropped at 8: every slicing is the same code
            rows.append(Case(**frame, slicing=slicing, bits=bits))
    rows += [Case(**frame, slicing=slicings[0], bits=bits, activations="int8") for bits in widths]
    return rows


def method_name(args: argparse.Namespace) -> str:
    return args.method if args.method == "minmax" else f"{args.method}-{args.train_bits}-{args.mode}"
