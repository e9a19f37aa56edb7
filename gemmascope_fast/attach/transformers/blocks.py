"""What a transformer block adds to the residual stream, found from the names of its parts.

A block adds two things to the residual stream: the output of its attention and the output of its MLP, each possibly
after a norm and times a number.  The position of the norms differs between models, and one name means different
things: `post_attention_layernorm` comes before Llama's MLP, and after OLMo 2's attention.  The set of all norms of a
block tells them apart.  A block whose parts are not in the table below is an error that names them.
`tests/attach/test_sites.py` checks the table against every causal language model of the installed transformers.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple

from torch import Tensor, nn

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "multi_head_attention")
OTHER_MIXERS = ("mamba", "conv", "mixer", "mlstm_layer", "temporal_block", "recurrent_block")
MLP = ("mlp", "feed_forward", "ffn", "mlp_block", "block_sparse_moe", "shared_mlp")
# Names of the output projection in attention: its input is the concatenated heads.
PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "Wo", "attention.out_proj", "attention.o_proj", "output.dense")
# Modules that change nothing in evaluation mode, or that are part of the MLP.
_NEUTRAL = re.compile("dropout|activation_fn|act_fn")
# Attributes of a block that multiply both of the terms it adds.
_MULTIPLIERS = ("residual_multiplier", "residual_scale")
_SUSPECT = re.compile("alpha|beta|scal|multipl|factor|lambda|resid|gate")
# Modules of blocks whose residual stream has several vectors per token, and blocks whose output is not such a stream.
_STREAMS = ("altup", "attn_hc", "attn_hyper_connection")
_NO_STREAM = {
    "XLNetLayer": "orders its output by position before sequence",
    "ReformerLayer": "is reversible and has two residual streams",
}


class Norms(NamedTuple):
    """The norms of a block by their function; None if it has no such norm."""

    before_mlp: str | None
    after_attention: str | None = None
    after_mlp: str | None = None


# Names of a block's parts other than attention and MLP, and their function.
_NORMS = {
    frozenset(names.split()): norms
    for names, norms in {
        "input_layernorm post_attention_layernorm": Norms("post_attention_layernorm"),
        "input_layernorm": Norms("input_layernorm"),
        "input_layernorm pre_feedforward_layernorm": Norms("pre_feedforward_layernorm"),
        "input_layernorm pre_ff_layernorm": Norms("pre_ff_layernorm"),
        "attention_layernorm feedforward_layernorm": Norms("feedforward_layernorm"),
        "operator_norm ffn_norm": Norms("ffn_norm"),
        "attn_norm mlp_norm": Norms("mlp_norm"),
        "norm_mlstm norm_ffn": Norms("norm_ffn"),
        "temporal_pre_norm channel_pre_norm": Norms("channel_pre_norm"),
        "norm_1 norm_2": Norms("norm_2"),
        "layernorm1 layernorm2": Norms("layernorm2"),
        "ln_attn ln_mlp": Norms("ln_mlp"),
        "ln_1 ln_2": Norms("ln_2"),
        "ln_1": Norms("ln_1"),
        "post_attention_layernorm post_feedforward_layernorm": Norms(
            None, "post_attention_layernorm", "post_feedforward_layernorm"
        ),
        "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm": Norms(
            "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
        ),
        "input_layernorm post_attention_layernorm pre_mlp_layernorm post_mlp_layernorm": Norms(
            "pre_mlp_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
        ),
        "input_layernorm post_self_attn_layernorm post_attention_layernorm post_mlp_layernorm": Norms(
            "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"
        ),
        "input_layernorm post_norm1 post_attention_layernorm post_norm2": Norms(
            "post_attention_layernorm", "post_norm1", "post_norm2"
        ),
        "operator_norm post_operator_norm ffn_norm post_ffn_norm": Norms(
            "ffn_norm", "post_operator_norm", "post_ffn_norm"
        ),
        "input_layernorm attn_sconv post_attention_layernorm mlp_sconv": Norms(
            "post_attention_layernorm", "attn_sconv", "mlp_sconv"
        ),
    }.items()
}
# Blocks whose parts are in the table but that use them differently.
_OTHERWISE = {
    "transformers.models.openai.modeling_openai.Block": "normalises the sum after adding",
    "transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseLayer": (
        "adds the bias of attention outside of the module"
    ),
}


class Unknown(Exception):
    """The block has no such site.  The message says what it does instead, such as "normalises the sum after
    adding"; `path` is a module to name instead, if there is one."""

    def __init__(self, why: str, path: str | None = None) -> None:
        super().__init__(why)
        self.path = path


class Part(NamedTuple):
    """One end of a module within a block, and the factor that the block multiplies its value by."""

    path: str
    end: str
    scale: float = 1.0
    no_gain: bool = False


def part(block: nn.Module, kind: str) -> Part:
    """Where a site of one kind is within a block.  Raises Unknown if the block has none."""
    block = getattr(block, "_orig_mod", block)
    return {"attn": _heads, "attn_out": _attn_out, "mlp": _mlp_out, "mlp_in": _mlp_in, "mlp_in_no_gain": _no_gain}[
        kind
    ](block)


def streams(block: nn.Module) -> str | None:
    """Why the output of a block is not one vector [B, S, d] per token; None if it is."""
    block = getattr(block, "_orig_mod", block)
    found = [name for name, _ in block.named_children() if name in _STREAMS]
    if found:
        return f"has a residual stream of several vectors a token (module {found[0]!r})"
    return _NO_STREAM.get(type(block).__name__)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a root-mean-square norm or torch's LayerNorm, whose formulas without gain are known."""
    name = type(module).__name__.lower()
    plain = name.endswith("rmsnorm") and "gated" not in name
    return isinstance(module, nn.LayerNorm) or (plain and epsilon(module) is not None)


def epsilon(norm: nn.Module) -> float | None:
    """What a norm adds to the mean square (epsilon), under any of its names."""
    for name in ("eps", "variance_epsilon", "norm_eps"):
        if isinstance(getattr(norm, name, None), float):
            return float(getattr(norm, name))
    return None


def _children(block: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in block.named_children() if not _NEUTRAL.search(name)}


def _is_bert(names: dict[str, nn.Module]) -> bool:
    return {"attention", "intermediate", "output"} <= set(names)


def _only(names: dict[str, nn.Module], known: tuple[str, ...], what: str) -> str:
    found = [name for name in known if name in names]
    if len(found) == 1 and not isinstance(names[found[0]], nn.ModuleList):
        return found[0]
    if len(found) > 1:
        raise Unknown(f"has several modules as {what}: {', '.join(found)}")
    raise Unknown(f"has none of {', '.join(known)}; its parts are {', '.join(names)}")


def _attention(names: dict[str, nn.Module]) -> str:
    if "norm_attn_norm" in names:
        return "norm_attn_norm.attn"
    others = [name for name in OTHER_MIXERS if name in names]
    if others:
        raise Unknown(f"has {others[0]!r} instead of attention, or in addition to it", others[0])
    return _only(names, ATTENTION, "attention")


def _rest(names: dict[str, nn.Module]) -> frozenset[str]:
    return frozenset(names) - {*ATTENTION, *OTHER_MIXERS, *MLP}


def _norms(block: nn.Module, names: dict[str, nn.Module]) -> Norms:
    """Raise Unknown if it is not known how the block uses its parts."""
    cls = type(block)
    why = _OTHERWISE.get(f"{cls.__module__}.{cls.__qualname__}")
    if why is not None:
        raise Unknown(why)
    rest = _rest(names)
    if rest in _NORMS:
        return _NORMS[rest]
    if rest == {"norm_attn_norm"}:
        return Norms(None)
    if rest == {"fc1", "fc2", "self_attn_layer_norm", "final_layer_norm"} and cls.__name__ in _PRE_NORM_FC:
        if not getattr(block, "do_layer_norm_before", True):
            raise Unknown("normalises the sum after adding")
        return Norms("final_layer_norm")
    raise Unknown(f"does not show what it adds to the residual stream; its parts are {', '.join(names)}")


_PRE_NORM_FC = ("OPTDecoderLayer", "BioGptDecoderLayer", "XGLMDecoderLayer")


def _scale(block: nn.Module) -> float:
    """The number by which the block multiplies what it adds.  Unknown if it has other such numbers."""
    own: dict[str, Any] = {**dict(block.named_parameters(recurse=False)), **dict(block.named_buffers(recurse=False))}
    own |= {n: v for n, v in vars(block).items() if isinstance(v, (int, float, Tensor)) and not isinstance(v, bool)}
    scale = 1.0
    for name, value in own.items():
        if name in _MULTIPLIERS and isinstance(value, (int, float)):
            scale *= float(value)
        elif isinstance(value, Tensor) or (_SUSPECT.search(name) and not re.search("drop", name)):
            raise Unknown(f"has a number of its own outside of its modules ({name})")
    if getattr(block, "apply_residual_connection_post_layernorm", False):
        raise Unknown("normalises its residual stream")
    if not scale:
        raise Unknown("multiplies what it adds by 0")
    return scale


def _inner(names: dict[str, nn.Module], name: str, candidates: tuple[str, ...]) -> str:
    """The module itself, or, if its forward adds the residual, the projection before that."""
    module = names.get(name)
    if module is None or "residual" not in inspect.signature(module.forward).parameters:
        return name
    for inside in candidates:
        if isinstance(getattr(module, inside, None), nn.Module):
            return f"{name}.{inside}"
    raise Unknown(f"has a module {name!r} that adds the residual itself", name)


def _bert_out(block: nn.Module, names: dict[str, nn.Module], path: str) -> Part:
    if "crossattention" in names or hasattr(block.output, "LayerNorm"):
        raise Unknown("normalises the sum after adding", path)
    return Part(path, "output")


def _attn_out(block: nn.Module) -> Part:
    names = _children(block)
    if _is_bert(names):
        return _bert_out(block, names, "attention.output.dense")
    try:
        attention = _attention(names)
    except Unknown as error:
        norms = _NORMS.get(_rest(names))
        raise Unknown(str(error), (norms.after_attention if norms else None) or error.path) from None
    try:
        after, scale = _norms(block, names).after_attention, _scale(block)
        return Part(after or _inner(names, attention, ("dense",)), "output", scale)
    except Unknown as error:
        raise Unknown(str(error), error.path or attention) from None


def _mlp_out(block: nn.Module) -> Part:
    names = _children(block)
    if _is_bert(names):
        return _bert_out(block, names, "output.dense")
    mlp = "fc2" if "fc2" in names else _only(names, MLP, "MLP")
    try:
        after, scale = _norms(block, names).after_mlp, _scale(block)
        return Part(after or _inner(names, mlp, ("dense_4h_to_h", "down_proj")), "output", scale)
    except Unknown as error:
        raise Unknown(str(error), error.path or mlp) from None


def _mlp_in(block: nn.Module) -> Part:
    names = _children(block)
    if _is_bert(names):
        return Part("intermediate.dense", "input")
    if "pre_feedforward_layernorm" in names:
        return Part("pre_feedforward_layernorm", "output")
    if "fc1" in names:
        return Part("fc1", "input")
    if "block_sparse_moe" in names and "shared_mlp" in names:  # both read the same activation
        return Part("shared_mlp", "input")
    return Part(_only(names, MLP, "MLP"), "input")


def _no_gain(block: nn.Module) -> Part:
    _mlp_in(block)  # raises Unknown if there is no MLP
    names = _children(block)
    before: str | None = "pre_feedforward_layernorm" if "pre_feedforward_layernorm" in names else None
    if before is None and not _is_bert(names):
        before = _norms(block, names).before_mlp
    if before is None:
        raise Unknown("has no norm before its MLP")
    norm = names[before]
    if not is_norm(norm):
        raise Unknown(
            f"has a {type(norm).__name__} as {before}, neither a root-mean-square norm nor a LayerNorm", before
        )
    return Part(before, "input", no_gain=True)


def _heads(block: nn.Module) -> Part:
    names = _children(block)
    attention = "attention" if _is_bert(names) else _attention(names)
    module = block.get_submodule(attention)
    for projection in PROJECTIONS:
        inside: Any = module
        for step in projection.split("."):
            inside = getattr(inside, step, None)
        if isinstance(inside, nn.Module):
            return Part(f"{attention}.{projection}", "input")
    raise Unknown(f"has in {attention!r} none of {', '.join(PROJECTIONS)}", attention)
