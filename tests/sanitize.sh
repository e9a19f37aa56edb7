#!/usr/bin/env bash
# The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy: every instruction set, every op.
# Usage: tests/sanitize.sh PYTHON [pytest arguments]
# GSF_SANITIZE_SCRIPT: a script of the tests' and its arguments to run in place of pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
shift
copy=$(mktemp -d -t gsf-sanitize-XXXXXX)
trap 'rm -rf "$copy"' EXIT
cp -a csrc gemmascope_fast kernels tests benchmarks setup.py pyproject.toml README.md LICENSE "$copy"
rm -f "$copy"/gemmascope_fast/*.so
cd "$copy"
GSF_REQUIRE_EXT=1 GSF_SANITIZE=address,undefined "$python" setup.py -q build_ext --inplace
# Python itself is not instrumented: the runtimes come first by preloading, and its own leaks are not ours.
runtimes="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH="$copy" OMP_NUM_THREADS=1
if [ -n "${GSF_SANITIZE_SCRIPT:-}" ]; then
  # shellcheck disable=SC2086  # a script and its arguments
  LD_PRELOAD="$runtimes" "$python" $GSF_SANITIZE_SCRIPT
  exit
fi
tests=${GSF_SANITIZE_TESTS:-tests/ops/test_encode.py tests/ops/test_decode.py tests/ops/test_sampled_dot.py tests/ops/test_transpose.py tests/sae/test_sae.py tests/ops/test_latents.py tests/test_screen*.py tests/test_packed*.py}
# -s: a report ends the process, and what pytest had captured of it would be lost
# shellcheck disable=SC2086  # a list of files
LD_PRELOAD="$runtimes" "$python" -m pytest -s -p no:cacheprovider -k "not compile" "$@" $tests
