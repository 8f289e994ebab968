"""Prints the size of the build: kernels, build seconds, library and wheel, tests."""

import glob
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import flashcore as fc

MB = 1e6


def suite(path: str) -> str:
    if not os.path.exists(path):
        return "not run"
    root = ElementTree.parse(path).getroot()
    suites = [root] if root.tag == "testsuite" else list(root)
    total = Counter[str]()
    for s in suites:
        for key in ("tests", "failures", "errors", "skipped", "disabled"):
            total[key] += int(s.get(key, "0"))
    failed = total["failures"] + total["errors"]
    skipped = total["skipped"] + total["disabled"]
    return f"{total['tests'] - failed - skipped} passed, {skipped} skipped, {failed} failed"


def main() -> None:
    kernels = Counter((k.backend, k.direction) for k in fc.kernels())
    library = max(Path(fc.__file__).parent.glob("lib/libflashcore.so*"), key=os.path.getsize)
    wheel = glob.glob("dist/flashcore_attention-*.whl")[0]
    rows = [
        ("kernels", f"{sum(kernels.values())}"),
        *((f"  {backend} {direction}", str(n)) for (backend, direction), n in kernels.items()),
        ("build", f"{Path('build/wheel.seconds').read_text().strip()} s"),
        (library.name, f"{os.path.getsize(library) / MB:.2f} MB"),
        ("wheel", f"{os.path.getsize(wheel) / MB:.2f} MB"),
        ("C++ tests", suite("build/ctest.xml")),
        ("C++ tests, sanitized", suite("build/sanitize.xml")),
        ("Python tests", suite("build/pytest.xml")),
        ("python", sys.version.split()[0]),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
