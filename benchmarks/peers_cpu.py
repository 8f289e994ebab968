"""The CPU libraries that are measured, each behind the same two verbs.

    prepare(problem, direction, inputs) -> a function of no arguments that does the timed work
    result(value)                       -> its output as float32 arrays (B, S, H, D)

A library that is missing, or that does not offer a case, raises Unavailable with the reason, which
becomes its entry in the table. Libraries are imported in the constructor, inside the process that
measures them, after its threads and cores have been set.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.problems import Problem

Arrays = dict[str, np.ndarray]
Timed = Callable[[], Any]


class Unavailable(Exception):
    """Why a peer has no number for a problem."""


def need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module} is not installed") from error


def make_inputs(p: Problem) -> Arrays:
    """q, k, v, dout: N(0, 1), float32, (B, S, H, D), the same in every process."""
    rng = np.random.default_rng(0)

    def normal(seqlen: int, heads: int) -> np.ndarray:
        return rng.standard_normal((p.batch, seqlen, heads, p.head_dim), dtype=np.float32)

    return {
        "q": normal(p.seqlen_q, p.num_heads),
        "k": normal(p.seqlen_k, p.heads_kv),
        "v": normal(p.seqlen_k, p.heads_kv),
        "dout": normal(p.seqlen_q, p.num_heads),
    }


def bhsd(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.swapaxes(1, 2))


class Peer:
    name = ""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def prepare(self, p: Problem, direction: str, x: Arrays) -> Timed:
        return self.forward(p, x) if direction == "fwd" else self.backward(p, x)

    def forward(self, p: Problem, x: Arrays) -> Timed:
        raise NotImplementedError

    def backward(self, p: Problem, x: Arrays) -> Timed:
        raise Unavailable("no backward")

    def result(self, value: Any) -> list[np.ndarray]:
        raise NotImplementedError


class Flashcore(Peer):
    """Through the public function, as a user calls it: outputs are allocated in the call."""

    name = "flashcore"
    dtypes = ("float32", "bfloat16", "float16")

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.fc = need("flashcore")
        self.fc.set_num_threads(threads)

    def arrays(self, p: Problem, x: Arrays) -> Arrays:
        dtype: Any = p.dtype
        if p.dtype == "bfloat16":
            dtype = need("ml_dtypes").bfloat16
        return {name: bhsd(a).astype(dtype, copy=False) for name, a in x.items()}

    def forward(self, p: Problem, x: Arrays) -> Timed:
        a = self.arrays(p, x)
        q, k, v = a["q"], a["k"], a["v"]
        return lambda: self.fc.attention(q, k, v, layout="bhsd", causal=p.causal)

    def backward(self, p: Problem, x: Arrays) -> Timed:
        a = self.arrays(p, x)
        q, k, v, dout = a["q"], a["k"], a["v"], a["dout"]
        out, lse, _ = self.fc.attention(q, k, v, layout="bhsd", causal=p.causal, return_lse=True)
        return lambda: self.fc.attention_backward(
            dout, q, k, v, out, lse, layout="bhsd", causal=p.causal
        )

    def result(self, value: Any) -> list[np.ndarray]:
        values = [value] if isinstance(value, np.ndarray) else value[:3]
        return [v.astype(np.float32).swapaxes(1, 2) for v in values]


class FlashcoreAvx2(Flashcore):
    """The same library told to use no more than AVX2 (FLASHCORE_CPU_ISA)."""

    name = "flashcore-avx2"

    def __init__(self, threads: int) -> None:
        os.environ["FLASHCORE_CPU_ISA"] = "avx2"
        super().__init__(threads)


class TorchFlash(Peer):
    """torch.nn.functional.scaled_dot_product_attention, pinned to its flash backend."""

    name = "torch"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.torch = need("torch")
        self.torch.set_num_threads(threads)

    def forward_of(self, p: Problem, x: Arrays, grad: bool) -> tuple[Timed, list[Any]]:
        torch = self.torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        dtype = getattr(torch, p.dtype)
        q, k, v = (
            torch.from_numpy(bhsd(x[n])).to(dtype).requires_grad_(grad) for n in ("q", "k", "v")
        )
        gqa = p.heads_kv != p.num_heads

        def run() -> Any:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=p.causal, enable_gqa=gqa
                )

        return run, [q, k, v]

    def forward(self, p: Problem, x: Arrays) -> Timed:
        return self.forward_of(p, x, grad=False)[0]

    def backward(self, p: Problem, x: Arrays) -> Timed:
        torch = self.torch
        run, inputs = self.forward_of(p, x, grad=True)
        out = run()
        dout = torch.from_numpy(bhsd(x["dout"])).to(out.dtype)
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

    def result(self, value: Any) -> list[np.ndarray]:
        values = [value] if isinstance(value, self.torch.Tensor) else value
        return [v.detach().float().numpy().swapaxes(1, 2) for v in values]


class Jax(Peer):
    """jax.nn.dot_product_attention under jit. Its gradient is not offered without the forward."""

    name = "jax"

    def __init__(self, threads: int) -> None:
        if threads == 1:
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
        super().__init__(threads)
        self.jax = need("jax")

    def forward(self, p: Problem, x: Arrays) -> Timed:
        if p.dtype == "float16":
            raise Unavailable("float16 is not supported on its CPU backend")
        jax = self.jax
        dtype = getattr(jax.numpy, p.dtype)
        q, k, v = (jax.numpy.asarray(x[n], dtype) for n in ("q", "k", "v"))

        attend = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=p.causal))
        return lambda: attend(q, k, v).block_until_ready()

    def backward(self, p: Problem, x: Arrays) -> Timed:
        raise Unavailable("no backward without the forward")

    def result(self, value: Any) -> list[np.ndarray]:
        return [np.asarray(value, np.float32)]


class OnnxRuntime(Peer):
    """MultiHeadAttention; for grouped heads or 16 bits GroupQueryAttention: causal only."""

    name = "onnxruntime"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.ort = need("onnxruntime")
        self.onnx = need("onnx")

    def forward(self, p: Problem, x: Arrays) -> Timed:
        if p.dtype == "bfloat16":
            raise Unavailable("no bfloat16 on its CPU provider")
        grouped = p.heads_kv != p.num_heads or p.dtype == "float16"
        if grouped and not p.causal:
            raise Unavailable("GroupQueryAttention is causal only")
        session = self.session(p, grouped)
        feeds: dict[str, Any] = {
            n: x[n].astype(p.dtype).reshape(p.batch, x[n].shape[1], -1) for n in ("q", "k", "v")
        }
        if grouped:
            feeds["seqlens"] = np.full(p.batch, p.seqlen_k - 1, np.int32)
            feeds["total"] = np.array([p.seqlen_k], np.int32)
        self.shape = (p.batch, p.seqlen_q, p.num_heads, p.head_dim)
        return lambda: session.run(["out"], feeds)[0]

    def session(self, p: Problem, grouped: bool) -> Any:
        helper, types = self.onnx.helper, self.onnx.TensorProto
        element = types.FLOAT16 if p.dtype == "float16" else types.FLOAT

        def info(name: str, heads: int, seqlen: int) -> Any:
            shape = [p.batch, seqlen, heads * p.head_dim]
            return helper.make_tensor_value_info(name, element, shape)

        inputs = [
            info("q", p.num_heads, p.seqlen_q),
            info("k", p.heads_kv, p.seqlen_k),
            info("v", p.heads_kv, p.seqlen_k),
        ]
        outputs = [info("out", p.num_heads, p.seqlen_q)]
        if grouped:
            inputs += [
                helper.make_tensor_value_info("seqlens", types.INT32, [p.batch]),
                helper.make_tensor_value_info("total", types.INT32, [1]),
            ]
            node = helper.make_node(
                "GroupQueryAttention",
                ["q", "k", "v", "", "", "seqlens", "total"],
                ["out", "present_k", "present_v"],
                domain="com.microsoft",
                num_heads=p.num_heads,
                kv_num_heads=p.heads_kv,
            )
            cache = [p.batch, p.heads_kv, p.seqlen_k, p.head_dim]
            for name in ("present_k", "present_v"):
                outputs.append(helper.make_tensor_value_info(name, element, cache))
        else:
            node = helper.make_node(
                "MultiHeadAttention",
                ["q", "k", "v"],
                ["out"],
                domain="com.microsoft",
                num_heads=p.num_heads,
                unidirectional=int(p.causal),
            )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph([node], "attention", inputs, outputs)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        return self.ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def result(self, value: Any) -> list[np.ndarray]:
        return [np.asarray(value, np.float32).reshape(self.shape)]


class OpenVino(Peer):
    """The ScaledDotProductAttention operation. It has no grouped heads."""

    name = "openvino"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.ov = need("openvino")

    def forward(self, p: Problem, x: Arrays) -> Timed:
        if p.heads_kv != p.num_heads:
            raise Unavailable("no grouped heads")
        if p.dtype == "float16":
            raise Unavailable("no float16 execution on this CPU")
        ov = self.ov
        ops = need("openvino.opset13")
        # Inputs are float32 at the border; execution is in the dtype that is asked for.
        parameters = [
            ops.parameter([p.batch, p.num_heads, x[n].shape[1], p.head_dim], ov.Type.f32, name=n)
            for n in ("q", "k", "v")
        ]
        out = ops.scaled_dot_product_attention(*parameters, causal=p.causal)
        config = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "bf16" if p.dtype == "bfloat16" else "f32",
        }
        compiled = ov.Core().compile_model(ov.Model([out], parameters), "CPU", config)
        request = compiled.create_infer_request()
        for i, n in enumerate(("q", "k", "v")):
            request.set_input_tensor(i, ov.Tensor(bhsd(x[n])))

        def run() -> Any:
            request.infer()
            return request.get_output_tensor(0).data

        return run

    def result(self, value: Any) -> list[np.ndarray]:
        return [np.array(value, np.float32).swapaxes(1, 2)]


class NumPy(Peer):
    """Standard attention: the whole N x N matrix, one product after the other."""

    name = "numpy"

    def matrices(self, p: Problem, x: Arrays) -> tuple[np.ndarray, ...]:
        if p.dtype != "float32":
            raise Unavailable("no 16-bit matrix product")
        q, k, v, dout = (bhsd(x[n]) for n in ("q", "k", "v", "dout"))
        group = p.num_heads // p.heads_kv
        return q, np.repeat(k, group, axis=1), np.repeat(v, group, axis=1), dout

    @staticmethod
    def probabilities(p: Problem, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        s: np.ndarray = q @ k.swapaxes(2, 3)
        s *= np.float32(1 / np.sqrt(p.head_dim))
        if p.causal:
            i, j = np.ogrid[: p.seqlen_q, : p.seqlen_k]
            s[:, :, j > i + p.seqlen_k - p.seqlen_q] = -np.inf
        s -= s.max(-1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(-1, keepdims=True)
        return s

    def forward(self, p: Problem, x: Arrays) -> Timed:
        q, k, v, _ = self.matrices(p, x)
        return lambda: self.probabilities(p, q, k) @ v

    def backward(self, p: Problem, x: Arrays) -> Timed:
        q, k, v, dout = self.matrices(p, x)
        if p.heads_kv != p.num_heads:
            raise Unavailable("no grouped heads")
        saved = self.probabilities(p, q, k)  # what autograd would have kept from the forward
        scale = np.float32(1 / np.sqrt(p.head_dim))

        def run() -> Any:
            dv = saved.swapaxes(2, 3) @ dout
            ds = dout @ v.swapaxes(2, 3)
            ds -= (ds * saved).sum(-1, keepdims=True)
            ds *= saved
            ds *= scale
            return ds @ k, ds.swapaxes(2, 3) @ q, dv

        return run

    def result(self, value: Any) -> list[np.ndarray]:
        values = [value] if isinstance(value, np.ndarray) else value
        return [v.swapaxes(1, 2) for v in values]


PEERS: dict[str, type[Peer]] = {
    cls.name: cls
    for cls in (Flashcore, FlashcoreAvx2, TorchFlash, OnnxRuntime, OpenVino, Jax, NumPy)
}
