"""Valid files of every checkpoint format, and functions that damage them; each depends only on its random numbers."""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zipfile

import numpy as np

D, F, LAYERS, K = 6, 10, 3, 3


INTERESTING = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


# ---- healthy files ---------------------------------------------------------------------------------------------


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    g = np.random.default_rng(seed)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": F, "b_dec": D, "threshold": F}
    return {name: g.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def safetensors(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    from safetensors.numpy import save

    return save(arrays, metadata)


def scope_2(seed: int = 0) -> dict[str, np.ndarray]:
    return {name.replace("W", "w"): array for name, array in weights(seed).items()}


def npz(compressed: bool) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **weights())
    return buffer.getvalue()


def native() -> dict[str, bytes]:
    about = {"version": 1, "kind": "topk_sae", "k": K, "figures": {"l0": 3.5}, "model_name": "m"}
    about |= {"hook_name": "model.layers.3.output", "hook_name_out": "model.layers.3.output"}
    arrays = weights()
    arrays["threshold"][:] = 0  # a top-k SAE has none
    return {"sae.safetensors": safetensors(arrays, {"gemmascope_fast": json.dumps(about)})}


def saelens(architecture: str) -> dict[str, bytes]:
    arrays = weights()
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "sae_lens_version": "6.54.0"}
    config |= {"normalize_activations": "none", "apply_b_dec_to_input": architecture == "standard"}
    config["metadata"] = {"hook_name": "blocks.4.hook_resid_post", "model_name": "gemma-2-2b"}
    if architecture == "topk":
        config |= {"k": K, "rescale_acts_by_decoder_norm": True}
    if architecture == "batchtopk":
        arrays["topk_threshold"] = np.array(0.5)
    if architecture == "jumprelu_skip_transcoder":
        arrays["W_skip"] = np.ones((D, D), "f4")
        config["d_out"] = D
    if architecture == "gated":
        del arrays["b_enc"]
        arrays |= {name: np.ones(F, "f4") for name in ("b_gate", "b_mag", "r_mag")}
    if not architecture.startswith("jumprelu"):
        del arrays["threshold"]
    return {"sae_weights.safetensors": safetensors(arrays), "cfg.json": json.dumps(config).encode()}


def gemma_scope_2() -> dict[str, bytes]:
    arrays = scope_2() | {"affine_skip_connection": np.ones((D, D), "f4")}
    config = {"type": "transcoder", "architecture": "jump_relu", "affine_connection": True, "width": F}
    config |= {"model_name": "gemma-v3-270m-pt", "l0": 10}
    config["hf_hook_point_in"] = "model.layers.2.pre_feedforward_layernorm.output"
    config["hf_hook_point_out"] = "model.layers.2.post_feedforward_layernorm.output"
    return {"params.safetensors": safetensors(arrays), "config.json": json.dumps(config).encode()}


def layered(kind: str) -> dict[str, bytes]:
    files = {"config.json": json.dumps({"type": kind, "architecture": "jump_relu"}).encode()}
    for i in range(LAYERS):
        arrays = scope_2(i)
        if kind == "clt":
            arrays["w_dec"] = np.stack([arrays["w_dec"]] * LAYERS, axis=1)
            arrays["affine_skip_connection"] = np.ones((D, D), "f4")
        else:
            arrays |= {name: weights()[name] for name in ("b_enc", "threshold")}
        files[f"params_layer_{i}.safetensors"] = safetensors(arrays)
    return files


def torch_file(arrays: dict[str, object], **more: object) -> bytes:
    """What torch.save makes of arrays and of values that are none."""
    import torch

    buffer = io.BytesIO()
    held = {name: torch.from_numpy(np.asarray(array).copy()) for name, array in arrays.items()}
    torch.save(held | more, buffer)
    return buffer.getvalue()


def linear(bias: str = "decoder.bias") -> dict[str, np.ndarray]:
    w = weights()
    made = {"encoder.weight": w["W_enc"].T.copy(), "decoder.weight": w["W_dec"].T.copy()}
    return made | {"encoder.bias": w["b_enc"], bias: w["b_dec"]}


def qwen_scope() -> dict[str, bytes]:
    w = weights()
    arrays = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    return {"layer3.sae.pt": torch_file(arrays, k=K)}


def openai() -> dict[str, bytes]:
    arrays = {"pre_bias": weights()["b_dec"], "latent_bias": weights()["b_enc"]}
    arrays |= {name: array for name, array in linear().items() if name.endswith("weight")}
    arrays["stats_last_nonzero"] = np.zeros(F, "i8")
    return {"8.pt": torch_file(arrays, activation="ReLU", activation_state_dict={})}


def dictionary_learning(made_by: str) -> dict[str, bytes]:
    trainer = {"dict_class": made_by, "activation_dim": D, "dict_size": F, "k": K, "layer": 7, "lm_name": "m"}
    arrays = linear("b_dec") | {"threshold": np.array(0.5, "f4"), "k": np.array(K, "i4")}
    if made_by == "GatedAutoEncoder":
        arrays = linear("decoder_bias") | {name: np.ones(F, "f4") for name in ("r_mag", "mag_bias", "gate_bias")}
        del arrays["encoder.bias"]
    return {"ae.pt": torch_file(arrays), "config.json": json.dumps({"trainer": trainer, "buffer": {}}).encode()}


def llama_scope() -> dict[str, bytes]:
    config = {"d_model": D, "d_sae": F, "act_fn": "jumprelu", "norm_activation": "dataset-wise"}
    config |= {"jump_relu_threshold": 0.25, "sparsity_include_decoder_norm": True, "use_glu_encoder": False}
    config |= {"dataset_average_activation_norm": {"in": 6.25, "out": 6.25}}
    config |= {"hook_point_in": "blocks.8.hook_resid_post", "hook_point_out": "blocks.8.hook_resid_post"}
    return {"hyperparams.json": json.dumps(config).encode(), "checkpoints/final.safetensors": safetensors(linear())}


def llama_scope_r1() -> dict[str, bytes]:
    config = {"d_model": D, "act_fn": "jumprelu", "norm_activation": "dataset-wise"}
    config |= {"hook_point_in": "blocks.8.hook_resid_post", "hook_point_out": "blocks.8.hook_resid_post"}
    arrays = linear() | {"log_jumprelu_threshold": np.zeros(F, "f4")}
    arrays["dataset_average_activation_norm.blocks.8.hook_resid_post"] = np.array([6.25], "f4")
    return {"config.json": json.dumps(config).encode(), "sae_weights.safetensors": safetensors(arrays)}


def sparsify() -> dict[str, bytes]:
    w = weights()
    arrays = {"encoder.weight": w["W_enc"].T.copy(), "encoder.bias": w["b_enc"], "W_dec": w["W_dec"]}
    arrays |= {"b_dec": w["b_dec"], "W_skip": np.ones((D, D), "f4")}
    config = {"activation": "topk", "num_latents": F, "k": K, "d_in": D, "skip_connection": True, "transcode": True}
    return {"sae.safetensors": safetensors(arrays), "cfg.json": json.dumps(config).encode()}


def circuit_tracer() -> dict[str, bytes]:
    w = weights()
    arrays = {"W_enc": w["W_enc"].T.copy(), "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    arrays["activation_function.threshold"] = w["threshold"]
    config = "model_name: Qwen/Qwen3-4B\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    return {"layer_2.safetensors": safetensors(arrays), "config.yaml": config.encode()}


def latents() -> dict[str, bytes]:
    crow = np.array([0, 2, 2, 5], "i8")
    arrays = {"crow_indices": crow, "col_indices": np.array([1, 7, 0, 3, 9], "i4"), "values": np.ones(5, "f4")}
    return {"latents.safetensors": safetensors(arrays, {"shape": f"3,{F}"})}


SAELENS = ("jumprelu", "standard", "topk", "batchtopk", "gated", "jumprelu_skip_transcoder")
# format → its healthy variants, as files of one folder
FORMATS = {
    "gemma-scope-1": lambda: [{"params.npz": npz(False)}, {"params.npz": npz(True)}],
    "gemma-scope-2": lambda: [gemma_scope_2()],
    "cross-layer": lambda: [layered("clt")],
    "crosscoder": lambda: [layered("crosscoder")],
    "saelens": lambda: [saelens(a) for a in SAELENS],
    "qwen-scope": lambda: [qwen_scope()],
    "goodfire": lambda: [{"M-SAE-l3.pt": torch_file(linear())}],
    "openai": lambda: [openai()],
    "dictionary-learning": lambda: [
        dictionary_learning(name) for name in ("AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder")
    ],
    "llama-scope": lambda: [llama_scope(), llama_scope_r1()],
    "sparsify": lambda: [sparsify()],
    "circuit-tracer": lambda: [circuit_tracer()],
    "native": lambda: [native()],
    "latents": lambda: [latents()],
}


# ---- mutations -------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """A few of: other bits, bytes, numbers; pieces cut out, doubled, moved in; a shorter or longer file."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at, size = draw.randrange(len(out) + 1), draw.choice((1, 2, 4, 8, 64, 1024))
        how = draw.randrange(8)
        if how == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            out[at : at + size] = draw.randbytes(size)
        elif how == 2:
            number, width = draw.choice(INTERESTING), draw.choice((1, 2, 4, 8))
            order = draw.choice(("little", "big"))
            out[at : at + width] = (number & (256**width - 1)).to_bytes(width, order)
        elif how == 3:
            del out[at : at + size]
        elif how == 4:
            out[at:at] = out[at : at + size]
        elif how == 5:
            source = draw.randrange(len(out) + 1)
            out[at : at + size] = out[source : source + size]
        elif how == 6:
            del out[at:]
        else:
            out += draw.randbytes(size)
    return bytes(out)


def any_json(draw: random.Random, depth: int = 0) -> object:
    """A value that a config should not hold."""
    how = draw.randrange(14 if depth < 3 else 10)
    if how < 10:
        return draw.choice(
            (None, True, False, 0, -1, 1, F, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "sae",
             "jumprelu", "topk", "x" * 5000, "\x00", "²", "model.layers.²." + "output",
             "model.layers." + "9" * 5000 + ".output", "blocks.9.hook_resid_post", "none", "layer_norm", "\ud800")
        )  # fmt: skip
    if how < 12:
        return [any_json(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {str(draw.choice(("k", "type", "", "shape"))): any_json(draw, depth + 1) for _ in range(draw.randrange(4))}


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    """Keys that are lost, new or hold something else; sometimes other text altogether."""
    if draw.random() < 0.2:
        return draw.choice((b"", b"[" * 100_000, b"1" * 10_000, b'"a"', b"\xff\xfe", b'{"a":' * 5000, b"NaN"))
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):  # an earlier mutation made it unreadable
        return data
    for _ in range(draw.choice((1, 1, 2, 3))):
        holder = config
        while True:
            inner = [v for v in holder.values() if isinstance(v, dict) and v]
            if not inner or draw.random() < 0.5:
                break
            holder = draw.choice(inner)
        key = draw.choice([*holder, "type", "k", "extra"])
        if draw.random() < 0.25:
            holder.pop(key, None)
        else:
            holder[key] = any_json(draw)
    return json.dumps(config).encode("utf-8", "surrogatepass")


def mutate_metadata(metadata: dict[str, object], draw: random.Random) -> None:
    """safetensors: one of the texts under __metadata__, an object of JSON or the shape of latents."""
    key = draw.choice(list(metadata))
    held = metadata[key]
    if isinstance(held, str) and held.startswith("{"):
        metadata[key] = mutate_json(held.encode(), draw).decode("utf-8", "replace")
    else:
        metadata[key] = draw.choice(("-3,-10", "3,-10", "3", "", "3,10,1", "1e9,10", "9" * 30, "3,²"))


def mutate_header(data: bytes, draw: random.Random) -> bytes:
    """safetensors: a header that is well-formed JSON of the right length and says something else."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for _ in range(draw.choice((1, 1, 2, 4))):
        name = draw.choice(list(header))
        item, how = header[name], draw.randrange(8)
        if how == 0:
            del header[name]
        elif how == 1:
            header[draw.choice(("W_enc", "w_enc", "b_dec", "x", "screen.codes", "__metadata__"))] = item
        elif name == "__metadata__" and how < 6 and isinstance(item, dict) and item:
            mutate_metadata(item, draw)
        elif not isinstance(item, dict) or "dtype" not in item or how == 2:
            header[name] = any_json(draw) if how < 5 or not isinstance(item, dict) else item | {"k": any_json(draw)}
        elif how == 3:
            item["dtype"] = draw.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "X", 3, None))
        elif how in (4, 5):
            shape = list(item["shape"]) if isinstance(item["shape"], list) else [1]
            at = draw.randrange(len(shape) + 1)
            if draw.random() < 0.5:
                shape[at : at + 1] = [draw.choice((*INTERESTING, -1, 1.0, True, "6", None, [6]))]
            else:
                draw.shuffle(shape)
            item["shape"] = shape
        elif isinstance(item["data_offsets"], list):
            item["data_offsets"][draw.randrange(2)] = draw.choice((*INTERESTING, -1, 4.0, None, "0"))
        if not header:
            break
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if draw.random() < 0.1 and len(text) > 2:
        text = text[:-1] + b"," + text[1:]  # every name twice
    text = text.ljust(length * draw.randrange(2))  # as long as it was: then the arrays lie where they did
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def mutate_zip(data: bytes, draw: random.Random) -> bytes:
    """npz: members lost, doubled, renamed, compressed otherwise, with other npy headers or bytes; the zip is sound."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(draw.choice((1, 1, 2))):
        at, how = draw.randrange(len(members)), draw.randrange(6)
        name, body = members[at]
        if how == 0 and len(members) > 1:
            del members[at]
        elif how == 1:
            members.append((draw.choice((name, "../x.npy", "w_enc.npy", "/etc/x", "x" * 300, "")), body))
        elif how == 2:
            members[at] = (name, mutate_bytes(body, draw))
        elif how == 3:
            members[at] = (name, npy_with_header(body, any_header(draw)))
        elif how == 4:
            members += [(f"{i}.npy", b"") for i in range(draw.choice((10, 300)))]
        else:
            members[at] = (name, mutate_bytes(body[:128], draw) + body[128:])
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", draw.choice((0, 8, 12, 14))) as archive:
        # a doubled member is one of the mutations
        warnings.filterwarnings("ignore", "Duplicate name", UserWarning)
        for name, body in members:
            archive.writestr(zipfile.ZipInfo(name), body, draw.choice((0, 8, 12, 14)))
    return buffer.getvalue()


def mutate_torch(data: bytes, draw: random.Random) -> bytes:
    """A file of torch.save: members lost, doubled, renamed, compressed, with other bytes, most of all the pickle's."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    pickled = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    for _ in range(draw.choice((1, 1, 2))):
        at, how = draw.randrange(len(members)), draw.randrange(8)
        name, body = members[at]
        if how == 0 and at != pickled:
            members[at] = (name + "x", body)
        elif how == 1:
            members.append((draw.choice((name, "../x", "x/data.pkl", "data.pkl", "x" * 300, "")), body))
        elif how == 2:
            members[at] = (name, mutate_bytes(body, draw))
        elif how == 3:
            members += [(f"x/data/{i}", b"") for i in range(draw.choice((10, 300)))]
        else:
            members[pickled] = (members[pickled][0], mutate_pickle(members[pickled][1], draw))
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.filterwarnings("ignore", "Duplicate name", UserWarning)
        for name, body in members:
            archive.writestr(zipfile.ZipInfo(name), body, draw.choice((0, 0, 0, 0, 0, 8)))
    return buffer.getvalue()


def mutate_pickle(data: bytes, draw: random.Random) -> bytes:
    """The pickle of a file of torch.save with other opcodes, names and numbers."""
    if draw.random() < 0.5:
        return mutate_bytes(data, draw)
    old, new = draw.choice(
        ((b"FloatStorage", draw.choice((b"HalfStorage", b"LongStorage", b"BoolStorage", b"QInt8Storage"))),
         (b"_rebuild_tensor_v2", draw.choice((b"_rebuild_parameter", b"_rebuild_sparse_tensor", b"_rebuild_qtensor"))),
         (b"torch._utils", draw.choice((b"os", b"builtins", b"torch"))), (b"OrderedDict", b"Counter"),
         (b"storage", b"module"), (b"cpu", b"cuda:0"), (b"K\x06", b"J\xff\xff\xff\x7f"), (b"K\n", b"M\xff\xff"),
         (b"K\x00", draw.choice((b"K\x01", b"J\xff\xff\xff\xff", b"N", b"\x88"))), (b"X\x05", b"X\xff"),
         (b"q\x00", b"r\xff\xff\xff\x7f"), (b"s", b"u"), (b"t", b"l"), (b"R", b"b"), (b"Q", b"R"))
    )  # fmt: skip
    places = [i for i in range(len(data)) if data.startswith(old, i)]
    if not places:
        return mutate_bytes(data, draw)
    at = draw.choice(places)
    return data[:at] + new + data[at + len(old) :]


def any_header(draw: random.Random) -> bytes:
    shape = draw.choice(
        ("(6, 10)", "(10, 6)", "(10,)", "()", "(0,)", "(-1, -60)", "(1 << 40,)", "(9999999999999, 9999999999999)",
         "(6.0, 10)", "[6, 10]", "(True, 60)", "None", "(0, 99999999999999999999)", "(" * 3000, "6")
    )  # fmt: skip
    kind = draw.choice(
        ("'<f4'", "'>f4'", "'|O'", "'<f8'", "'<i4'", "'<U9'", "[('a', '<f4')]", "'<f2'", "4", "'" + "x" * 99 + "'")
    )
    order = draw.choice(("False", "True", "0", "'no'"))
    text = draw.choice(
        (f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}", f"{{'descr': {kind}}}",
         "__import__('os')", "{", "\x00", "1" * 9000,
         "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 10), 'x': 1}")
    )  # fmt: skip
    return text.encode() + b"\n"


def npy_with_header(body: bytes, header: bytes) -> bytes:
    return body[:8] + (len(header) & 0xFFFF).to_bytes(2, "little") + header + body[128:]


DEEP = {".npz": mutate_zip, ".pt": mutate_torch, ".yaml": mutate_bytes}


def mutated(files: dict[str, bytes], draw: random.Random) -> dict[str, bytes]:
    """The folder with something wrong in it."""
    files = dict(files)
    for name in draw.sample(sorted(files), draw.choice((1, 1, 1, 2)) if len(files) > 1 else 1):
        data = files[name]
        if draw.random() < 0.03:
            del files[name]
        elif name.endswith(".json"):
            files[name] = mutate_json(data, draw) if draw.random() < 0.8 else mutate_bytes(data, draw)
        else:
            deep = DEEP.get(name[name.rfind(".") :], mutate_header)
            files[name] = deep(data, draw) if draw.random() < 0.5 else mutate_bytes(data, draw)
    return files
