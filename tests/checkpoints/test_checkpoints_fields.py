"""Every field of every header and config: an invalid value is a CheckpointError that names it."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from checkpoint_files import weights, write_gemma_scope_2, write_saelens
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.loading import from_pretrained, open_checkpoint
from gemmascope_fast.ops.codes import quantize
from gemmascope_fast.quant import storage
from gemmascope_fast.quant.planes import Packed

JUMPRELU = {"architecture": "jumprelu", "sae_lens_version": "6.54.0", "apply_b_dec_to_input": False}

# ---- latents ---------------------------------------------------------------------------------------------------


def latents_file(path, shape="3,10", **changed):
    held = {"crow_indices": np.array([0, 2, 2, 5]), "col_indices": np.array([1, 7, 0, 3, 9], "i4")}
    held |= {"values": np.ones(5, "f4")}
    held |= changed
    save_file({n: a for n, a in held.items() if a is not None}, path, None if shape is None else {"shape": shape})
    return path


LATENTS = [
    {"shape": s} for s in (None, "", "-3,-10", "3,-10", "-1,-3,10", "3.0,10", "3,ten", " 3,10", "٣,10", "1" * 30)
]
LATENTS += [{"shape": s} for s in ("3,10,", "0,10", "3,9", "3," + "9" * 15, ",".join(["1"] * 9 + ["10"]), "4,10")]
LATENTS += [
    {"values": np.ones(5, "i8")},
    {"values": np.ones((5, 1), "f4")},
    {"values": np.ones((5, 1), "f4"), "col_indices": np.zeros((5, 1), "i4")},
    {"values": np.ones(4, "f4")},
    {"col_indices": np.array([1, 7, 0, 3, 9])},
    {"col_indices": np.array([1, 7, 0, 3, 10], "i4")},
    {"col_indices": np.array([1, 7, 0, 3, -1], "i4")},
    {"col_indices": np.array([7, 1, 0, 3, 9], "i4")},
    {"crow_indices": np.array([0, 2, 2, 5], "i4")},
    {"crow_indices": np.array([[0, 2], [2, 5]])},
    {"crow_indices": np.array([0, 3, 2, 5])},
    {"crow_indices": np.array([0, -3, 2, 5])},
    {"crow_indices": np.array([0, 2, 2, 2**62])},
    {"crow_indices": np.array(0)},
    {"crow_indices": None},
    {"more": np.ones(1)},
]


@pytest.mark.parametrize("change", LATENTS, ids=lambda c: str(c)[:40])
def test_latents_that_contradict_themselves(tmp_path, change):
    assert gsf.SparseLatents.load(latents_file(tmp_path / "good")).nnz == 5
    with pytest.raises(gsf.CheckpointError, match=str(tmp_path / "bad")):
        gsf.SparseLatents.load(latents_file(tmp_path / "bad", **change))


def test_latents_that_are_not_there(tmp_path):
    for place in (tmp_path, tmp_path / "nothing", tmp_path / "nothing" / "more"):
        with pytest.raises(gsf.CheckpointError, match=str(tmp_path)):
            gsf.SparseLatents.load(place)


# ---- activation functions and k --------------------------------------------------------------------------------

OLD = {"d_in": 6, "d_sae": 10, "apply_b_dec_to_input": False, "sae_lens_version": "3.2.0"}
NEW = {"apply_b_dec_to_input": False, "sae_lens_version": "6.54.0"}
ACTIVATIONS = [
    ({**OLD, "activation_fn_str": "tanh-relu"}, "activation_fn_str: expected relu .*tanh-relu"),
    ({**OLD, "activation_fn": "tanh-relu"}, "activation_fn: expected relu .*tanh-relu"),
    ({**OLD, "activation_fn_str": "gelu", "architecture": "jumprelu"}, "activation_fn_str: .*gelu"),
    ({**OLD, "activation_fn_str": "topk", "architecture": "jumprelu"}, "activation_fn_str: .*topk"),
    ({**OLD, "activation_fn_str": "relu", "architecture": "topk", "k": 3}, "activation_fn_str: expected topk"),
    ({**OLD, "activation_fn_str": ["relu"]}, "activation_fn_str"),
    ({**NEW, "architecture": "standard", "activation_fn": "tanh-relu"}, "activation_fn: expected relu"),
    ({**NEW, "architecture": "standard", "activation_fn": "topk", "k": 3}, "activation_fn: expected relu"),
    ({**NEW, "architecture": "jumprelu", "activation_fn": "identity"}, "activation_fn: .*identity"),
    ({**NEW, "architecture": "batchtopk", "activation_fn": "tanh"}, "activation_fn: .*tanh"),
    ({**NEW, "architecture": "jumprelu_transcoder", "activation_fn": "silu"}, "activation_fn: .*silu"),
    ({**NEW, "architecture": "transcoder", "activation_fn": "tanh-relu"}, "activation_fn: expected relu"),
    ({**OLD, "activation_fn_str": "topk"}, r"k: expected an integer from 1 to 10, got None"),
    ({**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {}}, r"k: .*from 1 to 10, got None"),
    ({**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": [3]}, "activation_fn_kwargs: expected an object"),
    ({**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "k": 4}, "k: 4 contradicts .*3"),
    ({**NEW, "architecture": "standard", "apply_b_dec_to_input": "false"}, "apply_b_dec_to_input: expected true or"),
    ({**NEW, "architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": 1}, "rescale_acts_by_decoder_norm"),
    ({**NEW, "architecture": "standard", "d_in": 6.0}, "d_in: expected an integer"),
    ({**NEW, "architecture": "standard", "d_sae": True}, "d_sae: expected an integer"),
    ({**NEW, "architecture": "standard", "d_in": 7}, "d_in: 7 contradicts"),
]
ACTIVATIONS += [
    ({**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}}, r"k: expected an integer from 1 to 10")
    for k in (0, -1, 11, 3.0, "3", True, None, [3], 10**30)
]
ACTIVATIONS += [({**NEW, "architecture": "topk", "k": k}, r"cfg\.json: k: expected .* 1 to 10") for k in (0, 11, 2.5)]


@pytest.mark.parametrize(("config", "said"), ACTIVATIONS)
def test_saelens_activation_functions(tmp_path, config, said):
    held = weights()
    if not config.get("architecture", "").startswith("jumprelu"):
        del held["threshold"]
    if config.get("architecture") == "batchtopk":
        held["topk_threshold"] = np.array(0.5)
    with pytest.raises(gsf.CheckpointError, match=said):
        from_pretrained(write_saelens(tmp_path, config, held))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_saelens_top_k_within_limits(tmp_path, k):
    held = {n: a for n, a in weights().items() if n != "threshold"}
    for number, config in enumerate(
        (
            {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}},
            {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}, "architecture": "topk", "k": k},
            {**NEW, "architecture": "topk", "k": k},
        )
    ):
        sae = from_pretrained(write_saelens(tmp_path / str(number), config, held))
        assert (type(sae), sae.k) == (gsf.TopKSAE, k)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"kind": "topk_sae"}, "k: expected an integer from 1 to 10, got None"),
        *(({"kind": "topk_sae", "k": k}, "k: expected an integer from 1 to 10") for k in (0, 11, -1, 2.0, True, "3")),
        ({"kind": "sae", "k": 3}, "k: only topk_sae, .* has one"),
        ({"kind": "transcoder", "k": 3}, "k: only topk_sae, .* has one"),
        *(({"kind": "sae", "version": v}, "version: expected") for v in (None, 0, 2, 1.0, True, "1")),
        *(({"kind": k}, "kind: expected one of") for k in (None, 3, "clt", "crosscoder", ["sae"])),
        ({"kind": "sae", "model_name": 3}, "model_name: expected text"),
        ({"kind": "sae", "hook_name": 3}, "hook name: expected text"),
        ({"kind": "sae", "figures": [1]}, "figures: expected an object"),
    ],
)
def test_native_metadata(tmp_path, about, said):
    about = {"version": 1} | about
    save_file(weights(), tmp_path / "sae.safetensors", {"gemmascope_fast": json.dumps(about)})
    with pytest.raises(gsf.CheckpointError, match=rf"sae\.safetensors: .*{said}"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "topk"}, "architecture: expected jump_relu"),
        ({"architecture": None}, "architecture: expected jump_relu"),
        ({"activation_fn": "tanh-relu"}, "activation_fn: .*tanh-relu"),
        ({"activation": "topk"}, "activation: .*topk"),
        ({"affine_connection": "no"}, "affine_connection: expected true or false"),
        ({"affine_connection": 0}, "affine_connection: expected true or false"),
        *(({"width": w}, "width: expected an integer") for w in (10.0, True, "10", 0, -10, None)),
        ({"width": 11}, "width 11 contradicts"),
        ({"type": ["sae"]}, "type: expected one of"),
    ],
)
@pytest.mark.parametrize("layered", [False, True])
def test_gemma_scope_2_configs(tmp_path, config, said, layered):
    if layered:
        held = weights()
        arrays = {"w_enc": held["W_enc"], "w_dec": held["W_dec"][:, None]}
        arrays |= {n: held[n] for n in ("b_enc", "b_dec", "threshold")}
        save_file(arrays, tmp_path / "params_layer_0.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"type": "clt"} | config))
    else:
        write_gemma_scope_2(tmp_path, {"type": "sae"} | config)
    with pytest.raises(gsf.CheckpointError, match=rf"config\.json: {said}"):
        from_pretrained(tmp_path)


def test_messages_stay_short(tmp_path):
    for value in ("x" * 500_000, list(range(50_000)), {str(i): i for i in range(20_000)}, [[[[[[]]]]]] * 1000):
        with pytest.raises(gsf.CheckpointError) as caught:
            from_pretrained(write_saelens(tmp_path, {"architecture": copy.copy(value)}, weights()))
        assert len(str(caught.value)) < 1000


def test_open_checkpoint_names_what_it_is_given(tmp_path):
    with pytest.raises(gsf.CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "nothing")


# ---- nested codes ----------------------------------------------------------------------------------------------


@pytest.fixture
def nested(tmp_path):
    matrix = Packed.of(quantize(torch.randn(20, 40, generator=torch.Generator().manual_seed(0))))
    storage.save(tmp_path / "codes.safetensors", {"a": matrix}, {}, {"what": "a test"})
    return tmp_path / "codes.safetensors"


BAD = [{"shape": s} for s in ([20, -40], [20], [20.0, 40], [0, 40], "ab", [True, 40], [20, 2**63], [36, 40], None)]
BAD += [{"group_size": g} for g in (0, -1, 32.0, "32", True, 16)]
BAD += [{"stored": s} for s in (0, -8, 7, 16, "8", 8.0, [8])]
BAD += [{"mode": m} for m in (None, 3, "other", ["prefix"])]


@pytest.mark.parametrize("change", [None, [], 3, *BAD], ids=str)
def test_nested_codes(nested, change):
    arrays, metadata = load_file(nested), safe_open(nested, "pt").metadata()
    header = json.loads(metadata["matryoshka"])
    assert storage.load(nested)[2] == {"what": "a test"}
    header["layers"]["a"] = header["layers"]["a"] | change if isinstance(change, dict) else change
    save_torch(arrays, nested, {"matryoshka": json.dumps(header)})
    with pytest.raises(gsf.CheckpointError, match=str(nested)):
        storage.load(nested)


NO_HEADERS = ["", "[", "[]", "3", "[" * 100_000, '{"version": 2}', '{"version": true}', '{"version": 1}']


@pytest.mark.parametrize("text", NO_HEADERS)
def test_nested_headers(nested, text):
    save_torch(load_file(nested), nested, {"matryoshka": text})
    with pytest.raises(gsf.CheckpointError, match=str(nested)):
        storage.load(nested)


def test_nested_codes_in_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "codes.safetensors")
    with pytest.raises(gsf.CheckpointError, match="got a FIFO"):
        storage.load(tmp_path / "codes.safetensors")
