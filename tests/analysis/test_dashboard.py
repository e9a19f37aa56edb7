"""The dashboard: its figures against DuckDB, its text in several scripts, its pages parsed, served and opened."""

import http.client
import json
import threading
from html.parser import HTMLParser

import architectures
import numpy as np
import pytest
import torch
from chromium import dumped, screenshot
from tiny_model import letters, make_sae, save_model

from gemmascope_fast.analysis.dashboard import Dashboard, collect
from gemmascope_fast.analysis.dashboard.collect import BINS, SEGMENT
from gemmascope_fast.analysis.dashboard.serve import server
from gemmascope_fast.analysis.dashboard.weights import logit_lens, neighbours
from gemmascope_fast.analysis.extraction import Store
from gemmascope_fast.analysis.pair import load_model
from gemmascope_fast.analysis.pieces import Pieces
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import main as cli
from gemmascope_fast.sae.sites import Site

pytest.importorskip("pyarrow")
duckdb = pytest.importorskip("duckdb")

HINDI, ARABIC = "नमस्ते दुनिया यह हिन्दी में लिखा है ", "مرحبا بالعالم هذا نص عربي "
ALPHABET = "".join(dict.fromkeys("abcdefghijklmnopqrstuvwxyz \n<>&/\"'" + HINDI + ARABIC))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of model, SAE file, folder of latents)."""
    root = tmp_path_factory.mktemp("dashboard")
    save_model(root / "model", ALPHABET)
    sae = make_sae()
    save(sae, root / "sae.safetensors")
    lines = [HINDI * 3, ARABIC * 3, "</script><b>&\n'\"", *(letters(90, seed=i) for i in range(12)), HINDI[:5]]
    path = root / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    words = ["extract", "--model", str(root / "model"), "--sae", str(root / "sae.safetensors")]
    words += ["--text", str(path), "--out", str(root / "latents"), "--window", "100", "--shard", "300"]
    assert cli.main(words) == 0
    return root


@pytest.fixture(scope="module")
def dashboard(made):
    store = Store(made / "latents")
    model, tokenizer = load_model(str(made / "model"))
    sae = make_sae()
    near, lens = neighbours(sae.W_dec), logit_lens(model, sae.W_dec, n=5)
    return Dashboard(store, collect(store, k=6, left=8, right=4), Pieces(tokenizer), near, lens, "some-model/1-res")


def test_figures_agree_with_duckdb(made, dashboard):
    latents = f"read_parquet('{made}/latents/latents/*.parquet')"
    rows = duckdb.sql(f"select feature, count(*), sum(value), max(value) from {latents} group by feature").fetchall()
    c = dashboard.collected
    assert {f: n for f, n in enumerate(c.fired.tolist()) if n} == {f: n for f, n, _, _ in rows}
    for f, n, total, high in rows:
        assert c.total[f] == pytest.approx(total, rel=1e-12)
        assert c.max[f] == np.float32(high)
        assert c.histogram[f].sum() == n
    f, n, _, high = max(rows, key=lambda row: row[1])
    values = [v for (v,) in duckdb.sql(f"select value from {latents} where feature = {f}").fetchall()]
    bins = np.minimum((np.float32(values) * (np.float32(BINS) / np.float32(high))).astype(int), BINS - 1)
    assert c.histogram[f].tolist() == np.bincount(bins, minlength=BINS).tolist()


def test_contexts_are_the_strongest_places(made, dashboard):
    latents = f"read_parquet('{made}/latents/latents/*.parquet')"
    c = dashboard.collected
    ids = {
        (d, p): i
        for d, p, i in duckdb.sql(
            f"select document, position, token_id from '{made}/latents/tokens/*.parquet'"
        ).fetchall()
    }
    every = duckdb.sql(f"select feature, document, position, value from {latents}").fetchall()
    values = {(f, d, p): v for f, d, p, v in every}
    for f in range(len(dashboard)):
        # the strongest of each stretch of SEGMENT tokens; of equals the earlier
        best = {}
        for g, d, p, v in every:
            if g == f and v > best.get((d, p // SEGMENT), (-1,))[0]:
                best[d, p // SEGMENT] = (v, d, p)
        want = sorted(best.values(), key=lambda b: -b[0])[:6]
        kept = c.document[f] >= 0
        assert [round(v, 5) for v in c.value[f][kept].tolist()] == [round(b[0], 5) for b in want]
        for rank in np.nonzero(kept)[0]:
            d, p = int(c.document[f, rank]), int(c.position[f, rank])
            assert values[f, d, p] == c.value[f, rank]
            around = range(p - 8, p + 5)
            assert c.ids[f, rank].tolist() == [ids.get((d, q), -1) for q in around]
            assert c.acts[f, rank].tolist() == [values.get((f, d, q), 0.0) for q in around]


def test_collected_is_kept_and_made_anew_for_other_latents(made, tmp_path):
    store = Store(made / "latents")
    cache = tmp_path / "kept.npz"
    calls = []
    first = collect(store, k=2, cache=cache, progress=lambda: calls.append(1))
    assert len(calls) == 2 * len(store.shards)
    again = collect(store, k=2, cache=cache, progress=lambda: pytest.fail("it was kept"))
    assert np.array_equal(first.ids, again.ids)
    assert first.left == again.left
    collect(store, k=3, cache=cache, progress=lambda: calls.append(1))
    cache.write_bytes(b"damaged")
    collect(store, k=3, cache=cache, progress=lambda: calls.append(1))
    assert len(calls) == 6 * len(store.shards)


class Page(HTMLParser):
    """Text of spans within p.text, links, and elements that are not ours."""

    def __init__(self, text):
        super().__init__()
        self.contexts, self.links, self.tags, self.dirs, self._in = [], [], set(), [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag == "a":
            self.links.append(attrs["href"])
        if tag == "p" and attrs.get("class") == "text":
            self.contexts.append([])
            self.dirs.append(attrs.get("dir"))
        if tag == "span" and "title" in attrs:
            self._in = [attrs, ""]

    def handle_data(self, data):
        if self._in is not None:
            self._in[1] += data

    def handle_endtag(self, tag):
        if tag == "span" and self._in is not None:
            self.contexts[-1].append(tuple(self._in))
            self._in = None


def test_every_page_parses_and_shows_its_contexts(dashboard):
    scripts = set()
    for f in range(len(dashboard)):
        page = Page(dashboard.page(f))
        assert "script" not in page.tags  # a text with </script><b> stays text
        assert "b" in page.tags  # our own
        c = dashboard.collected
        assert len(page.contexts) == int((c.document[f] >= 0).sum())
        assert set(page.dirs) <= {"auto"}
        assert f"https://www.neuronpedia.org/some-model/1-res/{f}" in page.links
        for spans in page.contexts:
            text = "".join(t for _, t in spans)
            scripts |= {"hindi"} if "न" in text or "ह" in text else set()
            scripts |= {"arabic"} if "ر" in text or "ا" in text else set()
            assert sum("peak" in a.get("class", "") for a, _ in spans) == 1
            shares = [float(a["style"].removeprefix("--a:")) for a, _ in spans if "style" in a]
            assert max(shares) <= 1
    assert scripts == {"hindi", "arabic"}
    with pytest.raises(IndexError, match="feature"):
        dashboard.page(len(dashboard))


def test_vowel_signs_stay_with_their_letters(dashboard):
    pieces = dashboard.pieces
    ids = pieces.tokenizer(HINDI, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(HINDI)
    spans = pieces.spans(ids)
    assert "".join(s.text for s in spans) == HINDI
    assert [i for s in spans for i in s.tokens] == list(range(len(ids)))
    import unicodedata

    assert all(unicodedata.category(s.text[0]) not in ("Mn", "Mc") for s in spans)
    assert "हि" in [s.text for s in spans]


def test_bytes_of_one_character_become_one_span():
    """A tokenizer of single bytes: each letter of these scripts is two or three tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocab = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    pieces = Pieces(transformers.PreTrainedTokenizerFast(tokenizer_object=made))
    for text in ("aé😀b", HINDI, ARABIC, "日本語"):
        ids = pieces.tokenizer(text, add_special_tokens=False)["input_ids"]
        spans = pieces.spans(ids)
        assert len(ids) == len(text.encode())
        assert "".join(s.text for s in spans) == text
        assert [i for s in spans for i in s.tokens] == list(range(len(ids)))
    half = pieces.tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    assert [s.tokens for s in pieces.spans(half)] == [[0]]


def test_neighbours_and_lens_against_their_formulas(made):
    model, _ = load_model(str(made / "model"))
    W_dec = make_sae().W_dec.detach()
    features, cosines = neighbours(W_dec, 3)
    full = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec[None], dim=-1).fill_diagonal_(-2)
    want = full.topk(3, dim=1)
    assert torch.equal(features, want.indices)
    assert torch.allclose(cosines, want.values, atol=1e-6)
    norm = model.model.norm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.5, 0.5, 32))
    lens = logit_lens(model, W_dec, n=4)
    logits = W_dec.double() * (1 + norm.weight.double()) @ model.lm_head.weight.detach().double().t()
    logits -= logits.mean(1, keepdim=True)
    assert torch.equal(lens.raised, logits.topk(4, dim=1).indices)
    assert torch.equal(lens.lowered, logits.topk(4, dim=1, largest=False).indices)
    assert torch.allclose(lens.lowered_by.double(), logits.topk(4, dim=1, largest=False).values, atol=1e-6)


LENSES = {
    "starcoder2": ("model.norm", True),  # LayerNorm with a bias
    "nemotron": ("model.norm", True),  # a LayerNorm that stores its gain minus one
    "cohere": ("model.norm", True),  # a class of its own that subtracts the mean
    "gpt2": ("transformer.ln_f", True),
    "gpt_neox": ("gpt_neox.final_layer_norm", True),
    "phi": ("model.final_layernorm", True),
    "llama": ("model.norm", False),
    "gemma2": ("model.norm", False),
    "mamba": ("backbone.norm_f", False),
    "lfm2": ("model.embedding_norm", False),
    "recurrent_gemma": ("model.final_norm", False),
}


@pytest.mark.parametrize("name", LENSES)
def test_the_lens_takes_a_row_through_the_last_norm_and_the_unembedding(name):
    """What the norm makes of the row alone, with the row's own scale given back."""
    model = architectures.make(name)
    norm, centred = model.get_submodule(LENSES[name][0]), LENSES[name][1]
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(4))
    lens = logit_lens(model, rows, n=3)
    with torch.no_grad():
        d = rows - rows.mean(1, keepdim=True) if centred else rows
        bias = norm(torch.zeros(1, 32))
        want = (
            (norm(d * 1e3) - bias) * d.square().mean(1, keepdim=True).sqrt() @ model.get_output_embeddings().weight.t()
        )
    want = want - want.mean(1, keepdim=True)
    top = want.topk(3, dim=1)
    assert lens.raised_by.abs().max() > 0
    torch.testing.assert_close(lens.raised_by, top.values, rtol=1e-3, atol=1e-4)
    assert (lens.raised == top.indices).float().mean() > 0.98


def test_a_model_without_a_last_norm_or_a_site_beside_the_stream_has_no_lens():
    bert, llama, rows = architectures.make("bert"), architectures.make("llama"), torch.randn(5, 32)
    with pytest.raises(ValueError, match="expected a norm before the unembedding"):
        logit_lens(bert, rows)
    for site in (Site("attn", 1), Site("mlp_in", 1), Site("path", path="model.layers.1.self_attn.o_proj.input")):
        with pytest.raises(ValueError, match="adds to the residual stream"):
            logit_lens(llama, rows, site=site)
    for site in (Site("mlp", 1), Site("resid", 1), Site("path", path="model.layers.1.mlp.output")):
        assert logit_lens(llama, rows, n=2, site=site).raised.shape == (5, 2)


def test_pages_of_an_sae_on_attention_heads_as_wide_as_the_model_have_no_lens(tmp_path, capsys):
    """Two heads of 16: their width is the residual stream's by chance."""
    save_model(tmp_path / "model")
    sae = make_sae()
    sae.cfg.site = Site("attn", 1)
    save(sae, tmp_path / "sae.safetensors")
    (tmp_path / "text.txt").write_text("all about attention heads " * 20, encoding="utf-8")
    words = ["--model", str(tmp_path / "model"), "--sae", str(tmp_path / "sae.safetensors")]
    latents = str(tmp_path / "latents")
    more = ["--text", str(tmp_path / "text.txt"), "--out", latents, "--window", "100"]
    assert cli.main(["extract", *words, *more]) == 0
    assert cli.main(["dashboard", "--latents", latents, "--out", str(tmp_path / "site")]) == 0
    assert "No logit lens" in capsys.readouterr().out


def test_static_pages_by_command(made, tmp_path):
    words = ["dashboard", "--latents", str(made / "latents"), "--out", str(tmp_path / "site")]
    assert cli.main([*words, "--json", str(tmp_path / "f.json")]) == 0
    assert len(list((tmp_path / "site" / "feature").iterdir())) == 96
    index = (tmp_path / "site" / "index.html").read_text()
    data = json.loads(index.split('id="data">')[1].split("</script>")[0])
    figures = json.loads((tmp_path / "f.json").read_text())
    assert [row[1] for row in data] == [f["fired"] for f in figures["features"]]
    assert index.count("</script>") == 2
    other = tmp_path / "other.safetensors"
    save(make_sae(seed=9), other)
    assert cli.main([*words, "--sae", str(other)]) == 1
    assert cli.main(["dashboard", "--latents", str(tmp_path)]) == 1


def test_more_features_than_one_page_holds(made, dashboard, tmp_path, monkeypatch):
    from gemmascope_fast.analysis.dashboard import pages

    monkeypatch.setattr(pages, "ROWS", 40)
    fewer = Dashboard(dashboard.store, dashboard.collected, dashboard.pieces)
    page = tmp_path / "index.html"
    step = "<script>const first = $('rows').rows.length; $('on').click(); document.title = first;</script></body>"
    page.write_text(fewer.index.replace("</body>", step))
    drawn = dumped(page, tmp_path / "profile")
    assert "<title>40</title>" in drawn
    body = drawn.split('<tbody id="rows">')[1].split("</tbody>")[0]
    shown = [int(part.split(".html")[0]) for part in body.split('href="feature/')[1:]]
    fired = dashboard.collected.fired
    assert shown == sorted(range(96), key=lambda f: (-fired[f], f))[40:80]
    assert ">41 to 80 of 96<" in drawn


def test_the_server_gives_the_same_pages(dashboard):
    with server(dashboard) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            connection = http.client.HTTPConnection(*running.server_address)
            for path, want in [
                ("/", dashboard.index),
                ("/feature/7.html", dashboard.page(7)),
                ("/feature/96.html", None),
            ]:
                connection.request("GET", path)
                answer = connection.getresponse()
                text = answer.read().decode()
                assert answer.status == (404 if want is None else 200)
                assert want is None or text == want
        finally:
            running.shutdown()
            thread.join()


def test_a_port_in_use_is_told_before_anything_is_read(dashboard, tmp_path, capsys):
    with server(dashboard) as running:
        port = str(running.server_address[1])
        assert cli.main(["dashboard", "--latents", str(tmp_path / "nothing"), "--serve", "--port", port]) == 1
        assert f"--port: expected a free port (0: any), got {port}: " in capsys.readouterr().err


def test_pages_in_chromium(dashboard, made, tmp_path):
    """A real browser runs the index's script, searches, and draws a page; .ci/run installs it."""
    from gemmascope_fast.analysis.dashboard.pages import write

    write(dashboard, tmp_path / "site")
    opened = tmp_path / "site" / "index.html"
    index = dumped(opened, tmp_path / "profile")
    body = index.split('<tbody id="rows">')[1].split("</tbody>")[0]
    shown = [int(part.split(".html")[0]) for part in body.split('href="feature/')[1:]]
    fired = dashboard.collected.fired
    assert shown == sorted(range(96), key=lambda f: (-fired[f], f))
    # what stands in the page is what the script draws, of a tie and of every script of writing the same
    again = "<script>const was = $('rows').innerHTML; select();"
    again += "document.title = was.length > 1000 && was === $('rows').innerHTML ? 'same' : 'other';"
    again += "$('search').value = '77'; select();</script></body>"
    opened.write_text(opened.read_text().replace("</body>", again))
    drawn = dumped(opened, tmp_path / "profile")
    assert "<title>same</title>" in drawn
    assert drawn.split('<tbody id="rows">')[1].split("</tbody>")[0].count("<tr>") == 1
    assert '<span id="count" role="status">1 to 1 of 1<' in drawn
    picture = tmp_path / "page.png"
    page = tmp_path / "site" / "feature" / "7.html"
    screenshot(page, tmp_path / "profile", picture)
    from PIL import Image

    colours = Image.open(picture).convert("RGB").getcolors(1 << 24)
    # shading: orange pixels of at least a few strengths
    assert len([c for _, c in colours if c[0] > 200 and c[2] < 140 and c[0] - c[2] > 80]) > 3
