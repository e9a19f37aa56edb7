"""The ahead-of-time ladder: every Triton kernel compiles, nothing spills, and the gate bites where something would."""

import dataclasses
import json
import shutil

import pytest

from gemmascope_fast.cli import main as cli
from gemmascope_fast.dev.gpu import aot, check, devices, model, nvcc, sass
from gemmascope_fast.dev.gpu.specs import all_specs

SPECS = {s.label: s for s in all_specs()}


def test_every_kernel_compiles_within_the_gates():
    """For AMD, with another compiler; sm_86, which has the least shared memory, is in `test_report`, and all
    architectures are in `make gpu-check`."""
    for spec in SPECS.values():
        binary = aot.compile_spec(spec, "gfx942")
        assert binary.faults(spec.few_warps) == [], binary


# What is tuned.  Every other constant says what is computed: a bandwidth, a bias, the planes of a width.
TUNED = {"BT", "BF", "BK", "BLOCK", "BLOCKS", "UNITS", "WORDS", "PAIRS", "AHEAD", "MANY", "SLOTS"}


MEANT = {"BITS", "COUNTS", "DROP", "ERROR", "LIFT", "ROUNDS", "SCAN", "UPCAST", "WIDE", "W0", "W1", "W2", "W3", "W4"}


def test_at_most_four_configurations_a_kernel():
    by_kernel = {}
    unknown = {k for s in SPECS.values() for k in s.constants if k not in TUNED | MEANT and not k.startswith("HAS_")}
    assert not unknown  # tuned or meant: a new constant says which
    for s in SPECS.values():
        tile = {k: v for k, v in s.constants.items() if k in TUNED}
        by_kernel.setdefault(s.function, set()).add((s.warps, s.stages, tuple(sorted(tile.items()))))
    assert all(len(configs) <= 4 for configs in by_kernel.values()), by_kernel


def test_the_gate_sees_a_spill():
    spec = SPECS["encode exact, T 1024"]
    wide = dataclasses.replace(spec, constants={**spec.constants, "BT": 64})  # 256 accumulators a thread
    faults = aot.compile_spec(wide, "sm_90").faults()
    assert any("spills" in f for f in faults)


def test_the_gate_sees_shared_memory_and_occupancy():
    fits = aot.Binary("k", "sm_90", 64, 0, 120 << 10, 0.5)
    assert fits.faults() == []
    assert "shared memory" in dataclasses.replace(fits, arch="sm_86").faults()[0]
    assert "occupancy" in dataclasses.replace(fits, occupancy=0.2).faults()[0]
    assert dataclasses.replace(fits, occupancy=0.2).faults("bound by tensor cores") == []


def test_no_kernel_that_bandwidth_bounds_is_excused():
    """What waits for memory needs the warps; one that is excused says why in the report."""
    excused = {s.label for s in SPECS.values() if s.few_warps}
    assert excused == {"screen int8, T 1024"}
    assert not any(SPECS[label].bandwidth_bound for label in excused)


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "want"),
    [
        # CUDA's occupancy calculator for the same inputs
        ("sm_80", 8, 32, 0, 1.0),
        ("sm_80", 8, 128, 0, 0.25),
        ("sm_80", 8, 129, 0, 0.125),
        ("sm_86", 4, 40, 0, 1.0),
        ("sm_90", 4, 64, 48 << 10, 0.25),
        ("gfx942", 4, 128, 0, 0.5),
    ],
)
def test_occupancy(arch, warps, registers, shared, want):
    assert devices.occupancy(devices.ARCHS[arch], warps, registers, shared) == want


def test_costs_are_those_of_the_tensors():
    spec = SPECS["encode exact, T 1"]
    assert spec.bytes == pytest.approx(4 * 2304 * 16384, rel=0.01)
    assert spec.ops == 2 * 2304 * 16384
    h100 = next(d for d in devices.DEVICES if d.name == "H100")
    assert devices.roof_time(h100, 3_350_000_000_000, 0, "fp32") == 1.0
    assert devices.roof_time(h100, 0, 989_000_000_000_000, "bf16") == 1.0


def test_whole_calls_by_the_model():
    rows = model.loops()
    for row in rows:
        assert 1 <= row["model_ratio"] <= 1.3, row
    calls = {row["call"]: row["launches"] for row in rows}
    assert calls["encode screened, T 1"] == 4
    assert calls["fused loop in CUDA C++, T 1"] == 2
    assert [calls[f"matryoshka_linear in CUDA C++, {bits} bits, T 1"] for bits in (8, 4, 2)] == [2, 2, 2]
    assert {row["device"] for row in rows} == {"A100", "H100", "B200", "RTX 4090"}


def test_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nvcc, "rows", lambda archs: [])
    out = tmp_path / "gpu-check.json"
    assert cli.main(["dev", "gpu-check", "--arch", "sm_86", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert len(report["kernels"]) == len(SPECS)
    assert [row["faults"] for row in report["kernels"]] == [[]] * len(SPECS)
    assert "model" in report["what"]
    with pytest.raises(ValueError, match="arch: expected one of"):
        check.collect(["sm_75"])


def test_nvcc_compiles_within_the_gates():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    for name, kernels in (("compact.cu", 3), ("splice.cu", 3), ("matryoshka.cu", 21)):
        rows = nvcc.compile_source(nvcc.SOURCES / "cuda" / name, "sm_90")
        assert len(rows) == kernels
        assert all(row["faults"] == [] for row in rows)
        assert all(row["stack"] == 0 and 0 <= row["machine"]["ffma"] < 1 and row["machine"]["loads"] for row in rows)
        assert all(row["bytes"] > 0 and row["model_microseconds"]["H100"] > 0 for row in rows)


def test_the_gate_of_nvcc_sees_a_spill(tmp_path, monkeypatch):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    sources = shutil.copytree(nvcc.SOURCES, tmp_path / "csrc")
    bounds = sources / "cuda" / "intrin.h"
    # eight blocks of 256 threads leave 32 registers a thread: the tile's 64 accumulators do not fit
    text = bounds.read_text()
    assert text.count("__launch_bounds__(threads, 2)") == 1
    bounds.write_text(text.replace("__launch_bounds__(threads, 2)", "__launch_bounds__(threads, 8)"))
    monkeypatch.setattr(nvcc, "SOURCES", sources)
    rows = nvcc.compile_source(sources / "cuda" / "encode.cu", "sm_90")
    assert any("spills" in fault for row in rows if "encode_tile" in row["kernel"] for fault in row["faults"])


def lines(*instructions):
    return "".join(f"        /*{16 * i:04x}*/                   {text} ;\n" for i, text in enumerate(instructions))


def test_machine_code_is_read():
    found = sass.of_text(lines("LDC R1, c[0x0][0x28]", "@!P0 LDG.E.128.CONSTANT R4, [R2.64]", "LDG.E R5, [R2]",
                               "LDG.E.U8 R5, [R2]", "LDGSTS.E.BYPASS.128 [R3], [R2.64]", "FFMA R4, R4, R5, R6", "NOP",
                               "EXIT", "NOP"))  # fmt: skip
    assert (found.instructions, found.ffma, found.loads) == (7, 1 / 7, {"16": 2, "4": 1, "1": 1})
    assert found.faults() == []


ROOT = (
    "MUFU.RSQ R3, R2",
    "FMUL.FTZ R4, R2, R3",
    "FMUL.FTZ R3, R3, 0.5",
    "CALL.REL.NOINC `($__internal_0_$__sqrt_rn_f32)",
)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (ROOT, None),  # to nearest
        (ROOT[:3], "2 FMUL.FTZ"),
        (("MUFU.RSQ R3, R2",), "MUFU.RSQ"),
        (("FCHK P0, R1, R2", "MUFU.RCP R3, R2"), None),
        (("I2F.U32.RP R3, R2", "MUFU.RCP R3, R3", "F2I.FTZ.U32.TRUNC.NTZ R3, R3"), None),  # integers
        (("MUFU.RCP R3, R2",), "MUFU.RCP"),
        (("MUFU.EX2 R3, R2",), "MUFU.EX2"),
        (("FFMA.FTZ R1, R2, R3, R4",), "FFMA.FTZ"),
        (("FADD.FTZ.RZ R1, R2, R3",), "FADD.FTZ"),
        (("FSETP.GT.FTZ.AND P0, PT, R1, R2, PT",), "FSETP"),
    ],
)
def test_the_gate_sees_how_machine_code_rounds(code, fault):
    faults = sass.of_text(lines(*code, "EXIT")).faults()
    assert (faults == []) if fault is None else (len(faults) >= 1 and any(fault in f for f in faults))


def test_the_gate_sees_what_ptx_approximates():
    text = "\tsqrt.approx.ftz.f32 \t%r1, %r2;\n\t@%p1 div.full.f32 \t%r1, %r2, %r3;\n\tadd.rn.f32 \t%r1, %r2, %r3;\n"
    assert sass.ptx_faults(text) == ["1 div.full.f32", "1 sqrt.approx.ftz.f32"]


KERNEL = """
__global__ void __launch_bounds__(256) kernel(float* y, const float* x, int n) {{
  {body}
}}
"""


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("y[0] = __fsqrt_rn(x[0]) / x[1];", None),
        ("y[0] = rsqrtf(x[0]);", "MUFU.RSQ"),
        ("y[0] = __expf(x[0]);", "MUFU.EX2"),
        ("float a[16]; for (int i = 0; i < 16; ++i) a[i] = x[i];\n#pragma unroll 1\n"
         "  for (int i = 0; i < n; ++i) y[i] = a[i % 16] += 1;", "stack frame (64 bytes)"),
    ],
)  # fmt: skip
def test_the_gate_of_nvcc_sees_approximations_and_stack_frames(tmp_path, monkeypatch, body, fault):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    monkeypatch.setattr(nvcc, "cost", lambda kernel: (1, 1, "fp32"))
    path = tmp_path / "kernel.cu"
    path.write_text(KERNEL.format(body=body))
    (row,) = nvcc.compile_source(path, "sm_90")
    assert (row["faults"] == []) if fault is None else any(fault in f for f in row["faults"]), row["faults"]


def test_a_kernel_outside_the_gates_is_status_one(tmp_path, monkeypatch, capsys):
    row = {"kernel": "k", "arch": "sm_86", "faults": ["spills (8)"]}
    monkeypatch.setattr(check, "collect", lambda archs: {"kernels": [row], "nvcc": "nvcc is not installed"})
    assert cli.main(["dev", "gpu-check", "--out", str(tmp_path / "out.json")]) == 1
    said = capsys.readouterr().err
    assert "k on sm_86: spills (8)" in said
    assert "CUDA C++ was not compiled: nvcc is not installed" in said


def test_costs_of_the_cuda_kernels():
    moved, operations, kind = nvcc.cost("encode_few<4, true, gsf::BF16>")
    assert kind == "fp32"
    assert moved == pytest.approx(2 * 2304 * 16384, rel=0.01)
    assert operations == 2 * 4 * 2304 * 16384
    assert nvcc.cost("decode_few<signed char>")[0] == pytest.approx(80 * 2304 + 4 * 2304, rel=0.01)
    assert nvcc.cost("matryoshka_few<(int)4, (int)1, (bool)1>") == nvcc.cost("matryoshka_few<4, 1, true>")
    moved, operations, kind = nvcc.cost("matryoshka_few<4, 1, true>")
    assert moved == pytest.approx(9216 * 2304 / 2, rel=0.02)
    assert (operations, kind) == (9216 * 2304 // 32 * 40, "int32")
    grouped = nvcc.cost("matryoshka_few<4, 1, false>")[0] - moved
    assert grouped == 9216 * 2304 // 32 * 3 - 5 * 9216  # fp16 and uint8 a group of 32, fp32 and uint8 a row
    for unknown in ("unknown<float>", "unknown", "unknown<4>"):
        with pytest.raises(ValueError, match="no cost"):
            nvcc.cost(unknown)
