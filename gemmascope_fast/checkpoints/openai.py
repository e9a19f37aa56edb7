"""OpenAI's SAEs of GPT-2 small (github.com/openai/sparse_autoencoder): a state dict in `LOCATION/autoencoders/N.pt`.

latents = activation(encoder(x - pre_bias) + latent_bias), x̂ = decoder(latents) + pre_bias.  ReLU SAEs are supported.
TopK SAEs first normalise each token to mean 0 and standard deviation 1 and undo it afterwards, which is not
supported: they raise an error that says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from gemmascope_fast.checkpoints.base import Checkpoint
from gemmascope_fast.checkpoints.torch_write import check_relu, tensor_of
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry
from gemmascope_fast.files.fields import shown
from gemmascope_fast.files.write import Source
from gemmascope_fast.sae.sites import Site

FORMAT = "openai"
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_PATH = re.compile(r"/(resid_delta_attn|resid_delta_mlp|resid_post_mlp)(?:_v[^/]*)?/autoencoders/([0-9]{1,6})\.pt$")
_SITES = {"resid_delta_attn": "attn_out", "resid_delta_mlp": "mlp", "resid_post_mlp": "resid"}


def read(path: Path, arrays: dict[str, Entry], values: dict[str, Any]) -> Checkpoint:
    """Read a state dict of their Autoencoder, tied or not; the site comes from the path if it is as published."""
    activation = values.get("activation", "ReLU")
    if activation == "TopK":
        raise CheckpointError(
            f"{path}: activation: OpenAI's TopK SAEs normalise each token (layer norm) before they encode and undo it"
            " after they decode, which is not supported"
        )
    if activation != "ReLU":
        raise CheckpointError(f"{path}: activation: expected ReLU, got {shown(activation)}, which is not supported")
    held = {name: entry for name, entry in arrays.items() if name not in STATISTICS}
    made: dict[str, Entry] = {}
    for name, entry in held.items():
        if name == "encoder.weight":
            made["W_enc"] = entry.transposed()
        elif name == "decoder.weight":
            made["W_dec"] = entry.transposed()
        elif name == "decoder.linear.weight":  # tied: the encoder's matrix, whose rows are also the decoder's
            made["W_dec"] = entry
        else:
            made[{"pre_bias": "b_dec", "latent_bias": "b_enc"}.get(name, name)] = entry
    found = _PATH.search(path.as_posix())
    site = None if found is None else Site(_SITES[found[1]], int(found[2]))
    return Checkpoint(
        path,
        "sae",
        made,
        site,
        model_name=None if found is None else "gpt2",
        subtracts_b_dec=True,
        threshold_value=0.0,
        format=FORMAT,
    )


def write(checkpoint: Checkpoint, arrays: dict[str, Source], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `autoencoder.pt`: a state dict for their `Autoencoder.from_state_dict`."""
    if checkpoint.kind != "sae":
        raise CheckpointError(f"{folder}: OpenAI's format is written for ReLU SAEs only, got a {checkpoint.kind}")
    check_relu(folder, "OpenAI's format", arrays)
    held = {name: tensor_of(arrays[name], dtype) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    # their encoder subtracts pre_bias first, so its part in our b_enc is added back
    bias = held["b_enc"].double() + held["b_dec"].double() @ held["W_enc"].double()
    n = bias.shape[0]
    state = {
        "pre_bias": held["b_dec"],
        "latent_bias": bias.to(held["b_enc"].dtype),
        "encoder.weight": held["W_enc"].t().contiguous(),
        "decoder.weight": held["W_dec"].t().contiguous(),
        "stats_last_nonzero": torch.zeros(n, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(n),
        "latents_mean_square": torch.zeros(n),
        "activation": "ReLU",
        "activation_state_dict": {},
    }
    torch.save(state, folder / "autoencoder.pt")
