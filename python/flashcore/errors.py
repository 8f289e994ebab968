"""What flashcore raises. Every message names the argument, what it got and what is allowed."""

from __future__ import annotations

__all__ = ["ArgumentError", "ArgumentTypeError", "DeviceError", "Error", "UnsupportedError"]


class Error(Exception):
    """Base of every error that flashcore raises itself."""


class ArgumentError(Error, ValueError):
    """Arguments that contradict each other or the contract: a shape, dtype, device or value."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is not the kind of object it must be, e.g. a list where an array is needed."""


class UnsupportedError(Error, NotImplementedError):
    """A valid request that no compiled kernel can honour. `flashcore.explain` lists the reasons."""


class DeviceError(Error, RuntimeError):
    """The device or its driver failed."""
