"""Gemma Scope releases of small random SAEs for the tests of banks, and what those tests ask of a bank."""

import threading

import attach_models as tiny
import numpy as np

from gemmascope_fast.bank import Bank
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.sae.screen import most_bytes

D, F = tiny.D, tiny.F
ONE = 4 * (2 * D * F + 2 * F + D) + most_bytes(D, F)  # bytes of one SAE in fp32, with what it may pack
WEIGHTS = ONE - most_bytes(D, F)
JOIN = 60  # seconds after which a thread counts as hung


def arrays(seed, d=D, f=F, d_out=None):
    g = np.random.default_rng(seed)
    d_out = d_out or d
    return {
        "W_enc": (g.standard_normal((d, f)) / d**0.5).astype("f4"),
        "W_dec": (g.standard_normal((f, d_out)) / d_out**0.5).astype("f4"),
        "b_enc": (0.1 * g.standard_normal(f)).astype("f4"),
        "b_dec": (0.1 * g.standard_normal(d_out)).astype("f4"),
        "threshold": np.full(f, 0.8, "f4"),
    }


def release(root, layers, repo="gemma-scope-2b-pt-res", seed=0, d=D, f=F):
    """A Gemma Scope release of one residual SAE a layer; gives its folder."""
    for layer in range(layers):
        folder = root / repo / f"layer_{layer}" / "width_16k" / f"average_l0_{layer + 50}"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **arrays(100 * seed + layer, d, f))
    return root / repo


def each_loaded(folder):
    return {name: from_pretrained(folder, name) for name in Bank(folder)}


def device(bank):
    return bank.held()["device"]


def run_threads(*functions):
    """All at once; the first exception of any is raised here, and a thread that hangs is an error."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:  # noqa: BLE001  (raised below, in the test's own thread)
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]
