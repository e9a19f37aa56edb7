"""Mutated checkpoints of every format: each loads or raises CheckpointError, in bounded time and memory.

    python tests/fuzz_checkpoints.py --cases 10000            # of each format
    python tests/fuzz_checkpoints.py --only saelens --first 4711 --cases 1   # one case again

Each case is a function of (format, number) alone.  The work is done in a child under an address-space limit, which
writes down the case it is at: a crash of the interpreter names its case too.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from fuzz_files import FORMATS, LAYERS, mutated

HANG_CPU, HANG = 10, 300  # seconds of its own and of the clock (the machine may be busy); a case takes milliseconds
MEMORY = 512 << 20  # bytes above what the interpreter has when the cases begin; the files have at most 100 kB


def load(folder: Path, kind: str) -> None:
    """Load what is there; where that works it must be a whole module of finite weights that runs."""
    import torch

    from gemmascope_fast import SparseLatents
    from gemmascope_fast.checkpoints.loading import from_pretrained
    from gemmascope_fast.cli.ls import listing

    if kind == "latents":
        SparseLatents.load(folder / "latents.safetensors").to_dense()
        return
    listing(str(folder))  # a damaged checkpoint is a line of the listing
    module = from_pretrained(folder)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    d_in = module.cfg.d_in
    lead = (LAYERS, 2) if kind == "cross-layer" else (2,)
    module(torch.zeros(*lead, d_in))


class Hang(BaseException):
    """Not an Exception: nothing on the way may catch it."""


def _hang(*_: object) -> None:
    raise Hang


def run_case(kind: str, number: int, variants: list[dict[str, bytes]], folder: Path) -> str:
    """ "loaded", "refused", or what went wrong."""
    from gemmascope_fast.errors import CheckpointError

    draw = random.Random(f"{kind}:{number}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in mutated(draw.choice(variants), draw).items():
        (folder / name).write_bytes(data)
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


def child(kinds: list[str], first: int, cases: int, place: Path) -> int:
    """All cases of some formats; the one it is at is in the file `at`, what went wrong on stdout."""
    import torch

    torch.set_num_threads(1)
    folder = place / "case"
    made = {kind: FORMATS[kind]() for kind in kinds}
    for kind, variants in made.items():
        for files in variants:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                (folder / name).write_bytes(data)
            load(folder, kind)  # the healthy file does load, and everything is imported
            shutil.rmtree(folder)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    signal.signal(signal.SIGALRM, _hang)
    signal.signal(signal.SIGPROF, _hang)
    failed = 0
    with open(place / "at", "w") as at:
        for kind, variants in made.items():
            counts = {"loaded": 0, "refused": 0, "failed": 0}
            for number in range(first, first + cases):
                at.seek(0)
                at.write(f"{kind}, case {number} \n")
                at.flush()
                outcome = run_case(kind, number, variants, folder)
                if outcome not in counts:
                    counts["failed"] += 1
                    if counts["failed"] <= 5:
                        print(f"--- {kind}, case {number}:\n{outcome}", flush=True)
                else:
                    counts[outcome] += 1
            failed += counts["failed"]
            print(f"{kind}: {cases} cases, " + ", ".join(f"{n} {what}" for what, n in counts.items()), flush=True)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of each format (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.add_argument("--only", choices=FORMATS, action="append", help="a format; may be given several times")
    parser.add_argument("--together", action="store_true", help="all formats in one process: quicker for few cases")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    kinds = args.only or list(FORMATS)
    if args.child is not None:
        return child(kinds, args.first, args.cases, args.child)
    failed = 0
    for group in [kinds] if args.together else [[kind] for kind in kinds]:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            command = [sys.executable, "-X", "faulthandler", __file__, "--child", place]
            command += ["--first", str(args.first), "--cases", str(args.cases)]
            done = subprocess.run([*command, *(f"--only={kind}" for kind in group)], check=False)
            if done.returncode not in (0, 1):
                at = (Path(place) / "at").read_text().split("\n")[0] if (Path(place) / "at").exists() else "the start"
                print(f"the interpreter died with status {done.returncode} at {at}")
            failed |= done.returncode
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
