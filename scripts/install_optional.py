"""Installs the requirements of a file one by one. One that cannot be had is named, not an error."""

import subprocess
import sys


def main(paths: list[str]) -> None:
    for path in paths:
        with open(path, encoding="utf-8") as lines:
            wanted = [line.strip() for line in lines if line.strip() and line[0] != "#"]
        for requirement in wanted:
            command = [sys.executable, "-m", "pip", "install", "--quiet", requirement]
            if subprocess.run(command, check=False).returncode != 0:
                print(f"not available here: {requirement}")


if __name__ == "__main__":
    main(sys.argv[1:])
