"""Writes README.md's table of compiled kernels from the registry, or checks that it is current.

usage: support_table.py [--check]

A backend that this build does not have (no nvcc, say) keeps the rows that are there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import flashcore as fc

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- support: written by scripts/support_table.py -->\n"
END = "<!-- support: end -->"
HEAD = "| backend | direction | dtypes | head dim | exclusion of keys | instruction sets |\n"
RULE = "|---|---|---|---|---|---|\n"
DEVICES = {"cpu": "CPU", "sm90": "NVIDIA Hopper (sm90)", "sm80": "NVIDIA Ampere, Ada (sm80)"}
MASKS = {
    "any": "causal, window, mask, lengths, block mask",
    "blocks": "block mask",
    "window": "causal, window",
    "causal": "causal, window without a left side",
    "none": "none",
}


def listed(values: list[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def rows() -> dict[str, str]:
    """One row per backend and direction, by the cells that identify it."""
    table = {}
    kernels = fc.kernels()
    for backend, direction in dict.fromkeys((k.backend, k.direction) for k in kernels):
        chosen = [k for k in kernels if (k.backend, k.direction) == (backend, direction)]
        sizes = sorted({k.head_dim for k in chosen})
        head_dim = "any" if 0 in sizes else f"multiples of 8 to {sizes[-1]}"
        masks = [k.mask for k in chosen]
        shown = [MASKS[m] for m in ("any", "window", "causal", "none", "blocks") if m in masks]
        if len(shown) > 1:
            shown = [s for s in shown if s != "none"]
        key = f"| {DEVICES[backend]} | {direction} |"
        table[key] = (
            f"{key} {listed([k.dtype for k in chosen])} | {head_dim} | {'; '.join(shown)} | "
            f"{listed([k.isa for k in chosen])} |\n"
        )
    return table


def updated(text: str) -> str:
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    table = {"|".join(line.split("|")[:3]) + "|": line for line in old.splitlines(keepends=True)}
    kept = {key: line for key, line in table.items() if line not in (HEAD, RULE) and line.strip()}
    merged = kept | rows()
    return before + BEGIN + HEAD + RULE + "".join(merged.values()) + END + after


def main() -> None:
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if "--check" not in sys.argv:
        README.write_text(new, encoding="utf-8")
    elif new != text:
        sys.exit("README.md: the table of kernels is stale; run scripts/support_table.py")


if __name__ == "__main__":
    main()
