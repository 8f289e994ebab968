"""The Hopper backward kernels, with torch tensors, against the float64 reference.

Each test has a time limit of its own (conftest.py), so that a kernel that hangs ends the run.
"""

import cases
import numpy as np
import pytest
from cases import Case
from gpu import on_gpu
from test_sm90_forward import PACKED, PLAIN, VARIANTS, random_case

import flashcore as fc
from flashcore import reference
from flashcore.testing import assert_grads_close_to_reference, assert_within_rule, to_numpy

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

DIMS = [64, 128, 256]
KERNELS = [32, 64, 96, 128, 192, 256]  # one per kernel
NAN, INF = float("nan"), float("inf")
BATCHES = [1, 70]  # few tiles, which head dims 64 and 128 have kernels for, and many


class Call:
    """A case's arrays on the GPU, with out and lse from the float64 reference."""

    def __init__(self, case: Case, **options):
        self.arrays = case.arrays()
        self.options = case.options() | options
        self.dtype = self.arrays["q"].dtype
        dense = {name: x for name, x in self.options.items() if not name.startswith("max_seqlen")}
        if "block_mask" in dense:
            dense["block_mask"] = dense["block_mask"].to_dense()
        exact = reference.attention(
            *(self.arrays[name] for name in "qkv"), precision=np.float64, **dense
        )
        self.tensors = {name: on_gpu(self.arrays[name]) for name in ("q", "k", "v", "dout")}
        self.tensors["out"] = on_gpu(exact.out.astype(self.dtype))
        self.tensors["lse"] = on_gpu(exact.lse.astype(np.float32))

    def poison(self, which: str, rows, value: float) -> None:
        """Rows of queries ("q") or of keys ("k"), in every input that has them."""
        for name in {"q": ("q", "dout", "out"), "k": ("k", "v")}[which]:
            self.tensors[name][rows] = value

    def start(self, **more) -> fc.Grads:
        t = self.tensors
        options = {name: on_gpu(x) for name, x in self.options.items()}
        return fc.attention_backward(
            t["dout"], t["q"], t["k"], t["v"], t["out"], t["lse"], **options, **more
        )

    def run(self, **more) -> fc.Grads:
        grads = self.start(**more)
        torch.cuda.synchronize()
        return grads

    def check_few(self, batch: int) -> None:
        """Whether the kernel is the one for few tiles, where there is one."""
        t = self.tensors
        plan = fc.explain(t["q"], t["k"], t["v"], direction="backward", **self.options)
        assert ("-few-" in plan.kernel) == (batch == 1 and t["q"].shape[-1] in (40, 64, 128))

    def check(self, grads: fc.Grads, **more) -> None:
        a = self.arrays
        assert_grads_close_to_reference(
            grads, a["dout"], a["q"], a["k"], a["v"], **self.options, **more
        )


def check(case: Case) -> Call:
    """Against the definition in float64, dlse too; and 30 times in a fixed order."""
    call = Call(case)
    dlse = call.arrays["dlse"].astype(np.float32)
    grads = call.run(dlse=on_gpu(dlse))
    assert all(g is None or g.is_cuda for g in grads)
    call.check(grads, dlse=dlse)
    first = call.run(deterministic=True, dlse=on_gpu(dlse))
    call.check(first, dlse=dlse)
    for _ in range(30):
        assert_same_bits(first, call.run(deterministic=True, dlse=on_gpu(dlse)))
    return call


def assert_same_bits(a: fc.Grads, b: fc.Grads) -> None:
    for x, y in zip(a, b):
        assert x is y is None or torch.equal(x, y)


def assert_same_bits_on_two_streams(call: Call, want: fc.Grads, times: int) -> None:
    """In a fixed order, `times` calls on each, which share the GPU."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    grads = []
    for _ in range(times):
        for stream in streams:
            with torch.cuda.stream(stream):
                grads.append(call.start(deterministic=True))
    torch.cuda.synchronize()
    for got in grads:
        assert_same_bits(want, got)


# ---- every option -------------------------------------------------------------------------------

EVERY_OPTION = [
    pytest.param(case.but(d=d, dv=dv), id=f"{theme}-{case.but(d=d, dv=dv)}")
    for theme, list_of_cases in VARIANTS.items()
    for n, case in enumerate(list_of_cases)
    for d, dv in ((64, None), (128, None), ((32, 96, 192, 256)[n % 4], None), (192, 128))
]


@pytest.mark.parametrize("case", EVERY_OPTION)
def test_option(case):
    check(case)


@pytest.mark.parametrize("n", range(200))
def test_random_combination(n):
    check(random_case(n))


@pytest.mark.parametrize(
    "d,dv", [(192, 128), (64, 128), (128, 64), (64, 256), (256, 64), (72, 16), (8, 248), (96, 40)]
)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 4.0}], ids=str)
def test_values_of_another_head_dim(d, dv, options):
    check(PLAIN.but(d=d, dv=dv, **options))


@pytest.mark.parametrize("case", cases.SM90, ids=str)
def test_matches_reference(case):
    call = Call(case)
    grads = call.run(dlse=on_gpu(call.arrays["dlse"].astype(np.float32)))
    assert all(g.is_cuda for g in grads[:3])
    call.check(grads, dlse=call.arrays["dlse"].astype(np.float32))


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("window", [(None, 37), (100, 0), (5, 9), (0, 0), (200, None)], ids=str)
def test_windows(d, window):
    call = Call(Case("window", dtype="bf16", b=1, q=500, k=450, d=d), window_size=window)
    call.check(call.run())


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("q_offset", [-50, 0, 40, 1000])
def test_offset_of_the_diagonal(d, q_offset):
    call = Call(Case("q_offset", dtype="bf16", b=1, q=300, k=290, d=d, causal=True))
    call.options["q_offset"] = q_offset
    call.tensors.update(Call(Case("", dtype="bf16", b=1, q=300, k=290, d=d, causal=True)).tensors)
    exact = reference.attention(
        *(call.arrays[name] for name in "qkv"), precision=np.float64, **call.options
    )
    call.tensors["out"] = on_gpu(exact.out.astype(call.dtype))
    call.tensors["lse"] = on_gpu(exact.lse.astype(np.float32))
    call.check(call.run())


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("options", [{}, {"alibi": "h"}, {"dropout": 0.3}], ids=str)
def test_many_tiles(d, options):
    """More key tiles than the GPU has multiprocessors, and many heads that share a key head."""
    call = Call(
        Case("many", dtype="bf16", b=3, q=260, k=1500, h=(12, 6), d=d, causal=True, **options)
    )
    call.check(call.run())


@pytest.mark.parametrize("d", KERNELS)
def test_many_packed_tiles(d):
    lengths = (900, 3, 0, 700, 130, 1, 64, 800)
    case = Case("many", dtype="bf16", packed_q=lengths, packed_k=lengths, h=(12, 6), d=d)
    check(case.but(causal=True))


@pytest.mark.parametrize("d", KERNELS)
def test_dropout_seed_on_the_device(d):
    call = Call(PLAIN.but(d=d, dropout=0.3))
    want = call.run(deterministic=True)
    call.options["rng"] = torch.tensor(call.options["rng"], dtype=torch.int64, device="cuda")
    assert_same_bits(call.run(deterministic=True), want)


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("h", [(2, 2), (4, 1)], ids=str)
def test_dropout_drops_what_the_mask_says(d, h):
    """With one-hot dO, dV is P transposed, d queries at a time: its zeros are what is dropped."""
    rows, keys, rng = 150, 333, (2**62 + 5, 3)
    kept = fc.dropout_mask((1, h[0], rows, keys), 0.4, rng)[0]
    for first in range(0, rows, d):
        for head in range(h[0]):  # alone: heads that share keys add to one dV
            call = Call(
                Case("one-hot dO", dtype="bf16", b=1, q=rows, k=keys, h=h, d=d),
                dropout_p=0.4,
                rng=rng,
            )
            eye = np.eye(rows, d, -first, dtype=np.float32)
            call.tensors["dout"].zero_()
            call.tensors["dout"][0, :, head] = torch.from_numpy(eye).cuda()
            dv = call.run().dv[0, :, head * h[1] // h[0]].float().cpu().numpy()
            count = min(d, rows - first)
            np.testing.assert_array_equal(dv[:, :count].T != 0, kept[head, first : first + count])


@pytest.mark.parametrize("d", DIMS)
def test_dk_and_dv_are_the_same_bits_every_time(d):
    call = Call(Case("twice", dtype="bf16", q=700, k=900, h=(4, 2), d=d, causal=True))
    first = call.run()
    for _ in range(20):
        again = call.run()
        assert torch.equal(first.dk, again.dk) and torch.equal(first.dv, again.dv)


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"softcap": 9.0, "dropout": 0.1}], ids=str
)
@pytest.mark.parametrize("h", [(4, 4), (6, 2)], ids=str)
def test_deterministic(d, options, h):
    call = Call(Case("repeat", dtype="bf16", q=700, k=900, h=h, d=d, **options))
    first = call.run(deterministic=True)
    call.check(first)
    for _ in range(30):
        again = call.run(deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3]))


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_deterministic_on_two_streams(d, options):
    """Tiles that wait for one another, more of them than multiprocessors, which two calls share."""
    call = Call(Case("streams", dtype="bf16", b=3, q=900, k=1500, h=(12, 6), d=d, **options))
    want = call.run(deterministic=True)
    call.check(want)
    assert_same_bits_on_two_streams(call, want, 20)


@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("options", [{}, {"h": (16, 8)}], ids=str)
def test_deterministic_in_laps(d, options):
    """Tiles that go round the query blocks: all of a launch must run at once, beside another one
    and in a graph."""
    call = Call(Case("laps", dtype="bf16", q=1990, k=2000, h=(16, 16), d=d).but(**options))
    t = call.tensors
    plan = fc.explain(t["q"], t["k"], t["v"], direction="backward", deterministic=True)
    assert "-laps-" in plan.kernel and plan.deterministic
    want = call.run(deterministic=True)
    call.check(want)
    for _ in range(15):
        assert_same_bits_on_two_streams(call, want, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call.start(deterministic=True)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(want, got)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"h": (2, 1)}, {"causal": True, "d": 128}], ids=str
)
def test_short_heads_that_come_out_even_are_taken_whole(options):
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    case = Case("short heads", dtype="bf16", b=processors, h=(1, 1), q=130, k=300, d=64)
    call = Call(case.but(**options))
    t = call.tensors
    plan = fc.explain(t["q"], t["k"], t["v"], direction="backward", **call.options)
    assert plan.deterministic  # without being asked for
    grads = call.run()
    call.check(grads)
    assert_same_bits(grads, call.run(deterministic=True))


@pytest.mark.parametrize("keys", [2000, 2048])
@pytest.mark.parametrize("d", KERNELS)
def test_infinite_keys_in_laps(d, keys):
    """Key 5 has weight 0 everywhere. Rows past the end of the last query block must not see it:
    they are zeros there, and 0 times infinity is not."""
    case = Case("a key of -inf", dtype="bf16", b=1, q=1990, k=keys, h=(16, 16), d=d)
    q, k, v, dout = (on_gpu(case.arrays()[name]) for name in ("q", "k", "v", "dout"))
    q[..., 0], k[..., 0], k[:, 5, :, 0] = 1, 0, -INF
    out, lse, _ = fc.attention(q, k, v, return_lse=True)
    want = fc.attention_backward(dout, q, k, v, out, lse)
    assert (want.dk[:, 5] == 0).all() and (want.dv[:, 5] == 0).all()
    assert "-laps-" in fc.explain(q, k, v, direction="backward", deterministic=True).kernel
    got = fc.attention_backward(dout, q, k, v, out, lse, deterministic=True)
    for name in ("dk", "dv"):
        x, y = getattr(got, name), getattr(want, name)
        assert (x[:, 5] == 0).all()
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("b,q,k", [(0, 300, 300), (2, 0, 300), (2, 300, 0)])
@pytest.mark.parametrize("d", KERNELS)
def test_deterministic_without_batch_rows_or_keys(d, b, q, k):
    x, y = (torch.ones(b, n, 4, d, device="cuda", dtype=torch.bfloat16) for n in (q, k))
    lse = torch.zeros(b, 4, q, device="cuda")
    into = {"dq": torch.ones_like(x), "dk": torch.ones_like(y), "dv": torch.ones_like(y)}
    fc.attention_backward(x, x, y, y, x, lse, **into, deterministic=True)
    assert all((grad == 0).all() for grad in into.values())


def test_deterministic_writes_dq_where_no_key_tile_comes():
    call = Call(Case("above", dtype="bf16", q=900, k=130, d=128, causal=True))
    dq = torch.full_like(call.tensors["q"], 7.0)
    grads = call.run(deterministic=True, dq=dq)
    assert (dq[:, : 900 - 130] == 0).all()
    call.check(grads)
    before = dq.clone()
    call.run(deterministic=True, accumulate=True, dq=dq)
    assert torch.equal(dq[:, : 900 - 130], before[:, : 900 - 130])


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulate_adds(d, dtype, b):
    call = Call(Case("accumulate", dtype="bf16", b=b, q=131, k=200, h=(2, 1), d=d, causal=True))
    call.check_few(b)
    plain = call.run()
    into = {f"d{name}": torch.full_like(call.tensors[name], 3.0, dtype=dtype) for name in "qkv"}
    grads = call.run(accumulate=True, **into)
    for name, plain_grad in zip(("dq", "dk", "dv"), plain):
        assert getattr(grads, name) is into[name]
        error = (into[name].float() - 3 - plain_grad.float()).abs().max().item()
        assert error < 0.05 if dtype == torch.bfloat16 else error < 0.02


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("d", DIMS)
def test_float32_gradients(d, b):
    call = Call(Case("float32", dtype="bf16", b=b, q=131, k=200, h=(2, 1), d=d, causal=True))
    call.check_few(b)
    into = {f"d{name}": torch.empty_like(call.tensors[name], dtype=torch.float32) for name in "qkv"}
    call.check(call.run(**into))


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("d", [*DIMS, 40, 136])
def test_nothing_is_written_outside_the_gradients(d, b):
    """Canaries before, after and between the rows."""
    call = Call(Case("canaries", dtype="bf16", b=b, q=131, k=200, h=(2, 1), d=d, causal=True))
    call.check_few(b)
    plain = call.run()
    into, rooms = {}, {}
    for name in "qkv":
        b, s, h, _ = call.tensors[name].shape
        room = torch.full((b, s + 2, h + 2, d + 8), 7.0, device="cuda", dtype=torch.bfloat16)
        rooms[name] = room
        into["d" + name] = room[:, 1:-1, 1:-1, :d]
    grads = call.run(**into)
    assert torch.equal(grads.dk, plain.dk) and torch.equal(grads.dv, plain.dv)
    call.check(grads)
    for name in "qkv":
        into["d" + name].fill_(7.0)
        assert (rooms[name] == 7).all()


@pytest.mark.parametrize("d", [*DIMS, 32, 40, 96])
@pytest.mark.parametrize(
    "options",
    [{"lengths_q": (60, 131)}, {"lengths_k": (7, 200)}, {"packed_q": (60, 71, 131)}],
    ids=str,
)
def test_nothing_is_written_into_a_neighbouring_sequence(d, options):
    """Canaries around the gradients; inside, what is padding is zero and the rest as ever."""
    if "packed_q" in options:
        options = options | {"packed_k": (80, 20, 300)}
    call = Call(Case("canaries", dtype="bf16", q=131, k=200, h=(2, 1), d=d, causal=True, **options))
    for fixed in (False, True):
        into, rooms = {}, {}
        for name in "qkv":
            *batch, s, h, _ = call.tensors[name].shape
            room = torch.full((*batch, s + 2, h + 2, d + 8), 7.0, device="cuda").bfloat16()
            rooms[name], into["d" + name] = room, room[..., 1:-1, 1:-1, :d]
        call.check(call.run(**into, deterministic=fixed))
        for name, count in (("q", "lengths_q"), ("k", "lengths_k"), ("v", "lengths_k")):
            for b, n in enumerate(options.get(count, ())):
                assert (into["d" + name][b, n:] == 0).all()
            into["d" + name].fill_(7.0)
            assert (rooms[name] == 7).all()


# ---- few tiles: who adds to dQ stores it, up to 32 steps -----------------------------------------

FEW = Case("few tiles", dtype="bf16", b=1, q=260, k=400, h=(2, 2))


@pytest.mark.parametrize("d", [40, 64, 128])
@pytest.mark.parametrize(
    "options",
    [
        {"q": 1},
        {"k": 129},
        {"q": 2048, "h": (1, 1)},
        {"q": 2049, "h": (1, 1)},
        {"q": 500, "h": (8, 1), "causal": True},
        {"q": 500, "h": (5, 1)},
        {"q": 900, "k": 140, "causal": True},  # rows that see no key
        {"q": 140, "k": 900, "causal": True, "align": "top_left"},  # tiles that no row sees
        {"window": (30, 5)},
        {"q": 900, "k": 200, "h": (1, 1), "window": (0, 0), "align": "top_left"},
        {"b": 3, "q": 77, "h": (4, 2), "dtype": "f16"},
    ],
    ids=str,
)
def test_few_tiles(d, options):
    call = Call(FEW.but(d=d, **options))
    call.check_few(1)
    for _ in range(3):
        dq = torch.full_like(call.tensors["q"], NAN)
        call.check(call.run(dq=dq))


def test_the_workspace_says_who_stores_dq_of_few_tiles():
    """Counters for a key head, where tiles have up to 32 steps of 64 rows: 16 bytes."""

    def bytes_of(steps: int) -> int:
        x = torch.empty(1, 64 * steps, 1, 128, device="cuda", dtype=torch.bfloat16)
        plan = fc.explain(x, x, x, direction="backward")
        assert "-few-" in plan.kernel
        return plan.workspace_bytes

    a_step = bytes_of(32) - bytes_of(31)
    assert bytes_of(34) - bytes_of(33) == a_step
    assert bytes_of(33) - bytes_of(32) == a_step - 16


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_few_tiles_on_many_streams(d, causal):
    """Calls that share the multiprocessors: not all blocks of one run at the same time."""
    call = Call(FEW.but(q=500, k=1000, h=(6, 6), d=d, causal=causal))
    call.check_few(1)
    t = call.tensors
    inputs = [t[name] for name in ("dout", "q", "k", "v", "out", "lse")]
    want = call.run()
    call.check(want)
    streams = [torch.cuda.Stream() for _ in range(8)]
    calls = []
    for i in range(40 * len(streams)):  # what is stored twice counts twice where it is added
        add = i // len(streams) % 2 == 0
        fill, dtype = (0.0, torch.float32) if add else (NAN, torch.bfloat16)
        into = {f"d{x}": torch.full_like(t[x], fill, dtype=dtype) for x in "qkv"}
        calls.append(({"accumulate": add}, into))
    torch.cuda.synchronize()
    for i, (options, into) in enumerate(calls):
        with torch.cuda.stream(streams[i % len(streams)]):
            fc.attention_backward(*inputs, **call.options, **options, **into)
    torch.cuda.synchronize()
    for _, into in calls:
        for name, x in into.items():
            torch.testing.assert_close(x.bfloat16(), getattr(want, name), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("q", [0, 1, 700])
@pytest.mark.parametrize("causal", [False, True])
def test_dsinks(q, causal):
    """The same bits every time, whatever the order of dQ; added to what is there if asked."""
    call = Call(Case("sinks", dtype="bf16", q=q, k=500, h=(6, 2), d=64, causal=causal, sinks=True))
    dlse = on_gpu(call.arrays["dlse"].astype(np.float32))
    first = call.run(dlse=dlse)
    call.check(first, dlse=call.arrays["dlse"].astype(np.float32))
    for fixed in (False, True):
        assert torch.equal(call.run(dlse=dlse, deterministic=fixed).dsinks, first.dsinks)


def test_dsinks_of_an_empty_batch_are_zero():
    call = Call(Case("empty", dtype="bf16", b=0, q=300, k=300, d=128, causal=True, sinks=True))
    assert (call.run().dsinks == 0).all()


def test_a_row_that_only_a_sink_sees_does_not_look_at_dout():
    case = Case("above", dtype="bf16", q=400, k=130, d=64, causal=True, sinks=True)
    call = Call(case)
    clean = call.run(deterministic=True)
    call.tensors["dout"][:, :128] = NAN
    assert_same_bits(call.run(deterministic=True), clean)


# ---- 80 queries a step --------------------------------------------------------------------------

MANY = Case("many tiles", dtype="bf16", b=3, q=150, k=300, h=(50, 50), d=128)


def assert_80_queries(call: Call) -> None:
    t, options = call.tensors, {name: on_gpu(x) for name, x in call.options.items()}
    assert "-80x128" in fc.explain(t["q"], t["k"], t["v"], direction="backward", **options).kernel


@pytest.mark.parametrize(
    "case",
    [
        MANY,
        MANY.but(dtype="f16", q=479, h=(100, 50)),
        MANY.but(d=104, lengths_q=(60, 150, 0), lengths_k=(1, 300, 200)),
        MANY.but(d=120, dv=120, sinks=True, strides="sliced"),
        MANY.but(packed_q=(80, 0, 81, 1, 479), packed_k=(300, 7, 129, 64, 200)),
    ],
    ids=str,
)
def test_80_queries_a_step(case):
    assert_80_queries(check(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_80_queries_add_to_gradients_and_write_nothing_around_them(dtype):
    call = Call(MANY.but(d=104))
    assert_80_queries(call)
    plain, into, rooms = call.run(), {}, {}
    for name in "qkv":
        b, s, h, d = call.tensors[name].shape
        rooms[name] = torch.full((b, s + 2, h + 2, d + 8), 7.0, device="cuda", dtype=dtype)
        into["d" + name] = rooms[name][:, 1:-1, 1:-1, :d]
    call.run(accumulate=True, **into)
    for name, want in zip("qkv", plain):
        error = (into["d" + name].float() - 7 - want.float()).abs().max().item()
        assert error < (0.1 if dtype == torch.bfloat16 else 0.02)
        into["d" + name].fill_(7.0)
        assert (rooms[name] == 7).all()


@pytest.mark.parametrize("poison", [NAN, INF])
def test_poison_in_the_padding_reaches_no_step_of_80_queries(poison):
    lengths_q, lengths_k = (150, 37, 80), (300, 129, 2)
    call = Call(MANY.but(lengths_q=lengths_q, lengths_k=lengths_k))
    assert_80_queries(call)
    for b in range(3):
        call.poison("q", (b, slice(lengths_q[b], None)), poison)
        call.poison("k", (b, slice(lengths_k[b], None)), poison)
    call.check(call.run())


def gradients_in_float64(q, k, v, dout, window):
    """dq, dk, dv of top-left windows (left, right), by the definition, on the GPU."""
    q, k, v = (x.double().transpose(1, 2).requires_grad_() for x in (q, k, v))
    i = torch.arange(q.shape[2], device="cuda")[:, None]
    j = torch.arange(k.shape[2], device="cuda")
    seen = (j >= i - window[0]) & (j <= i + window[1])
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -1e30)
    out = (scores.softmax(-1) * seen) @ v
    grads = torch.autograd.grad(out, (q, k, v), dout.double().transpose(1, 2))
    return [g.transpose(1, 2) for g in grads]


LONG = [(6400, 700), (6200, 830)]  # rows, keys


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("window", [(10**9, 0), (6200, 300)], ids=str)
@pytest.mark.parametrize("lengths", [LONG[:1], LONG[1:], LONG], ids=str)
def test_long_tiles_that_a_mask_cuts(lengths, window, fixed):
    """Keys that hold NaN reach no row that does not see them, and no other key."""
    torch.manual_seed(1)
    total_q, total_k = (sum(n) for n in zip(*lengths))

    def random(length):
        return torch.randn(length, 24, 128, device="cuda", dtype=torch.bfloat16)

    def close(got, want, scale):
        return ((got - want).abs().max() < 0.015 * scale.abs().max()).item()

    q, dout, k, v = random(total_q), random(total_q), random(total_k), random(total_k)
    bounds = ([0, lengths[0][i], sum(n[i] for n in lengths)][: len(lengths) + 1] for i in (0, 1))
    cu_q, cu_k = (torch.tensor(b, dtype=torch.int32, device="cuda") for b in bounds)
    options = {"window_size": window, "align": "top_left", "cu_seqlens_q": cu_q}
    options |= {"cu_seqlens_k": cu_k, "max_seqlen_q": 6400, "max_seqlen_k": 830}
    assert "-80x128" in fc.explain(q, k, v, direction="backward", **options).kernel
    out, lse = fc.attention(q, k, v, return_lse=True, **options)[:2]
    bad = 650  # of each sequence, and the keys behind it; rows see them from this one on:
    first_row = bad - window[1]

    def check(poisoned, **more):
        got = fc.attention_backward(dout, q, k, v, out, lse, deterministic=fixed, **options, **more)
        before = 1.0 if more else 0.0
        for b, want in enumerate(wanted):
            ends = (first_row, bad, bad) if poisoned else (None,) * 3
            for g, cu, w, end in zip(got, (cu_q, cu_k, cu_k), want, ends):
                assert close(g[cu[b] : cu[b + 1]][:end] - before, w[:end], w)
            if poisoned:
                assert torch.isnan(got.dq[cu_q[b] + first_row : cu_q[b + 1]].float()).all()

    wanted = [
        [
            g[0]
            for g in gradients_in_float64(q[i][None], k[j][None], v[j][None], dout[i][None], window)
        ]
        for i, j in zip(*([slice(a, b) for a, b in zip(cu, cu[1:])] for cu in (cu_q, cu_k)))
    ]
    check(False)
    for b in range(len(lengths)):
        k[cu_k[b] + bad : cu_k[b + 1]] = v[cu_k[b] + bad : cu_k[b + 1]] = NAN
    check(True)
    into = {"d" + name: torch.ones_like(x).float() for name, x in (("q", q), ("k", k), ("v", v))}
    check(True, accumulate=True, **into)


# ---- excluded positions -------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF])
def test_poison_around_the_inputs_reaches_nothing(poison):
    """Rows before and after, and the columns beyond head_dim that a tile of 64 would load."""
    call = Call(Case("poison", dtype="bf16", q=130, k=150, d=40, causal=True))
    for name in ("q", "k", "v", "dout", "out"):
        x = call.tensors[name]
        b, s, h, d = x.shape
        room = torch.full((b, s + 64, h, 64), poison, device="cuda", dtype=x.dtype)
        call.tensors[name] = room[:, 32 : 32 + s, :, :d]
        call.tensors[name].copy_(x)
    call.check(call.run())


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (50, 10)}], ids=str)
def test_poison_in_the_padding_reaches_nothing(d, poison, options):
    """Rows past a sequence's length, of every input. Their own gradients are zero."""
    lengths_q, lengths_k = (200, 37), (129, 301)
    call = Call(PLAIN.but(d=d, q=300, k=420, lengths_q=lengths_q, lengths_k=lengths_k, **options))
    for b in range(2):
        call.poison("q", (b, slice(lengths_q[b], None)), poison)
        call.poison("k", (b, slice(lengths_k[b], None)), poison)
    for fixed in (False, True):
        grads = call.run(deterministic=fixed)
        call.check(grads)
        for b in range(2):
            assert (grads.dq[b, lengths_q[b] :] == 0).all()
            assert (grads.dk[b, lengths_k[b] :] == 0).all()
            assert (grads.dv[b, lengths_k[b] :] == 0).all()


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (50, 10)}], ids=str)
def test_poison_in_a_packed_neighbour_reaches_nothing(d, poison, options):
    """The second sequence's rows, which the first one's last tiles and blocks run into."""
    call = Call(PLAIN.but(d=d, packed_q=(70, 200, 131), packed_k=(90, 150, 200), **options))
    clean = call.run(deterministic=True)
    call.poison("q", slice(70, 270), poison)
    call.poison("k", slice(90, 240), poison)
    got = call.run(deterministic=True)
    for rows in (slice(0, 70), slice(270, 401)):
        assert torch.equal(got.dq[rows], clean.dq[rows])
    for rows in (slice(0, 90), slice(240, 440)):
        assert torch.equal(got.dk[rows], clean.dk[rows])
        assert torch.equal(got.dv[rows], clean.dv[rows])


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("d", KERNELS)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 5.0, "alibi": "h", "dropout": 0.2}, {"h": (4, 2), "lengths_k": (230, 230)}],
    ids=str,
)
def test_poison_behind_the_mask_reaches_nothing(d, which, fixed, accumulate, poison, options):
    """Rows and keys that a window hides inside blocks that are visited."""
    case = PLAIN.but(q=230, k=230, window=(20, 0), d=d, **options)
    call = Call(case)
    clean = call.run(deterministic=True)
    call.poison(which, (slice(None), slice(150, None)), poison)
    into, before = {}, 0.0
    if accumulate:
        into = {"d" + name: torch.ones_like(call.tensors[name]).float() for name in "qkv"}
        before = 1.0
    got = call.run(deterministic=fixed, accumulate=accumulate, **into)
    # Rows from 150 on see keys from 130 on.
    first_bad_key = 130 if which == "q" else 150
    for name, end in (("dq", 150), ("dk", first_bad_key), ("dv", first_bad_key)):
        x, want = getattr(got, name).float() - before, getattr(clean, name).float()
        torch.testing.assert_close(x[:, :end], want[:, :end], rtol=0.02, atol=0.02)
    if poison != poison:
        assert torch.isnan(got.dq[:, 150:].float()).all()
        assert torch.isnan(got.dk[:, 170:].float()).any()


def test_poison_above_the_diagonal_of_packed_sequences_reaches_nothing():
    """Queries that see no key at all, in a block with some that do."""
    call = Call(PLAIN.but(d=128, packed_q=(300, 70), packed_k=(130, 90), causal=True))
    clean = call.run(deterministic=True)
    call.poison("q", slice(0, 160), NAN)  # row 170 is the first that sees a key
    for fixed in (False, True):
        got = call.run(deterministic=fixed)
        for x, want in zip(got[:3], clean):
            torch.testing.assert_close(x.float(), want.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(7, 200, 9, 90, 193, 64), (128, 3, 70, 128)], ids=str)
def test_the_bound_of_packed_lengths_changes_nothing(d, causal, lengths):
    case = PACKED.but(d=d, causal=causal, packed_q=lengths, packed_k=lengths, h=(60, 30))
    call, longest = Call(case), max(lengths)
    loose = call.run(deterministic=True, max_seqlen_q=700, max_seqlen_k=700)
    tight = call.run(deterministic=True, max_seqlen_q=longest, max_seqlen_k=longest)
    assert_same_bits(loose, tight)


@pytest.mark.parametrize("d", DIMS)
def test_rows_that_see_no_key_have_gradient_zero(d):
    call = Call(Case("above", dtype="bf16", q=400, k=130, d=d, causal=True))
    grads = call.run()
    assert (grads.dq[:, : 400 - 130] == 0).all()
    call.check(grads)


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_expanded_dout_is_read_in_place(dims):
    call = Call(Case("expanded", dtype="bf16", q=200, k=200, d=128))
    one = call.tensors["dout"]
    for dim in dims:
        one = one.narrow(dim, 0, 1)
    call.tensors["dout"] = one.expand_as(call.tensors["out"])
    host = call.arrays["dout"]
    index = tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(4))
    call.arrays["dout"] = np.ascontiguousarray(np.broadcast_to(host[index], host.shape))
    call.check(call.run())


def test_scores_about_minus_120():
    case = Case("negative", dtype="bf16", q=130, k=191, d=64)
    arrays = case.arrays()
    q = (arrays["q"].astype(np.float32) * 0.1 + 1).astype(case.np_dtype)
    k = (arrays["k"].astype(np.float32) * 0.3 - 120 / 64).astype(case.np_dtype)
    t = {name: on_gpu(x) for name, x in {**arrays, "q": q, "k": k}.items() if name in "qkv"}
    result = fc.attention(*t.values(), scale=1.0, return_lse=True)
    assert (result.lse < -100).all()
    grads = fc.attention_backward(
        on_gpu(arrays["dout"]), t["q"], t["k"], t["v"], result.out, result.lse, scale=1.0
    )
    assert_grads_close_to_reference(grads, arrays["dout"], q, k, arrays["v"], scale=1.0)


@pytest.mark.parametrize("d", DIMS)
def test_a_row_of_infinite_lse_has_no_gradient(d):
    """As beside an infinite sink. Where dout is zero it has none either: the same bits."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 200, 2, d, device="cuda").bfloat16() for _ in range(4))
    out, lse, _ = fc.attention(q, k, v, return_lse=True)
    zero, infinite = dout.clone(), lse.clone()
    zero[0, 5, 0], infinite[0, 0, 5] = 0, INF
    got = fc.attention_backward(dout, q, k, v, out, infinite, deterministic=True)[:3]
    same = fc.attention_backward(zero, q, k, v, out, lse, deterministic=True)[:3]
    assert not got[0][0, 5, 0].any()
    for x, y in zip(got, same, strict=True):
        assert torch.equal(x, y)


def test_side_stream():
    """Work goes to torch's current stream: it sees what was made there, in order."""
    call = Call(Case("stream", dtype="bf16", q=512, k=512, d=128, h=(8, 8)))
    want = call.run()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = call.tensors["q"].clone()
        call.tensors["q"] = late
        t = call.tensors
        got = fc.attention_backward(t["dout"], late, t["k"], t["v"], t["out"], t["lse"])
    stream.synchronize()
    assert torch.equal(got.dk, want.dk) and torch.equal(got.dv, want.dv)


def test_cuda_graph_capture_and_replay():
    call = Call(Case("graph", dtype="bf16", q=256, k=256, d=64, h=(4, 4)))
    into = {f"d{name}": torch.empty_like(call.tensors[name]) for name in "qkv"}
    call.run(**into)
    t = call.tensors
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fc.attention_backward(t["dout"], t["q"], t["k"], t["v"], t["out"], t["lse"], **into)
    t["dout"].mul_(0.5)
    expected = call.run()
    for _ in range(3):
        for x in into.values():
            x.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(into["dk"], expected.dk) and torch.equal(into["dv"], expected.dv)
        torch.testing.assert_close(into["dq"], expected.dq, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("varlen", [False, True])
def test_strides_beyond_2_to_the_31_elements(varlen):
    """Batches (packed: heads) that lie 4.5 GB apart, of inputs and of gradients."""
    case = Case("far", dtype="bf16", b=2, q=200, k=200, d=64)
    if varlen:
        case = case.but(packed_q=(130, 70), packed_k=(130, 70))
    call = Call(case)

    def far(x):
        """The same, with the first dimension (packed: heads) far apart."""
        dim = 1 if varlen else 0
        room = torch.empty(2, 2**31 + 2**16, device="cuda", dtype=x.dtype)
        parts = room[:, : x.numel() // 2].view(2, *x.movedim(dim, 0).shape[1:])
        return parts.movedim(0, dim).copy_(x)

    for name in ("q", "k", "v", "dout"):
        call.tensors[name] = far(call.tensors[name])
    into = {"d" + name: far(torch.zeros_like(call.tensors[name])) for name in "qkv"}
    call.check(call.run(**into))
    call.check(call.run(**into, deterministic=True))


def one_head(dout, q, k, v, precision):
    """Gradients of one head of torch tensors (S, D), products in this precision."""
    dout, q, k, v = (x.to(precision) for x in (dout, q, k, v))
    scale = q.shape[-1] ** -0.5
    p = torch.softmax((q @ k.T).double() * scale, -1)
    dp = (dout @ v.T).double()
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(precision)
    return ds @ k, ds.T @ q, p.to(precision).T @ dout


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("long", ["q", "k"])
def test_more_rows_than_2_to_the_31_elements(long, fixed):
    rows, keys = (1_100_000, 60) if long == "q" else (60, 1_100_000)
    q, dout = torch.randn(2, 1, rows, 16, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, keys, 16, 128, device="cuda", dtype=torch.bfloat16)
    assert max(q.numel(), k.numel()) > 2**31
    out, lse, _ = fc.attention(q, k, v, return_lse=True)
    grads = fc.attention_backward(dout, q, k, v, out, lse, deterministic=fixed)
    last = [x[0, :, -1] for x in (dout, q, k, v)]
    exact, same = (one_head(*last, precision) for precision in (torch.float64, q.dtype))
    for name, got, want, near in zip(("dq", "dk", "dv"), grads, exact, same):
        assert_within_rule(name, *(to_numpy(x) for x in (got[0, :, -1], want, near)))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 8.0}], ids=str)
@pytest.mark.parametrize("d", KERNELS)
def test_memory_is_what_the_plan_says(d, options, fixed):
    """Beyond the gradients: at most dQ in float32, in whole query blocks, and O(N)."""

    def beyond(n):
        q = torch.randn(2, n, 16, d, device="cuda", dtype=torch.bfloat16)
        out, lse, _ = fc.attention(q, q, q, return_lse=True, **options)
        grads = fc.attention_backward(q, q, q, q, out, lse, deterministic=fixed, **options)
        size = sum(g.nbytes for g in grads[:3])
        del grads
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fc.attention_backward(q, q, q, q, out, lse, deterministic=fixed, **options)
        used = torch.cuda.max_memory_allocated() - before - size
        plan = fc.explain(q, q, q, direction="backward", deterministic=fixed, **options)
        rounding = 4 * 2**20  # torch keeps up to 1 MB at the end of each of the four
        assert plan.workspace_bytes <= used <= plan.workspace_bytes + rounding
        rows = 2 * 16 * (n + 128)
        assert used <= rows * 4 * max(32, d) + rows * 64 + rounding
        return used

    assert beyond(6000) <= 2.1 * beyond(3000)


@pytest.mark.parametrize("d", KERNELS)
def test_one_tile_of_keys_needs_no_sums_of_dq(d):
    q = torch.randn(2, 3000, 16, d, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(2, 60, 4, d, device="cuda", dtype=torch.bfloat16)
    plan = fc.explain(q, k, k, direction="backward")
    assert plan.deterministic and plan.workspace_bytes <= 2 * 16 * (3000 + 128) * 64


def test_gradients_that_are_not_asked_for_are_not_written():
    call = Call(Case("dv alone", dtype="bf16", q=300, k=300, d=128, causal=True))
    want = call.run()
    for name in ("dq", "dk", "dv"):
        like = call.tensors[name[1]]
        grads = call.run(**{name: torch.empty_like(like)})
        if name != "dq":
            assert torch.equal(getattr(grads, name), getattr(want, name))


UNBUILT = {
    "bias": {"bias": np.ones((1, 1, 1, 64), np.float32)},
    "mask": {"mask": np.arange(64).reshape(1, 1, 1, 64) % 3 > 0},
    "block mask": {"block_mask": fc.BlockMask.from_dense(np.ones((64, 64), bool), block=(32, 32))},
    "zero scale": {"scale": 0.0},
    "negative scale": {"scale": -0.1},
}


@pytest.mark.parametrize("options", UNBUILT.values(), ids=[*UNBUILT])
def test_what_is_not_built_is_refused_or_right(options):
    """Never silently something else: an error that says so, or the reference's result."""
    call = Call(Case("unbuilt", dtype="bf16", b=1, q=64, k=64, d=64))
    device = {
        name: x.map(on_gpu) if isinstance(x, fc.BlockMask) else on_gpu(x)
        for name, x in options.items()
    }
    try:
        call.run(**device)
    except fc.UnsupportedError as e:
        assert "sm90" in str(e) and len(str(e)) > 40
        return
    call = Call(Case("unbuilt", dtype="bf16", b=1, q=64, k=64, d=64), **options)
    call.options |= device
    grads = call.run()
    call.options |= options
    call.check(grads)


def test_float32_out_or_dout_is_refused_by_name():
    call = Call(Case("wide", dtype="bf16", d=64))
    for name in ("out", "dout"):
        narrow = call.tensors[name]
        call.tensors[name] = narrow.float()
        with pytest.raises(fc.UnsupportedError, match=name):
            call.run()
        call.tensors[name] = narrow
