"""Each check of the PTX interpreter on a kernel of a few lines: what it must notice, and what it must let pass."""

import pytest
import torch
from ptx_library import Allocation, PtxFault, options, run, totals

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 in, .param .u64 out)
{{
  .reg .pred %p<9>; .reg .b32 %r<99>; .reg .b64 %rd<99>;
  .shared .align 16 .b8 tile[1024];
  ld.param.u64 %rd1, [in];
  ld.param.u64 %rd2, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, tile;
  shl.b32 %r3, %r1, 2;
  add.s32 %r4, %r2, %r3;
  cvt.u64.u32 %rd3, %r3;
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  xor.b32 %r5, %r3, {partner};
  add.s32 %r6, %r2, %r5;
{body}
  ret;
}}
"""


def launch(body, partner=4, blocks=1, threads=64, size=64, seed=1):
    """Thread t is at element t: %rd4 of in, %rd5 of out, %r4 of the tile, %r6 of its partner's place in the tile."""
    given, out = torch.arange(size, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
    memory = [Allocation(t.data_ptr(), t.nbytes, name) for t, name in ((given, "in"), (out, "out"))]
    with options(seed=seed):
        run(HEAD.format(body=body, partner=partner), "kernel", blocks, threads, memory,
            values=[given.data_ptr(), out.data_ptr()])  # fmt: skip
    return out


LOAD, STORE = "ld.global.b32 %r10, [%rd4];", "st.global.b32 [%rd5], %r11;"
EXCHANGE = "st.shared.b32 [%r4], %r10; {sync} ld.shared.b32 %r11, [%r6];"
COPY = "cp.async.ca.shared.global [%r4], [%rd4], 4; cp.async.commit_group; {wait} ld.shared.b32 %r11, [{where}];"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("partner", [4, 128])  # bytes: the next lane, the other warp
def test_an_exchange_with_a_barrier(partner, seed):
    out = launch(LOAD + EXCHANGE.format(sync="bar.sync 0;") + STORE, partner, seed=seed)
    assert out.tolist() == [t ^ (partner // 4) for t in range(64)]


def test_an_exchange_within_a_warp_needs_only_its_own_barrier():
    launch(LOAD + EXCHANGE.format(sync="bar.warp.sync -1;") + STORE, 4)
    with pytest.raises(PtxFault, match=r"race|uninitialised"):
        launch(LOAD + EXCHANGE.format(sync="bar.warp.sync -1;") + STORE, 128)


SHARED_COPY = COPY.format(wait="{wait}", where="%r4")
FAULTS = {
    "race between lanes of one warp": (LOAD + EXCHANGE.format(sync="") + STORE, "race: reads what another wrote"),
    "a shuffle is no barrier": (
        LOAD + EXCHANGE.format(sync="shfl.sync.bfly.b32 %r12, %r10, 1, 31, -1;"), "race: reads what another wrote",
    ),
    "a write over what another reads": (
        LOAD + EXCHANGE.format(sync="bar.sync 0;") + "st.shared.b32 [%r4], %r2;", "race: writes what another touched",
    ),
    "a race in global memory": (
        LOAD + "add.s32 %r10, %r10, 1; st.global.b32 [%rd5], %r10; xor.b64 %rd6, %rd5, 4; ld.global.b32 %r11, [%rd6];",
        "race: reads what another wrote in out",
    ),
    "beyond the end": ("ld.global.b32 %r10, [%rd4+4];", "a load of 4 bytes near byte 256 of the 256 of in"),
    "before the start": ("st.global.b32 [%rd5+-4], %r1;", "out of bounds: a store of 4 bytes near byte -4"),
    "by one byte": ("ld.global.b8 %r10, [%rd4+3]; ld.global.b8 %r10, [%rd4+4];", "near byte 256"),
    "misaligned": ("ld.global.b32 %r10, [%rd4+2];", "misaligned: a load of 4 bytes"),
    "misaligned vector": ("ld.global.v2.b32 {%r10, %r11}, [%rd4];", "misaligned: a load of 8 bytes"),
    "beyond shared memory": ("ld.shared.b32 %r10, [%r4+4096];", "out of bounds: shared memory"),
    "uninitialised": ("ld.shared.b32 %r10, [%r4];", "uninitialised shared memory"),
    "a part of it uninitialised": ("st.shared.b8 [%r4], %r1; ld.shared.b32 %r10, [%r4];", "uninitialised shared"),
    "a copy without a wait": (SHARED_COPY.format(wait=""), "read before it was waited for"),
    "a copy that another thread waited for": (
        COPY.format(wait="cp.async.wait_group 0;", where="%r6"), "race: reads what another wrote",
    ),
    "a wait for all but the last": (SHARED_COPY.format(wait="cp.async.wait_group 1;"), "read before it was waited"),
    "a write over a copy": (SHARED_COPY.format(wait="st.shared.b32 [%r4], %r1;"), "copy is overwritten"),
    "a copy beyond the end": (
        "cp.async.ca.shared.global [%r4], [%rd4+256], 4;", "out of bounds: a copy of 4 bytes",
    ),
    "lanes that are missing": (
        "setp.lt.u32 %p1, %r1, 7; @%p1 shfl.sync.bfly.b32 %r10, %r1, 1, 31, -1;", "names lanes that do not execute it",
    ),
    "a barrier for a part of a warp": ("setp.lt.u32 %p1, %r1, 7; @%p1 bar.sync 0;", "only a part of a warp"),
    "integer division by zero": ("mov.u32 %r10, 0; div.u32 %r11, %r1, %r10;", "division by zero"),
    "an unknown instruction": ("tanh.approx.f32 %r10, %r1;", "the interpreter does not know: tanh"),
    "an unknown variant": ("add.sat.s32 %r10, %r1, %r1;", "the interpreter does not know: add.sat"),
    "another barrier": ("bar.sync 1;", "the interpreter does not know: bar.sync 1"),
    "an unknown register": ("mov.u32 %r10, %clock;  mov.u32 %r10, %smid.x;", "does not know the register"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name):
    body, words = FAULTS[name]
    with pytest.raises(PtxFault, match=words):
        launch(body)


PASSES = {
    "a copy that was waited for": COPY.format(wait="cp.async.wait_group 0;", where="%r4"),
    "a copy behind a barrier": COPY.format(wait="cp.async.wait_all; bar.sync 0;", where="%r6"),
    "the same value by all": "mov.u32 %r10, 7; st.shared.b32 [%r2], %r10; bar.sync 0; ld.shared.b32 %r11, [%r2];",
    "a thread that returns early": "setp.ge.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;",
    "a loop that lanes leave one by one": (
        "mov.u32 %r10, 0;\n$again:\nadd.s32 %r10, %r10, 1; setp.lt.u32 %p1, %r10, %r1; @%p1 bra $again;\nbar.sync 0;"
    ),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_is_right_passes(name):
    launch(PASSES[name])


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("mov.u32 %r11, %ctaid.x; st.global.b32 [%rd5], %r11;", "two blocks touch the same memory: writes"),
        ("mov.u32 %r11, 5; st.global.b32 [%rd5], %r11;", None),  # the same from both
        (LOAD + "mov.u32 %r11, 5; st.global.b32 [%rd5], %r11; ld.global.b32 %r12, [%rd2];", "two blocks|race"),
    ],
)
def test_blocks_share_no_memory(body, fault):
    if fault is None:
        launch(body, blocks=2)
    else:
        with pytest.raises(PtxFault, match=fault):
            launch(body, blocks=2)


def test_a_nan_that_an_operation_makes_has_nvidias_bytes():
    bits = "mov.b32 %r10, 0x7fc00001; add.rn.f32 %r11, %r10, %r10;"
    assert set(launch(bits + STORE).tolist()) == {0x7FFFFFFF}


def test_counts():
    """A warp's row of words is four sectors; words two apart touch eight.  A stride of 32 words is 32 wavefronts."""
    far = "shl.b32 %r20, %r1, 3; and.b32 %r20, %r20, 127; cvt.u64.u32 %rd20, %r20; add.s64 %rd21, %rd1, %rd20;"
    found = counted(LOAD + far + "ld.global.s32 %r21, [%rd21];" + "st.shared.b32 [%r4], %r10;")
    assert (found["ld.global.b32"]["requests"], found["ld.global.b32"]["sectors"]) == (2, 8)
    assert found["ld.global.b32"]["bytes"] == 256
    assert found["ld.global.s32"]["sectors"] == 8  # 128 bytes a warp
    assert (found["st.shared.b32"]["wavefronts"], found["st.shared.b32"]["ideal"]) == (2, 2)
    column = "and.b32 %r20, %r1, 7; shl.b32 %r20, %r20, 7; add.s32 %r21, %r2, %r20; add.s32 %r21, %r21, 0;"
    found = counted(column + "mov.u32 %r10, 1; st.shared.b32 [%r21], %r10;")
    assert found["st.shared.b32"]["wavefronts"] == 2 * 8
    assert found["mov.u32"]["warps"] == 2 * 3  # the head's two and one here, of two warps
    assert found["mov.u32"]["lanes"] == 64 * 3


def counted(body):
    given = torch.arange(64, dtype=torch.int32)
    memory = [Allocation(given.data_ptr(), given.nbytes, "in")]
    with options(counts=True):
        return totals(run(HEAD.format(body=body, partner=4), "kernel", 1, 64, memory, values=[given.data_ptr()] * 2))
