#!/usr/bin/env bash
# usage: check_abi.sh WHEEL
# Installs one wheel on every other supported Python of this machine and runs scripts/smoke.py there.
# A version that is not here is named.
set -euo pipefail
cd "$(dirname "$0")/.."
wheel=$(realpath "$1")

for version in 3.10 3.11 3.12 3.13 3.14; do
  python=
  for candidate in ~/.pyenv/versions/"$version".*/bin/python "$(command -v "python$version" || true)"; do
    # A pyenv shim exists even for a version that is not active: ask it to run.
    if [ -x "$candidate" ] && "$candidate" -c 'import venv' 2>/dev/null; then python=$candidate; break; fi
  done
  if [ -z "$python" ]; then
    echo "python $version: not on this machine, not checked"
    continue
  fi
  env=build/abi/$version
  [ -x "$env/bin/python" ] || "$python" -m venv "$env"
  "$env/bin/python" -m pip install --quiet numpy nanobind-backend==1.0.0
  "$env/bin/python" -m pip install --quiet --force-reinstall --no-deps "$wheel"
  "$env/bin/python" scripts/smoke.py
done
