"""The comparison on a real model: which runs to make and which figures to measure; each figure is stored at once.

A run is one model, scope, grouping and base method; its cases are widths, slicings and activations of the same codes.
Training runs keep their finished blocks, and cases their figures, so the comparison can be stopped at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.analysis.widths import measure, mixnmatch
from gemmascope_fast.analysis.widths.measure import Case, Results
from gemmascope_fast.analysis.widths.mixnmatch import WIDTHS
from gemmascope_fast.files import identity
from gemmascope_fast.files.atomic import make_folder
from gemmascope_fast.quant.model import gained, quantize_, restored, set_bits, targets
from gemmascope_fast.quant.trained import Trained
from gemmascope_fast.training.nested.recipe import ALONE, Recipe


@dataclass(frozen=True)
class Run:
    """One model to quantise, train and measure."""

    scope: str
    group_size: int | None
    method: str  # minmax, omniquant, qat
    bits: tuple[int, ...] = (8, 4, 2)
    mode: str = "prefix"  # for training: prefix, matquant, alone
    dithered: bool = False
    widths: tuple[int, ...] = WIDTHS

    @property
    def label(self) -> str:
        """Name of the method in the keys of the figures."""
        name = self.method
        if self.method != "minmax":
            name += f"-{','.join(map(str, self.bits))}-{self.mode}"
        return name + ("-dithered" if self.dithered else "")

    def cases(self) -> list[Case]:
        slicings: tuple[str, ...] = (self.mode,)
        if self.method == "minmax":
            slicings = ("prefix", "matquant", "matquant-extra", ALONE)
        elif self.mode == "matquant":
            slicings = ("matquant", "matquant-extra")
        widths = self.bits if self.mode == ALONE else self.widths
        rows = []
        for activations in ("exact", "int8"):
            for slicing in slicings:
                # at 8 bits nothing is dropped, so all slicings are the same code
                here = [b for b in widths if b < 8 or slicing == slicings[0]]
                rows += [Case(self.scope, self.group_size, self.label, b, slicing, activations) for b in here]
        return rows


def runs(quick: bool = False) -> list[Run]:
    """The grid: FFN per channel with all cases; all linear layers, and groups of 32 (also on dithered weights), at 4
    and 2 bits for the method that learns clipping.  quick: only FFN per channel, untrained and learned clipping."""
    found = [Run("ffn", None, "minmax")]
    for method in ("omniquant",) if quick else ("omniquant", "qat"):
        found += [Run("ffn", None, method, mode=mode) for mode in ("prefix", "matquant")]
        found += [Run("ffn", None, method, (bits,), ALONE) for bits in ((4, 2) if quick else WIDTHS)]
    if quick:
        return found
    for scope, group, dithered in (
        ("all-linear", None, False),
        ("ffn", 32, False),
        ("ffn", 32, True),
        ("all-linear", 32, True),
    ):
        few = Run(scope, group, "omniquant", dithered=dithered, widths=(4, 2))
        found += [replace(few, method="minmax"), few, replace(few, mode="matquant")]
        found += [replace(few, bits=(bits,), mode=ALONE) for bits in (4, 2)]
    return found


@torch.no_grad()
def dither(weight: Tensor, seed: int) -> Tensor:
    """Move weights randomly within the cells that they were rounded to before: in each block of 32, the cell is the
    smallest distance between two values.  Otherwise weights from a low-bit file would favour another low-bit code."""
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -columns % 32)).reshape(rows, -1, 32)
    gaps = padded.sort(-1).values.diff(dim=-1)
    # rounding differences are not cells
    least = padded.abs().amax(-1, keepdim=True) * 1e-3
    cell = torch.where(gaps > least, gaps, torch.full_like(gaps, torch.inf)).amin(-1, keepdim=True)
    cell = torch.where(cell.isfinite(), cell, torch.zeros_like(cell))
    noise = torch.rand(padded.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    return (padded + noise * cell).reshape(rows, -1)[:, :columns].to(weight.dtype)


@dataclass
class Comparison:
    """What all runs share."""

    model: nn.Module
    training: Tensor  # windows [n, 256]
    held_out: Tensor
    work: Path
    recipe: dict[str, Any] = field(default_factory=dict)  # of all trained runs: epochs, rates, ...
    steps: int = 0  # of "qat", which is trained end to end; 0: block by block like the others
    progress: Callable[..., Any] = lambda x, **_: x
    more: dict[str, Any] = field(default_factory=dict)  # more that identifies the folder, such as the SAE

    def __post_init__(self) -> None:
        """Raises ValueError, which says what differs, if `work` belongs to another model, text, recipe or SAE."""
        make_folder(self.work)
        self.results = Results(self.work / "results.json")
        self.model_id = identity.of_module(self.model)
        text, training = identity.of_tensor(self.held_out), identity.of_tensor(self.training)
        about = {"model": self.model_id, "text": text, "training text": training}
        self.results.claim("about", about | {"recipe": self.recipe, "steps": self.steps} | self.more)

    def do(self, run: Run) -> None:
        """Train and measure one run, as far as it is not done yet."""
        cases = [case for case in run.cases() if case.key() not in self.results]
        if not cases:
            return
        if "full" not in self.results:
            self.results.put("full", measure.full(self.model, self.held_out))
        with self._weights(run):
            full = f"full-{run.scope}-dithered"
            if run.dithered and full not in self.results:
                self.results.put(full, measure.full(self.model, self.held_out))
            trained = None if run.method == "minmax" else self.train(run)
            names = list(targets(self.model, run.scope))
            means = measure.input_means(self.model, names, self.training[:4])
            measure.compare(self.model, self.held_out, cases, self.results, means, trained, self._bar(run))

    def train(self, run: Run) -> Trained:
        """The run's codes, from its folder if they are complete."""
        from gemmascope_fast.training.nested.blocks import train
        from gemmascope_fast.training.nested.endtoend import finetune

        recipe = Recipe(run.method, run.group_size, run.bits, run.mode, **self.recipe)
        folder = self.work / ("dithered" if run.dithered else "blocks")
        # dithering depends only on the scope, which is part of a run's key
        shared: dict[str, Any] = {"work": folder, "progress": self.progress, "model_id": self.model_id}
        if run.method == "qat" and self.steps:
            return finetune(self.model, self.training, recipe, run.scope, steps=self.steps, **shared)
        return train(self.model, self.training, recipe, run.scope, **shared)

    def mix(self, run: Run, points: int = 6, windows: int = 8) -> list[mixnmatch.Point]:
        """Mix'n'Match of a run's codes: patterns and search, as JSON."""
        few = self.held_out[:windows]
        with ExitStack() as stack:
            stack.enter_context(self._weights(run))
            trained = None if run.method == "minmax" else self.train(run)
            stack.enter_context(gained(self.model, trained.gains if trained else {}))
            before = targets(self.model, run.scope)
            with restored(self.model, before):
                served = quantize_(
                    self.model, run.scope, group_size=run.group_size, codes=trained, activations="exact",
                    skip_experts=True,
                )  # fmt: skip
                parts = mixnmatch.units(served, WIDTHS, "prefix")
                prefix = f"mix/{run.scope}/{run.label}/{run.group_size}/{windows}"
                added = mixnmatch.sensitivities(
                    served,
                    lambda: measure.mean_loss(served, few),
                    parts,
                    lambda key, value: self._known(f"{prefix}/alone/{key}", value),
                )
                found = []
                choices = mixnmatch.candidates(parts, added, points)
                for label, choice in self.progress(list(choices.items()), desc="mix'n'match"):
                    mixnmatch.apply(served, choice, parts)
                    loss = self._known(f"{prefix}/{label}", lambda: measure.mean_loss(served, self.held_out))
                    found.append(mixnmatch.Point(label, choice, mixnmatch.total(choice, parts), loss))
                set_bits(served, 8)
        mixnmatch.save_json(found, self.work / "mixnmatch.json", {"scope": run.scope, "method": run.label})
        return found

    def _known(self, key: str, value: Callable[[], float]) -> float:
        if key not in self.results:
            self.results.put(key, {"loss": value()})
        return float(self.results.figures[key]["loss"])

    def _bar(self, run: Run) -> Callable[[list[Any]], Any]:
        return lambda rows: self.progress(rows, desc=f"{run.scope} {run.label}")

    def _weights(self, run: Run) -> Any:
        """The unchanged model, or with the weights of the run's scope dithered."""
        if not run.dithered:
            return restored(self.model, {})
        return dithered(self.model, run.scope)


class dithered:
    """Within the block the linear layers of a scope have dithered weights."""

    def __init__(self, model: nn.Module, scope: str) -> None:
        self.linears = targets(model, scope)

    def __enter__(self) -> None:
        self.before = {name: linear.weight.data for name, linear in self.linears.items()}
        for seed, linear in enumerate(self.linears.values()):
            linear.weight.data = dither(linear.weight.data, seed)

    def __exit__(self, *_: object) -> None:
        for name, linear in self.linears.items():
            linear.weight.data = self.before[name]


def rows_of(figures: dict[str, Any]) -> Iterator[tuple[str, str, dict[int, float], dict[int, float]]]:
    """(scope and groups, method and slicing, loss by width with exact activations, the same with int8)."""
    table: dict[tuple[str, str], tuple[dict[int, float], dict[int, float]]] = {}
    for key, figure in figures.items():
        parts = key.split("/")
        if len(parts) != 6 or parts[0] not in ("ffn", "all-linear"):
            continue
        scope, group, method, slicing, bits, activations = parts
        if slicing == ALONE:
            method = method.split("-")[0] + ("-dithered" if method.endswith("-dithered") else "")
        exact, rounded = table.setdefault((f"{scope} {group}", f"{method} {slicing}"), ({}, {}))
        (exact if activations == "exact" else rounded)[int(bits.removeprefix("int"))] = figure["loss"]
    for (where, what), (exact, rounded) in sorted(table.items()):
        yield where, what, exact, rounded


def markdown(figures: dict[str, Any]) -> str:
    """Both tables, with what is measured so far."""
    lines = []
    if "full" in figures:
        where = f" (computed in {figures['full']['arithmetic']})" if "arithmetic" in figures["full"] else ""
        lines += [f"Loss (nats a token) of the unquantised model: {figures['full']['loss']:.3f}{where}.", ""]
    lines += ["| layers | method, slicing | " + " | ".join(f"int{b}" for b in WIDTHS) + " |", "|---|---|" + "---|" * 5]
    for where, what, exact, rounded in rows_of(figures):
        cells = [
            " ".join(
                filter(None, [f"{exact[b]:.3f}" if b in exact else "", f"({rounded[b]:.3f})" if b in rounded else ""])
            )
            for b in WIDTHS
        ]
        lines.append(f"| {where} | {what} | " + " | ".join(cells) + " |")
    sae = {key: f for key, f in figures.items() if key.startswith("sae/") and "fvu" in f}
    if sae:
        lines += ["", "| SAE | L0 | FVU | delta_loss | Jaccard | MB |", "|---|---|---|---|---|---|"]
        for key, f in sae.items():
            lines.append(
                f"| {key.removeprefix('sae/')} | {f['l0']:.1f} | {f['fvu']:.4f} | {f['delta_loss']:.4f} |"
                f" {f['jaccard']:.4f} | {f['nbytes'] / 1e6:.2f} |"
            )
    return "\n".join(lines) + "\n"
