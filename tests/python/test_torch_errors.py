"""What flashcore.torch refuses: each argument with one clear error."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers import run_python  # noqa: E402

import flashcore as fc  # noqa: E402
import flashcore.torch as ft  # noqa: E402

X = torch.randn(1, 4, 2, 8)


def quantized():
    return torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)


TENSORS = {
    "numpy": (lambda: X.numpy(), fc.ArgumentTypeError, r"q must be a torch tensor, got numpy\.nd"),
    "list": (lambda: [1.0], fc.ArgumentTypeError, r"q must be a torch tensor, got builtins\.list"),
    "none": (lambda: None, fc.ArgumentTypeError, "q must be a torch tensor, got .*NoneType"),
    "complex": (lambda: torch.complex(X, X), fc.UnsupportedError, "complex"),
    "conjugate": (lambda: torch.complex(X, X).conj(), fc.Error, "complex"),
    "negative": (lambda: torch._neg_view(X), fc.UnsupportedError, r"negative bit.*resolve_neg"),
    "sparse": (lambda: X.to_sparse(), fc.UnsupportedError, r"sparse_coo.*to_dense"),
    "nested": (
        lambda: torch.nested.nested_tensor([X[0], X[0, :2]]),
        fc.UnsupportedError,
        "nested.*cu_seqlens",
    ),
    "quantized": (quantized, fc.UnsupportedError, "quantized.*dequantize"),
    "meta": (lambda: X.to("meta"), fc.UnsupportedError, "meta device"),
    "integers": (lambda: X.int(), fc.UnsupportedError, "q has dtype int32"),
    "strided columns": (lambda: X.mT.contiguous().mT, fc.ArgumentError, "q"),
    "3-D": (lambda: X[0], fc.ArgumentError, "q"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name, grad):
    make, error, message = TENSORS[name]
    k = X.clone().requires_grad_(grad)
    with pytest.raises(error, match=message):
        ft.attention(make(), k, k)


def test_dtypes_and_devices_must_agree():
    with pytest.raises(fc.ArgumentError, match="k"):
        ft.attention(X.requires_grad_(), X.double(), X)
    with pytest.raises(fc.Error, match="k .*meta"):
        ft.attention(X, X.to("meta"), X)


def test_a_functional_tensor_has_no_data_for_the_neutral_function():
    wrapped = torch._to_functional_tensor(X.detach())
    with pytest.raises(fc.Error, match="q"):
        fc.attention(wrapped, X.detach(), X.detach())


@pytest.mark.parametrize("name", ["out", "stream"])
def test_what_the_adapter_does_not_have(name):
    for x in (X, X.clone().requires_grad_()):
        with pytest.raises(fc.UnsupportedError, match=f"{name}= is not an option.*no_grad"):
            ft.attention(x, X, X, **{name: X})
        ft.attention(x, X, X, **{name: None})


def test_unknown_options_and_values():
    for x in (X.detach(), X.clone().requires_grad_()):
        with pytest.raises(TypeError, match="colour"):
            ft.attention(x, X, X, colour=1)
        with pytest.raises(fc.ArgumentError, match="out_dtype must be None"):
            ft.attention(x, X, X, out_dtype="int9")
        with pytest.raises(fc.ArgumentError, match="layout must be"):
            ft.attention(x, X, X, layout="sbhd")
    with pytest.raises(TypeError, match="colour"):
        torch.compile(lambda x: ft.attention(x, x, x, colour=1), backend="eager")(X.detach())
    torch._dynamo.reset()


def test_explain_takes_what_attention_takes():
    x = X.clone().requires_grad_()
    plan = ft.explain(x, x, x, causal=True)
    assert plan == fc.explain(X.detach(), X.detach(), X.detach(), causal=True)
    assert ft.explain(x, x, x, direction="backward").kernel.startswith("cpu")


def test_flashcore_does_not_import_torch():
    code = "import sys, flashcore; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"
    code = "import sys, flashcore.torch; print('transformers' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_importing_the_adapter_changes_nothing_in_torch():
    code = """
import torch
before = torch.nn.functional.scaled_dot_product_attention
import flashcore.torch
assert torch.nn.functional.scaled_dot_product_attention is before
print("same")
"""
    assert run_python(code).strip() == "same"


def test_numbers_of_numpy_are_numbers():
    x = X.clone().requires_grad_()
    got = ft.attention(x, X, X, scale=float(np.float32(0.5)), dropout_p=0.0, rng=None)
    assert torch.equal(got, ft.attention(x, X, X, scale=0.5))


def test_a_block_mask_for_other_lengths():
    mask = fc.BlockMask.from_dense(np.ones((3, 4), bool), block=(4, 4)).map(torch.from_numpy)
    with pytest.raises(fc.ArgumentError, match="block_mask is for seqlen_q 3"):
        ft.attention(X, X, X, block_mask=mask)
