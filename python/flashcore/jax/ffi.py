"""The compiled handlers, made known to XLA."""

from __future__ import annotations

import pathlib
import re

import jax
import jaxlib

from flashcore import _core


def runtime_version() -> tuple[int, int]:
    """The version of XLA's foreign function interface in the jaxlib that is installed.

    Raises ImportError if it cannot be found out.
    """
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    try:
        text = header.read_text(encoding="utf-8")
    except OSError as error:
        raise ImportError(
            f"flashcore.jax reads the version of XLA's FFI from {header.name} of jaxlib, and "
            f"cannot: {error}"
        ) from error
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR)\s+(\d+)", text))
    if len(found) != 2:
        raise ImportError(f"flashcore.jax finds no version of XLA's FFI in {header.name} of jaxlib")
    return int(found["MAJOR"]), int(found["MINOR"])


def check(runtime: tuple[int, int]) -> None:
    """Refuses a runtime that could not run the handlers.

    XLA finds out by itself too, but late and badly: no backend of the process starts any more.
    """
    oldest, newest = _core.XLA_FFI_VERSIONS
    if runtime < oldest or runtime[0] != newest[0]:
        raise ImportError(
            f"flashcore.jax was built for XLA FFI {oldest[0]}.{oldest[1]} and later {newest[0]}.x, "
            f"but jaxlib {jaxlib.__version__} has {runtime[0]}.{runtime[1]}: install another "
            "jaxlib, or a flashcore built for this one. Nothing was registered"
        )


def register() -> None:
    """Registers the custom calls for "cpu" and "CUDA"."""
    check(runtime_version())
    for target, platform, capsule in _core.xla_handlers():
        jax.ffi.register_ffi_target(target, capsule, platform=platform)
