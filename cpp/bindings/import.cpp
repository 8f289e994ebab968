#include "bindings/import.h"

#include <cstring>
#include <string_view>
#include <unordered_map>

#include "bindings/gil.h"
#include "bindings/names.h"

namespace flashcore::python {
namespace {

constexpr uint64_t kReadOnly = uint64_t{1} << 0;
constexpr uint64_t kCopied = uint64_t{1} << 1;

// ---- types --------------------------------------------------------------------------------------

const ExchangeTable* find_exchange_table(nb::handle type) {
  nb::object const capsule = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto const* header = static_cast<const ExchangeTable::Header*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header && header->version.major != 1) header = header->previous;
  return reinterpret_cast<const ExchangeTable*>(header);
}

TypeInfo inspect_type(nb::handle type) {
  TypeInfo info;
  auto refused = [&](const char* why) {
    info.family = Family::refused;
    info.refusal = why;
    return info;
  };
  if (type.is(reinterpret_cast<PyObject*>(&PyCapsule_Type))) {
    info.family = Family::capsule;
    return info;
  }
  info.exchange = find_exchange_table(type);
  bool jax = false, tracer = false;
  for (nb::handle base : nb::cast<nb::tuple>(type.attr("__mro__"))) {
    std::string const module = str_text(nb::object(base.attr("__module__")));
    std::string const name = str_text(nb::object(base.attr("__name__")));
    std::string const root = module.substr(0, module.find('.'));
    if (root == "torch" && name == "Tensor") {
      info.family = Family::torch;
    } else if (root == "numpy" && name == "MaskedArray") {
      return refused("a masked array: pass the plain array and mask=");
    } else if (root == "numpy" && name == "ndarray") {
      info.family = Family::numpy;
    } else if (root == "cupy" && (name == "ndarray" || name == "_ndarray_base")) {
      info.family = Family::cupy;
    } else if (root == "jax" || root == "jaxlib") {
      jax = true;
      tracer = tracer || name == "Tracer";
    }
  }
  if (tracer)
    return refused(
        "a traced JAX value: inside jit, grad and vmap call flashcore.jax.attention, which takes "
        "the "
        "same options; this function runs outside of them");
  if (jax) info.family = Family::jax;
  if (info.family == Family::dlpack) {
    if (info.exchange)
      info.family = Family::exchange;
    else if (!nb::hasattr(type, "__dlpack__"))
      return refused(
          "not an array: pass a NumPy, PyTorch, CuPy or JAX array, or any object with __dlpack__");
  }
  return info;
}

// ---- calling Python -----------------------------------------------------------------------------

// A Python exception that a producer raised while it was asked for its data becomes our error, with
// the producer's as its cause. Interrupts, out-of-memory and endless recursion (a producer that
// calls us with itself, which would wrap the error once per level) pass through.
[[noreturn]] void refuse_from(nb::python_error& error, const std::string& message) {
  if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError) ||
      error.matches(PyExc_RecursionError))
    throw error;
  nb::object const refusal =
      nb::module_::import_("flashcore.errors").attr("ArgumentError")(message);
  refusal.attr("__cause__") = nb::borrow(error.value());
  PyErr_SetObject(refusal.type().ptr(), refusal.ptr());
  throw nb::python_error();
}

// What a producer said, without the C++ stack trace that some add below it.
std::string first_line(nb::python_error& error) {
  std::string const all = str_text(error.value());
  return all.substr(0, all.find('\n'));
}

bool is_true(nb::handle object) { return object.is(Py_True); }

// Why a torch tensor has no strided data to read, in the words of its properties.
std::string torch_refusal(nb::handle t) {
  if (is_true(t.attr("is_quantized"))) return "quantized: pass x.dequantize()";
  if (is_true(t.attr("is_nested")))
    return "nested: pass the packed values with cu_seqlens_q and cu_seqlens_k";
  std::string const layout = str_text(nb::object(t.attr("layout")));
  if (layout != "torch.strided") return layout + ": pass a dense tensor, x.to_dense()";
  std::string const device = str_text(nb::object(t.attr("device")));
  if (device == "meta") return "on the meta device and has no data";
  return "";
}

bool grad_is_enabled() {
  static PyObject* is_grad_enabled = nullptr;  // no initialiser: see Call::read_inputs
  if (!is_grad_enabled)
    is_grad_enabled =
        nb::object(nb::module_::import_("torch").attr("is_grad_enabled")).release().ptr();
  return is_true(nb::handle(is_grad_enabled)());
}

// A method call without the bound method in between.
bool is_negative_view(nb::handle t) {
  PyObject* const arguments[] = {t.ptr()};
  nb::object const negative =
      nb::steal(nb::detail::vectorcall_method(interned<"is_neg">().ptr(), arguments, 1, nullptr));
  if (!negative) throw nb::python_error();
  return is_true(negative);
}

// grads: whether autograd is recording.
void check_torch(const char* call, const char* name, nb::handle t, bool grads) {
  if (grads && is_true(t.attr(interned<"requires_grad">())))
    refuse_unsupported("[", call, "] ", name,
                       " requires grad, which this function would drop: it is not differentiable. "
                       "Pass ",
                       name,
                       ".detach(), or use flashcore.torch.attention, which takes part in "
                       "autograd");
  if (is_negative_view(t))
    refuse_unsupported("[", call, "] ", name,
                       " has the negative bit set, so its memory holds other values than it shows: "
                       "pass ",
                       name, ".resolve_neg()");
}

// Tracers record torch's own operations. Of a call they would see the allocation of the result and
// nothing that fills it, so what they make would return uninitialised memory.
void check_not_traced(const char* call, const char* name) {
  static PyObject* is_tracing = nullptr;  // no initialiser: see Call::read_inputs
  static PyObject* dispatch_modes = nullptr;
  if (!dispatch_modes) {
    nb::object const c = nb::module_::import_("torch").attr("_C");
    is_tracing = nb::object(c.attr("_is_tracing")).release().ptr();
    dispatch_modes = nb::object(c.attr("_len_torch_dispatch_stack")).release().ptr();
  }
  const char* const tracer = is_true(nb::handle(is_tracing)()) ? "torch.jit.trace"
                             : PyObject_IsTrue(nb::handle(dispatch_modes)().ptr())
                                 ? "a torch dispatch mode (make_fx and the like)"
                                 : nullptr;
  if (tracer)
    refuse_unsupported("[", call, "] ", name, " is a torch tensor inside ", tracer,
                       ", which would record the allocation of the result but not its "
                       "computation: call flashcore outside of it");
}

nb::object raw_stream_as_dlpack(void* stream) {
  auto const value = reinterpret_cast<uintptr_t>(stream);
  return nb::int_(value == 0 ? uintptr_t{1} : value);  // DLPack writes the legacy stream as 1
}

// object.__dlpack__(max_version=(1, 3), stream=stream). A null stream leaves the argument out.
// Producers from before DLPack 1.0 take no max_version.
nb::object ask_for_dlpack(nb::handle object, bool max_version, nb::handle stream) {
  static PyObject* version = nullptr;  // no initialiser: see Call::read_inputs
  static PyObject* keywords[2][2] = {};
  if (!version) version = nb::make_tuple(1, 3).release().ptr();
  bool const with_stream = stream && (max_version || !stream.is_none());
  PyObject* arguments[3] = {object.ptr()};
  size_t count = 1;
  if (max_version) arguments[count++] = version;
  if (with_stream) arguments[count++] = stream.ptr();
  PyObject*& names = keywords[max_version][with_stream];
  if (!names) {
    nb::list made;
    if (max_version) made.append(interned<"max_version">());
    if (with_stream) made.append(interned<"stream">());
    names = nb::tuple(made).release().ptr();
  }
  PyObject* const capsule =
      nb::detail::vectorcall_method(interned<"__dlpack__">().ptr(), arguments, 1, names);
  if (!capsule) throw nb::python_error();
  return nb::steal(capsule);
}

void* cupy_current_stream(nb::handle array) {
  nb::object const device = array.attr("device").attr("id");
  nb::object const stream =
      nb::module_::import_("cupy").attr("cuda").attr("get_current_stream")(device);
  return reinterpret_cast<void*>(nb::cast<uintptr_t>(stream.attr("ptr")));
}

// Host memory that a GPU can see is host memory; managed memory is device memory.
DLDevice plain_device(DLDevice device) {
  if (device.device_type == kDLCUDAHost) return {kDLCPU, 0};
  if (device.device_type == kDLCUDAManaged) return {kDLCUDA, device.device_id};
  return device;
}

DLDevice device_of(nb::handle object) {
  nb::object const pair = object.attr("__dlpack_device__")();
  auto number = [&](int i) {
    nb::int_ const item{nb::object(pair[i])};
    int overflow = 0;
    long long const n = PyLong_AsLongLongAndOverflow(item.ptr(), &overflow);
    if (overflow == 0 && n == static_cast<int32_t>(n)) return static_cast<int32_t>(n);
    PyErr_Format(PyExc_OverflowError, "__dlpack_device__() gave %R", pair.ptr());
    throw nb::python_error();
  };
  return plain_device({static_cast<DLDeviceType>(number(0)), number(1)});
}

}  // namespace

const TypeInfo& array_type(nb::handle object) {
  struct Known {
    nb::object type;  // weakly: where a type has died, another may come to live
    TypeInfo info;
    bool alive() const { return PyWeakref_GetObject(type.ptr()) != Py_None; }
  };
  // Guarded by the GIL. What is no array type is not kept: anything may be passed by mistake.
  static auto* const known = new std::unordered_map<PyObject*, Known>();
  PyObject* const type = object.type().ptr();
  auto const found = known->find(type);
  if (found != known->end() && found->second.alive()) return found->second.info;
  TypeInfo const info = inspect_type(type);  // may run Python code, and so this function
  if (info.family == Family::refused) {
    static thread_local TypeInfo refused;
    return refused = info;
  }
  std::erase_if(*known, [](auto const& entry) { return !entry.second.alive(); });
  nb::object weak = nb::steal(PyWeakref_NewRef(type, nullptr));
  if (!weak) throw nb::python_error();
  return known->insert_or_assign(type, Known{std::move(weak), info}).first->second.info;
}

// ---- Tensor -------------------------------------------------------------------------------------

void Tensor::import_lead(nb::handle object, const char* name, Session& session, Access access) {
  session.lead_type = nb::borrow(object.type());
  session.lead = &array_type(object);
  session.like = object;
  session.grads = session.lead->family == Family::torch && grad_is_enabled();
  if (session.lead->family == Family::cupy && !session.stream_given)
    session.stream = cupy_current_stream(object);
  import(object, name, session, access);
  session.device = tensor_.device;
  if (session.stream_given && !session.cuda())
    refuse_argument("[", session.call, "] stream was given but ", name,
                    " is on the CPU, where a call is over when it returns: leave stream out");
  if (session.lead->exchange && session.cuda() && !session.stream_given &&
      session.lead->exchange->current_stream(kDLCUDA, session.device.device_id, &session.stream) !=
          0)
    throw nb::python_error();
}

void Tensor::import(nb::handle object, const char* name, const Session& session, Access access) {
  release();
  Where const where{session, name, object};
  nb::object const type = nb::borrow(object.type());  // info lives as long as it does
  const TypeInfo& info = type.is(session.lead_type) ? *session.lead : array_type(object);
  // The lead's own family runs on the lead's stream already. Arrays of another producer are asked
  // to order their stream before ours.
  bool const same_producer =
      info.family == session.lead->family && info.exchange == session.lead->exchange;
  switch (info.family) {
    case Family::refused:
      refuse_type("[", session.call, "] ", name, " is ", type_text(object), ", ", info.refusal);
    case Family::capsule:
      own(where, object);
      break;
    case Family::torch:
    case Family::exchange:
      if (info.family == Family::torch && access != Access::made) {
        if (object.is(session.like) || !same_producer) check_not_traced(session.call, name);
        check_torch(session.call, name, object, same_producer ? session.grads : grad_is_enabled());
      }
      if (info.exchange) {
        view(where, *info.exchange);
        if (same_producer || plain_device(tensor_.device).device_type != kDLCUDA) break;
        release();
      }
      [[fallthrough]];
    case Family::dlpack:
    case Family::jax: {
      bool cuda = false;
      try {
        cuda = device_of(object).device_type == kDLCUDA;
      } catch (nb::python_error& error) {
        refuse_from(error, text("[", session.call, "] ", name, " (", type_text(object),
                                ") does not say where its data is: ", first_line(error)));
      }
      if (cuda && info.family == Family::jax)
        refuse_unsupported("[", session.call, "] ", name,
                           " is a JAX array on a GPU, whose stream and memory are XLA's: call "
                           "flashcore.jax.attention. JAX arrays on the CPU work here");
      call_dlpack(where, info, cuda ? raw_stream_as_dlpack(session.stream) : nb::none());
      break;
    }
    case Family::numpy:
      call_dlpack(where, info, nb::handle());
      break;
    case Family::cupy:
      call_dlpack(where, info,
                  same_producer ? nb::object(nb::int_(-1)) : raw_stream_as_dlpack(session.stream));
      break;
  }
  finish(where, info, access);
}

void Tensor::view(const Where& where, const ExchangeTable& table) {
  bool const failed = table.view_object ? table.view_object(where.object.ptr(), &tensor_) != 0
                                        : table.from_object(where.object.ptr(), &versioned_) != 0;
  if (failed) {
    nb::python_error error;
    std::string const why = array_type(where.object).family == Family::torch
                                ? torch_refusal(where.object)
                                : std::string();
    if (!why.empty()) refuse_unsupported("[", where.session.call, "] ", where.name, " is ", why);
    refuse_from(error, text("[", where.session.call, "] ", where.name, " (",
                            type_text(where.object), ") gives no data: ", first_line(error)));
  }
  if (versioned_) flags_ = versioned_->flags;
  adopt(where, versioned_ ? versioned_->dl_tensor : tensor_);
}

// stream: what __dlpack__ is given; a null handle leaves the argument out (NumPy).
void Tensor::call_dlpack(const Where& where, const TypeInfo& info, nb::handle stream) {
  nb::object const object = nb::borrow(where.object);
  nb::object capsule;
  auto const produce = [&] { return ask_for_dlpack(object, info.max_version, stream); };
  try {
    try {
      capsule = survive_exit(produce);  // may be Python code
    } catch (nb::python_error& error) {
      if (!info.max_version || !error.matches(PyExc_TypeError)) throw;
      info.max_version = false;  // a producer from before DLPack 1.0
      capsule = survive_exit(produce);
    }
  } catch (nb::python_error& error) {
    // ml_dtypes.bfloat16 is a user-defined dtype, which NumPy does not export: read its bits.
    if (info.family == Family::numpy &&
        str_text(nb::object(object.attr("dtype").attr("name"))) == "bfloat16") {
      nb::object const bits = object.attr("view")("uint16");
      call_dlpack({where.session, where.name, bits}, info, stream);
      tensor_.dtype = {kDLBfloat, 16, 1};
      return;
    }
    refuse_from(error, text("[", where.session.call, "] ", where.name, " (",
                            type_text(where.object), ") gives no data: ", first_line(error)));
  }
  own(where, capsule);
}

void Tensor::own(const Where& where, nb::handle capsule) {
  PyObject* const c = capsule.ptr();
  if (PyCapsule_IsValid(c, "dltensor_versioned")) {
    versioned_ =
        static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(c, "dltensor_versioned"));
    PyCapsule_SetName(c, "used_dltensor_versioned");
    if (versioned_->version.major != 1)
      refuse_unsupported("[", where.session.call, "] ", where.name, " (", type_text(where.object),
                         ") speaks DLPack ", versioned_->version.major, ".",
                         versioned_->version.minor, "; flashcore reads version 1");
    flags_ = versioned_->flags;
    adopt(where, versioned_->dl_tensor);
  } else if (PyCapsule_IsValid(c, "dltensor")) {
    unversioned_ = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(c, "dltensor"));
    PyCapsule_SetName(c, "used_dltensor");
    adopt(where, unversioned_->dl_tensor);
  } else {
    const char* const tag = PyCapsule_CheckExact(c) ? PyCapsule_GetName(c) : nullptr;
    PyErr_Clear();
    if (tag && std::string_view(tag).starts_with("used_dltensor"))
      refuse_argument("[", where.session.call, "] ", where.name,
                      " is a DLPack capsule that was consumed before: each one can be read once");
    refuse_type("[", where.session.call, "] ", where.name, " (", type_text(where.object),
                ") gave no DLPack capsule but ", tag ? tag : type_text(capsule).c_str());
  }
}

// Copies shape and strides, which the producer may free or change, and puts strides in the one form
// the core expects: explicit, and what a packed tensor has where a dimension has fewer than two
// entries (producers leave anything there).
void Tensor::adopt(const Where& where, const DLTensor& from) {
  DLTensor const source = from;
  if (source.ndim < 0 || source.ndim > kMaxDims)
    refuse_argument("[", where.session.call, "] ", where.name, " has ", source.ndim,
                    " dimensions; at most ", kMaxDims, " can be read");
  tensor_ = source;
  tensor_.data = static_cast<char*>(source.data) + source.byte_offset;
  tensor_.byte_offset = 0;
  tensor_.device = plain_device(source.device);
  int64_t packed = 1;
  for (int d = source.ndim - 1; d >= 0; --d) {
    shape_[d] = source.shape[d];
    strides_[d] = source.strides && shape_[d] > 1 ? source.strides[d] : packed;
    packed = strides_[d] * (shape_[d] > 0 ? shape_[d] : 1);
  }
  tensor_.shape = shape_;
  tensor_.strides = strides_;
  given_ = true;
}

void Tensor::finish(const Where& where, const TypeInfo& info, Access access) {
  const char* const call = where.session.call;
  if (tensor_.dtype.code == kDLComplex)
    refuse_unsupported("[", call, "] ", where.name,
                       " is complex; attention is defined here for "
                       "real numbers: pass real and imaginary parts as separate tensors");
  if (access != Access::write) return;
  if (info.family == Family::jax)
    refuse_argument("[", call, "] ", where.name,
                    " is an output, but a JAX array may not be written: leave it out, and a new "
                    "array is returned");
  if (flags_ & kReadOnly)
    refuse_argument("[", call, "] ", where.name, " is an output, but the array is read-only");
  if (flags_ & kCopied)
    refuse_argument("[", call, "] ", where.name, " is an output, but ", type_text(where.object),
                    " handed out a copy of its data, so the result would be lost");
}

void Tensor::release() {
  if (versioned_ && versioned_->deleter) versioned_->deleter(versioned_);
  if (unversioned_ && unversioned_->deleter) unversioned_->deleter(unversioned_);
  versioned_ = nullptr;
  unversioned_ = nullptr;
  flags_ = 0;
  given_ = false;
}

std::string dtype_name(DLDataType type) {
  if (type.lanes != 1) return "";
  switch (type.code) {
    case kDLFloat:
      return text("float", int{type.bits});
    case kDLBfloat:
      return text("bfloat", int{type.bits});
    case kDLInt:
      return text("int", int{type.bits});
    case kDLUInt:
      return text("uint", int{type.bits});
    case kDLBool:
      return "bool";
    default:
      return "";
  }
}

}  // namespace flashcore::python
