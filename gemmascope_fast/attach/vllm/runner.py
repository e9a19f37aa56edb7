"""vLLM's model runner (V1), with SAEs: which rows of a step belong to whom, and when requests come and go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.attach.vllm import saes
from gemmascope_fast.attach.vllm.requests import Asked, parse
from gemmascope_fast.attach.vllm.worker import Attached, Mounted
from gemmascope_fast.errors import AttachError


def install(runner: Any, config: Any) -> Attached:
    """Load the declared SAEs and hook the runner's model; the result is `runner.gemmascope`.

    AttachError for an SAE that does not fit the model.
    """
    text = runner.model_config.hf_text_config
    mounted = {}
    for name, spec in saes.declared(config).items():
        coder = saes.load(name, spec, runner.device)
        mounted[name] = Mounted(coder, saes.describe(name, spec, coder))
        if coder.d_in != text.hidden_size:
            raise AttachError(f"saes: {name}: expected d_in {text.hidden_size}, the model's width, got {coder.d_in}")
    model = runner.get_model()
    attached = Attached(model, decoder_layers(model, text.num_hidden_layers), mounted)
    runner.gemmascope = attached
    _Wrapped(runner, attached)
    return attached


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The layers of the text decoder.  AttachError if there is not exactly one list of that many layers."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "h", "blocks")
        if len(module) == count and "vision" not in name
    ]
    if len(found) != 1:
        raise AttachError(f"vllm: expected one list of {count} decoder layers, got {[name for name, _ in found]}")
    return found[0][1]


class _Wrapped:
    """The wrapped methods of one runner."""

    def __init__(self, runner: Any, attached: Attached) -> None:
        self.runner, self.attached = runner, attached
        self.scheduled: Any = None
        self.sampling = False  # the next logits are those that this step samples from; others are of prompt logprobs
        self.update, self.forward, self.sample = runner._update_states, runner._model_forward, runner.sample_tokens
        model: Any = attached.model
        self.logits = model.compute_logits
        runner._update_states, runner._model_forward = self.update_states, self.model_forward
        runner.sample_tokens = self.sample_tokens
        model.compute_logits = self.compute_logits

    def update_states(self, scheduled: Any) -> Any:
        for request in scheduled.finished_req_ids:
            self.attached.forget(request)
        for new in scheduled.scheduled_new_reqs:
            params = new.sampling_params
            given = (params.extra_args or {}).get(saes.KEY) if params is not None else None
            if given is None:
                continue
            about = {name: mounted.about for name, mounted in self.attached.saes.items()}
            prompt = len(new.prompt_token_ids)
            asked: Asked = parse(given, about, prompt, self.runner.max_model_len)
            self.attached.admit(new.req_id, asked, prompt, new.num_computed_tokens, params.eos_token_id)
        done = self.update(scheduled)
        self.scheduled = scheduled
        return done

    def model_forward(self, *args: Any, **kwargs: Any) -> Any:
        attached, scheduled, self.scheduled = self.attached, self.scheduled, None
        if not attached.live or scheduled is None:
            return self.forward(*args, **kwargs)
        batch, rows, first = self.runner.input_batch, [], 0
        for index, request in enumerate(batch.req_ids):
            count = scheduled.num_scheduled_tokens[request]
            rows.append((request, first, count, int(batch.num_computed_tokens_cpu[index])))
            first += count
        given = kwargs.get("input_ids")

        def ids(index: int, begin: int, count: int) -> Tensor:
            if given is not None:
                return given[begin : begin + count].to("cpu", torch.int64)
            start = rows[index][3]
            return torch.from_numpy(batch.token_ids_cpu[index, start : start + count]).long()

        try:
            attached.begin(rows, ids)
            self.sampling = True
            return self.forward(*args, **kwargs)
        finally:
            attached.end()

    def compute_logits(self, *args: Any, **kwargs: Any) -> Any:
        logits = self.logits(*args, **kwargs)
        if self.sampling:
            self.sampling = False
            self.attached.force_ends(logits, self.runner.input_batch.req_ids)
        return logits

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = self.sample(*args, **kwargs)
        told = self.attached.payloads() if self.attached.live else {}
        if told:
            # an asynchronous output hands out the inner one later
            setattr(getattr(output, "_model_runner_output", output), saes.KEY, told)
        return output
