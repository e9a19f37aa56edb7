"""Helpers for the tests of packed files: small panels, a compressed checkpoint, a flipped bit."""

import numpy as np
from safetensors.torch import load_file

from gemmascope_fast.checkpoints import packed


def small_panels(monkeypatch):
    monkeypatch.setattr(packed, "PANEL_BYTES", 4 * 200 * 128)  # 128 features: eight panels, the last one short


def compressed(folder):
    arrays = load_file(folder / "sae.safetensors")
    np.savez_compressed(folder / "params.npz", **{name: array.numpy() for name, array in arrays.items()})
    return folder / "params.npz"


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
