"""A KeyboardInterrupt at any line of entering or leaving a run leaves nothing of it in the model."""

import linecache
import sys
import threading
import types

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.attach import checkpointing
from gemmascope_fast.attach.transformers import generation, places

HERE = gsf.__file__.rsplit("/", 1)[0]
TORCH = ("hooks.py", "module.py")  # of torch: where a hook is registered


@pytest.fixture(scope="module")
def model():
    made = tiny.gemma3().train()
    with pytest.warns(FutureWarning):
        made.gradient_checkpointing_enable({"use_reentrant": False})
    return made


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that runs in the package (and where torch registers hooks)."""

    def __init__(self, at):
        self.at, self.lines, self.on, self.where = at, 0, False, None

    def __call__(self, frame, event, _arg):
        path = frame.f_code.co_filename
        if not path.startswith(HERE) and not path.endswith(TORCH):
            return None
        # Python looks for signals after calls and jumps: none comes between the body of a `with` and its exit, but the
        # tracer is told of that line, and an exception there would leave the lock taken
        if self.on and event == "line" and "with _LOCK" not in linecache.getline(path, frame.f_lineno):
            self.lines += 1
            if self.lines == self.at:
                self.on, self.where = False, f"{path}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def left(model):
    """Everything that a run may leave: hooks, what is wrapped, and the tables behind them."""
    wrapped = [m for m in model.modules() if hasattr(m.__dict__.get("_gradient_checkpointing_func"), "__wrapped__")]
    flags = [
        len(table)
        for m in model.modules()
        for table in (
            m._forward_hooks_with_kwargs,
            m._forward_hooks_always_called,
            m._forward_pre_hooks_with_kwargs,
        )
    ]
    tables = [len(ends) for module in model.modules() if (ends := places._HOOKS.get(module))]
    active = gsf.attach.__globals__["Run"].__enter__.__globals__["_ACTIVE"]
    watched = model in generation._WATCHES
    known = [m for m in model.modules() if m in checkpointing._WRAPPED]
    return tiny.hook_count(model), wrapped, sum(flags), tables, list(active), watched, known


def attached(model, mode):
    run = gsf.attach(model, {1: tiny.sae(), (2, "mlp"): tiny.sae(seed=2)}, mode=mode)
    run.watch(types.SimpleNamespace(update=lambda latents, tokens: None), 1)
    return run


def interrupted(model, mode, phase, at):
    """(whether it was interrupted there, where); asserts that nothing is left."""
    interrupt, run, outer = Interrupt(at), attached(model, mode), sys.gettrace()
    try:
        sys.settrace(interrupt)
        interrupt.on = phase == "enter"
        with run:
            interrupt.on = False
            model(tiny.ids(), use_cache=False)
            interrupt.on = phase == "exit"
    except KeyboardInterrupt:
        assert interrupt.where is not None
    finally:
        interrupt.on = False
        sys.settrace(outer)
    return interrupt.where


@pytest.mark.parametrize("mode", ["observe", "splice"])
@pytest.mark.parametrize("phase", ["enter", "exit"])
def test_nothing_is_left_whichever_line_is_interrupted(model, mode, phase):
    before, at, seen = left(model), 0, set()
    base = model(tiny.ids(), use_cache=False).logits
    while True:
        at += 1
        where = interrupted(model, mode, phase, at)
        assert left(model) == before, where
        if where is None:
            break
        seen.add(where)
    assert len(seen) > 30
    assert torch.equal(model(tiny.ids(), use_cache=False).logits, base)
    with gsf.attach(model, {1: tiny.sae()}, mode=mode) as run:
        model(tiny.ids(), use_cache=False)
    assert len(run.tokens) == 18


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("mode", ["observe", "splice"])
def test_a_run_goes_on_after_a_forward_was_interrupted(model, mode, error):
    """torch calls no hook after a KeyboardInterrupt: the call that was open does not count, and the next one does."""

    def fail(*_):
        raise error

    before = left(model)
    with gsf.attach(model, {1: tiny.sae()}, mode=mode, tokens="all") as run:
        handle = tiny.layer(model, 2).register_forward_hook(fail)
        for call in (lambda: model(tiny.ids()), lambda: model.generate(tiny.ids(), max_new_tokens=2)):
            with pytest.raises(error):
                call()
        handle.remove()
        model(tiny.ids(), use_cache=False)
        model.model(tiny.ids(), use_cache=False)
    assert len(run.tokens) == run.latents[1].n_rows == 36
    assert left(model) == before


def test_a_run_inside_another_leaves_it_alone(model):
    before = left(model)
    for at in range(1, 400, 7):
        with gsf.attach(model, {1: tiny.sae()}, tokens="all") as outer:
            interrupted(model, "splice", "enter", at)
            model(tiny.ids(), use_cache=False)
        assert outer.latents[1].n_rows in (18, 36)
        assert left(model) == before


def test_no_lock_is_left_taken():
    """After all of the above: a thread that attaches would wait for ever."""
    free = []

    def take():
        for module in (checkpointing, places, sys.modules["gemmascope_fast.attach.run"]):
            free.append(module._LOCK.acquire(timeout=5))
            if free[-1]:
                module._LOCK.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert free == [True, True, True]
