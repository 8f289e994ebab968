"""Threads change how long a call takes, never what it returns."""

import concurrent.futures
import os
import subprocess
import sys

import cases
import pytest
from helpers import backward, forward, run_python, same_bits

import flashcore as fc

MIX = [
    cases.Case("mix", dtype=dtype, q=q, k=k, causal=causal, h=(4, 2), d=d)
    for dtype in ("f32", "bf16")
    for q, k, causal, d in ((100, 130, True, 64), (1, 900, False, 32), (300, 60, False, 24))
]


def both(case):
    arrays, options = case.arrays(), case.options()
    return tuple(forward(arrays, options)) + tuple(backward(arrays, options))


def test_eight_threads_get_what_one_gets():
    want = [both(case) for case in MIX]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [(n, pool.submit(both, case)) for _ in range(6) for n, case in enumerate(MIX)]
        for n, future in futures:
            assert same_bits(future.result(), want[n])


def test_eight_threads_with_errors_among_them():
    """A refusal in one thread does not disturb another, and each sees its own text."""
    case = MIX[0]
    arrays, options = case.arrays(), case.options()
    want = tuple(forward(arrays, options))

    def call(n):
        if n % 2:
            return same_bits(tuple(forward(arrays, options)), want)
        with pytest.raises(fc.ArgumentError, match=rf"num_splits must be >= 0.*-{n + 1}\b"):
            forward(arrays, {**options, "num_splits": -(n + 1)})
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(200)))


@pytest.mark.parametrize("case", MIX, ids=str)
def test_any_number_of_threads_gives_the_same_bits(case):
    before = fc.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            fc.set_num_threads(n)
            assert fc.get_num_threads() == n
            results.append(both(case))
        assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])
    finally:
        fc.set_num_threads(0)
    assert fc.get_num_threads() == before


FORK = """
import os, numpy as np, flashcore as fc
fc.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((1, 300, 4, 32)).astype(np.float32)
want = fc.attention(x, x, x, causal=True)
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        ok = all((fc.attention(x, x, x, causal=True) == want).all() for _ in range(5))
        os._exit(0 if ok else 1)
    children.append(pid)
assert (fc.attention(x, x, x, causal=True) == want).all()
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""


def test_safe_after_fork():
    assert run_python(FORK, timeout=60).split() == ["[0,", "0,", "0]"]


@pytest.mark.parametrize(
    "variables,threads",
    [
        ({"FLASHCORE_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4"}, 4),
        ({"FLASHCORE_NUM_THREADS": "2", "OMP_NUM_THREADS": "7"}, 2),
        ({"OMP_NUM_THREADS": "3,2"}, 3),
    ],
)
def test_environment(variables, threads):
    clean = {"FLASHCORE_NUM_THREADS": "", "OMP_NUM_THREADS": ""}
    code = "import flashcore as fc; print(fc.get_num_threads())"
    assert run_python(code, **{**clean, **variables}).strip() == str(threads)


COUNT = "import flashcore as fc; print(fc.get_num_threads(), fc.get_num_threads())"


def count_threads(**variables):
    """What a new process answers, and what it says about its environment."""
    clean = {"FLASHCORE_NUM_THREADS": "", "OMP_NUM_THREADS": ""}
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        env={**os.environ, **clean, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    first, again = done.stdout.split()
    assert first == again
    return int(first), done.stderr


@pytest.mark.parametrize("bad", ["0", "-3", "many", "1e9", "2.5", "4 ", "-99999999999999999999"])
def test_a_bad_environment_is_the_default_and_said_once(bad):
    default, silent = count_threads()
    assert silent == ""
    threads, said = count_threads(FLASHCORE_NUM_THREADS=bad)
    assert threads == default
    assert said == (
        f"flashcore: FLASHCORE_NUM_THREADS='{bad}' is ignored: it must be an integer from 1 to "
        "4096\n"
    )


@pytest.mark.parametrize("many", ["5000", "1000000000", "99999999999999999999"])
def test_more_threads_than_there_may_be(many):
    assert count_threads(FLASHCORE_NUM_THREADS=many) == (4096, "")


@pytest.mark.parametrize("bad", ["0", "many"])
def test_a_bad_environment_of_openmp_is_the_default(bad):
    assert count_threads(OMP_NUM_THREADS=bad) == count_threads()


def test_affinity_is_the_default():
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import flashcore as fc
print(fc.get_num_threads())
"""
    assert run_python(code, FLASHCORE_NUM_THREADS="", OMP_NUM_THREADS="").strip() == "1"


def test_threadpoolctl():
    pytest.importorskip("threadpoolctl")
    code = """
import flashcore as fc, threadpoolctl
with threadpoolctl.threadpool_limits(1):
    inside = fc.get_num_threads()
print(inside)
"""
    assert run_python(code).strip() == "1"
