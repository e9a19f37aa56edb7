"""Two small models of the same letters and an SAE of each, on disk, for the tests of the comparisons."""

import json

from tiny_model import LAYER, make_sae, save_model

from gemmascope_fast.checkpoints.native import save

KEY = (LAYER, "resid")


def save_two(where):
    save_model(where / "a", "abcdefghijklmnopqrstuvwxyz \n:*-")
    save_model(where / "b", "abcdefghijklmnopqrstuvwxyz \n:*-", seed=1)
    save(make_sae(), where / "sae.safetensors")
    save(make_sae(seed=2), where / "other.safetensors")
    return where


def lines(path, records):
    path.write_text("\n".join(json.dumps(r) if isinstance(r, dict) else r for r in records) + "\n")
    return str(path)


def base(folder, command):
    return [*command.split(), "--model", str(folder / "a"), "--sae", str(folder / "sae.safetensors")]
