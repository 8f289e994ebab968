#include "bindings/options.h"

#include <limits>

namespace flashcore::python {
namespace {

[[noreturn]] void refuse_value(const char* call, const char* name, const char* want,
                               nb::handle value) {
  bool const array = nb::hasattr(value, "__dlpack__");
  refuse_type(
      "[", call, "] ", name, " must be ", want, ", got ", type_text(value),
      array ? ": a value inside an array is not read, as that could wait for a device" : "");
}

// A new reference to value as a tuple of two, if it is a tuple or list of two; else null.
PyObject* pair_or_null(nb::handle value) {
  nb::object pair = nb::borrow(value);
  if (PyList_Check(value.ptr())) pair = nb::steal(PyList_AsTuple(value.ptr()));
  return PyTuple_Check(pair.ptr()) && PyTuple_Size(pair.ptr()) == 2 ? pair.release().ptr()
                                                                    : nullptr;
}

// The one of a few words that value is.
size_t read_word(const char* call, const char* name, nb::handle value, const char* first,
                 const char* second) {
  if (PyUnicode_Check(value.ptr())) {
    if (PyUnicode_CompareWithASCIIString(value.ptr(), first) == 0) return 0;
    if (PyUnicode_CompareWithASCIIString(value.ptr(), second) == 0) return 1;
  }
  refuse_argument("[", call, "] ", name, " must be '", first, "' or '", second, "', got ",
                  shown(value));
}

// A Python integer in [-2^63, 2^64), as its 64 bits.
int64_t read_bits(const char* call, const char* name, nb::handle value) {
  nb::object const integer = nb::steal(PyNumber_Index(value.ptr()));
  if (!integer) {
    PyErr_Clear();
    refuse_value(call, name, "an integer", value);
  }
  long long const small = PyLong_AsLongLong(integer.ptr());
  if (small != -1 || !PyErr_Occurred()) return small;
  PyErr_Clear();
  unsigned long long const large = PyLong_AsUnsignedLongLong(integer.ptr());
  if (large != static_cast<unsigned long long>(-1) || !PyErr_Occurred())
    return static_cast<int64_t>(large);
  PyErr_Clear();
  refuse_argument("[", call, "] ", name, " does not fit 64 bits: ", shown(value));
}

}  // namespace

bool read_bool(const char* call, const char* name, nb::handle value) {
  if (value.is(Py_True)) return true;
  if (value.is(Py_False)) return false;
  std::string const type = type_text(value);
  if (type == "numpy.bool" || type == "numpy.bool_") return PyObject_IsTrue(value.ptr()) == 1;
  refuse_value(call, name, "True or False", value);
}

double read_double(const char* call, const char* name, nb::handle value) {
  if (!PyFloat_CheckExact(value.ptr()) && !PyLong_CheckExact(value.ptr()) &&
      nb::hasattr(value, "__dlpack__"))
    refuse_value(call, name, "a number", value);
  double const number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    refuse_value(call, name, "a number", value);
  }
  return number;
}

int64_t read_int(const char* call, const char* name, nb::handle value) {
  if (!PyLong_CheckExact(value.ptr()) && nb::hasattr(value, "__dlpack__"))
    refuse_value(call, name, "an integer", value);
  nb::object const integer = nb::steal(PyNumber_Index(value.ptr()));
  if (!integer) {
    PyErr_Clear();
    refuse_value(call, name, "an integer", value);
  }
  long long const number = PyLong_AsLongLong(integer.ptr());
  if (number == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    refuse_argument("[", call, "] ", name, " does not fit 64 bits: ", shown(value));
  }
  return number;
}

int32_t read_int32(const char* call, const char* name, nb::handle value) {
  int64_t const number = read_int(call, name, value);
  if (number < std::numeric_limits<int32_t>::min() || number > std::numeric_limits<int32_t>::max())
    refuse_argument("[", call, "] ", name, " does not fit 32 bits: ", number);
  return static_cast<int32_t>(number);
}

flashcore_layout read_layout(const char* call, nb::handle value) {
  return read_word(call, "layout", value, "bshd", "bhsd") ? FLASHCORE_BHSD : FLASHCORE_BSHD;
}

void read_seed_and_offset(const char* call, nb::handle pair, int64_t rng[2]) {
  nb::object const values = nb::steal(pair_or_null(pair));
  if (!values)
    refuse_type("[", call, "] rng must be two integers, (seed, offset), got ", shown(pair));
  rng[0] = read_bits(call, "rng[0] (seed)", PyTuple_GetItem(values.ptr(), 0));
  rng[1] = read_bits(call, "rng[1] (offset)", PyTuple_GetItem(values.ptr(), 1));
}

// The producer's stream is found when q is read, unless the caller names one: an integer (a raw
// cudaStream_t), or what torch, CuPy and cuda.core call a stream.
Call::Call(const char* name, nb::handle stream) {
  session.call = name;
  args.struct_size = sizeof args;
  if (stream.is_none()) return;
  nb::object value = nb::borrow(stream);
  if (nb::hasattr(stream, "__cuda_stream__"))
    value = nb::object(stream.attr("__cuda_stream__")()[1]);
  else if (nb::hasattr(stream, "cuda_stream"))
    value = stream.attr("cuda_stream");
  else if (nb::hasattr(stream, "ptr"))
    value = stream.attr("ptr");
  if (!PyLong_Check(value.ptr()))
    refuse_type("[", name,
                "] stream must be an integer (a cudaStream_t) or a stream object of "
                "torch or CuPy, got ",
                type_text(stream));
  session.stream = reinterpret_cast<void*>(read_bits(name, "stream", value));
  session.stream_given = true;
}

void Call::read_inputs(nb::handle q_array, nb::handle k_array, nb::handle v_array) {
  q.import_lead(q_array, "q", session);
  k.import(k_array, "k", session);
  v.import(v_array, "v", session);
  args.q = q.get();
  args.k = k.get();
  args.v = v.get();
  // Workers that told torch to use one thread mean all of the process, not only torch.
  if (session.lead->family == Family::torch && !session.cuda()) {
    // Not a static with an initialiser: Python may switch threads inside it, and the guard of such
    // a static is a lock that the next thread would wait for with the GIL in its hands.
    static PyObject* get_num_threads = nullptr;
    if (!get_num_threads)
      get_num_threads =
          nb::object(nb::module_::import_("torch").attr("get_num_threads")).release().ptr();
    args.num_threads = nb::cast<int32_t>(nb::handle(get_num_threads)());
  }
}

const DLTensor* Call::read_array(Tensor& tensor, const char* name, nb::handle value) {
  if (value.is_none()) return nullptr;
  tensor.import(value, name, session);
  return tensor.get();
}

void Call::read_window(nb::handle value) {
  nb::object const pair = nb::steal(pair_or_null(value));
  if (!pair)
    refuse_type("[", session.call,
                "] window_size must be a pair (left, right), each an integer or "
                "None for open, got ",
                shown(value));
  nb::handle const left = PyTuple_GetItem(pair.ptr(), 0), right = PyTuple_GetItem(pair.ptr(), 1);
  if (!left.is_none()) {
    window_left_ = read_int(session.call, "window_size[0]", left);
    args.window_left = &window_left_;
  }
  if (!right.is_none()) {
    window_right_ = read_int(session.call, "window_size[1]", right);
    args.window_right = &window_right_;
  }
}

void Call::read_rng(nb::handle value) {
  if (value.is_none()) return;
  if (nb::hasattr(value, "__dlpack__")) {
    args.rng_tensor = read_array(rng_tensor_, "rng", value);
    return;
  }
  read_seed_and_offset(session.call, value, rng_);
  args.rng = rng_;
}

void Call::read_block_mask(nb::handle value) {
  if (value.is_none()) return;
  // The class itself has these attributes too, but its block is no pair.
  nb::object const block = nb::steal(pair_or_null(nb::getattr(value, "block", nb::none())));
  if (!block || !nb::hasattr(value, "kv_num_blocks"))
    refuse_type("[", session.call, "] block_mask must be a flashcore.BlockMask, got ",
                PyType_Check(value.ptr()) ? "a class, " : "",
                PyType_Check(value.ptr()) ? shown(value) : type_text(value),
                ": flashcore.BlockMask.from_dense makes one of a boolean array");
  block_mask_ = {};
  block_mask_.struct_size = sizeof block_mask_;
  block_mask_.block_q =
      read_int32(session.call, "block_mask.block[0]", PyTuple_GetItem(block.ptr(), 0));
  block_mask_.block_k =
      read_int32(session.call, "block_mask.block[1]", PyTuple_GetItem(block.ptr(), 1));
  auto array = [&](Tensor& tensor, const char* name, const char* attribute) {
    block_mask_arrays_.emplace_back(nb::getattr(value, attribute, nb::none()));
    return read_array(tensor, name, block_mask_arrays_.back());
  };
  block_mask_.kv_num_blocks = array(kv_num_blocks_, "block_mask.kv_num_blocks", "kv_num_blocks");
  block_mask_.kv_indices = array(kv_indices_, "block_mask.kv_indices", "kv_indices");
  block_mask_.q_num_blocks = array(q_num_blocks_, "block_mask.q_num_blocks", "q_num_blocks");
  block_mask_.q_indices = array(q_indices_, "block_mask.q_indices", "q_indices");
  args.block_mask = &block_mask_;
}

void Call::read_options(const nb::tuple& values) {
  if (values.size() != kOptionCount)
    refuse_argument("[", session.call, "] ", kOptionCount, " options expected, got ",
                    values.size());
  const char* const call = session.call;
  // The options in the order of kOptionNames: every next() is one of them.
  Py_ssize_t i = 0;
  nb::handle value;
  const char* name = nullptr;
  auto next = [&] {
    name = kOptionNames[i];
    return value = PyTuple_GetItem(values.ptr(), i++);
  };
  auto flag = [&] { return next().is(Py_False) ? false : read_bool(call, name, value); };
  auto array = [&](Tensor& tensor) {
    next();
    return read_array(tensor, name, value);
  };
  auto integer = [&]() -> int64_t { return next().is_none() ? 0 : read_int(call, name, value); };

  args.layout = read_layout(call, next());
  if (!next().is_none()) {
    scale_ = read_double(call, name, value);
    args.scale = &scale_;
  }
  args.causal = flag();
  read_window(next());
  args.align = read_word(call, "align", next(), "bottom_right", "top_left")
                   ? FLASHCORE_TOP_LEFT
                   : FLASHCORE_BOTTOM_RIGHT;
  if (!next().is_none()) {
    if (nb::hasattr(value, "__dlpack__")) {
      args.q_offset_tensor = read_array(q_offset_tensor_, name, value);
    } else {
      q_offset_ = read_int(call, name, value);
      args.q_offset = &q_offset_;
    }
  }
  args.softcap = read_double(call, "softcap", next());
  args.alibi_slopes = array(alibi_slopes_);
  args.bias = array(bias);
  args.mask = array(mask_);
  args.sinks = array(sinks);
  read_block_mask(next());
  args.dropout_p = read_double(call, "dropout_p", next());
  read_rng(next());
  args.cu_seqlens_q = array(cu_seqlens_q_);
  args.cu_seqlens_k = array(cu_seqlens_k_);
  args.max_seqlen_q = integer();
  args.max_seqlen_k = integer();
  args.seqlens_q = array(seqlens_q_);
  args.seqlens_k = array(seqlens_k_);
  args.page_table = array(page_table_);
  args.q_descale = array(q_descale_);
  args.k_descale = array(k_descale_);
  args.v_descale = array(v_descale_);
  args.num_splits = next().is_none() ? 0 : read_int32(call, name, value);
  args.split_size = integer();
  args.deterministic = flag();
}

}  // namespace flashcore::python
