"""The handlers as XLA sees them: versions, the binary interface, who is refused and when."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

jax = pytest.importorskip("jax")

from helpers import run_python  # noqa: E402

import flashcore as fc  # noqa: E402
from flashcore import _core  # noqa: E402
from flashcore.jax import ffi  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDE = pathlib.Path(fc.__file__).parent / "include"


def test_versions():
    oldest, newest = _core.XLA_FFI_VERSIONS
    assert oldest <= newest and oldest <= ffi.runtime_version()
    ffi.check(oldest)
    ffi.check(newest)
    ffi.check((newest[0], newest[1] + 7))  # XLA keeps old handlers running


@pytest.mark.parametrize("version", [(0, 0), (1, 0), (2, 3)])
def test_a_runtime_that_does_not_fit_is_refused(version):
    with pytest.raises(ImportError, match=rf"jaxlib .* has {version[0]}\.{version[1]}.*Nothing was"):
        ffi.check(version)


@pytest.mark.parametrize("minor,usable", [("0", False), ("1", True)])
def test_it_is_refused_before_registration(tmp_path, minor, usable):
    """With a header of our own in the place of jaxlib's: JAX goes on without us."""
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text(f"#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR {minor}\n")
    code = f"""
import jax
jax.ffi.include_dir = lambda: {str(tmp_path)!r}
registered = []
register = jax.ffi.register_ffi_target
jax.ffi.register_ffi_target = lambda *a, **k: registered.append(a[0]) or register(*a, **k)
try:
    import flashcore.jax
except ImportError as error:
    assert "Nothing was registered" in str(error) and not registered
print(len(registered), float(jax.numpy.ones(3).sum()))
"""
    assert run_python(code).split() == ["4" if usable else "0", "3.0"]


@pytest.mark.parametrize("text", [None, "nothing of interest"])
def test_a_jaxlib_that_does_not_say(tmp_path, monkeypatch, text):
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    if text is not None:
        header.parent.mkdir(parents=True)
        header.write_text(text)
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    with pytest.raises(ImportError, match="c_api.h of jaxlib"):
        ffi.runtime_version()


def test_an_older_jax_is_refused():
    code = """
import jax
jax.__version_info__, jax.__version__ = (0, 9, 2), "0.9.2"
try:
    import flashcore.jax
except ImportError as error:
    print(error)
"""
    assert "needs JAX 0.10 or newer, got 0.9.2" in run_python(code)


def test_handlers_are_there_for_both_platforms():
    found = {(target, platform) for target, platform, _ in _core.xla_handlers()}
    assert found == {
        (target, platform)
        for target in ("flashcore_attention", "flashcore_attention_backward")
        for platform in ("cpu", "CUDA")
    }


# Ours, theirs, [(our field, their field)].
STRUCTURES = [
    ("Extension", "Extension_Base", [("type", "type"), ("next", "next")]),
    ("Version", "Api_Version", [("major", "major_version"), ("minor", "minor_version")]),
    ("Buffer", "Buffer", [("dtype", "dtype"), ("data", "data"), ("rank", "rank"), ("dims", "dims")]),
    ("Buffers", "Args", [("size", "size"), ("types", "types"), ("values", "args")]),
    ("Buffers", "Rets", [("size", "size"), ("types", "types"), ("values", "rets")]),
    ("Text", "ByteSpan", [("data", "ptr"), ("size", "len")]),
    ("Scalar", "Scalar", [("dtype", "dtype"), ("value", "value")]),
    (
        "Attributes",
        "Attrs",
        [("size", "size"), ("types", "types"), ("names", "names"), ("values", "attrs")],
    ),
    ("ErrorArgs", "Error_Create_Args", [("message", "message"), ("code", "errc")]),
    ("StreamArgs", "Stream_Get_Args", [("context", "ctx"), ("stream", "stream")]),
    (
        "DeviceOrdinalArgs",
        "DeviceOrdinal_Get_Args",
        [("context", "ctx"), ("ordinal", "device_ordinal")],
    ),
    (
        "Api",
        "Api",
        [
            ("version", "api_version"),
            ("create_error", "XLA_FFI_Error_Create"),
            ("get_stream", "XLA_FFI_Stream_Get"),
            ("get_device_ordinal", "XLA_FFI_DeviceOrdinal_Get"),
        ],
    ),
    (
        "CallFrame",
        "CallFrame",
        [
            ("extensions", "extension_start"),
            ("api", "api"),
            ("context", "ctx"),
            ("stage", "stage"),
            ("arguments", "args"),
            ("results", "rets"),
            ("attributes", "attrs"),
        ],
    ),
    ("Metadata", "Metadata", [("version", "api_version"), ("traits", "traits")]),
    ("MetadataExtension", "Metadata_Extension", [("metadata", "metadata")]),
]
VALUES = {
    "kInvalidArgument": "Error_Code_INVALID_ARGUMENT",
    "kUnimplemented": "Error_Code_UNIMPLEMENTED",
    "kInternal": "Error_Code_INTERNAL",
    "kScalar": "AttrType_SCALAR",
    "kMetadata": "Extension_Metadata",
    "kExecute": "ExecutionStage_EXECUTE",
    "kCommandBufferCompatible": "HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE",
    **{
        f"k{name.title() if name == 'PRED' else name}": f"DataType_{name}"
        for name in "PRED S8 S16 S32 S64 U8 U16 U32 U64 F16 F32 F64 BF16 C64".split()
    },
}


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_the_binary_interface_is_that_of_the_installed_jaxlib(tmp_path):
    renamed = {"Extension_Base": "InternalExtension"} if ffi.runtime_version() >= (0, 4) else {}
    lines = ["#include <cstddef>", "#include <xla/ffi/api/c_api.h>", '#include "bindings/xla_abi.h"']
    for ours, theirs, fields in STRUCTURES:
        theirs = f"XLA_FFI_{renamed.get(theirs, theirs)}"
        for a, b in fields:
            lines.append(
                f"static_assert(offsetof(flashcore::xla::{ours}, {a}) == offsetof({theirs}, {b}) &&"
                f" sizeof(flashcore::xla::{ours}::{a}) == sizeof({theirs}::{b}));"
            )
        if ours not in ("Api", "CallFrame", "Metadata"):  # newer ones append to these
            lines.append(f"static_assert(sizeof(flashcore::xla::{ours}) == sizeof({theirs}));")
    lines += [f"static_assert(int(flashcore::xla::{a}) == int(XLA_FFI_{b}));" for a, b in VALUES.items()]
    source = tmp_path / "abi.cpp"
    source.write_text("\n".join(lines) + "\n")
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof", str(source)]
    command += [f"-I{path}" for path in (jax.ffi.include_dir(), ROOT / "cpp", INCLUDE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
