"""python -m benchmarks {cpu,gpu,sparse,approximate,host,demo} [options]"""

import argparse
import importlib

COMMANDS = {
    "cpu": "flashcore beside the CPU libraries, forward and backward",
    "gpu": "flashcore beside cuDNN and FlashAttention on a CUDA device",
    "approximate": "block masks beside approximate methods, over length",
    "sparse": "block masks beside the dense kernels and FlexAttention on a CUDA device",
    "host": "what a call costs besides the work itself",
    "demo": "exact attention against standard attention over growing N",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = {}
    for name, what in COMMANDS.items():
        module = importlib.import_module(f"benchmarks.{name}")
        module.add_arguments(commands.add_parser(name, help=what, description=what))
        runs[name] = module.run
    options = parser.parse_args()
    runs[options.command](options)


if __name__ == "__main__":
    main()
