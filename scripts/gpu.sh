#!/usr/bin/env bash
# make gpu: everything that needs a device, into one archive to attach to an issue.
#   scripts/gpu.sh PYTHON [FOLDER]   an interpreter whose environment holds this package and torch's CUDA build, and
#                                    where the archive goes
# A step that fails does not end the run: the archive says which did, and the exit status is 1.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
py=${1:-python3}
to=${2:-$root}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# In the source tree its own package would be imported, without the extensions of the installed one.
cp -r "$root/tests" "$root/benchmarks" "$root/scripts" "$root/pyproject.toml" "$work"
out=$work/gemmascope-fast-gpu
mkdir "$out"
git -C "$root" rev-parse HEAD >"$out/commit.txt" 2>/dev/null || true
cd "$work" || exit 2
"$py" scripts/gpu_preflight.py | tee "$out/package.txt"
[ "${PIPESTATUS[0]}" = 0 ] || exit 2
failed=()

step() { # NAME COMMAND...: its output into NAME.txt
  local name=$1
  shift
  echo "== $name"
  "$@" >"$out/$name.txt" 2>&1 || failed+=("$name")
}
have() { command -v "$1" >/dev/null; }
optional() { # NAME TOOL COMMAND...: a step where the tool is there, a line in missing.txt where it is not
  local name=$1 tool=$2
  shift 2
  if have "$tool"; then step "$name" "$@"; else echo "$name: no $tool on the path" >>"$out/missing.txt"; fi
}

step info "$py" -m gemmascope_fast.cli.main info --json -
optional nvidia-smi nvidia-smi nvidia-smi -q
step tests "$py" -m pytest tests/device -p no:cacheprovider
# The sanitizers slow a kernel a hundredfold: one small shape of each.  Torch's allocator hands out parts of large
# blocks, beyond whose ends they would see nothing: without it every tensor is an allocation of its own.
for tool in memcheck racecheck synccheck; do
  optional "sanitizer-$tool" compute-sanitizer env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$py" -m pytest tests/device -p no:cacheprovider -k "3-640-4097 or overflow"
done
step benchmark "$py" benchmarks/gpu.py --json "$out/benchmark.json"
optional ncu ncu ncu --set basic --target-processes all -o "$out/nsight" --force-overwrite \
  "$py" benchmarks/gpu.py --once
if "$py" -m gemmascope_fast.cli.main dev profile --help >/dev/null 2>&1; then
  step profile "$py" -m gemmascope_fast.cli.main dev profile
else
  echo "profile: this version has no such command" >>"$out/missing.txt"
fi

printf '%s\n' "${failed[@]+"${failed[@]}"}" >"$out/failed.txt"
archive=$to/gemmascope-fast-gpu.tar.gz
tar -czf "$archive" -C "$work" gemmascope-fast-gpu
echo "wrote $archive; failed steps: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
