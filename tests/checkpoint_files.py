"""Small checkpoints of each format, written as their libraries write them."""

import json

import numpy as np
import torch
from safetensors.numpy import save_file

D, F = 6, 10


def weights(d_in=D, d_sae=F, d_out=D, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": d_sae, "b_dec": d_out, "threshold": d_sae}
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def write_gemma_scope_2(folder, config=None, skip=False, **sizes):
    w = weights(**sizes)
    stored = {"w_enc": w["W_enc"], "w_dec": w["W_dec"]} | {n: w[n] for n in ("b_enc", "b_dec", "threshold")}
    if skip:
        stored["affine_skip_connection"] = np.ones((w["W_enc"].shape[0], w["W_dec"].shape[1]), "f4")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_saelens(folder, config, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def dense(x, w, threshold):
    """fp64 JumpReLU SAE of numpy weights."""
    w = {name: torch.from_numpy(array).double() for name, array in w.items()}
    z = x.double() @ w["W_enc"] + w["b_enc"]
    f = torch.where(z > torch.as_tensor(threshold).double().clamp(min=0), z, 0.0)
    return f, f @ w["W_dec"] + w["b_dec"]
