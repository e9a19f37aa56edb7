"""Three requests in one vLLM batch: a plain one, an observed one and a steered one.

Needs vLLM 0.32.0 (`make env-vllm`) and the extra `demo`.  MODEL and SAE may be given:

    .venv-vllm/bin/python examples/vllm_features.py [MODEL [SAE]]
"""

import sys

from vllm import LLM, SamplingParams

from gemmascope_fast import Clamp
from gemmascope_fast.attach.vllm import engine_config, request
from gemmascope_fast.checkpoints.bundled import converted_model

PROMPT = "The Eiffel Tower is in the city of"


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(converted_model())
    sae = sys.argv[2] if len(sys.argv) > 2 else "demo"
    llm = LLM(
        model,
        enforce_eager=True,
        max_model_len=512,
        gpu_memory_utilization=0.3,
        additional_config=engine_config({"sae": sae}),
    )
    asked = {
        "plain": None,
        "observed": request(observe={"sae": "sae", "features": {"top": 5}}),
        "steered": request(steer=Clamp(5, 9000.0)),
    }
    params = [SamplingParams(temperature=0, max_tokens=12, extra_args=args) for args in asked.values()]
    for name, output in zip(asked, llm.generate([PROMPT] * 3, params, use_tqdm=False), strict=True):
        done = output.outputs[0]
        print(f"{name}: {done.text!r}")
        if name == "observed":
            latents = done.gemmascope.latents("sae")
            for position, row in zip(done.gemmascope.positions("sae").tolist(), latents, strict=True):
                print(f"  position {position}: features {row.col_indices.tolist()}")


if __name__ == "__main__":  # vLLM starts the engine in a process of its own, which imports this file
    main()
