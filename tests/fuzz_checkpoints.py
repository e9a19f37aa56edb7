"""Mutated and forged checkpoints of every format: each loads or raises CheckpointError, in bounded time and memory.

    python tests/fuzz_checkpoints.py --cases 10000 --forged 1000     # of each format
    python tests/fuzz_checkpoints.py --only saelens --first 4711 --cases 1   # one case again
    python tests/fuzz_checkpoints.py --cases 10000000 --forged 1000000 --seconds 600   # as many as 10 minutes hold

A mutated file has bytes or fields changed; a forged one is sound, with the digests and checksums of what it holds
(fuzz_forged.py).  Each case is a function of (format, way, number) alone.  The work is done in a child under an
address-space limit, which writes down the case it is at: a crash of the interpreter names its case too.
`make fuzz-asan` runs the same cases over kernels that are built with AddressSanitizer.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from fuzz_files import FORMATS, LAYERS, mutated
from fuzz_forged import TIME, forged, packed_pair, screened, small_packed_files

from gemmascope_fast import SparseLatents, StaleScreenError
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.cli.ls import listing
from gemmascope_fast.errors import CheckpointError

FORMATS = FORMATS | {"screened": screened, "packed": packed_pair}
HANG_CPU, HANG = 10, 300  # seconds of its own and of the clock (the machine may be busy); a case takes milliseconds
MEMORY = 512 << 20  # bytes above what the interpreter has when the cases begin; the files have at most 100 kB
SLACK = 32 << 20  # bytes that a case may take beside twice its files: JSON of a megabyte takes 25 when parsed
BOMB = 64 << 20  # what an npz may hold, however small it is
ASAN = "asan" in os.environ.get("LD_PRELOAD", "")  # reserves terabytes and keeps what was freed: no limits on memory


def load(folder: Path, kind: str) -> None:
    """Load what is there; where that works it must be a whole module of finite weights that runs."""
    if kind == "latents":
        latents = SparseLatents.load(folder / "latents.safetensors")
        latents.l0()
        if latents.n_rows * latents.d_sae < 1 << 20:
            latents.to_dense()
        return
    if kind == "packed":
        module = from_pretrained(folder / "sae.safetensors", rows="mmap")
        _encode(module)
        return
    listing(str(folder))  # a damaged checkpoint is a line of the listing
    module = from_pretrained(folder)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    lead = (LAYERS, 2) if kind == "cross-layer" else (2,)
    if kind == "screened":
        _encode(module)
    else:
        module(torch.zeros(*lead, module.cfg.d_in))


def _encode(module) -> None:
    """Screened, with few tokens and with many: a forged bound may be found out, and leads to no other feature."""
    for tokens in (1, 20):
        x = torch.linspace(-3, 3, tokens * module.d_in).sin().reshape(tokens, module.d_in) * 5
        try:
            latents = module.encode_sparse(x, screen=True)
        except StaleScreenError:
            continue
        module.decode(latents.validate())


class Hang(BaseException):
    """Not an Exception: nothing on the way may catch it."""


def _hang(*_: object) -> None:
    raise Hang


def run_case(kind: str, number: int, variants: list[dict[str, bytes]], folder: Path, way: str = "mutated") -> str:
    """ "loaded", "refused", or what went wrong."""
    draw = random.Random(f"{kind}:{number}" if way == "mutated" else f"{kind}:{way}:{number}")
    files = draw.choice(variants)
    size = _write(mutated(files, draw) if way == "mutated" else forged(kind, files, draw), folder)
    before = _memory("VmRSS") if _reset_peak() else None
    outcome = _outcome(folder, kind)
    taken = 0 if before is None else _memory("VmHWM") - before
    if taken > 2 * size + SLACK + (BOMB if kind == "gemma-scope-1" else 0):
        return f"took {taken} bytes for files of {size}, and: {outcome}"
    return outcome


def _outcome(folder: Path, kind: str) -> str:
    signal.setitimer(signal.ITIMER_PROF, HANG_CPU)
    signal.alarm(HANG)
    try:
        load(folder, kind)
    except CheckpointError as error:
        return "refused" if str(folder) in str(error) else f"names no file: {error}"
    except (Exception, Hang):  # noqa: BLE001  (that is what is looked for)
        return traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "loaded"


def _write(files: dict[str, bytes], folder: Path) -> int:
    """The files of a case, in an empty folder; gives their bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    if "sae.safetensors.packed" in files and "sae.safetensors" in files:
        os.utime(folder / "sae.safetensors", ns=(TIME, TIME))  # the packed file says which checkpoint it is of
    return sum(map(len, files.values()))


def _reset_peak() -> bool:
    """Make the process's peak of memory what it has now; False where the system cannot."""
    if ASAN:
        return False
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _memory(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def child(kinds: list[str], ways: dict[str, int], first: int, seconds: float, place: Path) -> int:
    """All cases of some formats; the one it is at is in the file `at`, what went wrong on stdout."""
    torch.set_num_threads(1)
    folder = place / "case"
    small_packed_files()
    made = {kind: FORMATS[kind]() for kind in kinds}
    for kind, variants in made.items():
        for files in variants:
            _write(files, folder)
            load(folder, kind)  # the healthy file does load, and everything is imported
    if not ASAN:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    signal.signal(signal.SIGALRM, _hang)
    signal.signal(signal.SIGPROF, _hang)
    failed = 0
    share = seconds / max(1, len(made) * sum(1 for cases in ways.values() if cases))
    with open(place / "at", "w") as at:
        for kind, variants in made.items():
            for way, cases in ways.items():
                if cases:
                    failed += _cases(kind, way, range(first, first + cases), share, variants, folder, at)
    return 1 if failed else 0


def _cases(kind, way, numbers, seconds, variants, folder, at) -> int:
    """Run the cases of one format and way until the seconds are over; gives how many went wrong."""
    counts, start = {"loaded": 0, "refused": 0, "failed": 0}, time.monotonic()
    for number in numbers:
        if time.monotonic() - start > seconds:
            break
        at.seek(0)
        at.write(f"{kind}, {way}, case {number} \n")
        at.flush()
        outcome = run_case(kind, number, variants, folder, way)
        if outcome not in counts:
            counts["failed"] += 1
            if counts["failed"] <= 5:
                print(f"--- {kind}, {way}, case {number}:\n{outcome}", flush=True)
        else:
            counts[outcome] += 1
    told = ", ".join(f"{n} {what}" for what, n in counts.items())
    print(f"{kind}, {way}: {sum(counts.values())} cases, {told}", flush=True)
    return counts["failed"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="mutated, of each format (default: %(default)s)")
    parser.add_argument("--forged", type=int, default=0, help="forged, of each format (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many in all")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.add_argument("--only", choices=FORMATS, action="append", help="a format; may be given several times")
    parser.add_argument("--together", action="store_true", help="all formats in one process: quicker for few cases")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    kinds = args.only or list(FORMATS)
    if args.child is not None:
        ways = {"mutated": args.cases, "forged": args.forged}
        return child(kinds, ways, args.first, args.seconds, args.child)
    failed = 0
    groups = [kinds] if args.together else [[kind] for kind in kinds]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a case writes its files first
    for group in groups:
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as place:
            command = [sys.executable, "-X", "faulthandler", __file__, "--child", place]
            command += ["--first", str(args.first), "--cases", str(args.cases), "--forged", str(args.forged)]
            command += ["--seconds", str(args.seconds / len(groups))]
            done = subprocess.run([*command, *(f"--only={kind}" for kind in group)], check=False)
            if done.returncode not in (0, 1):
                at = (Path(place) / "at").read_text().split("\n")[0] if (Path(place) / "at").exists() else "the start"
                print(f"the interpreter died with status {done.returncode} at {at}")
            failed |= done.returncode
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
