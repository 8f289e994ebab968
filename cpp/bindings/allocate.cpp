#include "bindings/allocate.h"

#include <cstring>
#include <new>

#include "bindings/gil.h"
#include "bindings/names.h"
#include "common/types.h"

namespace flashcore::python {
namespace {

// flashcore._allocate.<framework>_allocator(), made once per framework.
struct Allocator {
  nb::object like, make, empty, dtypes;
};
const Allocator& allocator(const Session& session) {
  static const Allocator* made[4];  // never destroyed: Python may be gone by then
  static constexpr const char* kMakers[4] = {"torch_allocator", "numpy_allocator", "cupy_allocator",
                                             "jax_allocator"};
  Family const family = session.lead->family;
  size_t const i = family == Family::torch  ? 0
                   : family == Family::cupy ? 2
                   : family == Family::jax  ? 3
                                            : 1;
  if (!made[i]) {
    nb::object const found = survive_exit(
        [&] { return nb::object(nb::module_::import_("flashcore._allocate").attr(kMakers[i])()); });
    made[i] = new Allocator{found.attr("like"), found.attr("make"), found.attr("empty"),
                            found.attr("dtypes")};
  }
  return *made[i];
}

nb::object integers(const Shape& shape) {
  nb::object tuple = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(shape.size())));
  for (size_t d = 0; d < shape.size(); ++d)
    PyTuple_SetItem(tuple.ptr(), static_cast<Py_ssize_t>(d), PyLong_FromLongLong(shape[d]));
  return tuple;
}

// Of a packed tensor of that shape.
nb::object packed_strides(const Shape& shape) {
  nb::object tuple = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(shape.size())));
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d] > 1 ? shape[d] : 1)
    PyTuple_SetItem(tuple.ptr(), static_cast<Py_ssize_t>(d), PyLong_FromLongLong(stride));
  return tuple;
}

// dtype_name() for Python: interned where it is what lse or a workspace has.
nb::object dtype_word(DLDataType type) {
  if (type.code == kDLFloat && type.bits == 32) return nb::borrow(interned<"float32">());
  if (type.code == kDLUInt && type.bits == 8) return nb::borrow(interned<"uint8">());
  return nb::str(dtype_name(type).c_str());
}

// A new tensor from a producer that we know by its exchange table alone.
nb::object exchange_empty(const Session& session, const char* name, Shape shape, DLDataType dtype,
                          bool zero) {
  const ExchangeTable& table = *session.lead->exchange;
  if (zero && session.cuda())
    refuse_unsupported("[", session.call, "] ", name,
                       " would have to be made zero on a device: "
                       "give it as an argument");
  DLTensor prototype{};
  prototype.device = session.device;
  prototype.dtype = dtype;
  prototype.ndim = static_cast<int32_t>(shape.size());
  prototype.shape = shape.data();
  std::string failure;
  DLManagedTensorVersioned* made = nullptr;
  int const status = table.allocate(
      &prototype, &made, &failure, [](void* context, const char* kind, const char* message) {
        *static_cast<std::string*>(context) = text(kind, ": ", message);
      });
  if (status != 0)
    throw Refusal("DeviceError", text("[", session.call, "] ", name, " could not be allocated by ",
                                      type_text(session.like), ": ", failure));
  if (zero) {
    size_t bytes = dtype.bits / 8;
    for (int64_t n : shape) bytes *= static_cast<size_t>(n);
    std::memset(static_cast<char*>(made->dl_tensor.data) + made->dl_tensor.byte_offset, 0, bytes);
  }
  void* object = nullptr;
  if (table.to_object(made, &object) != 0) throw nb::python_error();
  return nb::steal(static_cast<PyObject*>(object));
}

nb::object raw_stream(const Session& session) {
  if (!session.stream_given) return nb::none();
  return nb::int_(reinterpret_cast<uintptr_t>(session.stream));
}

// A call of the framework, which may be Python code: the GIL may go between its steps.
template <size_t N>
nb::object call_framework(const nb::object& function, const nb::handle (&arguments)[N],
                          nb::handle keywords = {}) {
  PyObject* pointers[N];
  for (size_t i = 0; i < N; ++i) pointers[i] = arguments[i].ptr();
  size_t const positional = N - (keywords ? nb::len(keywords) : 0);
  PyObject* const made = survive_exit(
      [&] { return nb::detail::vectorcall(function.ptr(), pointers, positional, keywords.ptr()); });
  if (!made) throw nb::python_error();
  return nb::steal(made);
}

// empty(shape, strides, dtype=, device=), without Python in between.
nb::object packed_empty(const Allocator& allocate, nb::handle like, const Shape& shape,
                        const nb::object& dtype) {
  static PyObject* keywords = nullptr;  // no initialiser: see Call::read_inputs
  if (!keywords) keywords = nb::make_tuple("dtype", "device").release().ptr();
  nb::object const sizes = integers(shape), steps = packed_strides(shape);
  nb::object const type = allocate.dtypes[dtype];
  nb::object const device = like.attr(interned<"device">());
  return call_framework(allocate.empty, {sizes, steps, type, device}, keywords);
}

void require_allocator(const Session& session, const char* name) {
  bool const ours =
      session.lead->family == Family::dlpack || session.lead->family == Family::capsule;
  if (ours && session.device.device_type != kDLCPU)
    refuse_unsupported("[", session.call, "] ", name,
                       " cannot be allocated: ", type_text(session.like),
                       " has no allocator that flashcore knows on its device: pass torch or CuPy "
                       "arrays");
}

// An array like another one, of the framework that leads the call.
nb::object new_array_like(const Session& session, const char* name, nb::handle like, bool zero) {
  require_allocator(session, name);
  const Allocator& allocate = allocator(session);
  if (!zero && !session.stream_given) return call_framework(allocate.like, {like});
  return call_framework(allocate.make,
                        {like, nb::none(), nb::none(), nb::bool_(zero), raw_stream(session)});
}

// Any other.
nb::object new_array(const Session& session, const char* name, const Shape& shape, DLDataType type,
                     bool zero) {
  if (session.lead->family == Family::exchange)
    return exchange_empty(session, name, shape, type, zero);
  require_allocator(session, name);
  const Allocator& allocate = allocator(session);
  nb::object const dtype = dtype_word(type);
  if (!zero && !session.stream_given && !allocate.empty.is_none())
    return packed_empty(allocate, session.like, shape, dtype);
  return call_framework(
      allocate.make, {session.like, integers(shape), dtype, nb::bool_(zero), raw_stream(session)});
}

}  // namespace

void Output::use(nb::handle given, const char* name, const Session& session) {
  array = nb::borrow(given);
  tensor.import(array, name, session, Access::write);
}

void Output::make(const char* name, const Session& session, const Shape& shape, DLDataType dtype,
                  bool zero) {
  array = new_array(session, name, shape, dtype, zero);
  made_ = true;
  tensor.import(array, name, session, Access::made);
}

void Output::make_like(const char* name, const Session& session, nb::handle source,
                       const Tensor& source_tensor, bool zero) {
  auto const make_packed = [&] {
    Shape const shape(source_tensor->shape, source_tensor->shape + source_tensor->ndim);
    make(name, session, shape, source_tensor->dtype, zero);
  };
  if (array_type(source).family != session.lead->family || session.lead->family >= Family::exchange)
    return make_packed();
  array = new_array_like(session, name, source, zero);
  made_ = true;
  tensor.import(array, name, session, Access::made);
  int const last = tensor->ndim - 1;
  // The order of dimensions of an expanded array need not end with the last.
  if (last >= 0 && tensor->shape[last] > 1 && tensor->strides[last] != 1) make_packed();
}

nb::object Output::take(const Session& session) {
  if (!array.is_valid()) return nb::none();
  if (session.lead->family != Family::jax || !made_) return array;
  return nb::module_::import_("flashcore._allocate").attr("jax_array")(array, session.like);
}

Workspace::Workspace(const Session& session, size_t bytes) {
  if (bytes == 0) return;
  if (session.device.device_type == kDLCPU) {
    host_.reset(std::aligned_alloc(FLASHCORE_WORKSPACE_ALIGNMENT,
                                   round_up<size_t>(bytes, FLASHCORE_WORKSPACE_ALIGNMENT)));
    if (!host_) throw std::bad_alloc();
    data_ = host_.get();
    return;
  }
  array_ = new_array(session, "workspace", {static_cast<int64_t>(bytes)}, {kDLUInt, 8, 1},
                     /*zero=*/false);
  tensor_.import(array_, "workspace", session, Access::made);
  data_ = tensor_->data;
}

std::string read_dtype_name(const char* call, nb::handle out_dtype) {
  nb::object name = nb::borrow(out_dtype);
  for (const char* attribute : {"name", "__name__"})
    if (!PyUnicode_Check(name.ptr()) && nb::hasattr(out_dtype, attribute))
      name = out_dtype.attr(attribute);
  std::string word = str_text(name);  // "torch.float32", "float32"
  word = word.substr(word.find('.') + 1);
  for (const char* known : {"float16", "bfloat16", "float32", "float64"})
    if (word == known) return word;
  refuse_argument("[", call,
                  "] out_dtype must be None (the dtype of the inputs), float16, bfloat16, float32 "
                  "or float64, got ",
                  shown(out_dtype));
}

}  // namespace flashcore::python
