#!/usr/bin/env bash
# usage: sources.sh cpp|all
# Lists the project's own files: tracked, or new and not ignored.
set -euo pipefail
cd "$(dirname "$0")/.."
list() { git ls-files --cached --others --exclude-standard -- "$@" | while read -r f; do [ -f "$f" ] && echo "$f"; done; }
case "$1" in
  cpp) list '*.h' '*.hpp' '*.c' '*.cpp' '*.cuh' '*.cu' ;;
  all) list ;;
esac
