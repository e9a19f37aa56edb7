"""`attach`: SAEs inside a transformers model, to watch it, to replace what passes, to steer it.

`attach` itself is also `gemmascope_fast.attach`; import what else is here by `from gemmascope_fast.attach import …`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gemmascope_fast.attach.alarms import Alarm, Fired
from gemmascope_fast.attach.calls import Tokens
from gemmascope_fast.attach.edits import Ablate, Add, Clamp, Direction, Edit, Mask, MinClamp, Scale
from gemmascope_fast.attach.entries import Activations
from gemmascope_fast.attach.observers import Statistics, TopContexts, TopK
from gemmascope_fast.attach.run import Run
from gemmascope_fast.attach.selection import Selection

__all__ = [
    "Ablate",
    "Activations",
    "Add",
    "Alarm",
    "Clamp",
    "Direction",
    "Edit",
    "Fired",
    "Mask",
    "MinClamp",
    "Run",
    "Scale",
    "Statistics",
    "Tokens",
    "TopContexts",
    "TopK",
    "attach",
]


def attach(
    model: nn.Module,
    saes: Any,
    *,
    mode: str | None = None,
    edits: Any = (),
    tokens: Selection = "content",
    error_grad: bool = False,
    keep: bool = True,
    anywhere: bool = False,
) -> Run:
    """SAEs in a transformers model while the returned run's `with` block lasts.

    saes: an SAE, a list, a Bank (of which this model's SAEs are taken), or a dict keyed by layer, (layer, kind), Site
    or module path (`….output` or `….input` of that very module; a bare path means its output).  Without a key the
    checkpoint's own site counts; docs/reference/sites.md says what each kind is.  In place of an SAE an `Activations`
    keeps what passes.  A cross-layer transcoder has one set of latents a layer, keyed by where that layer reads, and
    splices every output; a crosscoder has one, keyed by the tuple of its sites, and is only observed.
    mode: None means "observe", or "splice+error" where there are edits.  "observe" changes nothing; "splice" puts the
    reconstruction in the activation's place; "splice+error" adds what the reconstruction lacks, so that without edits
    the activation passes bit for bit (and nothing is decoded), while the gradient goes through the latents, with the
    error a constant unless `error_grad`.
    edits: interventions (Clamp, Scale, Ablate, Add, MinClamp, Mask, Direction) in their order: one, a list where one
    SAE is attached, or a dict keyed as `saes`; at a site of no SAE a Direction alone.  They act on the selected tokens.
    tokens: "content", the default: neither BOS, EOS, PAD, padding nor a chat's first four tokens, on which Gemma Scope
    was not trained; "all"; a bool tensor [S] or [B, S] over the columns of the sequences; or a callable from token ids
    int64 [B, S] (and, where it takes a second argument, the call's `Tokens`) to bool [B, S].  What is left out keeps
    an empty row and passes unchanged.

    keep: False keeps no latents, for long runs that observers watch (`run.watch`, `run.on_fire`).
    anywhere: True allows a key that names another site than the SAE's checkpoint does.

    Raises AttachError for a site that is not in the model, or not the one that the SAE's checkpoint names, an SAE of
    another width, two splices at one site; ValueError or TypeError for arguments that mean nothing.  All of that
    before anything runs.  Warns where the SAE was trained on a model of another name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return Run(model, saes, mode=mode, edits=edits, tokens=tokens, error_grad=error_grad, keep=keep, anywhere=anywhere)
