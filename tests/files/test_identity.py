"""Digests of what a job read: every weight counts; another model, SAE, tokenizer or text in a job's folder is an error
that says which differs."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_model import letters, make_model, make_sae, save_model, two_blocks
from torch import nn

from gemmascope_fast import SAEConfig, TopKSAE
from gemmascope_fast import quant as matryoshka
from gemmascope_fast.analysis import pair as pair_module
from gemmascope_fast.analysis.evaluation.run import Evaluation
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import main as cli
from gemmascope_fast.files import identity
from gemmascope_fast.training.nested import blocks as training
from gemmascope_fast.training.nested import calibration, endtoend
from gemmascope_fast.training.nested.recipe import Recipe

for module in ("pyarrow", "transformers"):
    pytest.importorskip(module)


# ---- digests -----------------------------------------------------------------------------------------


def test_a_model_read_again_is_the_same_and_any_weight_counts(tmp_path):
    save_model(tmp_path / "a")
    a, tokenizer = pair_module.load_model(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    b, other = pair_module.load_model(str(tmp_path / "b"))
    assert identity.of_module(a) == identity.of_module(b)
    a.generate(torch.tensor([[1, 5]]), max_new_tokens=3, do_sample=False)
    assert identity.of_module(a) == identity.of_module(b)
    for parameter in b.parameters():
        flat = parameter.data.view(-1)
        for at in (0, 1, flat.numel() - 1):
            before = flat[at].clone()
            flat[at] = torch.nextafter(before, torch.tensor(9.0))  # bumps no version
            assert identity.of_module(a) != identity.of_module(b)
            flat[at] = before
    assert identity.of_module(a) == identity.of_module(b)
    assert identity.of_module(a.to(torch.bfloat16)) != identity.of_module(b)
    assert identity.of_tokenizer(tokenizer) == identity.of_tokenizer(other)
    other(["ab", "abc"], padding=True, truncation=True, max_length=2)  # leaves its mark in the tokenizer's state
    assert identity.of_tokenizer(tokenizer) == identity.of_tokenizer(other)
    save_model(tmp_path / "c", letters="bacdefghijklmnopqrstuvwxyz \n")
    assert identity.of_tokenizer(pair_module.load_model(str(tmp_path / "c"))[1]) != identity.of_tokenizer(other)


@pytest.mark.parametrize("setting", ["rms_norm_eps", "query_pre_attn_scalar", "final_logit_softcapping"])
def test_the_configuration_counts(setting):
    a, b = make_model(), make_model()
    assert identity.of_module(a) == identity.of_module(b)
    setattr(b.config, setting, 7 if setting == "query_pre_attn_scalar" else 7.0)
    assert identity.of_module(a) != identity.of_module(b)


def test_what_a_coder_holds_besides_weights_counts():
    sae = make_sae()
    sae.threshold.data.clamp_(max=0)  # a top-k SAE takes no others
    weights = {name: getattr(sae, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    of = [sae, *(TopKSAE(**weights, cfg=SAEConfig(32, 96, 32), k=k) for k in (3, 4))]
    coded = matryoshka.MatryoshkaSAE.from_sae(sae)
    for bits in (8, 4):
        matryoshka.set_bits(coded, bits)
        of.append(copy.deepcopy(coded))
    digests = [identity.of_module(each) for each in of]
    assert len(set(digests)) == len(digests)
    before = identity.of_module(sae)
    sae.encode_sparse(torch.randn(4, 32))
    assert identity.of_module(sae) == before
    sae.threshold.data[5] += 1
    assert identity.of_module(sae) != before


def test_tensors_of_every_layout_and_kind():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 10, generator=g)
    cube = torch.randn(3, 4, 5, generator=g)
    assert identity.of_tensor(cube.transpose(0, 2)) == identity.of_tensor(cube.transpose(0, 2).contiguous())
    assert identity.of_tensor(x[:, ::2]) == identity.of_tensor(x[:, ::2].contiguous())
    many = [x, x.t(), x.reshape(10, 6), x.half(), x.bfloat16(), x.double(), x > 0, x.to(torch.complex64), x[0], x[0, 0]]
    many += [torch.zeros(0), torch.zeros(0, 3), torch.arange(4), torch.arange(4, dtype=torch.int32)]
    assert len({identity.of_tensor(each) for each in many}) == len(many)
    with pytest.raises(ValueError, match=r"lm_head\.(weight|bias): expected weights in memory, got .* the meta device"):
        identity.of_module(nn.ModuleDict({"lm_head": nn.Linear(2, 2, device="meta")}))


def test_a_file_is_read_again_when_it_changes(tmp_path):
    path = tmp_path / "text"
    path.write_text("abc")
    assert identity.of_file(path) == identity.of_text("abc")
    stamp = path.stat()
    path.write_text("abd")
    import os

    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as `cp -p` does
    assert identity.of_file(path) == identity.of_text("abd")


# ---- jobs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two models of one shape, two SAEs, two texts."""
    where = tmp_path_factory.mktemp("identity")
    for name, seed in (("a", 0), ("b", 7)):
        save_model(where / name, seed=seed)
        save(make_sae(seed=seed + 1), where / f"{name}.safetensors")
        (where / f"{name}.txt").write_text(letters(3000, seed=seed))
    return where


def run(words):
    assert cli.main([str(word) for word in words]) == 0


def refused(capsys, words):
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 1
    return capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]


class Names:
    """Paths that stay while what stands there changes: names alone tell nothing."""

    def __init__(self, root, folder):
        self.root, self.folder = root, folder
        for kind in ("model", "sae", "text"):
            self.put(kind, "a")

    def put(self, kind, which):
        if kind == "model":
            shutil.rmtree(self.folder / "model", ignore_errors=True)
            shutil.copytree(self.root / which, self.folder / "model")
        else:
            ending = {"sae": "safetensors", "text": "txt"}[kind]
            shutil.copy(self.root / f"{which}.{ending}", self.folder / f"{kind}.{ending}")

    def words(self, job):
        at = self.folder
        pair = ["--model", at / "model", "--sae", at / "sae.safetensors"]
        text = at / "text.txt"
        small = ["--train-windows", "6", "--windows", "2", "--batch", "2", "--text", text]
        return {
            "extract": ["extract", *pair, "--text", text, "--window", "100", "--out", at / "out"],
            "eval": ["eval", *pair, "--text", text, "--window", "50", "--no-losses", "--state", at / "state"],
            "quantize --work": [
                "quantize", "--model", at / "model", "--method", "omniquant", "--train-bits", "4", "--mode", "alone",
                "--epochs", "1", *small, "--work", at / "work", "--overwrite", "--out", at / "codes.safetensors",
            ],
            "quantize --table": ["quantize", "--model", at / "model", *small, "--table", at / "table.json"],
            "train --activations": [
                "train", "--model", at / "model", "--layer", "1", "--d-sae", "8", "--l0", "2", "--steps", "2",
                "--batch", "64", "--text", text, "--activations", at / "activations",
                "--overwrite", "--out", at / "trained.safetensors",
            ],
            "compare --work": [
                "quantize", "tables", *pair, "--work", at / "tables", "--text", text, "--windows", "2",
                "--train-windows", "6", "--epochs", "1", "--only", "grid", "--methods", "minmax", "--quick",
            ],
        }[job]  # fmt: skip


CASES = [
    ("extract", "model", "with another model"), ("extract", "sae", "with another sae"),
    ("extract", "text", "another text|not the one that"),
    ("eval", "model", "with another model"), ("eval", "sae", "with another sae"), ("eval", "text", "another text"),
    ("quantize --work", "model", "with another model"), ("quantize --work", "text", "with another text"),
    ("quantize --table", "model", "with another model"), ("quantize --table", "text", "with another text"),
    ("train --activations", "model", "with another model"),
    ("compare --work", "model", "with another model"), ("compare --work", "sae", "with another sae"),
    ("compare --work", "text", "with another text"),
]  # fmt: skip


@pytest.mark.parametrize(("job", "kind", "message"), CASES)
def test_another_in_the_same_folder_is_named(root, tmp_path, capsys, monkeypatch, job, kind, message):
    monkeypatch.setattr(calibration, "WINDOW", 64)
    names = Names(root, tmp_path)
    run(names.words(job))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    run(names.words(job))  # the same again goes on
    names.put(kind, "b")
    said = refused(capsys, names.words(job))
    assert any(part in said for part in message.split("|")), said
    for other in {"model", "sae", "text"} - {kind}:
        assert f"another {other}" not in said
    after = {p: p.read_bytes() for p in before if "model" not in p.parts and p.suffix not in (".safetensors", ".txt")}
    assert after == {p: before[p] for p in after}
    names.put(kind, "a")
    run(names.words(job))


def test_a_table_keeps_to_the_settings_of_each_method(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "WINDOW", 64)
    names = Names(root, tmp_path)
    trained = [*names.words("quantize --work")[:-2], "--table", tmp_path / "table.json"]
    run(names.words("quantize --table"))
    run(trained)  # another method beside it
    said = refused(capsys, [*trained, "--batch", "3"])
    assert "batch 2 (now 3)" in said
    assert said.count("now") == 1


def test_a_run_is_resumed_with_its_own_text_and_model_alone(root, tmp_path, capsys, monkeypatch):
    from gemmascope_fast.cli import train as command

    names = Names(root, tmp_path)
    words = [w for w in names.words("train --activations") if "activations" not in str(w)]
    monkeypatch.setattr(command, "_finish", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
    assert "stopped" in refused(capsys, words)
    monkeypatch.undo()
    names.put("text", "b")
    assert "started with another text" in refused(capsys, [*words, "--resume"])
    names.put("text", "a")
    names.put("model", "b")
    shutil.rmtree(tmp_path / "trained.safetensors.activations")
    assert "started with another model" in refused(capsys, [*words, "--resume"])
    names.put("model", "a")
    shutil.rmtree(tmp_path / "trained.safetensors.activations")
    run([*words, "--resume"])


def test_in_python_too(tmp_path):
    model, other = two_blocks(), two_blocks(seed=3)
    ids = torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(1))
    recipe = Recipe("qat", bits=(2,), mode="alone", epochs=1)
    codes = training.train(model, ids, recipe, work=tmp_path)
    endtoend.finetune(model, ids, recipe, steps=1, start=codes, work=tmp_path)
    for call in (
        lambda m, x: training.train(m, x, recipe, work=tmp_path),
        lambda m, x: endtoend.finetune(m, x, recipe, steps=1, start=codes, work=tmp_path),
    ):
        with pytest.raises(ValueError, match="started with another model:"):
            call(other, ids)
        with pytest.raises(ValueError, match="started with another text:"):
            call(model, ids.flip(0))
        with torch.no_grad():
            weight = model.model.layers[1].mlp.down_proj.weight
            weight.data[3, 4] += 1e-3
            with pytest.raises(ValueError, match="started with another model:"):
                call(model, ids)
            weight.data.copy_(two_blocks().model.layers[1].mlp.down_proj.weight)
    # from other codes it begins anew
    from_weights = endtoend.finetune(model, ids, recipe, steps=1, work=tmp_path)
    again = endtoend.finetune(model, ids, recipe, steps=1, start=codes, work=tmp_path)
    moved = type(codes)(
        {n: type(c)(c.q.roll(1, 0), c.scale, c.zero_point) for n, c in codes.codes.items()}, codes.gains
    )
    other_start = endtoend.finetune(model, ids, recipe, steps=1, start=moved, work=tmp_path)
    found = [next(iter(t.codes.values())).q for t in (from_weights, again, other_start)]
    assert not torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[2])


def test_an_evaluation_resumed_on_a_text_that_grew_or_changed(root, tmp_path):
    model, tokenizer = pair_module.load_model(str(root / "a"))
    sae, text = make_sae(), letters(800, seed=1)

    def make(text, **more):
        return Evaluation(
            model, tokenizer, sae, 1, lambda: [text], window=20, state=tmp_path / "state", loss_tokens=100, **more
        )

    calls = []

    def stop(which, _tokens):
        calls.append(which)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(text).run(progress=stop)
    with pytest.raises(ValueError, match="another text"):
        make("z" + text[1:]).run()
    with pytest.raises(ValueError, match="another text"):
        make(text[:100]).run()
    figures = make(text).run()
    assert make(text).run() == figures
    for changed in (text[:-1] + "q", text + "more", text[:-50]):
        for losses in (True, False):
            with pytest.raises(ValueError, match="another text"):
                make(changed).run(losses)


def test_a_damaged_identity_is_named(tmp_path):
    (tmp_path / identity.FILE).write_text("{")
    with pytest.raises(ValueError, match=r"identity.json: expected JSON"):
        identity.claim(tmp_path, {"model": "a"})
    assert json.loads(Path(tmp_path / identity.FILE).read_text() + "}") == {}
