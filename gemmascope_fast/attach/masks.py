"""Reads a call's masks and position ids: which columns are padding, and where packed documents begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.attach.calls import Call

# Additive masks hide a column with -inf, with the dtype's minimum, or with -10,000 (older encoders).  Larger values
# leave it visible, for example a bias such as ALiBi's.
HIDDEN = -9000.0


def padding(mask: Any, call: Call) -> Tensor | None:
    """bool [B, S], False for padding, from a mask of the whole sequence or of the call's own columns; None if there is
    no padding."""
    begin, end = call.start, call.start + call.length
    generation = call.group.generation
    if generation is not None and generation.prompt is not None and begin >= generation.prompt:
        return None  # generate's own tokens are never padding, and checking each time would cost 10 µs a token
    own: Tensor | None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= end:
        own = mask[:, begin:end]
    elif isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == call.length:
        own = mask
    elif generation is not None and generation.mask is not None:
        # a static cache makes the mask four-dimensional; generate's argument is still the plain one
        full = torch.ones(generation.mask.shape[0], end, dtype=torch.bool)
        prompt = generation.mask[:, :end]
        full[:, : prompt.shape[1]] = prompt
        own = full[:, begin:end]
    else:
        square = _visible(mask, call)
        own = None if square is None else _seen(*square)
    if own is None:
        return None
    own = _each(own.detach().to("cpu") != 0, call)
    return None if bool(own.all()) else own


def before(mask: Any, call: Call) -> Tensor | None:
    """bool [B, start] of the columns before a call, False for padding; None if the mask does not say."""
    generation = call.group.generation
    if not (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= call.start + call.length):
        mask = None if generation is None else generation.mask
    if mask is None or mask.shape[1] < call.start:
        return None
    return _each(mask[:, : call.start].detach().to("cpu") != 0, call)


def documents(given: Mapping[str, Any], call: Call) -> Tensor:
    """bool [B, S]: the columns at which another document begins, if several are packed into one row.

    There position ids restart, a block-diagonal mask hides everything before, or a mask of two dimensions numbers the
    documents.
    """
    found = torch.zeros(call.batch, call.length, dtype=torch.bool)
    position = given.get("position_ids")
    if isinstance(position, Tensor) and position.shape[-1] == call.length:
        position = position.detach().to("cpu")
        while position.dim() > 2:  # with several axes, the first is for text
            position = position[0]
        position = _each(position.reshape(-1, call.length), call)
        found[:, 0] = position[:, 0] == 0
        found[:, 1:] = position[:, 1:] <= position[:, :-1]
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == call.length and mask.dtype != torch.bool:
        numbers = _each(mask.detach().to("cpu"), call)
        found[:, 1:] |= (numbers[:, 1:] != numbers[:, :-1]) & (numbers[:, 1:] != 0)
    square = _visible(mask, call)
    if square is not None:
        visible, first = square
        own = visible[:, :, first : first + call.length]
        earlier = own.tril(-1).any(2) | visible[:, :, :first].any(2)
        found |= _each((own.diagonal(dim1=1, dim2=2) & ~earlier).to("cpu"), call)
    return found


def _each(rows: Tensor, call: Call) -> Tensor:
    """[B, …], from one row for all, or from one for each input of generate."""
    return rows if rows.shape[0] == call.batch else rows.repeat_interleave(call.batch // rows.shape[0], dim=0)


def _visible(mask: Any, call: Call) -> tuple[Tensor, int] | None:
    """(bool [B, S, K]: which columns each token sees; the position of the call's first column in K), from a mask
    [B, heads, S, K], [B, S, K] or a dict of such masks by attention type.  None if there is no mask."""
    if isinstance(mask, Mapping):
        known = [found for found in (_visible(each, call) for each in mask.values()) if found is not None]
        # sliding-window attention sees less, and its cache may have fewer columns
        return max(known, key=lambda found: (found[0].shape[2], int(found[0].sum())), default=None)
    if not isinstance(mask, Tensor) or mask.dim() not in (3, 4):
        return None
    columns = mask.shape[-1]
    if mask.shape[-2] != call.length or columns < call.length:
        return None
    visible = mask.detach() > HIDDEN if mask.is_floating_point() else mask.detach() != 0
    if visible.dim() == 4:
        visible = visible[:, 0] if visible.shape[1] == 1 else visible.any(1)
    return visible, call.start if columns >= call.start + call.length else columns - call.length


def _seen(visible: Tensor, first: int) -> Tensor:
    """bool [B, S]: the columns that at least one token sees, not counting padding tokens.

    Some attention kernels give NaN if a token sees nothing, so transformers lets left padding see everything.  Such
    rows come first, and see columns that come after them.
    """
    length = visible.shape[1]
    own = visible[:, :, first : first + length]
    everything = visible.all(2) & own.triu(1).any(2)
    leading = everything.cumprod(1).bool()
    leading &= ~leading.all(1, keepdim=True)
    return (own & ~leading[:, :, None]).any(1)
