"""The Python code of docs/numpy.md and docs/cupy.md runs, from top to bottom."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT


def run_code_of(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)
    assert len(blocks) > 3
    exec(compile("\n".join(blocks), page, "exec"), {})


def test_numpy() -> None:
    run_code_of("numpy.md")


@pytest.mark.gpu
def test_cupy() -> None:
    pytest.importorskip("cupy")
    run_code_of("cupy.md")


@pytest.mark.parametrize("page", ["torch", "jax", "cupy", "numpy", "compat_flash_attn"])
def test_every_framework_has_a_page_that_is_linked(page: str) -> None:
    assert (ROOT / "docs" / f"{page}.md").exists()
    assert f"docs/{page}.md" in (ROOT / "README.md").read_text()
