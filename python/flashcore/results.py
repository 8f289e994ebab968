"""What the functions of flashcore return."""

from __future__ import annotations

from typing import NamedTuple

from flashcore.options import Array


class Result(NamedTuple):
    """What `attention` returns when a return_* option is set. What was not asked for is None."""

    out: Array
    lse: Array
    max_logits: Array


class Grads(NamedTuple):
    """What `attention_backward` returns. dbias and dsinks are None without bias and sinks."""

    dq: Array
    dk: Array
    dv: Array
    dbias: Array
    dsinks: Array


class Kernel(NamedTuple):
    """One compiled kernel. head_dim is the largest it takes; 0 means any."""

    name: str
    direction: str  # "forward" or "backward"
    backend: str  # "cpu", "sm90"
    isa: str  # instruction set: "avx512", "sm_90a"
    dtype: str
    mask: str  # what it can exclude: "any", "window", "causal", "none"
    head_dim: int
    head_dim_v: int
    block_m: int  # query rows per tile
    block_n: int  # keys per tile
    usable: bool  # a device of this machine can run it


class Device(NamedTuple):
    """A device that flashcore can see."""

    kind: str  # "cpu" or "cuda"
    id: int
    name: str
    isa: str
    multiprocessors: int  # CUDA: streaming multiprocessors; CPU: threads that flashcore would use
    memory_bytes: int  # 0 if unknown


class Plan(NamedTuple):
    """What a call would do. kernel is None if no kernel can run it: refusals says why."""

    kernel: str | None
    backend: str
    arch: str  # instruction set
    tile: tuple[int, int]  # query rows and keys per step
    splits: int  # parts that the keys are split into
    workspace_bytes: int
    deterministic: bool  # bitwise repeatable from run to run
    refusals: list[tuple[str, str]]  # (kernel, reason), in order of preference
