"""Extraction on a local Ray with two workers: the same bytes as without it, even if a worker is killed."""

import json
import os
import signal
import time
from functools import partial

import pytest
import torch
from tiny_model import letters, make_sae, save_model

from gemmascope_fast.analysis.extraction import Store, documents, extract, resolve
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import main as cli
from gemmascope_fast.cli.extract import make_extractor

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    where = tmp_path_factory.mktemp("ray")
    save_model(where / "model")
    save(make_sae(), where / "sae.safetensors")
    lines = [json.dumps({"text": letters(50 + 7 * i % 90, seed=i)}) for i in range(80)]
    (where / "text.jsonl").write_text("\n".join(lines) + "\n")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield where
    ray.shutdown()


def files(folder):
    found = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {str(name): data for name, data in found.items() if name.name != ".lock"}


def words(root, out, *more):
    model = ["--model", str(root / "model"), "--sae", str(root / "sae.safetensors"), "--text", str(root / "text.jsonl")]
    return ["extract", *model, "--window", "64", "--shard", "400", "--out", str(out), *more]


def test_a_killed_worker_is_replaced_and_nothing_lost(root, tmp_path):
    from gemmascope_fast.analysis.extraction.ray_engine import RayEngine

    make = partial(make_extractor, str(root / "model"), str(root / "sae.safetensors"), None, None, 64, 2048, "cpu")
    text = partial(documents, resolve([str(root / "text.jsonl")]))
    about = {"sae": "own"}
    extract(make(), text, tmp_path / "local", about=about, shard=400)

    def slow():  # a block takes long enough that the kill comes in the middle of one
        extractor = make()

        def work(block):
            time.sleep(0.3)
            return extractor(block)

        return work

    engine = RayEngine(slow, workers=2, threads=torch.get_num_threads())
    killed = []

    def progress(tokens, _done):
        if tokens and len(engine.made_by) == 3:
            killed.append(engine.made_by[-1])
            os.kill(killed[0], signal.SIGKILL)

    extract(make(), text, tmp_path / "ray", about=about, shard=400, engine=engine, progress=progress)
    assert len(killed) == 1
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    shards = len(Store(tmp_path / "ray").shards)
    assert len(engine.made_by) == shards > 12
    assert len(set(engine.made_by)) == 3  # two, and the one in the killed one's place


def test_by_command_a_bad_line_keeps_what_came_before(root, tmp_path, capsys):
    good = (root / "text.jsonl").read_text()
    lines = good.splitlines()
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join([*lines[:40], lines[40][:-3], *lines[41:]]) + "\n")
    own = [str(path) if w == str(root / "text.jsonl") else w for w in words(root, tmp_path / "ray", "--engine", "ray")]
    assert cli.main(own) == 1
    assert "text.jsonl, line 41: expected one JSON object" in capsys.readouterr().err
    before = len(Store(tmp_path / "ray").shards)
    assert before >= 5
    path.write_text(good)
    assert cli.main([*own, "--workers", "1"]) == 0
    assert cli.main([w.replace("ray", "local") if w == str(tmp_path / "ray") else w for w in own[:-2]]) == 0
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert cli.main([*words(root, tmp_path / "none", "--engine", "ray"), "--workers", "0"]) == 1
    assert "--workers: expected at least 1" in capsys.readouterr().err
