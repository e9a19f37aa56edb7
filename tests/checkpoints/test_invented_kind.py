"""A kind of coder that this package does not have, added as CONTRIBUTING says, works wherever the others do."""

import json
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import LAYER, D, F, make_model, make_sae

import gemmascope_fast as gsf
from gemmascope_fast.analysis.evaluation import Reconstruction
from gemmascope_fast.checkpoints import kinds
from gemmascope_fast.checkpoints.loading import from_pretrained, open_checkpoint
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli.convert import convert
from gemmascope_fast.cli.ls import listing
from gemmascope_fast.sae.base import Field


class LeakySAE(gsf.JumpReLUSAE):
    """x̂ = (f · gain) @ W_dec + b_dec + leak · x."""

    kind = "leaky_sae"
    extra_arrays: ClassVar[Mapping[str, tuple[str, ...]]] = {"gain": ("d_sae",)}
    extra_fields: ClassVar[Mapping[str, Field]] = {"leak": Field(float, 0.0, 1.0), "steps": Field(int, 1, "d_sae")}

    def __init__(self, *args, gain, leak, steps, **more):
        super().__init__(*args, **more)
        self.gain, self.leak, self.steps = torch.nn.Parameter(gain.detach()), leak, steps

    def decode(self, latents):
        dense = latents if isinstance(latents, torch.Tensor) else latents.to_dense()
        return super().decode(dense * self.gain)

    def reconstruct(self, latents, x):
        return self.decode(latents) + self.leak * x


@pytest.fixture(autouse=True)
def registered():
    kinds.register(LeakySAE)
    yield
    del kinds.KINDS["leaky_sae"]


def leaky(steps=5, leak=0.25):
    plain = make_sae()
    weights = {name: p.detach() for name, p in plain.named_parameters()}
    gain = torch.linspace(0.5, 1.5, F)
    return LeakySAE.from_weights(**weights, cfg=plain.cfg, gain=gain, leak=leak, steps=steps)


def test_it_is_saved_loaded_listed_and_converted(tmp_path):
    sae, x = leaky(), torch.randn(7, D)
    save(sae, tmp_path / "sae.safetensors")
    for again in (from_pretrained(tmp_path), LeakySAE.from_pretrained(tmp_path)):
        assert type(again) is LeakySAE
        assert (again.leak, again.steps) == (0.25, 5)
        assert torch.equal(again.gain, sae.gain)
        assert torch.equal(again(x), sae(x))
    row = listing(str(tmp_path))[0]
    assert (row["kind"], row["format"], row["d_sae"]) == ("leaky_sae", "native", F)
    convert(tmp_path, tmp_path / "half", "native", dtype="bfloat16")
    half = from_pretrained(tmp_path / "half")
    assert half.leak == 0.25
    assert torch.equal(half.gain, sae.gain.bfloat16().float())
    with pytest.raises(gsf.CheckpointError, match="SAELens has no leaky_sae"):
        convert(tmp_path, tmp_path / "lens", "saelens")
    with pytest.raises(TypeError, match="expected a checkpoint of kind 'topk_sae', got 'leaky_sae'"):
        gsf.TopKSAE.from_pretrained(tmp_path)


def test_it_is_attached_and_evaluated():
    model, sae = make_model(), leaky()
    ids = torch.randint(4, 60, (2, 9))
    with gsf.attach(model, sae, tokens="all") as run:
        model(ids)
    seen = {}
    hook = model.model.layers[LAYER].register_forward_hook(lambda m, a, out: seen.setdefault("x", out))
    model(ids)
    hook.remove()
    x = (seen["x"] if isinstance(seen["x"], torch.Tensor) else seen["x"][0]).reshape(-1, D).detach()
    assert run.latents[LAYER].reshape(-1, F) == sae.encode_sparse(x)
    with gsf.attach(model, sae, mode="splice", tokens="all"):
        spliced = model(ids).logits

    def replaced(module, arguments, out):
        x = out if isinstance(out, torch.Tensor) else out[0]
        made = sae(x.reshape(-1, D)).reshape(x.shape)
        return made if isinstance(out, torch.Tensor) else (made, *out[1:])

    hook = model.model.layers[LAYER].register_forward_hook(replaced)
    expected = model(ids).logits
    hook.remove()
    assert torch.equal(spliced, expected)
    measured = Reconstruction(sae)
    assert torch.equal(measured.add(x), sae(x))
    assert measured.figures()["l0"] == pytest.approx(float(sae.encode_sparse(x).l0().float().mean()))


def test_its_prefix():
    sae, x = leaky(steps=90), torch.randn(7, D)
    part = sae.prefix(40)
    assert type(part) is LeakySAE
    assert (part.d_sae, part.leak, part.steps) == (40, 0.25, 40)
    assert torch.equal(part.gain, sae.gain[:40])
    assert torch.equal(part.encode(x), sae.encode(x)[:, :40])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"leak": None}, "leak: expected a number from 0.0 to 1.0, got None"),
        ({"leak": 1.5}, "leak: expected a number from 0.0 to 1.0, got 1.5"),
        ({"leak": True}, "leak: expected a number"),
        ({"leak": float("nan")}, "leak: expected a number"),
        ({"steps": 0}, f"steps: expected an integer from 1 to {F}, got 0"),
        ({"steps": F + 1}, f"steps: expected an integer from 1 to {F}"),
        ({"steps": 2.0}, "steps: expected an integer"),
        ({"k": 3}, "k: only topk_sae, .* has one, got k = 3 of kind leaky_sae"),
        ({"kind": "sae"}, "leak.*of kind sae|steps.*of kind sae"),
    ],
)
def test_its_fields_are_checked_when_the_file_is_opened(tmp_path, change, said):
    path = tmp_path / "sae.safetensors"
    save(leaky(), path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["gemmascope_fast"])
    save_file(load_file(path), path, {"gemmascope_fast": json.dumps(about | change)})
    with pytest.raises(gsf.CheckpointError, match=said):
        open_checkpoint(path)


def test_its_arrays_are_checked(tmp_path):
    path = tmp_path / "sae.safetensors"
    save(leaky(), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    save_file({name: array for name, array in arrays.items() if name != "gain"}, path, metadata)
    with pytest.raises(gsf.CheckpointError, match=r"expected arrays .*gain"):
        open_checkpoint(path)
    save_file(arrays | {"gain": torch.ones(F - 1)}, path, metadata)
    with pytest.raises(gsf.CheckpointError, match=rf"gain: expected \({F},\), got \({F - 1},\)"):
        open_checkpoint(path)


def test_what_is_not_registered_says_so(tmp_path):
    class Other(gsf.JumpReLUSAE):
        kind = "other_sae"

    plain = make_sae()
    weights = {name: p.detach() for name, p in plain.named_parameters()}
    with pytest.raises(gsf.CheckpointError, match=r"expected one of sae, .*, got a other_sae"):
        save(Other.from_weights(**weights), tmp_path / "sae.safetensors")


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"kind": "sae"}, "is JumpReLUSAE's already"),
        ({"kind": "x", "extra_arrays": {"W_enc": ("d_in", "d_sae")}}, "names of their own"),
        ({"kind": "x", "extra_fields": {"hook_name": Field(str)}}, "names of their own"),
        ({"kind": "x", "extra_arrays": {"a": ("d_in",)}, "extra_fields": {"a": Field(int)}}, "names of their own"),
        ({"kind": "x", "extra_arrays": {"a": ("d_model",)}}, "expected d_in, d_sae and d_out"),
        ({"kind": "x_transcoder"}, "reconstructs_input True contradicts"),
        ({"kind": "x", "reconstructs_input": False}, "reconstructs_input False contradicts"),
    ],
)
def test_a_class_that_contradicts_itself_is_not_registered(about, said):
    before = dict(kinds.KINDS)
    with pytest.raises(ValueError, match=said):
        kinds.register(type("Invented", (gsf.JumpReLUSAE,), about))
    assert before == kinds.KINDS
