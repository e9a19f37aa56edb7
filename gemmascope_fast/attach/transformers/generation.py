"""What a run must know about `generate`: where the prompt ends, whether it uses beam search, what it returned.

A forward pre-hook sees none of that, so while a run is open the model's `generate` is wrapped, on the instance.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gemmascope_fast.attach.calls import Generation


class Listener(Protocol):
    def generation_begins(self, generation: Generation) -> bool: ...

    def generation_ends(self, generation: Generation) -> None: ...


_LOCK = threading.RLock()
_WATCHES: WeakKeyDictionary[nn.Module, _Watch] = WeakKeyDictionary()


class _Watch:
    def __init__(self, model: nn.Module) -> None:
        self.listeners: tuple[Listener, ...] = ()
        self.had = model.__dict__.get("generate")
        original: Any = model.generate
        reference = weakref.ref(model)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            about = [(listener, _begin(reference(), args, kwargs)) for listener in self.listeners]
            about = [(listener, generation) for listener, generation in about if listener.generation_begins(generation)]
            output = None
            try:
                output = original(*args, **kwargs)
            finally:
                for listener, generation in about:
                    _end(generation, output)
                    listener.generation_ends(generation)
            return output

        self.wrapper = generate

    def remove(self, model: nn.Module) -> None:
        if model.__dict__.get("generate") is not self.wrapper:
            return  # it was wrapped again by others; without listeners our wrapper does nothing
        if self.had is None:
            del model.generate
        else:
            model.generate = self.had


def listen(model: nn.Module, listener: Listener) -> None:
    """Notify the listener of every `generate` of the model, until `leave`."""
    if not callable(getattr(model, "generate", None)):
        return
    with _LOCK:
        watch = _WATCHES.get(model)
        if watch is None:
            watch = _WATCHES[model] = _Watch(model)
            model.generate = watch.wrapper  # type: ignore[assignment]
        watch.listeners = (*watch.listeners, listener)


def leave(model: nn.Module, listener: Listener) -> None:
    """Stop notifying the listener; does nothing if it is not registered.  After an interrupted `listen`, removes what
    is there."""
    with _LOCK:
        watch = _WATCHES.get(model)
        if watch is None:
            return
        watch.listeners = tuple(other for other in watch.listeners if other is not listener)
        if not watch.listeners:
            watch.remove(model)
            del _WATCHES[model]


def _begin(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    defaults = getattr(model, "generation_config", None)

    def setting(name: str) -> Any:
        for source in (kwargs.get(name), getattr(config, name, None), getattr(defaults, name, None)):
            if source is not None:
                return source
        return None

    found = Generation(beams=int(setting("num_beams") or 1), eos=_ids(setting("eos_token_id")))
    prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if not isinstance(prompt, Tensor):
        prompt, found.embeds = kwargs.get("inputs_embeds"), True
    if isinstance(prompt, Tensor) and prompt.dim() >= 2:
        found.prompt = prompt.shape[1]
        found.mask = _prompt_mask(prompt, kwargs.get("attention_mask"), setting("pad_token_id"), found.eos)
        if found.embeds:
            found.offset = found.prompt
        elif found.mask is not None and found.mask.shape[1] > found.prompt:
            # the mask covers the whole sequence, and its first columns are in the given cache
            found.offset = found.mask.shape[1] - found.prompt
            found.prompt += found.offset
    return found


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in (value if isinstance(value, (list, tuple)) else torch.as_tensor(value).reshape(-1)))


def _prompt_mask(prompt: Tensor, mask: Any, pad: Any, eos: tuple[int, ...]) -> Tensor | None:
    """The prompt's mask. Without one, generate treats PAD tokens as padding, unless PAD is also an EOS."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.detach().to("cpu") != 0
    pads = [p for p in _ids(pad) if p not in eos]
    if mask is None and prompt.dim() == 2 and not prompt.is_floating_point() and pads:
        return ~torch.isin(prompt.detach().cpu(), torch.tensor(pads))
    return None


def _end(generation: Generation, output: Any) -> None:
    sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
    if not isinstance(sequences, Tensor):
        return
    generation.final = sequences.detach().to("cpu", torch.int64)
    generation.returned = weakref.ref(sequences)
    beams = getattr(output, "beam_indices", None)
    generation.beam_indices = beams.detach().cpu() if isinstance(beams, Tensor) else None
