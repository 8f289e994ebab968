"""Arrays divided over four devices: the checks of jax_on_four_devices.py, each a test here."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from os import environ

import pytest

pytest.importorskip("jax", minversion="0.10")

FILE = pathlib.Path(__file__).with_name("jax_on_four_devices.py")


def names():
    lines = FILE.read_text().splitlines()
    after = (line for mark, line in zip(lines, lines[1:]) if mark == "@check")
    return [line.removeprefix("def ").partition("(")[0] for line in after]


@pytest.fixture(scope="module")
def found():
    """One process for all: most of its time is JAX's start and compilation."""
    done = subprocess.run(
        [sys.executable, str(FILE)],
        env={
            **environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", names())
def test_four_devices(found, name):
    assert found[name] == "", found[name]


def test_nothing_is_left_out(found):
    assert list(found) == names() and len(found) > 20
