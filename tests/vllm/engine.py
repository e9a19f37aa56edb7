"""The engine that the tests run, and access to its inside."""

import torch

from gemmascope_fast.attach.vllm import engine_config
from gemmascope_fast.checkpoints.bundled import converted_model

LAYER = 12
BLOCK = 16  # tokens per block of the KV cache
BLOCKS = 64  # several long requests do not fit together (18 layers of two kinds share them)
STEP = 64  # tokens per step: a longer prompt is computed in chunks
LENGTH = 256


class Engine:
    def __init__(self, **options):
        from vllm import LLM

        self.llm = LLM(
            str(converted_model()),
            dtype="float32",
            max_model_len=LENGTH,
            enforce_eager=True,
            block_size=BLOCK,
            num_gpu_blocks_override=BLOCKS,
            max_num_batched_tokens=STEP,
            max_num_seqs=16,
            enable_prefix_caching=True,
            gpu_memory_utilization=0.3,
            additional_config=engine_config({"res12": "demo"}),
            **options,
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.attached = self.runner.gemmascope
        self.sae = self.attached.saes["res12"].coder
        self.layer = next(m for n, m in self.runner.model.named_modules() if n.endswith(f"layers.{LAYER}"))

    def generate(self, prompts, asked, *, max_tokens=8, **options):
        """asked: extra_args for all, or a list of them.  Greedy, never ended by EOS unless ignore_eos=False."""
        from vllm import SamplingParams, TokensPrompt

        options = {"temperature": 0, "ignore_eos": True, "max_tokens": max_tokens, **options}
        each = asked if isinstance(asked, list) else [asked] * len(prompts)
        params = [SamplingParams(extra_args=args, **options) for args in each]
        prompts = [p if isinstance(p, str) else TokensPrompt(prompt_token_ids=p) for p in prompts]
        return self.llm.generate(prompts, params, use_tqdm=False)

    def one(self, prompt, asked=None, **options):
        return self.generate([prompt], asked, **options)[0].outputs[0]

    def finished(self):
        return set(self.scheduler.finished_req_ids)

    def forget_prefixes(self):
        assert self.llm.reset_prefix_cache()

    def activations(self, run):
        """What a request running alone has at the layer's output, [rows, d] in the order of computation."""
        seen = []
        handle = self.layer.register_forward_hook(lambda _m, _a, out: seen.append((out[0] + out[1]).clone()))
        try:
            result = run()
        finally:
            handle.remove()
        return result, torch.cat(seen)


def prompt(length, seed=0):
    """BOS and random ids of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [2, *torch.randint(1000, 50_000, (length - 1,), generator=generator).tolist()]
