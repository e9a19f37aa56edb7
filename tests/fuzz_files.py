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


def latents() -> dict[str, bytes]:
    crow = np.array([0, 2, 2, 5], "i8")
    arrays = {"crow_indices": crow, "col_indices": np.array([1, 7, 0, 3, 9], "i4"), "values": np.ones(5, "f4")}
    return {"latents.safetensors": safetensors(arrays, {"shape": f"3,{F}"})}


# format → its healthy variants, as files of one folder
FORMATS = {
    "gemma-scope-1": lambda: [{"params.npz": npz(False)}, {"params.npz": npz(True)}],
    "gemma-scope-2": lambda: [gemma_scope_2()],
    "cross-layer": lambda: [layered("clt")],
    "crosscoder": lambda: [layered("crosscoder")],
    "saelens": lambda: [saelens(a) for a in ("jumprelu", "standard", "topk", "batchtopk", "jumprelu_skip_transcoder")],
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
    config = json.loads(data)
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
            deep = mutate_zip if name.endswith(".npz") else mutate_header
            files[name] = deep(data, draw) if draw.random() < 0.5 else mutate_bytes(data, draw)
    return files
