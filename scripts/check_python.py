"""Says clearly what is missing before a virtual environment is made."""

import importlib.util
import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(
        f"flashcore needs Python >= 3.10, got {sys.version.split()[0]} ({sys.executable}); "
        "run make with PYTHON=python3.12 or another newer interpreter"
    )
if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
    sys.exit(
        f"flashcore needs the venv module of {sys.executable}; "
        "on Debian and Ubuntu it is the package python3-venv"
    )
