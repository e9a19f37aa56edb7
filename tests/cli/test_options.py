"""All commands at once: light help with defaults and an example, one meaning for each option, outputs that are checked
before any work, progress on standard error alone, Ctrl-C."""

import argparse
import io
import json
import shlex
import subprocess
import sys

import pytest
from tiny_model import letters, make_sae, save_model

from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import arguments, quantize
from gemmascope_fast.cli import main as cli
from gemmascope_fast.dev import roof_command
from gemmascope_fast.dev.bench import command as bench
from gemmascope_fast.files import progress

NAMES = [command.name for command in cli.COMMANDS]
PARSERS = {command.name: cli.parser_of(command) for command in cli.COMMANDS}
OPTIONS = {
    (name, flag): action
    for name, parser in PARSERS.items()
    for action in parser._actions
    for flag in action.option_strings
    if flag.startswith("--")
}
SHARED = {  # option: (type, metavar, number of values, how its help begins, types of its defaults)
    "--model": (None, "MODEL", None, "a transformers model or folder; 'demo' is Gemma 3 270M", (str, None)),
    "--sae": (None, "SAE", None, "an SAE's repository, folder or file; 'demo' is the bundled one", (str, None)),
    "--sae-id": (None, "ID", None, "the SAE within its repository", (None,)),
    "--layer": (int, "N", None, "the layer whose output the SAE reads", (None,)),
    "--anywhere": (None, None, 0, "allow a --layer that is not the SAE's own", (bool,)),
    "--prompt": (None, "TEXT", None, "text, literally; ", (str, None)),
    "--text": (None, "FILE", "+", "files, 'pydoc', 'stdlib', or '-' for standard input", (list, None)),
    "--out": ("Path", "PATH", None, "where the result is written: ", ("Path", None)),
    "--json": ("Path", "FILE", None, "write the figures as JSON; '-' is standard output", (None,)),
    "--plot": ("Path", "FILE", None, "draw ", (None,)),
    "--html": ("Path", "FILE", None, "write a self-contained page", ("Path", None)),
    "--overwrite": (None, None, 0, "replace outputs that exist", (bool,)),
    "--device": (None, "DEVICE", None, "where to compute: cpu, cuda or cuda:N", (str,)),
    "--dtype": (None, "TYPE", None, "type in which the model computes: float32 or bfloat16", (str,)),
    "--seed": (int, "N", None, "seed of everything random", (int,)),
    "--quiet": (None, None, 0, "no progress on standard error", (bool,)),
    "--column": (None, "KEY", None, "the text's key in JSON lines and Parquet", (str,)),
    "--split": (None, "UNIT", None, "documents of a .txt: file, paragraph or line", (str,)),
    "--window": (int, "N", None, "tokens after each BOS", (int,)),
}
RUN_A_MODEL = {name for name, flag in OPTIONS if flag == "--model"}
NO_DEVICE = {"quantize", "quantize tables"}  # their descriptions say why


def kind(value):
    return None if value is None else "Path" if isinstance(value, arguments.Path) else type(value)


def test_the_table_is_not_empty():
    assert len(PARSERS) == len(NAMES) == 21
    assert {flag for _, flag in OPTIONS} >= SHARED.keys()


@pytest.mark.parametrize("flag", SHARED)
def test_an_option_means_the_same_in_every_command(flag):
    of_type, metavar, nargs, begins, defaults = SHARED[flag]
    found = {name: action for (name, own), action in OPTIONS.items() if own == flag}
    assert found
    for name, action in found.items():
        assert (action.type.__name__ if of_type == "Path" else action.type) == of_type, name
        assert (action.metavar, action.nargs) == (metavar, nargs), name
        assert action.help.startswith(begins), name
        assert kind(action.default) in defaults, name
        assert action.dest == flag[2:].replace("-", "_"), name


def test_what_runs_a_model_says_where_and_in_which_type():
    for flag in ("--device", "--dtype"):
        having = {name for name, own in OPTIONS if own == flag}
        assert having >= RUN_A_MODEL - NO_DEVICE
        assert not having & NO_DEVICE
    assert all("no --device and --dtype" in PARSERS[name].description.replace("\n", " ") for name in NO_DEVICE)
    assert "no --dtype" in PARSERS["dev bench"].description
    assert "no --device" in PARSERS["dev gpu-check"].description


def test_every_command_takes_quiet_and_what_writes_takes_overwrite():
    for name, parser in PARSERS.items():
        assert (name, "--quiet") in OPTIONS
        assert ((name, "--overwrite") in OPTIONS) == bool(parser.get_default("outputs"))
        # nothing but a declared output is a path to write: what is read has a default or is required
        declared = {dest for dest, _, _ in parser.get_default("outputs") or ()}
        paths = {a.dest for a in parser._actions if a.type is arguments.Path} - declared
        assert paths <= {"latents", "data", "pairs", "quality", "readme", "runs", "compare", "guard"}, name


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_help_with_its_default(name):
    text = " ".join(PARSERS[name].format_help().split())
    for action in PARSERS[name]._actions:
        assert action.help, action.dest
        shown = arguments.Formatter("x")._get_help_string(action)
        if action.option_strings and action.default not in (None, [], argparse.SUPPRESS) and action.nargs != 0:
            assert "(default: " in shown, action.dest
    assert "None" not in text
    assert "example: gemmascope-fast " + name in text
    example = next(command.example for command in cli.COMMANDS if command.name == name)
    assert cli.parse(shlex.split(example)).command == name


HELP = """
import sys
from gemmascope_fast.cli import main as cli
try:
    cli.main([*sys.argv[1:], "--help"])
except SystemExit as stopped:
    heavy = {"torch", "numpy", "transformers", "rich", "tqdm", "safetensors"} & sys.modules.keys()
    print("imported:", sorted(heavy), "status:", stopped.code)
"""


@pytest.mark.parametrize("name", NAMES)
def test_help_imports_nothing_heavy(name):
    done = subprocess.run([sys.executable, "-c", HELP, *name.split()], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: [] status: 0\n"), done.stdout[-300:]


def test_names_that_help_repeats_are_those_of_the_work():
    from gemmascope_fast import backends
    from gemmascope_fast.dev.bench.cases import CASES
    from gemmascope_fast.dev.bench.run import SUITES
    from gemmascope_fast.training.nested.recipe import METHODS

    assert ("minmax", *METHODS) == quantize.METHODS
    assert tuple(backends.ISAS) == roof_command.ISAS
    assert tuple(CASES) == bench.CASES
    assert bench.SUITES == SUITES


# ---- outputs -------------------------------------------------------------------------------------------

OUTPUTS = [(name, *output) for name, parser in PARSERS.items() for output in parser.get_default("outputs") or ()]
IDS = [f"{name} {flag}" for name, _, flag, _ in OUTPUTS]


def line(name, folder, dest, flag, path):
    """A command line with this output and whatever else the command requires."""
    words = name.split()
    for action in PARSERS[name]._actions:
        if action.required and action.dest != dest:
            value = {"layer": "1", "to": "native", "out": folder / "o.safetensors", "work": folder / "w"}
            words += [*action.option_strings[:1], str(value.get(action.dest, folder / "input"))]
    return [*words, *([flag] if flag.startswith("-") else []), str(path)]


@pytest.fixture
def idle(monkeypatch):
    """Every command's `run` only notes that it began."""
    begun = []
    for command in cli.COMMANDS:
        module = sys.modules[command.module]
        monkeypatch.setattr(module, "run", lambda args: begun.append(args.command))
    return begun


@pytest.mark.parametrize(("name", "dest", "flag", "kind"), OUTPUTS, ids=IDS)
def test_an_output_is_checked_before_any_work(tmp_path, capsys, idle, name, dest, flag, kind):
    target = tmp_path / "there.svg"
    if "folder" in kind:
        target.mkdir()
        assert cli.main(line(name, tmp_path, dest, flag, target)) == 0  # an empty folder is as good as none
        (target / "kept").write_text("kept")
    else:
        target.write_text("kept")
    idle.clear()
    if "kept" in kind:  # continued, never replaced
        assert cli.main(line(name, tmp_path, dest, flag, target)) == 0
        assert idle == [name]
    else:
        assert cli.main(line(name, tmp_path, dest, flag, target)) == 1
        said = f"gemmascope-fast {name}: {flag}: {target} exists; --overwrite replaces it\n"
        assert capsys.readouterr().err == said
        assert idle == []
        assert cli.main([*line(name, tmp_path, dest, flag, target), "--overwrite"]) == 0
        assert idle == [name]
    idle.clear()
    (tmp_path / "file").write_text("")
    wrong = tmp_path / "file" if "folder" in kind else tmp_path
    for place in (wrong, tmp_path / "file" / "in.svg"):
        assert cli.main([*line(name, tmp_path, dest, flag, place), "--overwrite"]) == 1
        assert f"gemmascope-fast {name}: {flag}: expected" in capsys.readouterr().err
    new = tmp_path / "a" / "b" / "c.svg"  # its folders can be made
    assert cli.main(line(name, tmp_path, dest, flag, new)) == 0
    assert not new.parent.exists()
    assert idle == [name]


# ---- running -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    where = tmp_path_factory.mktemp("options")
    save_model(where / "model", letters="abcdefghijklmnopqrstuvwxyz \n:")
    save(make_sae(features=8), where / "sae.safetensors")
    (where / "t.txt").write_text("\n".join(letters(60, seed=i) for i in range(6)))
    return where


def pair(root):
    return ["--model", str(root / "model"), "--sae", str(root / "sae.safetensors")]


def test_json_to_standard_output_is_alone_there(root, capsys, tmp_path):
    words = ["eval", *pair(root), "--text", str(root / "t.txt"), "--window", "40", "--loss-tokens", "20"]
    assert cli.main([*words, "--json", "-"]) == 0
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert {"fvu", "l0", "dead_fraction", "delta_loss"} <= figures.keys()
    assert "dead_fraction" in said.err  # the table, and the bars
    assert "losses" in said.err
    assert cli.main([*words, "--json", str(tmp_path / "new" / "f.json")]) == 0
    assert json.loads((tmp_path / "new" / "f.json").read_text()) == figures
    said = capsys.readouterr()
    assert "dead_fraction" in said.out
    assert cli.main([*words, "--json", "-", "--quiet"]) == 0
    assert "losses:" not in capsys.readouterr().err


def test_standard_input_is_a_text(root, capsys, monkeypatch, tmp_path):
    text = (root / "t.txt").read_text()
    for words in (
        ["eval", "--window", "40", "--no-losses", "--json", "-"],
        ["demo", "--json", "-"],
        ["extract", "--split", "line", "--window", "40", "--json", "-"],
    ):
        found = []
        for number, name in enumerate((str(root / "t.txt"), "-")):
            monkeypatch.setattr(sys, "stdin", io.StringIO(text))
            more = ["--out", str(tmp_path / f"out{number}")] if words[0] == "extract" else []
            assert cli.main([*words, *pair(root), "--text", name, *more]) == 0
            figures = json.loads(capsys.readouterr().out)
            found.append({k: v for k, v in figures.items() if k in ("tokens", "l0", "fvu", "documents", "delta_loss")})
        assert found[0] == found[1]
        assert found[0]["tokens"] > 300


COMPUTE = {
    "demo": ["--prompt", "abc abc"], "eval": ["--text", "t.txt", "--window", "40", "--loss-tokens", "20"],
    "extract": ["--text", "t.txt", "--window", "40", "--out", "OUT"], "watch": ["--prompt", "abc", "--max-tokens", "2"],
    "compare texts": ["--a", "t.txt", "--b", "t.txt"], "compare conversation": ["--transcript", "talk.json"],
    "compare models": ["--model-b", "model", "--text", "t.txt", "--split", "line"], "dev profile": ["--tokens", "2"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTE)
def test_a_model_computes_in_bfloat16(root, tmp_path, monkeypatch, name):
    """The SAE stays in fp32: the same command, another type of the model."""
    pytest.importorskip("scipy")
    pytest.importorskip("pyarrow")
    from gemmascope_fast.analysis import pair as loading

    (root / "talk.json").write_text(json.dumps([{"role": "user", "content": "abc"}]))
    dtypes, load = [], loading.load_model

    def noted(*args):
        model, tokenizer = load(*args)
        dtypes.append(str(model.dtype))
        return model, tokenizer

    monkeypatch.setattr(loading, "load_model", noted)
    monkeypatch.chdir(root)
    words = [str(tmp_path / "out") if word == "OUT" else word for word in COMPUTE[name]]
    assert cli.main([*name.split(), *pair(root), *words, "--dtype", "bfloat16", "--quiet"]) == 0
    assert set(dtypes) == {"torch.bfloat16"}


@pytest.mark.parametrize("name", sorted(RUN_A_MODEL - NO_DEVICE - {"dashboard"}))
def test_a_device_that_is_not_there_is_named(root, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    extra = {"train": ["--layer", "1", "--text", str(root / "t.txt"), "--max-tokens", "5000"]}.get(name)
    own = extra or [str(tmp_path / "out") if word == "OUT" else word for word in COMPUTE.get(name, [])]
    if name == "train":
        own += ["--out", str(tmp_path / "s.safetensors")]
    model = pair(root)[:2] if name == "train" else pair(root)
    monkeypatch.chdir(root)
    assert cli.main([*name.split(), *model, *own, "--device", "cuda"]) == 1
    assert "--device cuda: this process sees no such CUDA device" in capsys.readouterr().err
    assert cli.main([*name.split(), *model, *own, "--device", "banana"]) == 1
    assert "--device: expected cpu, cuda or cuda:N, got 'banana'" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_status_130(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("gemmascope_fast.cli.ls.run", interrupted)
    assert cli.main(["ls", "demo"]) == 130
    assert capsys.readouterr().err == "gemmascope-fast ls: interrupted\n"


def test_ctrl_c_ends_the_line_of_a_bar(capsys, monkeypatch):
    def interrupted(args):
        for _ in progress.bar(range(9), desc="working"):
            raise KeyboardInterrupt

    monkeypatch.setattr("gemmascope_fast.cli.ls.run", interrupted)
    assert cli.main(["ls", "demo"]) == 130
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert last == "gemmascope-fast ls: interrupted"


def test_quiet_silences_what_it_should_and_no_longer(capsys):
    with progress.quiet():
        assert list(progress.bar([1, 2])) == [1, 2]
        progress.say("no")
        with progress.quiet(False):
            progress.say("no")
        with progress.status("no"), progress.progress_bar(9, "no", True) as update:
            update(9)
    assert capsys.readouterr() == ("", "")
    progress.say("yes")
    list(progress.bar([1], desc="yes"))
    assert capsys.readouterr().err.count("yes") >= 2
