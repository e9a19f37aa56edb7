"""What the machine code of a CUDA kernel says: rounding on exact paths, the share of FFMA, the width of loads.

Triton's wheel holds `nvdisasm`, so no CUDA toolkit is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from gemmascope_fast.errors import BackendError

# Reciprocals and inverse roots are starting values of exact divisions and roots; these have no such use.
APPROXIMATE = ("MUFU.EX2", "MUFU.LG2", "MUFU.SIN", "MUFU.COS", "MUFU.TANH", "MUFU.SQRT")
FLUSHING = re.compile(r"^[FH](ADD|MUL|FMA|SET|SETP|MNMX|CHK|SWZADD)\S*\.(FTZ|FMZ)\b")
LOAD = re.compile(r"^(LDG|LDGSTS)\b")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)([^;]*);")
INTERNAL = re.compile(r"^\$__internal_\d+_\$(\w+):", re.MULTILINE)  # routines of the compiler's library


@dataclass(frozen=True)
class Sass:
    """One kernel's machine code.  `loads`: global loads by bytes a lane, {"16": 12, …}."""

    instructions: int
    ffma: float  # share of the instructions
    loads: dict[str, int]
    rounding: tuple[str, ...] = field(default=())  # what rounds otherwise than to nearest, or flushes subnormals

    def faults(self) -> list[str]:
        return [f"rounding: {text}" for text in self.rounding]


def nvdisasm() -> str:
    """Triton's own copy of nvdisasm."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm")


def read(cubin: bytes) -> dict[str, Sass]:
    """Every kernel of a binary by its mangled name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([nvdisasm(), "-c", file.name], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackendError(f"nvdisasm: {done.stderr.strip() or done.stdout.strip()}")
    parts = re.split(r"^\s*\.section\s+\.text\.([^,\s]+),.*$", done.stdout, flags=re.MULTILINE)
    found = {name: of_text(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    if not found:
        raise BackendError("nvdisasm found no kernel in the binary")
    return found


def of_text(text: str) -> Sass:
    """From the disassembly of one kernel."""
    own = INTERNAL.split(text)[0]
    listed = [(m[1], m[2]) for m in INSTRUCTION.finditer(own)]
    names = Counter(name for name, _ in listed if name != "NOP")
    total = sum(names.values())
    if total == 0:
        raise BackendError("the disassembly of a kernel holds no instruction")
    ffma = sum(n for name, n in names.items() if name.split(".")[0] == "FFMA")
    loads: Counter[str] = Counter()
    for name, _ in listed:
        if LOAD.match(name):
            loads[str(load_bytes(name))] += 1
    routines = Counter(m for _, rest in listed for m in re.findall(r"\$__internal_\d+_\$(\w+)", rest))
    return Sass(total, ffma / total, dict(loads), tuple(rounding_faults(names, routines)))


def load_bytes(name: str) -> int:
    """Bytes that a lane loads: 4 where the mnemonic does not say."""
    for word in name.split("."):
        if word in ("128", "64"):
            return int(word) // 8
        if word in ("U8", "S8", "U16", "S16"):
            return int(word[1:]) // 8
    return 4


def rounding_faults(names: Counter[str], routines: Counter[str]) -> list[str]:
    """What an exact kernel must not hold.

    A division to nearest is MUFU.RCP with an FCHK and a routine for what is out of range; an integer division starts
    from an I2F; a root to nearest is MUFU.RSQ, two FMUL.FTZ of normal numbers and a routine for the rest.  A reciprocal
    or root beyond those is an approximation.
    """
    found = [f"{n} {name}" for name, n in sorted(names.items()) if name in APPROXIMATE]
    reciprocals = sum(n for name, n in names.items() if name.startswith("MUFU.RCP"))
    roots = sum(n for name, n in names.items() if name.startswith("MUFU.RSQ"))
    starts = sum(n for name, n in names.items() if name == "FCHK" or (name.startswith("I2F") and name.endswith(".RP")))
    exact_roots = sum(n for name, n in routines.items() if "sqrt_rn" in name)
    flushing = {name: n for name, n in sorted(names.items()) if FLUSHING.match(name)}
    if set(flushing) != {"FMUL.FTZ"} or flushing["FMUL.FTZ"] > 2 * exact_roots:
        found += [f"{n} {name}" for name, n in flushing.items()]
    if reciprocals > starts:
        found.append(f"{reciprocals} MUFU.RCP, of which {starts} start an exact division")
    if roots > exact_roots:
        found.append(f"{roots} MUFU.RSQ, of which {exact_roots} start an exact root")
    return found


def ptx_faults(text: str) -> list[str]:
    """Instructions of PTX that approximate or flush subnormals."""
    found = Counter(re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z]\w*\S*\.(?:approx|full|ftz)\S*)", text, re.MULTILINE))
    return [f"{n} {name}" for name, n in sorted(found.items())]
