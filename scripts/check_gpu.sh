#!/usr/bin/env bash
# usage: [OUT=dir] [PYTHON=python3] check_gpu.sh WHEEL...
# The GPU check, on a machine with an NVIDIA GPU, torch and no network. Installs the given wheels
# (flashcore and nanobind_backend; also pytest, hypothesis, ml_dtypes where the machine lacks them) into a
# folder of its own, runs the GPU tests (the GPU examples among them), what a call costs on the host
# and a short benchmark of this tree, and prints one table. Everything it wrote is in OUT (default
# out/). Exits with 1 if anything failed.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: check_gpu.sh WHEEL..." >&2; exit 2; }
python=${PYTHON:-python3}
out=${OUT:-out}
mkdir -p "$out"
env=$(mktemp -d)
trap 'rm -rf "$env"' EXIT

# An environment of its own that also sees the packages of the machine's Python (torch).
"$python" -m venv --without-pip "$env" || exit 1
site=$("$env/bin/python" -c 'import site; print(site.getsitepackages()[0])')
"$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
  > "$site/machine.pth"
"$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$@" || exit 1
python=$env/bin/python
export PYTHONUNBUFFERED=1

declare -a table
failed=0
step() {
  local name=$1 log=$out/$2
  shift 2
  local begin=$SECONDS verdict=passed
  echo "== $name"
  "$@" 2>&1 | tee "$log"
  if [ "${PIPESTATUS[0]}" -ne 0 ]; then verdict=FAILED failed=1; fi
  table+=("$(printf '%-12s %-7s %4d s  %s' "$name" "$verdict" $((SECONDS - begin)) "$(tail -n 1 "$log")")")
}

# The references are NumPy on one core each: where pytest-xdist is there, several processes share the GPU.
workers=()
if "$python" -c 'import xdist' 2> /dev/null; then
  workers=(-n "${WORKERS:-12}" --dist worksteal)
fi

step info info.txt "$python" -m flashcore
step tests pytest.txt "$python" -m pytest tests/python -m gpu -p no:cacheprovider -q \
  "${workers[@]}" --junitxml="$out/pytest.xml"
step "call cost" call_cost.txt "$python" -m benchmarks host --device cuda
step benchmark benchmark.txt "$python" -m benchmarks gpu --quick --out "$out"

echo
printf '%s\n' "${table[@]}" | tee "$out/table.txt"
exit $failed
