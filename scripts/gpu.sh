#!/usr/bin/env bash
# make gpu: everything that needs a device, into one archive to attach to an issue.
#   scripts/gpu.sh PYTHON      an interpreter whose environment holds this package and torch's CUDA build
# A step that fails does not end the run: the archive says which did, and the exit status is 1.
set -uo pipefail
cd "$(dirname "$0")/.."
py=${1:-python3}
"$py" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
  { echo "make gpu: expected a CUDA device that torch can use, found none" >&2; exit 2; }
out=$(mktemp -d)/gemmascope-fast-gpu
mkdir -p "$out"
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

git rev-parse HEAD >"$out/commit.txt" 2>/dev/null || true
step info "$py" -m gemmascope_fast.cli.main info --json
optional nvidia-smi nvidia-smi nvidia-smi -q
step tests "$py" -m pytest tests/device -p no:cacheprovider
# the sanitizers slow a kernel a hundredfold: one small shape of each
for tool in memcheck racecheck synccheck; do
  optional "sanitizer-$tool" compute-sanitizer compute-sanitizer --tool "$tool" --error-exitcode 9 \
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
archive=$PWD/gemmascope-fast-gpu.tar.gz
tar -czf "$archive" -C "$(dirname "$out")" "$(basename "$out")"
echo "wrote $archive; failed steps: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
