"""Loading needs little more memory than the result, measured on another process from outside."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

D, F = 1024, 16384
SHARE = 1.1  # of the weights as held

# Tells that it is ready, loads what a line on stdin names, tells what it holds, keeps it until the next line.
CHILD = """
import json, sys
from gemmascope_fast.checkpoints.loading import from_pretrained
held = None
for line in sys.stdin:
    order = json.loads(line)
    held = None
    if order:
        held = from_pretrained(order["path"], dtype=order["dtype"])
    print(sum(p.nbytes for p in held.parameters()) if held is not None else 0, flush=True)
"""


def status(pid, field):
    """Kilobytes of a line such as VmHWM in /proc/PID/status → bytes."""
    with open(f"/proc/{pid}/status") as file:
        line = next(line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


class Loader:
    def __init__(self):
        # the allocator gives freed blocks back at once, so that one load's are not the next one's baseline
        own = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(256 << 10), "MALLOC_TRIM_THRESHOLD_": "0"}
        command = [sys.executable, "-c", CHILD]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)

    def order(self, **what):
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def measure(self, path, dtype):
        """(bytes of the weights held, growth of the peak resident set while they were loaded)."""
        pid = self.process.pid
        self.order()
        with open(f"/proc/{pid}/clear_refs", "w") as file:
            file.write("5")  # the peak begins anew
        before = status(pid, "VmRSS")
        held = self.order(path=str(path), dtype=dtype)
        return held, status(pid, "VmHWM") - before


def weights():
    g = np.random.default_rng(0)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": F, "b_dec": D, "threshold": F}
    return {name: g.integers(-8, 8, shape, dtype="i1").astype("f4") for name, shape in shapes.items()}


def write(where, kind):
    where.mkdir()
    w = weights()
    if kind == "npz":
        np.savez(where / "params.npz", **w)
    elif kind == "npz-compressed":
        with zipfile.ZipFile(where / "params.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in w.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array)
    elif kind == "gemma-scope-2":
        save_file({name.replace("W", "w"): array for name, array in w.items()}, where / "params.safetensors")
    elif kind == "saelens-centred":  # b_dec is folded into b_enc by a product with the whole encoder
        del w["threshold"]
        save_file(w, where / "sae_weights.safetensors")
        config = {"architecture": "standard", "apply_b_dec_to_input": True, "sae_lens_version": "6.0.0"}
        (where / "cfg.json").write_text(json.dumps(config))
    elif kind == "native":
        about = {"gemmascope_fast": json.dumps({"version": 1, "kind": "sae"})}
        save_file(w, where / "sae.safetensors", metadata=about)
    elif kind in ("qwen-scope", "gated"):
        where = where / "SAE-Res-Qwen3-1.7B-Base-W16K-L0_50" if kind == "qwen-scope" else where
        where.mkdir(exist_ok=True)
        held = {name: torch.from_numpy(w[name]) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        held |= {name: held[name].t().contiguous() for name in ("W_enc", "W_dec")}
        if kind == "qwen-scope":
            torch.save(held, where / "layer3.sae.pt")
        else:
            names = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_dec": "decoder_bias"}
            gates = {name: torch.zeros(F) for name in ("gate_bias", "mag_bias", "r_mag")}
            torch.save({theirs: held[ours] for ours, theirs in names.items()} | gates, where / "ae.pt")
            (where / "config.json").write_text(json.dumps({"trainer": {"dict_class": "GatedAutoEncoder"}}))
    elif kind == "crosscoder":
        folder = where / "crosscoder" / "layer_1_2_width_8k_l0_small"
        folder.mkdir(parents=True)
        for i in range(2):
            half = {"w_enc": w["W_enc"][: D // 2], "w_dec": w["W_dec"][:, : D // 2], "b_dec": w["b_dec"][: D // 2]}
            half = {name: np.ascontiguousarray(array) for name, array in half.items()}
            save_file(half | {n: w[n] for n in ("b_enc", "threshold")}, folder / f"params_layer_{i}.safetensors")
        return folder
    return where


KINDS = ["npz", "npz-compressed", "gemma-scope-2", "saelens-centred", "native", "crosscoder", "qwen-scope", "gated"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    where = tmp_path_factory.mktemp("lean")
    yield write(where / "x", request.param)
    shutil.rmtree(where)


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    made = Loader()
    # what is allocated once, by the first load of all, is no part of any load
    warm = write(tmp_path_factory.mktemp("warm") / "x", "npz-compressed")
    made.order(path=str(warm), dtype="bfloat16")
    shutil.rmtree(warm)
    yield made
    made.process.stdin.close()
    assert made.process.wait(60) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_that_of_the_weights_as_held(loader, folder, dtype):
    held, grown = loader.measure(folder, dtype)
    assert held == (2 * D * F + 2 * F + D) * (4 if dtype == "float32" else 2)
    assert held * 0.9 < grown <= SHARE * held, f"{grown / held:.3f} of what is held"
