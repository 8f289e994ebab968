"""The build backend: scikit-build-core, plus the CUDA compiler as a build requirement where the
machine has a GPU but no compiler for it.

The environment variable FLASHCORE_CUDA decides: auto (the default), on or off.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from scikit_build_core import build as _backend
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

CUDA_TOOLKIT = "cuda-toolkit[nvcc,cccl]==13.0.*"

Settings = dict[str, Any] | None


def _has_nvcc() -> bool:
    if os.environ.get("CUDACXX") or shutil.which("nvcc"):
        return True
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return any(home and Path(home, "bin", "nvcc").exists() for home in homes)


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()


def _cuda_requirements() -> list[str]:
    """The compiler from PyPI, when it is wanted and there is none."""
    mode = os.environ.get("FLASHCORE_CUDA", "auto").lower()
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"FLASHCORE_CUDA must be auto, on or off, got {mode!r}")
    published = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    wanted = mode == "on" or (mode == "auto" and _has_gpu())
    return [CUDA_TOOLKIT] if wanted and published and not _has_nvcc() else []


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*_backend.get_requires_for_build_wheel(config_settings), *_cuda_requirements()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*_backend.get_requires_for_build_editable(config_settings), *_cuda_requirements()]
