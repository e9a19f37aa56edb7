"""A complete evaluation: two passes over a text of any length, in bounded memory, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemmascope_fast.analysis.evaluation.losses import Losses
from gemmascope_fast.analysis.evaluation.reconstruction import Reconstruction, check_kind
from gemmascope_fast.attach import attach
from gemmascope_fast.attach.entries import entries
from gemmascope_fast.attach.tokens import content_of
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files import identity
from gemmascope_fast.files.write import write_safetensors
from gemmascope_fast.sae.base import Coder
from gemmascope_fast.sae.sites import Site
from gemmascope_fast.training.activations import activations_at, windows

PIECE = 1 << 20  # characters tokenised at a time
KEY = "gemmascope_fast.analysis.evaluation"
PASSES = ("reconstruction", "losses")


def pieces(lines: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """Join lines into pieces of about `size` characters; a longer line is cut."""
    held: list[str] = []
    length = 0
    for line in lines:
        for start in range(0, len(line), size):
            part = line[start : start + size]
            if length and length + len(part) > size:
                yield "".join(held)
                held, length = [], 0
            held.append(part)
            length += len(part)
    if length:
        yield "".join(held)


def token_batches(tokenizer: Any, text: Callable[[], Iterable[str]], window: int) -> Iterator[Tensor]:
    """Token ids int64 [B, S]: windows of `window` content tokens after a BOS (for encoders between CLS and SEP); no
    window spans two pieces."""
    for piece in pieces(text()):
        yield from windows(tokenizer(piece, add_special_tokens=False)["input_ids"], tokenizer, window)


def content_mask(tokenizer: Any, ids: Tensor) -> Tensor:
    """bool [B, S]: False at BOS, EOS, PAD and the tokenizer's other special tokens."""
    return ~torch.isin(ids, torch.tensor(sorted(tokenizer.all_special_ids)))


def sites_of(sae: Any, layer: int | Site | None = None, anywhere: bool = False) -> tuple[Site, Site]:
    """(where the SAE reads, where it writes: elsewhere for a transcoder), from its checkpoint or at another layer.

    ValueError for a coder of several sites, or if there is no site in either; AttachError for a site other than the
    checkpoint's, unless `anywhere`.
    """
    check_kind(sae)
    if layer is None and sae.cfg.site is None:
        raise ValueError("layer: expected a layer number, because the checkpoint names no site")
    (entry,) = entries(sae if layer is None else {layer: sae}, anywhere=anywhere)
    return entry.site, entry.site_out


class Evaluation:
    """The first pass computes reconstruction figures, the second the losses (which need the mean of all activations).

    layer: None for the SAE's own site, a number for a site of the same kind in that layer (the residual stream if the
    SAE names none), or a `Site`; a place other than the checkpoint's is an error unless `anywhere`.  text() must return
    the text's lines from the start at each call.  With a `state` file, the run is saved there every `save_every`
    batches and continues from it. If the file is of another model, SAE or text, ValueError says which differs; `about`
    adds more to compare.  loss_tokens: the second pass (four full forwards) ends with the batch in which it reaches
    this number of tokens (None: at the end of the text).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sae: Coder,
        layer: int | Site | None,
        text: Callable[[], Iterable[str]],
        *,
        window: int = 255,
        state: Path | None = None,
        about: dict[str, Any] | None = None,
        save_every: int = 1,
        loss_tokens: int | None = None,
        anywhere: bool = False,
    ) -> None:
        if window < 2:
            raise ValueError(f"window: expected at least 2 tokens, got {window}")
        if loss_tokens is not None and loss_tokens < 1:
            raise ValueError(f"loss_tokens: expected a positive number, got {loss_tokens}")
        self.sites = sites_of(sae, layer, anywhere)
        attach(
            model, {self.sites[0]: sae}, anywhere=anywhere
        )  # raises here for a model without these sites or with other widths
        self.model, self.tokenizer, self.sae, self.text = model, tokenizer, sae, text
        self.window, self.path, self.save_every, self.loss_tokens = window, state, save_every, loss_tokens
        self.about = (about or {}) | {"window": window, "sites": [site.hook_name for site in self.sites]}
        self.reconstruction = Reconstruction(sae)
        self.losses: Losses | None = None
        self.done = {"reconstruction": 0, "losses": 0, "complete": False}
        self._read = dict.fromkeys(PASSES, "")  # a hash of the token ids counted in each pass
        self._next = ""  # the same, including the current batch
        if state is not None:
            self.about |= {
                "model_fingerprint": identity.of_module(model), "sae_fingerprint": identity.of_module(sae),
                "tokenizer_fingerprint": identity.of_tokenizer(tokenizer),
            }  # fmt: skip
            if state.exists():
                self._load(state)

    def run(self, losses: bool = True, progress: Callable[[str, int], None] | None = None) -> dict[str, Any]:
        """Run both passes, or the rest of them; returns all figures.  progress(pass, tokens) is called per batch."""
        with torch.inference_mode():
            if not self.done["complete"]:
                self._first(progress)
            else:
                self._check_text()
            figures = self.reconstruction.figures()
            if losses:
                self.losses = self.losses or self._new_losses()
                self._second(progress)
                figures |= self.losses.figures()
        return figures

    def frequencies(self) -> Tensor:
        """Share of the tokens on which each feature fired, fp64 [d_sae]."""
        return self.reconstruction.fired.double() / max(1, self.reconstruction.rows)

    def _new_losses(self) -> Losses:
        return Losses(self.sae, self.sites, self.reconstruction.mean())

    def _batches(self, which: str) -> Iterator[Tensor]:
        """The part of the text that a pass has not counted.  ValueError if the part it has counted has changed."""
        done, read = self.done[which], ""
        i = 0
        for i, ids in enumerate(token_batches(self.tokenizer, self.text, self.window), 1):
            read = hashlib.sha256(read.encode() + ids.numpy().tobytes()).hexdigest()
            if i == done and read != self._read[which]:
                break
            if i > done:
                self._next = read
                yield ids
        if i < done or (i == done and read != self._read[which]):
            raise ValueError(f"state: {self.path} is an evaluation of another text")

    def _check_text(self) -> None:
        """Raise ValueError unless a complete first pass was of this text."""
        for _ in self._batches("reconstruction"):
            raise ValueError(f"state: {self.path} is an evaluation of another text: this one is longer")

    def _first(self, progress: Callable[[str, int], None] | None) -> None:
        batches, sites = self._batches("reconstruction"), list(dict.fromkeys(self.sites))
        for seen in activations_at(self.model, sites, batches, content_of(self.tokenizer)):
            self.reconstruction.add(seen[0], seen[-1])
            self._count("reconstruction", seen[0].shape[0], progress)
        self.done["complete"] = True
        self._save()

    def _second(self, progress: Callable[[str, int], None] | None) -> None:
        assert self.losses is not None
        for ids in self._batches("losses"):
            if self.loss_tokens is not None and self.losses.tokens >= self.loss_tokens:
                break
            content = content_mask(self.tokenizer, ids)
            self.losses.add(self.model, ids, content)
            self._count("losses", int(content.sum()), progress)
        self._save()

    def _count(self, which: str, tokens: int, progress: Callable[[str, int], None] | None) -> None:
        self.done[which] += 1
        self._read[which] = self._next
        if progress is not None:
            progress(which, tokens)
        if self.done[which] % self.save_every == 0:
            self._save()

    def _save(self) -> None:
        if self.path is None:
            return
        tensors = self.reconstruction.state()
        if self.losses is not None:
            tensors["losses"] = self.losses.sums
            tensors["loss_tokens"] = torch.tensor([self.losses.tokens])
        about = {"done": self.done, "read": self._read, "about": self.about}
        write_safetensors(self.path, tensors, {KEY: json.dumps(about)})

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                stored = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: not an evaluation that can be resumed: {error}") from error
        identity.check(f"state {path}", stored["about"], self.about)
        self.done, self._read = stored["done"], stored["read"]
        self.reconstruction.restore(tensors)
        if "losses" in tensors:
            self.losses = self._new_losses()
            self.losses.sums, self.losses.tokens = tensors["losses"], int(tensors["loss_tokens"])


def evaluate(
    model: Any,
    tokenizer: Any,
    sae: Coder,
    layer: int | Site | None,
    text: str,
    *,
    losses: bool = True,
    window: int = 255,
    anywhere: bool = False,
) -> dict[str, Any]:
    """All figures of a text in memory: those of `Reconstruction.figures` and, by default, of `Losses.figures`.
    layer, anywhere: as in `Evaluation`."""
    return Evaluation(model, tokenizer, sae, layer, lambda: [text], window=window, anywhere=anywhere).run(losses)
