"""Builds gemmascope_fast._C if a C++ compiler is found; without one, installs the package without it and says so.

The metadata is in pyproject.toml.  GSF_REQUIRE_EXT=1 makes a failed build of the extension an error,
GSF_REQUIRE_CUDA=1 a failed build of the CUDA kernels.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent.resolve()


def pybind11_include() -> list[str]:
    """pybind11's own headers; if it is not installed, torch's headers include a copy."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def extension() -> dict:
    compiler = os.environ.get("CXX", "c++")
    required = os.environ.get("GSF_REQUIRE_EXT") == "1"
    if shutil.which(compiler.split()[0]) is None:
        if required:
            raise RuntimeError(f"GSF_REQUIRE_EXT=1, but no C++ compiler {compiler!r} was found")
        print(f"gemmascope-fast: no C++ compiler ({compiler}): installing without the native kernels")
        return {}
    # torch searches for the toolkit once, when this is imported
    if "CUDA_HOME" not in os.environ and (home := cuda_toolkit()) is not None:
        os.environ["CUDA_HOME"] = home
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuild(BuildExtension):
        """If the compiler cannot build an extension, the package still installs and works, slower, and says so.

        Extensions are built one by one: if the CUDA kernels fail, the native ones are kept.
        """

        def run(self) -> None:
            wanted, built, compiler, inplace = self.extensions, [], self.compiler, self.inplace
            for ext in wanted:
                self.extensions, self.compiler, self.inplace = [ext], compiler, inplace
                what = "CUDA" if ext.name.endswith("_cuda") else "native"
                try:
                    super().run()
                    built.append(ext)
                except Exception as error:
                    if os.environ.get("GSF_REQUIRE_CUDA" if what == "CUDA" else "GSF_REQUIRE_EXT") == "1":
                        raise
                    print(f"gemmascope-fast: the {what} kernels were not built: {error}")
            # otherwise setuptools would try to copy an extension that does not exist
            self.extensions, self.inplace = built, inplace

    flags = ["-O3", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-unknown-pragmas"]
    # The order and the rounding of every sum are part of the contract: no contraction, no fast-math.
    # Exception flags are not: if the compiler may ignore them, clamps become vector minima and maxima, not branches.
    flags += ["-ffp-contract=off", "-fno-fast-math", "-fno-trapping-math", "-fopenmp"]
    # GSF_SANITIZE=address,undefined: an instrumented build for `make sanitize`; the first error ends the process
    sanitizers = os.environ.get("GSF_SANITIZE")
    link = ["-s"]
    if sanitizers:
        instrument = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        flags += [*instrument, "-O1", "-g", "-fno-omit-frame-pointer"]
        link = instrument
    # OpenMP without linking a runtime: the symbols resolve to the one that torch loaded, so that there is only one
    # thread pool in the process, not two that compete.
    ext = CppExtension(
        "gemmascope_fast._C",
        [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/*.cpp"))],
        include_dirs=[str(ROOT / "csrc"), *pybind11_include()],
        extra_compile_args={"cxx": flags},
        extra_link_args=link,
    )
    extensions = [ext, *cuda_extension(flags)]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": OptionalBuild.with_options(use_ninja=True)}}


def cuda_toolkit() -> str | None:
    """Where nvcc's headers and libraries are, asked from nvcc itself, because the nvcc on the path may be a wrapper."""
    if shutil.which("nvcc") is None:
        return None
    command = ["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    return None if found is None else str(Path(found[1].strip()).resolve())


ARCHITECTURES = ("8.0", "8.6", "9.0", "10.0", "12.0")


def architectures(home: str) -> str:
    """TORCH_CUDA_ARCH_LIST: the architectures that this nvcc knows, and PTX of the newest for future devices."""
    command = [str(Path(home) / "bin" / "nvcc"), "--list-gpu-code"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    chosen = [a for a in ARCHITECTURES if f"sm_{a.replace('.', '')}" in known]
    if not chosen:
        raise RuntimeError(f"nvcc: expected one that compiles for one of {', '.join(ARCHITECTURES)}, it knows {known}")
    return ";".join(chosen) + "+PTX"


def cuda_extension(cxx_flags: list[str]) -> list:
    """gemmascope_fast._C_cuda if torch is a CUDA build and nvcc is found; needs no GPU and does not look for one.

    GSF_REQUIRE_CUDA=1 makes it an error if either is missing.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if torch.version.cuda is None or CUDA_HOME is None:
        if os.environ.get("GSF_REQUIRE_CUDA") == "1":
            raise RuntimeError(f"GSF_REQUIRE_CUDA=1: torch's CUDA is {torch.version.cuda}, nvcc's home {CUDA_HOME}")
        return []
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        try:
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(CUDA_HOME)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("GSF_REQUIRE_CUDA") == "1":
                raise
            print(f"gemmascope-fast: the CUDA kernels were not built: {error}")
            return []
    sources = sorted(ROOT.glob("csrc/cuda/*.cpp")) + sorted(ROOT.glob("csrc/cuda/*.cu"))
    return [
        CUDAExtension(
            "gemmascope_fast._C_cuda",
            [str(p.relative_to(ROOT)) for p in sources],
            include_dirs=[str(ROOT / "csrc"), *pybind11_include()],
            extra_compile_args={"cxx": cxx_flags, "nvcc": ["-O3", "--fmad=false"]},
            extra_link_args=["-s"],
        )
    ]


packages = find_packages(include=["gemmascope_fast", "gemmascope_fast.*"])
setup(
    # The top-level kernels/ has no __init__.py, so no module named `kernels` is ever installed; it is installed as
    # gemmascope_fast.kernels.  In a source tree that is not installed, a symlink of that name is used; the mapping
    # below is for checkouts that could not create the link.
    packages=[*packages, "gemmascope_fast.kernels"],
    package_dir={"gemmascope_fast.kernels": "kernels"},
    package_data={
        "gemmascope_fast": ["py.typed", "*/data/*", "*/data/**/*", "*/templates/*", "*/*/templates/*"],
    },
    **extension(),
)
