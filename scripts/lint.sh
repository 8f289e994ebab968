#!/usr/bin/env bash
# Every check on the text of the project. Needs the venv and the installed wheel (make lint). Weak
# symbols in the CPU kernels are checked by the build itself (cpp/cpu/check_symbols.cmake).
set -uo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
failed=0
step() {
  local name=$1
  shift
  if "$@"; then echo "lint: $name ok"; else echo "lint: $name FAILED"; failed=1; fi
}

no_machine_paths() {
  # The project speaks of itself alone: no directory of one machine, no address of a package index.
  ! scripts/sources.sh all | grep -vE '\.(png|json)$' | xargs grep -nIE \
    '/(work|farm|root|home/[a-z]+|opt|tmp)/|://[^ ]*/simple'
}
no_binaries() {
  ! scripts/sources.sh all | grep -E '\.(so|so\.[0-9]+|o|a|whl|cubin|fatbin|pyc)$'
}
clang_format() { scripts/sources.sh cpp | xargs $bin/clang-format --dry-run -Werror; }

step clang-format clang_format
step "ruff check" $bin/ruff check --quiet .
step "ruff format" $bin/ruff format --check --quiet .
step mypy $bin/mypy
step "support table" $bin/python scripts/support_table.py --check
step "no machine paths" no_machine_paths
step "no binaries" no_binaries
exit $failed
