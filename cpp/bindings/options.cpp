#include "bindings/options.h"

#include <limits>
#include <string_view>

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

bool is_bool(nb::handle value) {
  if (PyBool_Check(value.ptr())) return true;
  if (PyFloat_CheckExact(value.ptr()) || PyLong_CheckExact(value.ptr())) return false;
  std::string const type = type_text(value);
  return type == "numpy.bool" || type == "numpy.bool_";
}

// A new reference to value as a Python integer.
nb::object as_integer(const char* call, const char* name, nb::handle value) {
  nb::object integer;
  if (!is_bool(value)) integer = nb::steal(PyNumber_Index(value.ptr()));
  if (!integer) {
    PyErr_Clear();
    refuse_value(call, name, "an integer", value);
  }
  return integer;
}

// A Python integer in [-2^63, 2^64), as its 64 bits.
int64_t read_bits(const char* call, const char* name, nb::handle value) {
  nb::object const integer = as_integer(call, name, value);
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
  if (is_bool(value)) return PyObject_IsTrue(value.ptr()) == 1;
  refuse_value(call, name, "True or False", value);
}

double read_double(const char* call, const char* name, nb::handle value) {
  if (!PyFloat_CheckExact(value.ptr()) && !PyLong_CheckExact(value.ptr()) &&
      (is_bool(value) || nb::hasattr(value, "__dlpack__")))
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
  nb::object const integer = as_integer(call, name, value);
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
  if (!PyLong_Check(value.ptr()) || PyBool_Check(value.ptr()))
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
  nb::object const lengths = nb::steal(pair_or_null(nb::getattr(value, "lengths", nb::none())));
  if (lengths) {
    block_mask_.seqlen_q =
        read_int(session.call, "block_mask.lengths[0]", PyTuple_GetItem(lengths.ptr(), 0));
    block_mask_.seqlen_k =
        read_int(session.call, "block_mask.lengths[1]", PyTuple_GetItem(lengths.ptr(), 1));
  }
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

using Args = flashcore_attention_args;

// How an option of a certain kind becomes a field of args. None is what Python says for "not
// given".
struct Call::Readers {
  template <auto Field>
  static void flag(Call& c, const char* name, nb::handle x) {
    c.args.*Field = read_bool(c.session.call, name, x);
  }
  template <auto Field>
  static void number(Call& c, const char* name, nb::handle x) {
    c.args.*Field = read_double(c.session.call, name, x);
  }
  template <auto Field>
  static void integer(Call& c, const char* name, nb::handle x) {
    c.args.*Field = x.is_none() ? 0 : read_int(c.session.call, name, x);
  }
  template <auto Field, auto Storage>
  static void array(Call& c, const char* name, nb::handle x) {
    c.args.*Field = c.read_array(c.*Storage, name, x);
  }
};

struct Call::Option {
  std::string_view name;
  void (*read)(Call&, const char* name, nb::handle value);
};

// The options that forward, backward and explain share. Extending the list: here and in
// flashcore/options.py.
const Call::Option Call::kOptions[] = {
    {"layout",
     [](Call& c, const char*, nb::handle x) { c.args.layout = read_layout(c.session.call, x); }},
    {"scale",
     [](Call& c, const char* name, nb::handle x) {
       if (x.is_none()) return;
       c.scale_ = read_double(c.session.call, name, x);
       c.args.scale = &c.scale_;
     }},
    {"causal", Readers::flag<&Args::causal>},
    {"window_size", [](Call& c, const char*, nb::handle x) { c.read_window(x); }},
    {"align",
     [](Call& c, const char* name, nb::handle x) {
       c.args.align = read_word(c.session.call, name, x, "bottom_right", "top_left")
                          ? FLASHCORE_TOP_LEFT
                          : FLASHCORE_BOTTOM_RIGHT;
     }},
    {"q_offset",
     [](Call& c, const char* name, nb::handle x) {
       if (x.is_none()) return;
       if (nb::hasattr(x, "__dlpack__")) {
         c.args.q_offset_tensor = c.read_array(c.q_offset_tensor_, name, x);
       } else {
         c.q_offset_ = read_int(c.session.call, name, x);
         c.args.q_offset = &c.q_offset_;
       }
     }},
    {"softcap", Readers::number<&Args::softcap>},
    {"alibi_slopes", Readers::array<&Args::alibi_slopes, &Call::alibi_slopes_>},
    {"bias", Readers::array<&Args::bias, &Call::bias>},
    {"mask", Readers::array<&Args::mask, &Call::mask_>},
    {"sinks", Readers::array<&Args::sinks, &Call::sinks>},
    {"block_mask", [](Call& c, const char*, nb::handle x) { c.read_block_mask(x); }},
    {"dropout_p", Readers::number<&Args::dropout_p>},
    {"rng", [](Call& c, const char*, nb::handle x) { c.read_rng(x); }},
    {"cu_seqlens_q", Readers::array<&Args::cu_seqlens_q, &Call::cu_seqlens_q_>},
    {"cu_seqlens_k", Readers::array<&Args::cu_seqlens_k, &Call::cu_seqlens_k_>},
    {"max_seqlen_q", Readers::integer<&Args::max_seqlen_q>},
    {"max_seqlen_k", Readers::integer<&Args::max_seqlen_k>},
    {"seqlens_q", Readers::array<&Args::seqlens_q, &Call::seqlens_q_>},
    {"seqlens_k", Readers::array<&Args::seqlens_k, &Call::seqlens_k_>},
    {"page_table", Readers::array<&Args::page_table, &Call::page_table_>},
    {"q_descale", Readers::array<&Args::q_descale, &Call::q_descale_>},
    {"k_descale", Readers::array<&Args::k_descale, &Call::k_descale_>},
    {"v_descale", Readers::array<&Args::v_descale, &Call::v_descale_>},
    {"num_splits",
     [](Call& c, const char* name, nb::handle x) {
       c.args.num_splits = x.is_none() ? 0 : read_int32(c.session.call, name, x);
     }},
    {"split_size", Readers::integer<&Args::split_size>},
    {"deterministic", Readers::flag<&Args::deterministic>},
};

nb::tuple Call::option_names() {
  nb::list names;
  for (const Option& option : kOptions) names.append(option.name.data());
  return nb::tuple(names);
}

void Call::read_options(nb::handle options) {
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(options.ptr(), &at, &key, &value);) {
    Py_ssize_t size = 0;
    const char* const characters = PyUnicode_AsUTF8AndSize(key, &size);
    PyErr_Clear();  // lone surrogates: no option has them
    std::string_view const given =
        characters ? std::string_view(characters, static_cast<size_t>(size)) : "";
    const Option* option = std::begin(kOptions);
    while (option != std::end(kOptions) && option->name != given) ++option;
    if (option == std::end(kOptions))
      throw nb::type_error(
          text(session.call, "() got an unexpected keyword argument ", shown(key)).c_str());
    option->read(*this, option->name.data(), value);
  }
}

}  // namespace flashcore::python
