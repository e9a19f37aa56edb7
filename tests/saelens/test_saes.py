"""Accelerated SAELens SAEs and transcoders against SAELens's own, from its released wheel."""

import copy
import warnings

import pytest
import torch
from lens_saes import ALL, D_IN, D_SAE, SAES, LargestTensor, assert_as_exact, in_double, make, tokens
from sae_lens import SAE
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig

import gemmascope_fast as gsf
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

NORMS = ["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening"]
POINTS = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"]


@pytest.fixture
def encodings(monkeypatch):
    """Every call of this package's encoder."""
    calls, plain = [], JumpReLUSAE.encode_sparse

    def counted(self, x, *args, **kwargs):
        calls.append(tuple(x.shape))
        return plain(self, x, *args, **kwargs)

    monkeypatch.setattr(JumpReLUSAE, "encode_sparse", counted)
    return calls


@pytest.mark.parametrize("kind", ALL)
def test_it_passes_for_the_original_and_computes_the_same(kind):
    sae, x = make(kind), tokens()
    fast = gsf.accelerate(sae)
    assert isinstance(fast, type(sae))
    assert fast is not sae
    assert fast.cfg.to_dict() == sae.cfg.to_dict()
    assert list(fast.state_dict()) == list(sae.state_dict())
    assert list(fast.hook_dict) == list(sae.hook_dict)
    exact = in_double(sae)
    acts = fast.encode(x)
    assert torch.equal(acts != 0, sae.encode(x) != 0)
    assert 0 < int((acts != 0).sum()) < acts.numel() / 8
    assert_as_exact(acts, sae.encode(x), exact.encode(x.double()))
    assert_as_exact(fast(x), sae(x), exact(x.double()))
    assert_as_exact(fast.decode(acts), sae.decode(acts), exact.decode(acts.double()))
    assert torch.equal(fast.encode_sparse(x).to_dense(), acts)


@pytest.mark.parametrize("kind", SAES)
@pytest.mark.parametrize("norm", NORMS)
def test_norms_error_term_and_caches(kind, norm):
    sae, x = make(kind, normalize_activations=norm), tokens()
    fast, exact = gsf.accelerate(sae), in_double(sae)
    for use_error_term in (False, True):
        for each in (sae, fast, exact):
            each._use_error_term = use_error_term
        assert_as_exact(fast(x), sae(x), exact(x.double()))
        got, cache = fast.run_with_cache(x)
        assert torch.equal(got, fast(x))
        _, wanted = sae.run_with_cache(x)
        _, reference = exact.run_with_cache(x.double())
        assert list(cache) == list(wanted)
        assert ("hook_sae_error" in cache) == use_error_term
        for name in wanted:
            assert_as_exact(cache[name], wanted[name], reference[name])


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "topk"])  # top-k has candidates, by the chunk
def test_nothing_dense_without_a_hook_that_asks_for_it(kind):
    fast, x = gsf.accelerate(make(kind)), tokens(300, D_IN)
    fast._use_error_term = kind in SAES
    fast(x)  # the weights are laid out and packed at first use
    with torch.no_grad(), LargestTensor() as largest:
        fast(x)
    assert largest.elements < x.shape[0] * D_SAE
    with torch.no_grad(), LargestTensor() as largest:
        fast.encode(x)
    assert largest.elements >= x.shape[0] * D_SAE


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("use_error_term", [False, True])
def test_a_hook_that_reads_changes_no_bytes(point, use_error_term, encodings):
    fast, x = gsf.accelerate(make(normalize_activations="layer_norm")), tokens()
    fast._use_error_term = use_error_term
    quiet, seen = fast(x), []
    before = len(encodings)
    with fast.hooks(fwd_hooks=[(point, lambda tensor, hook: seen.append(tensor))]):
        assert torch.equal(fast(x), quiet)
    assert len(seen) == 1
    # the error term is taken from the one encoding; with pre-activations asked for, from those
    assert len(encodings) - before == (0 if point == "hook_sae_acts_pre" else 1)
    assert before == 1


def edit_input(tensor, hook):
    return tensor * 1.5


def edit_in_place(tensor, hook):
    tensor[..., ::3] = 0


def edit_more(tensor, hook):
    return tensor + 0.25


@pytest.mark.parametrize("kind", SAES)
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("edit", [edit_input, edit_in_place, edit_more])
@pytest.mark.parametrize("use_error_term", [False, True])
def test_a_hook_that_edits_does_what_it_does_in_saelens(kind, point, edit, use_error_term):
    sae = make(kind)
    fast, exact = gsf.accelerate(sae), in_double(sae)
    outs = []
    for each, x in ((fast, tokens()), (sae, tokens()), (exact, tokens().double())):
        each._use_error_term = use_error_term
        with torch.no_grad(), each.hooks(fwd_hooks=[(point, edit)]):
            outs.append(each(x))
    assert_as_exact(*outs)


def test_error_and_output_hooks_edit_too():
    sae, x = make(), tokens()
    fast = gsf.accelerate(sae)
    for each in (sae, fast):
        each._use_error_term = True
    for point in ("hook_sae_error", "hook_sae_output"):
        hooks = [(point, lambda tensor, hook: torch.zeros_like(tensor))]
        with sae.hooks(fwd_hooks=hooks), fast.hooks(fwd_hooks=hooks):
            torch.testing.assert_close(fast(x), sae(x))


@pytest.mark.parametrize("kind", ["jumprelu", "standard", "topk", "jumprelu_skip_transcoder"])
@pytest.mark.parametrize("hooked", [False, True])
def test_gradients(kind, hooked):
    sae = make(kind)
    fast, exact = gsf.accelerate(sae), in_double(sae)
    grads = []
    for each in (fast, sae, exact):
        x = tokens().to(each.dtype).requires_grad_()
        seen = {}
        hook = [("hook_sae_acts_post", lambda g, hook, seen=seen: seen.update(acts=g))] if hooked else []
        with each.hooks(bwd_hooks=hook):
            (each(x) ** 2).sum().backward()
        found = {name: p.grad for name, p in each.named_parameters() if name != "threshold"} | {"x": x.grad} | seen
        grads.append(found)
    assert grads[0].keys() == grads[1].keys()
    for name in grads[1]:
        assert_as_exact(*(g[name] for g in grads))


def test_hook_z_shapes():
    sae = make(hook_name="blocks.0.attn.hook_z", reshape_activations="hook_z")
    fast, x = gsf.accelerate(sae), tokens(2, 5, 4, 6)
    assert_as_exact(fast(x), sae(x), in_double(sae)(x.double()))
    assert fast(x).shape == x.shape
    assert fast.encode(x).shape == (2, 5, D_SAE)
    for each in (sae, fast):
        each.turn_off_forward_pass_hook_z_reshaping()
    again = gsf.accelerate(sae)
    assert not again.hook_z_reshaping_mode
    assert torch.equal(again(x.flatten(-2)), fast(x.flatten(-2)))


@pytest.mark.parametrize("kind", ALL)
def test_fold_W_dec_norm(kind):
    sae, x = make(kind), tokens()
    fast = gsf.accelerate(sae)
    fast(x)
    if "topk" in kind:
        with pytest.raises(NotImplementedError, match="not safe"):
            fast.fold_W_dec_norm()
        return
    before = fast(x)
    for each in (sae, fast):
        each.fold_W_dec_norm()
    torch.testing.assert_close(fast.W_dec.norm(dim=-1), torch.ones(D_SAE))
    assert_as_exact(fast.encode(x), sae.encode(x), in_double(sae).encode(x.double()))
    torch.testing.assert_close(fast(x), before)


def test_folding_scale_and_whitening():
    sae, x = make(normalize_activations="covariance_whitening"), tokens()
    fast = gsf.accelerate(sae)
    fast(x)
    matrix = torch.eye(D_IN) + tokens(D_IN, D_IN, seed=3) / 40
    for each in (sae, fast):
        each.fold_activation_whitening(tokens(D_IN, seed=2), matrix, torch.linalg.inv(matrix))
        each.fold_activation_norm_scaling_factor(1.25)
    assert fast.cfg.normalize_activations == "none"
    assert_as_exact(fast(x), sae(x), in_double(sae)(x.double()))


@pytest.mark.parametrize("kind", ALL)
def test_saved_and_loaded_by_both_and_by_this_package(kind, tmp_path):
    sae, x = make(kind, apply_b_dec_to_input=False) if kind in SAES else make(kind), tokens()
    fast = gsf.accelerate(sae)
    fast(x)
    fast.save_model(tmp_path)
    plain = SAE.load_from_disk(tmp_path)
    assert type(plain) is type(sae)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), sae.parameters(), strict=True))
    again = type(fast).load_from_disk(tmp_path)
    assert type(again) is type(fast)
    assert torch.equal(again(x), fast(x))
    own = gsf.SAE.from_pretrained(tmp_path)
    assert_as_exact(own(x), sae(x), in_double(sae)(x.double()))


def test_weights_that_change_are_noticed():
    sae, x = make(), tokens()
    fast, other = gsf.accelerate(sae), make(seed=5)
    fast(x)
    for name, parameter in fast.named_parameters():
        parameter.data = other.get_parameter(name).detach().clone()
    assert torch.equal(fast(x), gsf.accelerate(other)(x))
    with torch.no_grad():
        fast.b_enc.add_(0.125)
        other.b_enc.add_(0.125)
    assert torch.equal(fast(x), gsf.accelerate(other)(x))
    fast.W_enc = torch.nn.Parameter(sae.W_enc.detach().clone())
    other.W_enc = torch.nn.Parameter(sae.W_enc.detach().clone())
    assert torch.equal(fast(x), gsf.accelerate(other)(x))


def test_built_on_meta_and_loaded_by_assignment():
    sae, x = make(), tokens()
    cfg = copy.deepcopy(sae.cfg)
    cfg.device = "meta"
    fast = type(gsf.accelerate(sae))(cfg)
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    fast.load_state_dict(state, assign=True)
    assert torch.equal(fast(x), gsf.accelerate(sae)(x))
    assert torch.equal(state["W_enc"], sae.W_enc)


def test_the_original_and_its_copy_are_independent():
    sae, x = make(), tokens()
    fast = gsf.accelerate(sae)
    before = sae(x)
    fast.to(torch.bfloat16)
    fast.fold_W_dec_norm()
    assert torch.equal(sae(x), before)
    assert fast(x).dtype == torch.bfloat16
    assert fast.cfg.dtype == "bfloat16"
    assert sae.cfg.dtype == "float32"
    assert gsf.accelerate(fast) is fast
    clone = copy.deepcopy(fast)
    assert clone.core.W_enc is clone.W_enc
    assert clone.W_enc is not fast.W_enc


def test_16_bit_weights_are_evaluated_in_fp32():
    sae, x = make(apply_b_dec_to_input=False), tokens()
    fast, plain = gsf.accelerate(sae).to(torch.bfloat16), copy.deepcopy(sae).to(torch.bfloat16)
    exact = in_double(plain)
    x16 = x.to(torch.bfloat16)
    got, reference = fast.encode(x16).double(), exact.encode(x16.double())
    both = (got != 0) & (reference != 0)
    assert int(both.sum()) > 20
    assert int(((got != 0) != (reference != 0)).sum()) <= 2  # a rounding at the threshold
    # one rounding to bf16 (8 bits), and nothing else that can be seen at this size
    assert bool(((got - reference).abs() <= reference.abs() * 2.0**-8)[both].all())


def test_in_place_the_object_stays_with_its_hooks():
    sae, x = make(), tokens()
    plain, seen = sae(x), []
    sae.hook_sae_acts_post.add_hook(lambda tensor, hook: seen.append(tensor.shape))
    with pytest.raises(ValueError, match="hooks"):
        gsf.accelerate(sae)
    fast = gsf.accelerate(sae, inplace=True)
    assert fast is sae
    torch.testing.assert_close(fast(x), plain)
    assert seen == [(3, 5, D_SAE)]


def test_what_does_not_reduce_is_refused_or_computed_by_saelens():
    with pytest.raises(TypeError, match=r"MatchingPursuitSAE is not supported: .* step by step"):
        gsf.accelerate(MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=4, d_sae=8)))
    sae, x = make(), tokens()
    fast = gsf.accelerate(sae).to(torch.float64)
    with pytest.warns(UserWarning, match="float64"):
        got = fast(x)
    torch.testing.assert_close(got, copy.deepcopy(sae).to(torch.float64)(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(x)
    fast = gsf.accelerate(sae)
    fast.activation_fn = torch.nn.Softplus()
    assert "Softplus" in fast.why_plain()
    rescaled = gsf.accelerate(make("topk", rescale_acts_by_decoder_norm=True))
    assert "norms" in rescaled.why_plain()


def test_latents_that_are_not_sparse_are_decoded_densely():
    sae, x = make("standard"), tokens()
    sae.b_enc.data.zero_()
    fast = gsf.accelerate(sae)
    assert float((fast.encode(x) != 0).float().mean()) > 0.3
    assert_as_exact(fast(x), sae(x), in_double(sae)(x.double()))
