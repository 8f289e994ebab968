"""Fails if a build log shows a CUDA kernel that spills, or a compiler remark that costs speed.

The compiler reports serialised wgmma (C7510 to C7520), an ignored setmaxnreg (C7508) and "Potential
Performance Loss" as information, which no -Werror turns into an error; so the log is read. What is
accepted stands in build_log_allow.txt, one regular expression a line with its reason after '#'.
"""

import re
import sys
from pathlib import Path

REMARK = re.compile(r"Potential Performance Loss|\bC7508\b|\bC75(1\d|20)\b")
WARNED_SPILL = re.compile(r"Registers are spilled|\bspilled to local memory\b", re.I)
ENTRY = re.compile(r"(?:Compiling entry function|Function properties for) '?([\w$]+)")
LISTED = re.compile(r"flashcore: (\d+) kernels from")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def allowed(path: Path) -> list[re.Pattern[str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    patterns = (line.split("#")[0].strip() for line in lines)
    return [re.compile(p) for p in patterns if p]


def findings(text: str) -> tuple[list[str], int]:
    """Complaints (with the kernel's name in them), and how many kernels the log reports on."""
    bad: list[str] = []
    kernels: set[str] = set()
    kernel = "?"
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            kernel = entry.group(1)
        if REMARK.search(line) or WARNED_SPILL.search(line):  # says itself of which kernel
            bad.append(line.strip())
        elif spill := SPILL.search(line):
            kernels.add(kernel)
            if spill.group(1) != "0" or spill.group(2) != "0":
                bad.append(f"{kernel}: {spill.group(0)}")
    return bad, len(kernels)


def main(log: str) -> None:
    text = Path(log).read_text(encoding="utf-8", errors="replace")
    accepted = allowed(Path(__file__).with_name("build_log_allow.txt"))
    bad, kernels = findings(text)
    refused = [line for line in bad if not any(p.search(line) for p in accepted)]
    for line in refused:
        print(f"build log: {line}")
    expected = sum(int(n) for n in LISTED.findall(text))
    if kernels < expected:
        sys.exit(
            f"build log: {expected} CUDA kernels are compiled but {kernels} are reported on: "
            "an incremental build (remove build/wheel), or ptxas without -v"
        )
    print(
        f"build log: {kernels} CUDA kernels, {len(refused)} complaints, "
        f"{len(bad) - len(refused)} accepted"
    )
    if refused:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
