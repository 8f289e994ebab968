#!/usr/bin/env bash
# Formats C, C++, CUDA and Python in place.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
scripts/sources.sh cpp | xargs $bin/clang-format -i
$bin/ruff format .
$bin/ruff check --fix --quiet . || true
