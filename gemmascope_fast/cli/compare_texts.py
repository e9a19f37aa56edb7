"""`gemmascope-fast compare texts`: which features differ between two sets of texts, or pairs of answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.errors import require
from gemmascope_fast.files.progress import bar
from gemmascope_fast.files.results import save_figure, shown

if TYPE_CHECKING:
    import numpy as np

    from gemmascope_fast.analysis.compare.pairs import Pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Features of two sets of texts with effect size, test and false discovery rate; or of preferred against"
        " rejected answers, before and after correcting for length and format."
    )
    common.add_pair(parser)
    note = "the first set, as `extract --text` takes it; 'demo:past' and 'demo:present' are bundled"
    parser.add_argument("--a", nargs="+", metavar="FILE", help=note)
    parser.add_argument("--b", nargs="+", metavar="FILE", help="the second set")
    note = "instead of two sets: JSON lines with chosen, rejected and optionally prompt; 'demo' is bundled"
    parser.add_argument("--pairs", type=Path, metavar="FILE", help=note)
    note = "with --pairs: --model is a reward model; show what its features add to the reward"
    parser.add_argument("--reward", action="store_true", help=note)
    note = "with --reward: the rewards also under another prompt, without one, without format and at equal length"
    parser.add_argument("--contexts", action="store_true", help=note)
    note = "with --pairs: do not correct for length and format"
    parser.add_argument("--no-covariates", action="store_true", help=note)
    common.add_documents(parser, "line", text=False)
    parser.add_argument("--pool", default="mean", metavar="NAME", help="over a text's tokens: mean, max or rate")
    parser.add_argument("--test", default="rank", metavar="NAME", help="'rank' (Mann-Whitney) or 'permutation'")
    parser.add_argument("--layers", action="store_true", help="also how separable the sets are at every layer")
    common.add_window(parser)
    parser.add_argument("--top", type=int, default=15, metavar="N", help="rows of the table")
    common.add_json(parser)
    common.add_plot(parser)


def run(args: argparse.Namespace) -> int:
    require("scipy", "analysis", "compare-texts")
    if (args.pairs is None) == (args.a is None or args.b is None):
        raise ValueError("expected --a FILE and --b FILE, or --pairs FILE")
    if args.reward and (args.pairs is None or args.layers):
        raise ValueError("--reward: expected --pairs, and no --layers")
    if args.contexts and not args.reward:
        raise ValueError("--contexts: expected --reward")
    from gemmascope_fast.cli.extract import sites_of

    first, second, z = _texts(args)
    from gemmascope_fast.analysis.compare.reward import load_reward_model
    from gemmascope_fast.analysis.pair import load_model, load_sae

    sae = load_sae(args.sae, args.sae_id, args.device)
    sites_of(sae, args.layer, args.anywhere)
    key = args.layer if args.layer is not None else sae.cfg.site
    model, tokenizer = (load_reward_model if args.reward else load_model)(args.model, args.device, args.dtype)
    rows, pairs = _compare(args, model, tokenizer, {key: sae}, first, second, z)
    out: dict[str, Any] = {"texts": [len(first), len(second)], "features": _records(rows)}
    _show(rows, args.top, f"{len(first)} texts against {len(second)}")
    if pairs is not None:
        out["pairs"] = pairs
        _show_pairs(pairs[: args.top])
    if args.contexts:
        out["contexts"] = _contexts(args, model, tokenizer, {key: sae})
        _show_contexts(out["contexts"], args.top)
    if args.layers:
        out["layers"] = depth(model, tokenizer, {key: sae}, first, second, args.window, args.pairs is not None)
        _show_layers(out["layers"])
    common.write_figures(args, out)
    if args.plot is not None:
        _plot(rows, out.get("layers"), args.plot)
    return 0


def _texts(args: argparse.Namespace) -> tuple[Any, Any, np.ndarray | None]:
    """(first set, second set, differences of covariates for pairs)."""
    import numpy as np

    from gemmascope_fast.analysis.compare.pairs import answers
    from gemmascope_fast.analysis.compare.sets import covariates
    from gemmascope_fast.analysis.extraction.sources import documents, resolve

    if args.pairs is None:
        sets = []
        for flag, names in (("--a", args.a), ("--b", args.b)):
            found = ["".join(d.parts) for d in documents(resolve(names), args.column, args.split)]
            found = [text for text in found if text.strip()]
            if len(found) < 2:
                raise ValueError(f"{flag}: expected at least two texts, got {len(found)}")
            sets.append(found)
        return sets[0], sets[1], None
    pairs = _pairs(args)
    if args.contexts:
        answers(pairs, "other")  # an error for pairs without prompts, before anything is loaded
    z = None if args.no_covariates else np.array([covariates(p.chosen) - covariates(p.rejected) for p in pairs])
    return *answers(pairs), z


def _pairs(args: argparse.Namespace) -> list[Pair]:
    from gemmascope_fast.analysis.compare.pairs import load_pairs
    from gemmascope_fast.checkpoints.bundled import example

    return load_pairs(example(args.pairs, "preferences.jsonl"))


def _contexts(args: argparse.Namespace, model: Any, tokenizer: Any, sites: Any) -> dict[str, Any]:
    """Rewards and contributions of the pairs' answers in every context."""
    from gemmascope_fast.analysis.compare.pairs import CONTEXTS, answers
    from gemmascope_fast.analysis.compare.reward import attributed, contexts_of

    pairs = _pairs(args)
    found = {}
    with bar(total=2 * len(pairs) * len(CONTEXTS), desc="contexts", unit="text") as reading:
        options = {"window": args.window, "progress": reading.update}
        for context in CONTEXTS:
            (a, of_a), (b, of_b) = (
                attributed(model, tokenizer, sites, texts, **options) for texts in answers(pairs, context)
            )
            found[context] = a, b, of_a, of_b
    return contexts_of(found)


def _compare(args: Any, model: Any, tokenizer: Any, sites: Any, first: Any, second: Any, z: Any) -> tuple[dict, Any]:
    """(a row for each feature, with --reward what changes each pair's rewards)."""
    from gemmascope_fast.analysis.compare.pooled import pooled
    from gemmascope_fast.analysis.compare.reward import attributed, ranked
    from gemmascope_fast.analysis.compare.sets import compare_pairs, compare_sets

    with bar(total=len(first) + len(second), desc="reading", unit="text") as reading:
        options = {"window": args.window, "progress": reading.update}
        if args.reward:
            (a, of_a), (b, of_b) = (attributed(model, tokenizer, sites, texts, **options) for texts in (first, second))
            return compare_pairs(a, b, z), ranked(a, b, (of_a, of_b))
        a, b = (pooled(model, tokenizer, sites, texts, args.pool, **options)[0] for texts in (first, second))
    return (compare_sets(a, b, test=args.test) if args.pairs is None else compare_pairs(a, b, z)), None


def depth(
    model: Any, tokenizer: Any, sites: Any, first: list[str], second: list[str], window: int = 1023,
    paired: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Separability of the two sets at the output of every layer, and on the latents where there is an SAE."""
    import numpy as np

    from gemmascope_fast.analysis.compare.pooled import pool
    from gemmascope_fast.analysis.compare.sets import separability
    from gemmascope_fast.analysis.extraction.texts import read_texts
    from gemmascope_fast.attach import Activations
    from gemmascope_fast.attach.transformers.structure import Structure

    layers = range(len(Structure(model).stack()[1]))
    keys: dict[Any, Any] = {(layer, "resid"): Activations() for layer in layers}
    ((own, sae),) = sites.items()
    labels = [True] * len(first) + [False] * len(second)
    means: dict[Any, list[np.ndarray]] = {key: [] for key in (*keys, "latents")}
    with bar(total=len(labels), desc="every layer", unit="text") as reading:
        for _, rows in read_texts(model, tokenizer, keys, [*first, *second], window=window, progress=reading.update):
            for key in keys:
                means[key].append(rows[key].double().mean(0).numpy())
        for _, rows in read_texts(model, tokenizer, {own: sae}, [*first, *second], window=window):
            dense = np.zeros(sae.cfg.d_sae)
            features, values = pool(rows[own], "mean")
            dense[features] = values
            means["latents"].append(dense)
    name = getattr(own, "hook_name", f"layer {own}")
    named = [*((layer, (layer, "resid")) for layer in layers), (f"latents, {name}", "latents")]
    return [{"layer": n, "auc": separability(np.array(means[key]), labels, paired=paired)} for n, key in named]


def _records(rows: dict) -> list[dict[str, Any]]:
    names = list(rows)
    return [dict(zip(names, each, strict=True)) for each in zip(*(rows[n].tolist() for n in names), strict=True)]


def _show(rows: dict, top: int, title: str) -> None:
    names = list(rows)
    # few digits: the table must fit a terminal of 80 columns; the JSON has all of them
    heads = [n.replace("_", " ").replace("difference", "differs by") for n in names]
    digits = {n: 2 if n[0] in "pq" or n == "difference" else 3 for n in names}
    shown_rows = [
        [str(v) if n == "feature" else f"{v:.{digits[n]}g}" for n, v in record.items()]
        for record in _records({n: rows[n][:top] for n in names})
    ]
    common.print_table(heads, shown_rows, f"{title}: {len(rows['feature'])} features tested")
    for name in (n for n in names if n.startswith("q")):
        print(f"features with {name.replace('_', ' ')} < 0.05: {int((rows[name] < 0.05).sum())}")


def _show_pairs(pairs: list[dict[str, Any]]) -> None:
    rows = []
    for row in pairs:
        # no space within: a narrow terminal breaks lines between features
        by = "  ".join(f"{f['feature']}:{f['difference']:+.3g}" for f in row["features"][:4])
        rows.append((str(row["pair"]), f"{row['chosen']:.4g}", f"{row['rejected']:.4g}", by))
    common.print_table(("pair", "chosen", "rejected", "adds to the difference, feature:by"), rows, "Rewards")


def _show_contexts(found: dict[str, Any], top: int) -> None:
    rows = [
        (name, f"{row['margin']:.4g}", f"{row['accuracy']:.2f}", f"{row['attributed']:.4g}")
        for name, row in found["contexts"].items()
    ]
    heads = ("context of the answers", "margin", "chosen is higher", "from features")
    common.print_table(heads, rows, "Reward of the preferred answer minus that of the rejected one")
    names = list(found["contexts"])
    table = [
        (str(row["feature"]), *(f"{row[name]:+.3g}" for name in names), "yes" if row["stays"] else "")
        for row in found["features"][:top]
    ]
    common.print_table(("feature", *names, "stays"), table, "What features add to the margin")
    for name, group in found["groups"].items():
        print(f"{group['features']} features, {name}: {group['carries']:+.4g} of the margin")


def _show_layers(found: list[dict[str, Any]]) -> None:
    rows = [(str(row["layer"]), shown(row["auc"])) for row in found]
    common.print_table(("layer", "AUC of held-out texts"), rows, "How separable the sets are")


def _plot(rows: dict, layers: list[dict[str, Any]] | None, path: Path) -> None:
    """Effect against significance; for pairs effect before against after; and AUC by layer."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11 if layers else 6.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if layers else 1, squeeze=False)[0]
    if "after" in rows:
        axes[0].scatter(rows["before"], rows["after"], s=6, c=np.where(rows["q_after"] < 0.05, "C1", "#999"))
        axes[0].axline((0, 0), slope=1, color="#888", linewidth=0.8)
        axes[0].set(xlabel="effect before covariates", ylabel="effect after (orange: q < 0.05)")
    else:
        p = -np.log10(np.maximum(rows["p"], 1e-300))
        axes[0].scatter(rows["d"], p, s=6, c=np.where(rows["q"] < 0.05, "C1", "#999"))
        axes[0].set(xlabel="Cohen's d (right: stronger in a)", ylabel="-log10 p (orange: q < 0.05)")
    if layers:
        axes[1].plot([row["auc"] for row in layers[:-1]], "o-", label="activations")
        axes[1].axhline(layers[-1]["auc"], color="C1", linestyle="--", label=layers[-1]["layer"])
        axes[1].axhline(0.5, color="#888", linewidth=0.8)
        axes[1].set(xlabel="layer", ylabel="AUC of held-out texts")
        axes[1].xaxis.get_major_locator().set_params(integer=True)
        axes[1].legend()
    save_figure(figure, path)
