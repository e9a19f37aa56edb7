"""The entry point in vLLM's group `vllm.general_plugins`, which vLLM calls in each of its processes.

It wraps a few methods of vLLM: admission (the request is checked), the worker's start (hooks), the scheduler and the
output processor (latents travel with the tokens that they belong to).  Where a request asks for nothing, the wrappers
do nothing.  GSF_VLLM=0 leaves vLLM untouched.
"""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from gemmascope_fast.attach.vllm.saes import KEY
from gemmascope_fast.errors import AttachError

TESTED = ("0.32.0",)  # versions of vLLM that tests/vllm runs with; others may have changed what we wrap
SWITCH = "GSF_VLLM"

_registered = False


def register() -> None:
    """Called by vLLM in each process, possibly several times."""
    global _registered  # noqa: PLW0603 vLLM gives a plugin no object to keep state in
    if _registered or os.environ.get(SWITCH) == "0":
        return
    _registered = True
    import vllm

    if vllm.__version__.split("+")[0] not in TESTED:
        _refuse(vllm.__version__)
        return
    from vllm.outputs import RequestOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    _wrap(InputProcessor, "__init__", _input_processor)
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(WorkerWrapperBase, "init_worker", _init_worker)
    _wrap(Scheduler, "update_from_output", _update_from_output)
    _wrap(Scheduler, "_free_request", _free_request)
    _wrap(OutputProcessor, "process_outputs", _process_outputs)
    _wrap(RequestState, "_new_completion_output", _new_completion_output)
    _wrap(RequestState, "_new_request_output", _new_request_output)
    _wrap(RequestOutput, "add", _add)


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def asked_of(vllm_config: Any) -> Any:
    """What the engine's configuration has under "gemmascope"; None if nothing."""
    config = getattr(vllm_config, "additional_config", None)
    return config.get(KEY) if isinstance(config, Mapping) else None


def _refuse(version: str) -> None:
    from vllm.config import VllmConfig

    def post_init(original: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
        if asked_of(config) is not None:
            raise AttachError(f"vllm: tested with {', '.join(TESTED)}, got {version}; {SWITCH}=0 starts without SAEs")
        return original(config, *args, **kwargs)

    _wrap(VllmConfig, "__post_init__", post_init)


def check_engine(config: Any) -> None:
    """AttachError, by name, for what the hooks cannot follow.  config: vLLM's VllmConfig."""
    if config.speculative_config is not None:
        raise AttachError("vllm: speculative decoding is not supported: a row may be a token that is rejected later")
    if config.parallel_config.pipeline_parallel_size > 1:
        raise AttachError("vllm: pipeline parallelism is not supported: expected pipeline_parallel_size=1")
    if config.model_config.runner_type != "generate":
        raise AttachError(f"vllm: expected a generating model, got runner {config.model_config.runner_type!r}")
    if config.use_v2_model_runner:
        raise AttachError("vllm: model runner V2 is not supported; set VLLM_USE_V2_MODEL_RUNNER=0")
    if config.compilation_config.mode:
        raise AttachError("vllm: hooks do not run in compiled layers; start the engine with enforce_eager=True")


# ---- admission ------------------------------------------------------------------------------------------


def _input_processor(original: Callable[..., Any], self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    config = asked_of(vllm_config)
    self.gemmascope = None
    if config is not None:
        from gemmascope_fast.attach.vllm import saes

        check_engine(vllm_config)
        self.gemmascope = {name: saes.about(name, spec) for name, spec in saes.declared(config).items()}
    original(self, vllm_config, *args, **kwargs)


def _process_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    made = original(self, *args, **kwargs)
    params = made.sampling_params
    given = (params.extra_args or {}).get(KEY) if params is not None else None
    if given is None:
        return made
    from gemmascope_fast.attach.vllm.requests import RequestError, parse

    if self.gemmascope is None:
        raise RequestError(f"{KEY}: this engine has no SAEs; start it with additional_config=engine_config(...)")
    if made.prompt_token_ids is None:
        raise RequestError(f"{KEY}: expected a prompt of tokens, got prompt_embeds")
    asked = parse(given, self.gemmascope, len(made.prompt_token_ids), self.model_config.max_model_len)
    if asked.alarm:
        _check_stoppable(params)
    if (asked.observe or asked.alarm) and asked.cached == "compute":
        params.skip_reading_prefix_cache = True
    if asked.steer:
        # its blocks of the KV cache differ from those of every other request, even if only generated tokens change
        made.cache_salt = f"{made.cache_salt or ''}gemmascope:{secrets.token_hex(16)}"
    return made


def _check_stoppable(params: Any) -> None:
    """RequestError if the sampler could not choose EOS when an alarm asks for it."""
    from gemmascope_fast.attach.vllm.requests import RequestError

    if params.eos_token_id is None:
        raise RequestError("alarm: expected a model with an EOS token and ignore_eos=False, because EOS ends a request")
    for name in ("min_tokens", "allowed_token_ids", "structured_outputs", "bad_words"):
        if getattr(params, name):
            raise RequestError(f"alarm: cannot be combined with {name}, which may forbid EOS")


# ---- worker ---------------------------------------------------------------------------------------------


def _init_worker(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    done = original(self, *args, **kwargs)
    config = asked_of(self.vllm_config)
    if config is not None:
        from gemmascope_fast.attach.vllm.runner import install

        check_engine(self.vllm_config)
        load = self.worker.load_model

        def load_model(*more: Any, **named: Any) -> Any:
            loaded = load(*more, **named)
            install(self.worker.model_runner, config)
            return loaded

        self.worker.load_model = load_model
    return done


# ---- scheduler ------------------------------------------------------------------------------------------


def _update_from_output(original: Callable[..., Any], self: Any, scheduled: Any, output: Any) -> Any:
    told = getattr(output, KEY, None)
    if not told:
        return original(self, scheduled, output)
    # a chunk of a prompt gives no output: what it told waits for the first token
    waiting = self.__dict__.setdefault("_gemmascope", {})
    for request, payload in told.items():
        if request in self.requests:
            waiting.setdefault(request, []).append(payload)
    ready = {request: waiting[request] for request in told if request in waiting}
    outputs = original(self, scheduled, output)
    for several in outputs.values():
        for each in several.outputs:
            if each.request_id in ready:
                each.kv_transfer_params = {**(each.kv_transfer_params or {}), KEY: ready[each.request_id]}
                waiting.pop(each.request_id, None)
    return outputs


def _free_request(original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    self.__dict__.get("_gemmascope", {}).pop(request.request_id, None)
    return original(self, request, *args, **kwargs)


# ---- outputs --------------------------------------------------------------------------------------------


def _process_outputs(original: Callable[..., Any], self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    for each in outputs:
        carried = each.kv_transfer_params
        if not carried or KEY not in carried:
            continue
        state = self.request_states.get(each.request_id)
        if state is not None:
            from gemmascope_fast.attach.vllm.features import Features

            if not hasattr(state, KEY):
                state.gemmascope = Features()
            for payload in carried[KEY]:
                state.gemmascope.add(payload)
        each.kv_transfer_params = {name: value for name, value in carried.items() if name != KEY} or None
    return original(self, outputs, *args, **kwargs)


def _new_completion_output(
    original: Callable[..., Any], self: Any, token_ids: Any, finish_reason: Any, stop_reason: Any
) -> Any:
    features = getattr(self, KEY, None)
    if features is not None and finish_reason is not None:
        stop_reason = features.stop_reason() or stop_reason
    made = original(self, token_ids, finish_reason, stop_reason)
    made.gemmascope = None
    if features is not None:
        from vllm.sampling_params import RequestOutputKind

        made.gemmascope = features.take() if self.output_kind == RequestOutputKind.DELTA else features.copy()
    return made


def _new_request_output(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    made = original(self, *args, **kwargs)
    told = [getattr(each, KEY, None) for each in getattr(made, "outputs", [])] if hasattr(made, "finished") else []
    if any(features is not None and features.text for features in told):
        # the OpenAI-compatible server copies this field to its answer
        answers = [None if features is None else features.to_json() for features in told]
        made.kv_transfer_params = {**(made.kv_transfer_params or {}), KEY: answers}
    return made


def _add(original: Callable[..., Any], self: Any, later: Any, aggregate: bool) -> None:
    before = {each.index: each for each in self.outputs}
    original(self, later, aggregate)
    for each in later.outputs:
        earlier, features = before.get(each.index), getattr(each, KEY, None)
        if aggregate and earlier is not None and features is not None:
            if getattr(earlier, KEY, None) is None:
                earlier.gemmascope = features
            else:
                earlier.gemmascope.append(features)
