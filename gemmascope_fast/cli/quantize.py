"""`gemmascope-fast quantize`: nested codes of a model's linear layers, as a file, and what each width costs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.files.atomic import make_folder
from gemmascope_fast.files.progress import bar

METHODS = ("minmax", "omniquant", "qat")
STORED = (2, 3, 4, 6, 8)  # widths of a file of whole planes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Nested low-bit codes of a model's linear layers, as a file, and the loss at each width.  It computes on the"
        " CPU and has no --device and --dtype: models run in bf16 where the processor multiplies it,"
        " otherwise in fp32; `info` shows which."
    )
    add = parser.add_argument
    common.add_model(parser)
    add("--scope", choices=("ffn", "all-linear"), default="ffn", help="which layers")
    add("--head", action="store_true", help="also the output head, as a code of its own")
    add_skip_experts(parser)
    add("--group-size", type=int, metavar="N", help="weights that share a scale (default: a row)")
    note = "minmax: no training; omniquant: clipping and channel scales learned block by block; qat: the weights too"
    add("--method", choices=METHODS, default="minmax", help=note)
    add("--train-bits", default="8,4,2", metavar="B,B,…", help="widths trained together")
    add("--lambdas", metavar="L,L,…", help="their weights in the loss (default: 0.1,0.1,1 for 8,4,2)")
    note = "weight of the loss by which each width teaches the next narrower one"
    add("--distill", type=float, default=0.1, metavar="X", help=note)
    add("--no-scales", action="store_true", help="learn no channel scales")
    note = "share of the unquantised model's activations between blocks"
    add("--feed", type=float, default=0.0, metavar="X", help=note)
    note = "slicing that is trained for; alone: one width of --train-bits, with a grid of its own"
    add("--mode", choices=("prefix", "matquant", "alone"), default="prefix", help=note)
    add("--train-windows", type=int, default=80, metavar="N", help="training windows of 255 tokens")
    note = "also train on N windows that the model itself writes"
    add("--sampled-windows", type=int, default=0, metavar="N", help=note)
    note = "passes over the windows for each block (default: 2; for qat with --steps: none)"
    add("--epochs", type=int, metavar="N", help=note)
    add("--steps", type=int, default=0, metavar="N", help="qat: steps of end-to-end training")
    add("--batch", type=int, default=4, metavar="N", help="windows of a step")
    common.add_out(parser, "the codes, as .safetensors")
    add("--bits", type=int, default=8, metavar="N", help="width of that file: 2, 3, 4, 6 or 8")
    note = "measure every width into this JSON file; continues one that exists"
    common.add_output(parser, "--table", note, "kept file")
    common.add_text(parser, ["pydoc"], "; to calibrate on (first) and measure on (last)")
    add("--windows", type=int, default=40, metavar="N", help="held-out windows of 255 tokens, the text's last")
    common.add_output(parser, "--work", "keep finished blocks of training here, and continue from them", "kept folder")
    add("--quick", action="store_true", help="10 windows and a quarter of the training")


def add_skip_experts(parser: argparse.ArgumentParser) -> None:
    note = "leave a mixture's experts unquantised where they are fused weights"
    parser.add_argument("--skip-experts", action="store_true", help=note)


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.pair import load_model
    from gemmascope_fast.analysis.widths import measure
    from gemmascope_fast.files import identity
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
    held_out, training = windows(args, tokenizer)
    training = _with_sampled(args, model, tokenizer, training)
    results = None if args.table is None else _table(args, model_id, held_out, training)
    codes = None if recipe is None else _train(args, recipe, model, training, model_id)
    means = measure.input_means(model, names, training[:4])
    if results is not None:
        _show(measure.compare(model, held_out, cases(args), results, means, codes, lambda x: bar(x, desc="measuring")))
    if args.out is not None:
        models.quantize_(
            model, args.scope, group_size=args.group_size, mode="prefix" if args.mode == "prefix" else "matquant",
            head=args.head, means=means, codes=codes, skip_experts=args.skip_experts,
            progress=lambda x: bar(x, desc="packing"),
        )  # fmt: skip
        make_folder(args.out.parent)
        about: dict[str, Any] = {"model": args.model, "method": args.method, "scope": args.scope}
        size = models.save(model, args.out, args.bits, about)
        print(json.dumps({"file": str(args.out), "bytes": size, "layers": len(names), "bits": args.bits}))
    return 0


def _check(args: argparse.Namespace) -> Any:
    """The recipe of a method that trains, None for minmax; ValueError for bad options, before a model is loaded."""
    from gemmascope_fast.ops.codes import check_group_size
    from gemmascope_fast.training.nested.recipe import PUBLISHED, Recipe

    check_group_size(args.group_size)
    if args.out is None and args.table is None:
        raise ValueError("expected --out FILE or --table FILE: without them there is nothing to do")
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
        method=args.method, group_size=args.group_size, bits=bits, mode=args.mode, weights=weights,
        distill=args.distill, equivalent=not args.no_scales, feed=args.feed, batch=args.batch,
        epochs=(0 if args.steps else 2) if args.epochs is None else args.epochs,
    )  # fmt: skip


def windows(args: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any]:
    """(held-out windows, training windows) of --text."""
    from gemmascope_fast.training.nested import calibration
    from gemmascope_fast.training.text import read_text

    ids = calibration.windows(tokenizer, "\n\n".join(map(read_text, args.text)))
    if ids.shape[0] < args.windows + args.train_windows:
        raise ValueError(f"--text: expected {args.windows + args.train_windows} windows, got {ids.shape[0]}")
    return ids[-args.windows :], ids[: args.train_windows]


def _with_sampled(args: argparse.Namespace, model: Any, tokenizer: Any, training: Any) -> Any:
    import torch

    from gemmascope_fast.training.nested import calibration

    if not args.sampled_windows or args.method == "minmax":
        return training
    own = calibration.sampled(model, tokenizer.bos_token_id, args.sampled_windows, progress=bar)
    return torch.cat([training, own])


def _table(args: argparse.Namespace, model_id: str, held_out: Any, training: Any) -> Any:
    """The figures of --table, which are not measured again.  ValueError where they are of another model or text, or
    those of this method of other settings."""
    from gemmascope_fast.analysis.widths.measure import Case, Results
    from gemmascope_fast.files import identity

    make_folder(args.table.parent)
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
    rows = [
        (key, f"{figure['loss']:.4f}", f"{figure.get('bits_per_weight', 16):.2f}")
        for key, figure in found.items()
        if "loss" in figure
    ]
    common.print_table(("", "loss", "bits per weight"), rows)


def _train(args: argparse.Namespace, recipe: Any, model: Any, training: Any, model_id: str) -> Any:
    from gemmascope_fast.training.nested.blocks import train
    from gemmascope_fast.training.nested.endtoend import finetune

    shared = {"work": args.work, "progress": bar, "model_id": model_id}
    codes = None
    if recipe.epochs:
        codes = train(model, training, recipe, scope=args.scope, **shared)
    if args.steps:
        codes = finetune(model, training, recipe, args.scope, steps=args.steps, start=codes, **shared)
    return codes


def cases(args: argparse.Namespace) -> list[Any]:
    """Every width under every slicing, with exact activations and with the kernel's int8."""
    from gemmascope_fast.analysis.widths.measure import Case
    from gemmascope_fast.analysis.widths.mixnmatch import WIDTHS

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
