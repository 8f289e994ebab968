"""Between the arrays of cases.py and torch tensors, and attention in torch's own operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def tensor(x: Any) -> Any:
    """The array's memory as a tensor; what is no array stays."""
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def case_tensors(case: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and options of a case; what has a gradient requires it."""
    arrays = {name: tensor(x) for name, x in case.arrays().items()}
    options = {name: tensor(x) for name, x in case.options().items()}
    for x in (arrays["q"], arrays["k"], arrays["v"], options.get("bias"), options.get("sinks")):
        if x is not None:
            x.requires_grad_()
    return arrays, options


def plain(q, k, v, bias=None, causal=False):
    """(out, lse) of (B, S, H, D) tensors, differentiable any number of times."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    s = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        s = s + bias
    if causal:
        visible = torch.ones(s.shape[-2:], dtype=torch.bool).tril(s.shape[-1] - s.shape[-2])
        s = s.masked_fill(~visible, -torch.inf)
    return torch.einsum("bhst,bthd->bshd", s.softmax(-1), v), s.logsumexp(-1)


def doubles(*shapes: tuple[int, ...], grad: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_(grad)
        for shape in shapes
    ]


def largest_difference(a: Any, b: Any) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))
