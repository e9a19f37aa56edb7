"""Named sites and module paths in every causal language model of the installed transformers."""

import re
from pathlib import Path

import architectures
import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.attach import Activations
from gemmascope_fast.attach.transformers.structure import Structure
from gemmascope_fast.sae.sites import Site

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "sites.md"
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(2))
# Models that visit a block several times a forward, or whose rows are not those of the ids.
NO_ROWS = {
    "dory": "reached twice",
    "prophetnet": "reached twice|expected 2 x 9 rows",
    "cpmant": "expected 2 x 9 rows",
    "openai-gpt": "expected a tensor",
}


def documented():
    """{architecture: its line of the table} of docs/reference/sites.md."""
    return {line.split("|")[1].strip(): line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")}


class Inputs:
    """What enters each block, by hand."""

    def __init__(self, blocks):
        self.seen = {}
        self.handles = [
            block.register_forward_pre_hook(self._hook(layer), with_kwargs=True) for layer, block in enumerate(blocks)
        ]

    def _hook(self, layer):
        def hook(_module, args, kwargs):
            self.seen[layer] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

        return hook

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def readable(structure, layers):
    """{key: Activations} of every site that the model has, and the advice of the refusals: {(kind, layer): path}."""
    keep, advice = {}, {}
    for layer in range(layers):
        for kind in architectures.KINDS:
            try:
                structure.place(Site(kind, layer))
                keep[layer, kind] = Activations()
            except gsf.AttachError as error:
                path = re.search("such as '(.*)'", str(error))
                if path:
                    structure.place(Site("path", path=path[1]))
                    advice[kind, layer] = path[1]
    return keep, advice


def gain(norm, d):
    """(gain, bias) of a norm, from what it does."""
    if isinstance(norm, torch.nn.LayerNorm):
        v = torch.tensor([1.0, -1.0] * (d // 2))
        bias = norm(torch.zeros(d))
        return (norm(v * 1e3) - bias) / v, bias
    return norm(torch.full((1, d), 1e3))[0], 0.0


@pytest.mark.parametrize("name", architectures.names())
@torch.no_grad()
def test_an_architecture(name):
    """The blocks' outputs are the sum of what the sites give; every other site is refused by name, before it runs."""
    if name in architectures.CANNOT:
        pytest.skip(architectures.CANNOT[name])
    model = architectures.make(name)
    structure = Structure(model)
    found = architectures.row(structure)
    if f"transformers {transformers.__version__}" in PAGE.read_text("utf-8"):
        line = "| " + " | ".join([name, *found.values()]) + " |"
        assert documented().get(name) == line, "python tests/architectures.py writes the table anew"
    if set(found.values()) == {"no"}:
        return
    _, blocks = structure.stack()
    keep, _ = readable(structure, len(blocks))
    if name in NO_ROWS:
        with pytest.raises(gsf.AttachError, match=NO_ROWS[name]), gsf.attach(model, keep):
            model(input_ids=IDS, use_cache=False)
        return
    with Inputs(blocks) as inputs, gsf.attach(model, keep) as run:
        model(input_ids=IDS, use_cache=False)
    seen = run.activations
    for layer in range(len(blocks)):
        if all((layer, kind) in keep for kind in ("resid", "attn_out", "mlp")):
            before = inputs.seen[layer].reshape(18, -1)
            if layer:
                assert torch.equal(before, seen[layer - 1, "resid"])
            parts = [before, seen[layer, "attn_out"], seen[layer, "mlp"]]
            size = sum(part.abs() for part in parts)
            assert ((sum(parts) - seen[layer, "resid"]).abs() <= 4 * 2**-24 * size).all()
            assert all(part.abs().max() > 0.01 for part in parts)
        if (layer, "mlp_in_no_gain") in keep:
            norm = structure.place(Site("mlp_in_no_gain", layer)).module
            weight, bias = gain(norm, seen[layer, "mlp_in"].shape[-1])
            torch.testing.assert_close(
                seen[layer, "mlp_in_no_gain"] * weight + bias, seen[layer, "mlp_in"], atol=1e-4, rtol=1e-4
            )


def test_the_architectures_that_cannot_be_tried_cannot_be_made():
    for name in architectures.CANNOT:
        if name in architectures.names():
            with pytest.raises(Exception, match=r"."):
                architectures.make(name)(input_ids=IDS, use_cache=False)


@pytest.mark.parametrize("name", ["mamba", "jamba", "lfm2", "lfm3", "recurrent_gemma", "xlstm", "bamba", "nemotron_h"])
@torch.no_grad()
def test_a_refusal_names_the_module_that_adds_instead(name):
    """Where a state-space or convolution layer is in the place of attention, the sum holds with the module named."""
    model = architectures.make(name)
    structure = Structure(model)
    _, blocks = structure.stack()
    keep, advice = readable(structure, len(blocks))
    keep = {key: value for key, value in keep.items() if key[1] in ("resid", "attn_out", "mlp")}
    keep |= {path: Activations() for (kind, _), path in advice.items() if kind in ("attn_out", "mlp")}
    assert any(kind == "attn_out" for kind, _ in advice)
    with Inputs(blocks) as inputs, gsf.attach(model, keep) as run:
        model(input_ids=IDS, use_cache=False)
    for layer in range(len(blocks)):
        total = inputs.seen[layer].reshape(18, -1)
        for kind in ("attn_out", "mlp"):
            key = (layer, kind) if (layer, kind) in keep else advice.get((kind, layer))
            total = total if key is None else total + run.activations[key].reshape(18, -1)
        torch.testing.assert_close(total, run.activations[layer, "resid"], atol=1e-5, rtol=1e-5)


PATHS = {
    "llama": ("post_attention_layernorm", "mlp", "self_attn", "self_attn.o_proj", "input_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm", "mlp", "self_attn"),
    "gemma2": ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", "mlp"),
    "glm4": ("post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
    "granite": ("mlp", "self_attn", "post_attention_layernorm"),
    "qwen3_next": ("post_attention_layernorm", "mlp"),
    "gemma4_text": ("post_feedforward_layernorm", "post_attention_layernorm", "mlp", "post_per_layer_input_norm"),
    "gemma3n_text": ("post_feedforward_layernorm", "post_attention_layernorm", "mlp", "laurel"),
    "vaultgemma": ("pre_feedforward_layernorm", "mlp", "self_attn"),
}


@pytest.mark.parametrize("name", PATHS)
@torch.no_grad()
def test_a_path_means_that_module(name):
    model = architectures.make(name)
    for part in PATHS[name]:
        module = model.get_submodule(f"model.layers.1.{part}")
        for path in (f"model.layers.1.{part}.output", f"model.layers.1.{part}"):
            with tiny.Hand(module) as hand, gsf.attach(model, {path: Activations()}) as run:
                model(input_ids=IDS, use_cache=False)
            assert torch.equal(run.activations[path], hand.rows())
            assert run._taps[0].reads.name == f"model.layers.1.{part}.output"


@torch.no_grad()
def test_a_path_that_the_model_lacks_is_no_other_module():
    model = architectures.make("llama")
    for path in ("post_feedforward_layernorm.output", "pre_feedforward_layernorm.output", "attention.output"):
        with pytest.raises(gsf.AttachError, match="has no module"):
            gsf.attach(model, {f"model.layers.1.{path}": Activations()})
    with pytest.raises(gsf.AttachError, match=r"has no module 'vision\.encoder\.layers\.1\.mlp'"):
        gsf.attach(model, {"vision.encoder.layers.1.mlp": Activations()})


@torch.no_grad()
def test_names_of_one_place_find_its_key_and_those_of_another_do_not():
    llama, gemma = architectures.make("llama"), architectures.make("gemma2")
    path = "model.layers.1.post_attention_layernorm.output"
    with gsf.attach(gemma, {path: Activations()}) as run:
        gemma(IDS)
    assert torch.equal(run.activations[1, "attn_out"], run.activations[path])
    with gsf.attach(llama, {path: Activations()}) as run:
        llama(IDS)
    with pytest.raises(KeyError):
        run.activations[1, "attn_out"]
    with gsf.attach(llama, {(1, "mlp"): Activations()}) as run:
        llama(IDS)
    assert torch.equal(run.activations["model.layers.1.mlp"], run.activations[1, "mlp"])
    with pytest.raises(KeyError):
        run.activations["model.layers.1.post_feedforward_layernorm.output"]


@torch.no_grad()
def test_the_norm_without_its_gain_by_its_path():
    model = architectures.make("gemma2")
    path = "model.layers.1.pre_feedforward_layernorm.output_without_gain"
    with gsf.attach(model, {path: Activations(), (1, "mlp_in_no_gain"): Activations()}) as run:
        model(IDS)
    assert torch.equal(run.activations[path], run.activations[1, "mlp_in_no_gain"])
    with pytest.raises(gsf.AttachError, match="expected a root-mean-square norm"):
        gsf.attach(model, {"model.layers.1.mlp.output_without_gain": Activations()})


SITES = [Site("mlp", 3), Site("embed"), Site("mlp_in_no_gain", 2)]
SITES += [Site("path", path=f"model.{path}") for path in
          ("layers.3.mlp", "layers.1.post_attention_layernorm.output", "embed_tokens.output")]  # fmt: skip


@pytest.mark.parametrize("site", SITES)
def test_a_site_comes_back_from_its_name(site):
    assert Site.from_hook_name(site.hook_name) == site


def low():
    """An SAE that fires on the small values of a multiplied site."""
    sae = tiny.sae()
    with torch.no_grad():
        sae.threshold.fill_(0.1)
    return sae


class TestMultiplied:
    """Granite multiplies what attention and MLP add, outside of both modules."""

    model = None

    @pytest.fixture(autouse=True)
    def _granite(self):
        self.model = architectures.make("granite")
        assert self.model.model.layers[1].residual_multiplier == 0.22
        self.mlp = self.model.model.layers[1].mlp

    def by_hand(self, change):
        with tiny.Hand(self.mlp, change=lambda y: change(y * 0.22) / 0.22), torch.no_grad():
            return self.model(IDS).logits

    def test_a_splice(self):
        sae = low()
        with torch.no_grad(), gsf.attach(self.model, {(1, "mlp"): sae}, mode="splice") as run:
            got = self.model(IDS).logits
        torch.testing.assert_close(got, self.by_hand(sae))
        assert run.latents[1, "mlp"].nnz > 100
        with torch.no_grad(), tiny.Hand(self.mlp) as hand:
            base = self.model(IDS).logits
        assert run.latents[1, "mlp"] == sae.encode_sparse(hand.rows() * 0.22)
        with torch.no_grad(), gsf.attach(self.model, {(1, "mlp"): sae}, mode="splice+error"):
            assert torch.equal(self.model(IDS).logits, base)

    @pytest.mark.parametrize("edit", [gsf.Add(3, 4.0), gsf.Direction(torch.ones(tiny.D), strength=0.5)])
    def test_an_edit(self, edit):
        sae = low()
        what = 4 * sae.W_dec[3].detach() if isinstance(edit, gsf.Add) else 0.5 * torch.ones(tiny.D)
        with torch.no_grad(), gsf.attach(self.model, {(1, "mlp"): sae}, mode="splice+error", edits=edit):
            got = self.model(IDS).logits
        torch.testing.assert_close(got, self.by_hand(lambda y: y + what))

    def test_gradients(self):
        """A latent's gradient with the error held, against a splice by hand of x̂ + (x − x̂)."""
        sae = low().requires_grad_(False)
        with gsf.attach(self.model, {(1, "mlp"): sae}, mode="splice+error") as run:
            loss = self.model(IDS).logits.square().mean()
            got = run.attribution(loss)[1, "mlp"].to_dense()
        kept = []

        def spliced(y):
            x = (y * 0.22).detach()
            latents = sae.encode(x).requires_grad_()
            kept.append(latents)
            recon = sae.decode(latents)
            return (recon + (x - recon).detach()) / 0.22

        with tiny.Hand(self.mlp, change=spliced):
            self.model(IDS).logits.square().mean().backward()
        want = (kept[0].grad * kept[0].detach()).flatten(0, 1)
        assert want.abs().max() > 0
        assert (got - want).abs().max() < 1e-4 * want.abs().max()

    def test_integrated_gradients_start_at_no_latents(self):
        sae, seen = low(), []

        def forward():
            seen.append(self.model(IDS).logits)
            return seen[-1].square().mean()

        with gsf.attach(self.model, {(1, "mlp"): sae}, mode="splice+error") as run:
            run.integrated_gradients((1, "mlp"), forward, steps=2)
        share = 0.25  # the middle of the first of two steps
        want = self.by_hand(lambda y: y + (share - 1) * (sae.encode(y) @ sae.W_dec.detach()))
        assert any(torch.allclose(logits.detach(), want, rtol=1e-4, atol=1e-4) for logits in seen)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", ["splice", "splice+error"])
def test_what_a_transcoder_read_is_kept_from_changes_in_place(grad, mode):
    """Mixtral's experts multiply their input by noise in training, in place; the skip connection reads it later."""
    config = transformers.MixtralConfig(
        **architectures.small(transformers.MixtralConfig().to_dict(), {"router_jitter_noise": 0.5})
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).train()
    mlp, g = model.model.layers[2].mlp, torch.Generator().manual_seed(1)
    sites = Site("mlp_in", 2), Site("mlp", 2)
    skip = torch.randn(tiny.D, tiny.D, generator=g)
    sae = tiny.sae(kind=gsf.JumpReLUSkipTranscoder, site=sites[0], site_out=sites[1], W_skip=skip).requires_grad_(grad)
    seen = []
    before = mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().clone()))

    def logits():
        torch.manual_seed(7)
        return model(input_ids=IDS, use_cache=False).logits

    with torch.set_grad_enabled(grad):
        base = logits()
        with gsf.attach(model, sae, mode=mode) as run:
            got = logits()
        after = mlp.register_forward_hook(lambda _m, _a, _y: sae(seen[-1]))
        want = logits()
    before.remove()
    after.remove()
    assert run.latents[sites[0]] == sae.encode_sparse(seen[1].reshape(-1, tiny.D))
    torch.testing.assert_close(got, want if mode == "splice" else base)
    if grad:
        sae.zero_grad()
        got.square().mean().backward()
        assert sae.W_skip.grad is not None
        assert sae.W_enc.grad is not None
