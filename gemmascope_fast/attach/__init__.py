"""`attach`: put SAEs inside a transformers model, to observe it, to replace activations, to steer it.

`gemmascope_fast.attach` is the function itself; import other names with `from gemmascope_fast.attach import …`.
"""

from __future__ import annotations

from torch import nn

from gemmascope_fast.attach.alarms import Alarm, Fired
from gemmascope_fast.attach.calls import Tokens
from gemmascope_fast.attach.edits import Ablate, Add, Clamp, Direction, Edit, Edits, Mask, MinClamp, Scale
from gemmascope_fast.attach.entries import Activations, Attachables
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
    saes: Attachables,
    *,
    mode: str | None = None,
    edits: Edits = (),
    tokens: Selection = "content",
    error_grad: bool = False,
    keep: bool = True,
    anywhere: bool = False,
) -> Run:
    """Attach SAEs to a transformers model for the duration of the returned run's `with` block.

    saes: an SAE, a list, a Bank (its SAEs of this model are used), or a dict keyed by layer, (layer, kind), Site or
    module path (`….output` or `….input` of that module; a bare path means its output).  Without a key, the site in the
    checkpoint is used; docs/reference/sites.md explains the kinds.  An `Activations` in place of an SAE records the
    activations.  A cross-layer transcoder has one set of latents per layer, keyed by the site that the layer reads, and
    splices every output; a crosscoder has one set, keyed by the tuple of its sites, and can only observe.
    mode: None means "observe", or "splice+error" if there are edits.  "observe" changes nothing. "splice" replaces the
    activation by the reconstruction. "splice+error" also adds the reconstruction error: without edits, the
    activation passes through bit for bit (and nothing is decoded), while the gradient goes through the latents; the
    error is a constant unless `error_grad`.
    edits: interventions (Clamp, Scale, Ablate, Add, MinClamp, Mask, Direction), applied in order: one, a list if one
    SAE is attached, or a dict keyed as `saes`; without an SAE only Direction.  They act on selected tokens.
    tokens: "content" (default): without BOS, EOS, PAD, padding and the first four tokens of a chat, because Gemma Scope
    was not trained on them; "all"; a bool tensor [S] or [B, S] over the columns of the sequences; or a function of the
    token ids int64 [B, S] (and, if it has a second parameter, the call's `Tokens`) that returns bool [B, S].  Tokens
    that are not selected have an empty row and pass unchanged.

    keep: False stores no latents, for long runs with observers (`run.watch`, `run.on_fire`).
    anywhere: True allows a key for another site than the one in the SAE's checkpoint.

    Raises AttachError for a site that is not in the model, or not the one in the SAE's checkpoint, an SAE of the wrong
    width, or two splices at one site; ValueError or TypeError for invalid arguments. All of these are raised before
    anything runs.  Warns if the SAE was trained on a model with another name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return Run(model, saes, mode=mode, edits=edits, tokens=tokens, error_grad=error_grad, keep=keep, anywhere=anywhere)
