"""`gemmascope-fast watch`: a model writes, token by token, beside the SAE's features of each token; edits of features.

The model continues each line that is typed, and the features of every token are shown meanwhile.  With edits the model
writes twice, without and with them, so that the difference is visible.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.files.progress import status

if TYPE_CHECKING:
    import torch

    from gemmascope_fast.attach import Edit, Tokens
    from gemmascope_fast.ops.latents import SparseLatents

HELP = (
    "Type a text and the model continues it.  /clamp FEATURE VALUE, /add FEATURE STRENGTH and /ablate FEATURE edit"
    " features, /off removes all edits, /new forgets the text so far, /quit exits.  Ctrl-C stops the writing."
)
ROWS = 8  # tokens whose features are shown at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_prompt(parser, "continue it and exit (default: ask for lines until /quit)")
    edits: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--clamp", metavar="FEATURE=VALUE", help="set this feature to a value", **edits)
    parser.add_argument("--add", metavar="FEATURE=STRENGTH", help="add a strength to this feature", **edits)
    parser.add_argument("--ablate", type=int, metavar="FEATURE", help="set this feature to zero", **edits)
    parser.add_argument("--max-tokens", type=int, default=40, metavar="N", help="tokens written for each line")
    parser.add_argument("--top", type=int, default=4, metavar="N", help="features shown per token")
    parser.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    common.add_seed(parser)
    common.add_pair(parser)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    common.check_least(args, "max_tokens", "top")
    console = Console()
    with status("loading the model and the SAE"):
        session = Session(*common.load_pair(args), args)
    for kind, given in (("clamp", args.clamp), ("add", args.add)):
        for each in given:
            session.hold(kind, *each.partition("=")[::2])
    for feature in args.ablate:
        session.hold("ablate", str(feature))
    if args.prompt is not None:
        show(console, session, args.prompt)
        return 0
    console.print(HELP)
    while (line := _ask(console)) is not None:
        try:
            if not session.command(line):
                show(console, session, line)
        except KeyboardInterrupt:  # ends what is being written, not the session
            console.print("interrupted")
        except ValueError as error:
            console.print(f"[red]{error}[/red]")
        except StopIteration:
            break
    return 0


def _ask(console: Any) -> str | None:
    """The next line; None at the end of the input."""
    try:
        while not (line := console.input("[bold]> [/bold]") if sys.stdin.isatty() else input()):
            pass
    except (EOFError, KeyboardInterrupt):
        return None
    return line


@dataclass
class Step:
    """A token that the model read, and its strongest features."""

    token: str
    features: list[tuple[int, float]]


@dataclass
class Writing:
    """One reply as it grows."""

    prompt: str
    steps: list[Step] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    hooks: float = 0.0


class Session:
    """A model, its SAE, the text so far, and the edits."""

    def __init__(self, model: Any, tokenizer: Any, sae: Any, layer: int, args: argparse.Namespace) -> None:
        self.model, self.tokenizer, self.sae, self.layer, self.args = model, tokenizer, sae, layer, args
        self.held: list[Edit] = []
        self.text = ""

    def hold(self, kind: str, feature: str, amount: str = "") -> None:
        """Add an edit from its words.  ValueError for a feature that the SAE lacks, or an amount that is no number."""
        from gemmascope_fast.attach import Ablate, Add, Clamp

        try:
            number = int(feature)
            value = float(amount) if kind != "ablate" else 0.0
        except ValueError as error:
            raise ValueError(f"{kind}: expected a feature and a number, got {feature!r} {amount!r}") from error
        if not 0 <= number < self.sae.d_sae:
            raise ValueError(f"{kind}: expected a feature in [0, {self.sae.d_sae}), got {number}")
        made = {"clamp": lambda: Clamp(number, value), "add": lambda: Add(number, value)}
        edit = made.get(kind, lambda: Ablate(number))()
        # one edit per feature: the newest
        self.held = [e for e in self.held if number not in e.features] + [edit]  # type: ignore[attr-defined]

    def command(self, line: str) -> bool:
        """Whether the line was a command, now done.  StopIteration for /quit, ValueError for an unknown one."""
        if not line.startswith("/"):
            return False
        name, *words = line[1:].split()
        if name == "quit":
            raise StopIteration
        if name == "off":
            self.held = []
        elif name == "new":
            self.text = ""
        elif name in ("clamp", "add", "ablate") and len(words) == (1 if name == "ablate" else 2):
            self.hold(name, *words)
        else:
            raise ValueError(f"{line}: {HELP}")
        return True

    def write(self, text: str, edits: list[Edit], seen: Callable[[Writing], None]) -> Writing:
        """Continue `text`; `seen` is called at every token."""
        import torch

        from gemmascope_fast.attach import attach

        writing = Writing(text)
        inputs = self.tokenizer(text, return_tensors="pt").to(self.model.device)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}  # some add token types
        mode = "splice+error" if edits else "observe"
        watcher = _Watcher(self.tokenizer, writing, self.args.top)
        # keep=False: a conversation may be long, and what is shown is in the steps
        run = attach(self.model, {self.layer: self.sae}, mode=mode, edits=edits, tokens="content", keep=False)
        begin = time.perf_counter()

        def told() -> None:
            writing.seconds, writing.hooks = time.perf_counter() - begin, run.seconds
            seen(writing)

        with torch.random.fork_rng(devices=[]), torch.inference_mode(), run:
            torch.manual_seed(self.args.seed)
            run.watch(watcher)
            self.model.generate(
                **inputs, max_new_tokens=self.args.max_tokens, do_sample=self.args.sample,
                streamer=_Streamer(self.tokenizer, writing, told),
            )  # fmt: skip
        return writing


class _Watcher:
    """An observer that keeps each token's strongest features."""

    def __init__(self, tokenizer: Any, writing: Writing, top: int) -> None:
        self.tokenizer, self.writing, self.top = tokenizer, writing, top

    def update(self, latents: SparseLatents, tokens: Tokens) -> None:
        values, features = latents.topk(self.top)
        for token, own, ids in zip(tokens.token_id.tolist(), values.tolist(), features.tolist(), strict=True):
            fired = [(f, v) for f, v in zip(ids, own, strict=True) if f >= 0]
            self.writing.steps.append(Step(self.tokenizer.decode([token]), fired))


class _Streamer:
    """Called by generate: with the prompt first, then with each new token."""

    def __init__(self, tokenizer: Any, writing: Writing, told: Callable[[], None]) -> None:
        self.tokenizer, self.writing, self.told, self.prompt = tokenizer, writing, told, True

    def put(self, ids: torch.Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        self.writing.ids += ids.reshape(-1).tolist()
        # the whole reply anew: a character may need several tokens
        self.writing.text = self.tokenizer.decode(self.writing.ids, skip_special_tokens=True)
        self.told()

    def end(self) -> None:
        self.told()


# ---- the view -------------------------------------------------------------------------------------------


def show(console: Any, session: Session, line: str) -> None:
    """The model continues the text so far and the line while its features are shown; with edits, first without them."""
    from rich.live import Live

    text = session.text + line
    ways: list[tuple[str, list[Edit]]] = [("as it is", [])]
    if session.held:
        ways.append((", ".join(_named(edit) for edit in session.held), session.held))
    done: list[tuple[str, Writing]] = []
    with Live(console=console, refresh_per_second=12) as live:
        for name, edits in ways:

            def seen(writing: Writing, name: str = name) -> None:
                live.update(_view([*done, (name, writing)]))

            done.append((name, session.write(text, edits, seen)))
            live.update(_view(done))
    session.text = text + done[-1][1].text


def _named(edit: Any) -> str:
    return f"{type(edit).__name__.lower()} {edit.feature}" + (f" at {edit.amount:g}" if edit.NUMBER else "")


def _view(writings: list[tuple[str, Writing]]) -> Any:
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    panels = []
    for name, writing in writings:
        body = Text(writing.prompt, style="dim") + Text(writing.text, style="bold")
        rate = len(writing.ids) / writing.seconds if writing.seconds else 0.0
        share = 100 * writing.hooks / max(writing.seconds - writing.hooks, 1e-9)
        about = f"{rate:.1f} tokens/s, in the hooks {share:.1f} % of the model's time"
        panels.append(Panel(body, title=name, subtitle=about))
    return Group(*panels, _features(writings[-1][1]))


def _features(writing: Writing) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("token read", "strongest features", expand=True, title_justify="left")
    shown = writing.steps[-ROWS:]
    most = max((value for step in shown for _, value in step.features), default=1.0)
    for step in shown:
        cells = Text()
        for feature, value in step.features:
            bar = "█" * max(1, round(6 * value / most))
            cells.append(f"{feature:>6} ", style="cyan").append(f"{bar:<6} ", style="green").append(f"{value:<9.4g}")
        table.add_row(Text(repr(step.token)), cells)
    return table
