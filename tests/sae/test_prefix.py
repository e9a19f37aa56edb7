"""The coder of the first n features, which Matryoshka SAEs are trained for: views of the same weights."""

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.checkpoints.native import save

D, F, K = 16, 300, 20


def parts(d_out=D, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, F), "W_dec": (F, d_out), "b_enc": (F,), "b_dec": (d_out,)}
    made = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return made | {"threshold": torch.full((F,), 2.0)}


def coder(kind):
    w, cfg = parts(), gsf.SAEConfig(D, F, D, gsf.Site("resid", 3), None, gsf.SAEMetadata("m", "m/3-x"))
    if kind == "jumprelu":
        return gsf.JumpReLUSAE.from_weights(**w, cfg=cfg)
    if kind == "skip":
        return gsf.JumpReLUSkipTranscoder.from_weights(**w, W_skip=torch.eye(D))
    if kind == "crosscoder":
        return gsf.Crosscoder(**w, cfg=cfg, sites=[gsf.Site("resid", 1), gsf.Site("resid", 2)], n_layers=2)
    cls = {"topk": gsf.TopKSAE, "abs_topk": gsf.AbsTopKSAE}[kind]
    return cls.from_weights(**w | {"threshold": torch.zeros(F)}, k=K, cfg=cfg)


@pytest.mark.parametrize("kind", ["jumprelu", "skip", "crosscoder", "topk", "abs_topk"])
@pytest.mark.parametrize("n", [1, 7, 64, 299, 300])
def test_it_is_the_coder_that_has_no_other_features(kind, n):
    whole, x = coder(kind), torch.randn(40, D)
    part = whole.prefix(n)
    assert type(part) is type(whole)
    assert (part.cfg.d_sae, part.cfg.site, part.cfg.metadata) == (n, whole.cfg.site, whole.cfg.metadata)
    cut = {name: p.detach() for name, p in whole.named_parameters()}
    cut |= {"W_enc": cut["W_enc"][:, :n].clone(), "W_dec": cut["W_dec"][:n].clone()}
    cut |= {name: cut[name][:n].clone() for name in ("b_enc", "threshold")}
    more = {"k": min(K, n)} if "topk" in kind else {}
    more |= {"n_layers": 2} if kind == "crosscoder" else {}
    alone = type(whole)(**cut, **more)
    for screen in (None, True, False):
        assert part.encode_sparse(x, screen=screen) == alone.encode_sparse(x, screen=screen)
    assert torch.equal(part(x), alone(x))
    if "topk" in kind:
        assert part.k == min(K, n)
    else:
        assert torch.equal(part.encode(x), whole.encode(x)[:, :n])


def test_it_copies_no_matrix():
    whole = coder("jumprelu")
    part = whole.prefix(50)
    for name, parameter in part.named_parameters():
        held = getattr(whole, name)
        assert parameter.untyped_storage().data_ptr() == held.untyped_storage().data_ptr(), name
    whole.screen_cache.refresh(whole)
    part.encode_sparse(torch.randn(3, D))
    assert part.W_enc.data_ptr() == whole.W_enc.data_ptr()  # not laid out anew
    again = part.prefix(20).prefix(5)
    assert again.W_dec.data_ptr() == whole.W_dec.data_ptr()
    assert again.d_sae == 5


def test_an_edit_of_one_is_an_edit_of_the_other():
    whole, x = coder("jumprelu"), torch.randn(9, D)
    part = whole.prefix(50).prepare()
    whole.prepare()
    before = part.encode(x)
    with torch.no_grad():
        whole.W_enc[:, :50] *= 2
    assert torch.equal(part.encode(x), whole.encode(x)[:, :50])
    assert not torch.equal(part.encode(x), before)
    with torch.no_grad():
        part.W_enc.mul_(0.5)
    assert torch.equal(whole.encode(x)[:, :50], before)


def test_it_is_saved_by_itself(tmp_path):
    part = coder("topk").prefix(64)
    save(part, tmp_path / "sae.safetensors")
    again, x = from_pretrained(tmp_path), torch.randn(5, D)
    assert (again.d_sae, again.k) == (64, K)
    assert torch.equal(again(x), part(x))
    assert again.neuronpedia_url(63) == "https://www.neuronpedia.org/m/3-x/63"


@pytest.mark.parametrize("n", [0, -1, 301, 2.0, True, None])
def test_wrong_sizes(n):
    with pytest.raises(ValueError, match="n: expected 1 to d_sae = 300"):
        coder("jumprelu").prefix(n)


def test_rows_in_a_file_have_no_prefix(tmp_path):
    save(coder("jumprelu"), tmp_path / "sae.safetensors")
    mapped = from_pretrained(tmp_path, rows="mmap")
    with pytest.raises(ValueError, match="prefix: expected rows in memory"):
        mapped.prefix(10)
