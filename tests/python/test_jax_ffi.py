"""The handlers as XLA sees them: versions, the binary interface, who is refused and when."""

from __future__ import annotations

import ctypes
import pathlib
import shutil
import subprocess

import pytest

jax = pytest.importorskip("jax", minversion="0.10")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
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
    with pytest.raises(
        ImportError, match=rf"jaxlib .* has {version[0]}\.{version[1]}.*Nothing was"
    ):
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


@pytest.mark.parametrize(
    "count,attributes,message",
    [
        (3, {"colour": np.int64(1)}, "no colour"),
        (3, {"bias": np.int64(7)}, "no bias"),
        (3, {"causal": np.float64(1)}, "no causal"),
        (3, {"scale": np.int32(1)}, "no scale"),
        (3, {"layout": "bhsd"}, "no layout"),
        (2, {}, "no v"),
        (3, {}, "workspace: this call needs"),
    ],
)
def test_a_custom_call_that_nobody_here_made(count, attributes, message):
    x = jnp.ones((1, 300, 2, 64), jnp.float32)
    call = jax.ffi.ffi_call("flashcore_attention", jax.ShapeDtypeStruct(x.shape, x.dtype))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.jit(lambda x: call(*[x] * count, **attributes))(x).block_until_ready()


# ---- handlers called by a runtime of our own -----------------------------------------------------

Pointer, Size, Int, Long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64


def structure(name, **fields):
    """With the two fields that all of them begin with."""
    head = [("struct_size", Size), ("extensions", Pointer)]
    return type(name, (ctypes.Structure,), {"_fields_": head + list(fields.items())})


Version = structure("Version", major=Int, minor=Int)
Buffers = structure("Buffers", size=Long, types=Pointer, values=Pointer)
Attributes = structure("Attributes", size=Long, types=Pointer, names=Pointer, values=Pointer)
Buffer = structure("Buffer", dtype=Int, data=Pointer, rank=Long, dims=Pointer)
ErrorArgs = structure("ErrorArgs", message=ctypes.c_char_p, code=Int)
StreamArgs = structure("StreamArgs", context=Pointer, stream=Pointer)
OrdinalArgs = structure("OrdinalArgs", context=Pointer, ordinal=ctypes.c_int32)
Api = structure(
    "Api",
    version=Version,
    internal=Pointer,
    create_error=Pointer,
    unused_1=Pointer * 3,
    get_stream=Pointer,
    unused_2=Pointer * 12,
    get_device_ordinal=Pointer,
)
CallFrame = structure(
    "CallFrame",
    api=Pointer,
    context=Pointer,
    stage=Int,
    arguments=Buffers,
    results=Buffers,
    attributes=Attributes,
)


class Metadata(ctypes.Structure):
    _fields_ = [("struct_size", Size), ("version", Version), ("traits", ctypes.c_uint32)]


class MetadataExtension(ctypes.Structure):
    _fields_ = [("struct_size", Size), ("type", Int), ("next", Pointer), ("metadata", Pointer)]


def handler(target, platform):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = Pointer, [ctypes.py_object, ctypes.c_char_p]
    (capsule,) = (c for t, p, c in _core.xla_handlers() if (t, p) == (target, platform))
    return ctypes.CFUNCTYPE(Pointer, Pointer)(get(capsule, b"xla._CUSTOM_CALL_TARGET"))


@pytest.mark.parametrize("platform,traits", [("cpu", 0), ("CUDA", 1)])
@pytest.mark.parametrize("runtime,answer", [(None, 1), (0, 1), (1, 1), (4, 4), (5, 5), (9, 5)])
def test_what_a_handler_says_of_itself(platform, traits, runtime, answer):
    """A version that the runtime takes, whichever that is, and whether graphs may hold it."""
    metadata = Metadata(struct_size=ctypes.sizeof(Metadata))
    extension = MetadataExtension(type=1, metadata=ctypes.addressof(metadata))
    api = Api(version=Version(minor=runtime or 0))
    frame = CallFrame(extensions=ctypes.addressof(extension))
    if runtime is not None:
        frame.api = ctypes.addressof(api)
    assert handler("flashcore_attention", platform)(ctypes.addressof(frame)) is None
    assert (metadata.version.major, metadata.version.minor) == (0, answer)
    assert metadata.traits == traits


@pytest.mark.skipif(any(d.kind == "cuda" for d in fc.devices()), reason="its pointers are made up")
def test_the_cuda_handler_asks_for_stream_and_device():
    asked, said = [], []
    Callback = ctypes.CFUNCTYPE(Pointer, Pointer)

    @Callback
    def get_stream(args):
        asked.append("stream")
        StreamArgs.from_address(args).stream = 0x1234

    @Callback
    def get_device_ordinal(args):
        args = OrdinalArgs.from_address(args)
        asked.append(("ordinal", args.context))
        args.ordinal = 3

    @Callback
    def create_error(args):
        args = ErrorArgs.from_address(args)
        said.append((args.code, args.message.decode()))
        return 0x5678

    address = lambda function: ctypes.cast(function, Pointer).value
    api = Api(
        create_error=address(create_error),
        get_stream=address(get_stream),
        get_device_ordinal=address(get_device_ordinal),
    )
    dims = (Long * 4)(1, 16, 2, 64)
    buffer = Buffer(dtype=16, data=1 << 40, rank=4, dims=ctypes.addressof(dims))
    result = Buffer(dtype=16, data=1 << 41, rank=4, dims=ctypes.addressof(dims))
    operands = (Pointer * 3)(*[ctypes.addressof(buffer)] * 3)
    results = (Pointer * 1)(ctypes.addressof(result))
    frame = CallFrame(
        api=ctypes.addressof(api),
        context=0x42,
        stage=3,
        arguments=Buffers(size=3, values=ctypes.addressof(operands)),
        results=Buffers(size=1, values=ctypes.addressof(results)),
    )
    assert handler("flashcore_attention", "CUDA")(ctypes.addressof(frame)) == 0x5678
    assert asked == ["stream", ("ordinal", 0x42)]
    ((code, message),) = said
    assert code in (12, 13) and message.startswith("[attention] "), (code, message)


# ---- the binary interface ------------------------------------------------------------------------

# Ours, theirs, [(our field, their field)].
STRUCTURES = [
    ("Extension", "Extension_Base", [("type", "type"), ("next", "next")]),
    ("Version", "Api_Version", [("major", "major_version"), ("minor", "minor_version")]),
    (
        "Buffer",
        "Buffer",
        [("dtype", "dtype"), ("data", "data"), ("rank", "rank"), ("dims", "dims")],
    ),
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
_DTYPES = ("PRED", "S8", "S16", "S32", "S64", "U8", "U16", "U32", "U64", "F16", "F32", "F64")
_DTYPES += ("BF16", "C64")
VALUES = {
    "kInvalidArgument": "Error_Code_INVALID_ARGUMENT",
    "kUnimplemented": "Error_Code_UNIMPLEMENTED",
    "kInternal": "Error_Code_INTERNAL",
    "kScalar": "AttrType_SCALAR",
    "kMetadata": "Extension_Metadata",
    "kExecute": "ExecutionStage_EXECUTE",
    "kCommandBufferCompatible": "HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE",
    **{f"k{name.title() if name == 'PRED' else name}": f"DataType_{name}" for name in _DTYPES},
}


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_the_binary_interface_is_that_of_the_installed_jaxlib(tmp_path):
    renamed = {"Extension_Base": "InternalExtension"} if ffi.runtime_version() >= (0, 4) else {}
    lines = [
        "#include <cstddef>",
        "#include <xla/ffi/api/c_api.h>",
        '#include "bindings/xla_abi.h"',
    ]
    for ours, theirs, fields in STRUCTURES:
        theirs = f"XLA_FFI_{renamed.get(theirs, theirs)}"
        for a, b in fields:
            lines.append(
                f"static_assert(offsetof(flashcore::xla::{ours}, {a}) == offsetof({theirs}, {b}) &&"
                f" sizeof(flashcore::xla::{ours}::{a}) == sizeof({theirs}::{b}));"
            )
        if ours not in ("Api", "CallFrame", "Metadata"):  # newer ones append to these
            lines.append(f"static_assert(sizeof(flashcore::xla::{ours}) == sizeof({theirs}));")
    lines += [
        f"static_assert(int(flashcore::xla::{a}) == int(XLA_FFI_{b}));" for a, b in VALUES.items()
    ]
    source = tmp_path / "abi.cpp"
    source.write_text("\n".join(lines) + "\n")
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof", str(source)]
    command += [f"-I{path}" for path in (jax.ffi.include_dir(), ROOT / "cpp", INCLUDE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
