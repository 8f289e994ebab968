"""The shortest proof that an installed flashcore works: forward, backward and merge on NumPy arrays
against the definition in float64. Needs NumPy and nothing else."""

import sys

import numpy as np

import flashcore as fc


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """out and P, in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    s = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1])
    if causal:
        i, j = np.ogrid[: s.shape[2], : s.shape[3]]
        s = np.where(j <= i + s.shape[3] - s.shape[2], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("bhij,bjhd->bihd", p, v), p


def main() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 37, 4, 40)).astype(np.float32)
    k, v, dout = (rng.standard_normal((2, n, 4, 40)).astype(np.float32) for n in (53, 53, 37))

    out, lse, _ = fc.attention(q, k, v, causal=True, return_lse=True)
    expected, p = reference(q, k, v, causal=True)
    np.testing.assert_allclose(out, expected, atol=2e-6)

    grads = fc.attention_backward(dout, q, k, v, out, lse, causal=True)
    dv = np.einsum("bhij,bihd->bjhd", p, dout.astype(np.float64))
    np.testing.assert_allclose(grads.dv, dv, atol=5e-6)

    halves = [
        fc.attention(q, k[:, keys], v[:, keys], return_lse=True)
        for keys in (slice(0, 20), slice(20, 53))
    ]
    merged, _ = fc.merge([h.out for h in halves], [h.lse for h in halves])
    np.testing.assert_allclose(merged, reference(q, k, v, causal=False)[0], atol=2e-6)

    version = ".".join(map(str, sys.version_info[:3]))
    print(f"python {version}, numpy {np.__version__}: flashcore {fc.__version__} ok")


if __name__ == "__main__":
    main()
