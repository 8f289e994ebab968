// flashcore._core: the functions behind flashcore/api.py. Conversion only: what the arguments mean
// and whether they fit together is the core's business (validate.h).
#include <nanobind/nanobind.h>

#include <deque>

#include "bindings/allocate.h"
#include "bindings/gil.h"
#include "bindings/options.h"
#include "bindings/plan.h"
#include "bindings/xla.h"

namespace flashcore::python {
namespace {

DLDataType statistics_dtype(const Tensor& q) {
  bool const f64 = q->dtype.code == kDLFloat && q->dtype.bits == 64;
  return {kDLFloat, static_cast<uint8_t>(f64 ? 64 : 32), 1};
}

DLDataType output_dtype(const char* call, nb::handle out_dtype, DLDataType inherited) {
  if (out_dtype.is_none()) return inherited;
  std::string const name = read_dtype_name(call, out_dtype);
  if (name == "bfloat16") return {kDLBfloat, 16, 1};
  return {kDLFloat, static_cast<uint8_t>(std::stoi(name.substr(5))), 1};
}

bool same_dtype(DLDataType a, DLDataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// (B, Hq, Sq), or (Hq, total_q) for packed tensors.
Shape statistics_shape(const flashcore_attention_args& args) {
  const int64_t* const n = args.q->shape;
  if (args.cu_seqlens_q) return {n[1], n[0]};
  if (args.layout == FLASHCORE_BSHD) return {n[0], n[2], n[1]};
  return {n[0], n[1], n[2]};
}

// out has q's shape with v's head_dim.
void make_out(Output& out, const Call& call, DLDataType dtype) {
  const DLTensor& q = *call.q;
  int64_t const head_dim_v = call.v->shape[call.v->ndim - 1];
  if (q.shape[q.ndim - 1] == head_dim_v && same_dtype(q.dtype, dtype))
    return out.make_like("out", call.session, call.session.like, call.q);
  Shape shape(q.shape, q.shape + q.ndim);
  shape.back() = head_dim_v;
  out.make("out", call.session, shape, dtype);
}

// What the caller gave for an output must have the dtype asked for with out_dtype.
void check_out_dtype(const Call& call, nb::handle out_dtype, const Output& out) {
  if (out_dtype.is_none() || !out.tensor.given()) return;
  DLDataType const want = output_dtype(call.session.call, out_dtype, call.q->dtype);
  if (!same_dtype(out.tensor->dtype, want))
    refuse_argument("[", call.session.call, "] out is ", dtype_name(out.tensor->dtype),
                    " but out_dtype asks for ", dtype_name(want));
}

// Whether the kernel takes less time than giving the GIL away and taking it back. Calls on a device
// are never brief: a launch may wait for room in the stream.
bool brief(const Call& call) {
  if (call.session.cuda()) return false;
  auto elements = [](const DLTensor& t) {
    int64_t n = 1;
    for (int d = 0; d < t.ndim; ++d) n *= t.shape[d];
    return n;
  };
  constexpr int64_t kLargest = 1 << 12;  // a few microseconds at most
  int64_t const q = elements(*call.q), k = elements(*call.k);
  return q <= kLargest && k <= kLargest && q * k <= kLargest;
}

nb::object attention(nb::handle q, nb::handle k, nb::handle v, const nb::dict& options,
                     nb::handle out_array, nb::handle out_dtype, nb::handle return_lse,
                     nb::handle return_max_logits, nb::handle stream) {
  Call call("attention", stream);
  call.read_inputs(q, k, v);
  call.read_options(options);
  bool const want_lse = read_bool("attention", "return_lse", return_lse);
  bool const want_max = read_bool("attention", "return_max_logits", return_max_logits);
  Output out, lse, max_logits;
  if (!out_array.is_none()) out.use(out_array, "out", call.session);
  check_out_dtype(call, out_dtype, out);
  DLDataType const dtype = output_dtype("attention", out_dtype, call.q->dtype);
  call.args.out = out.tensor.get();

  flashcore_plan plan{};
  plan.struct_size = sizeof plan;
  check(flashcore_attention_plan(&call.args, &plan));

  if (!out.tensor.given()) make_out(out, call, dtype);
  if (want_lse)
    lse.make("lse", call.session, statistics_shape(call.args), statistics_dtype(call.q));
  if (want_max)
    max_logits.make("max_logits", call.session, statistics_shape(call.args),
                    statistics_dtype(call.q));
  call.args.out = out.tensor.get();
  call.args.lse = lse.tensor.get();
  call.args.max_logits = max_logits.tensor.get();
  Workspace const workspace(call.session, plan.workspace_bytes);
  auto const compute = [&] {
    return flashcore_attention_forward(&call.args, workspace.data(), plan.workspace_bytes,
                                       call.session.stream);
  };
  check(brief(call) ? compute() : without_gil(compute));
  nb::object result = out.take(call.session);
  if (!want_lse && !want_max) return result;
  return nb::make_tuple(result, lse.take(call.session), max_logits.take(call.session));
}

// out.sum() and the like have a gradient that is one expanded number. The kernels read rows of
// consecutive values, so this one input is packed when its last stride is 0.
nb::object packed_dout(nb::handle dout, Tensor& tensor, const Session& session) {
  int const last = tensor->ndim - 1;
  if (last < 0 || tensor->shape[last] < 2 || tensor->strides[last] != 0) return nb::borrow(dout);
  nb::object const packed = nb::module_::import_("flashcore._allocate").attr("packed")(dout);
  tensor.import(packed, "dout", session);
  return packed;
}

nb::object attention_backward(nb::handle dout_array, nb::handle q, nb::handle k, nb::handle v,
                              nb::handle out_array, nb::handle lse_array, const nb::dict& options,
                              nb::handle dlse_array, nb::handle dq_array, nb::handle dk_array,
                              nb::handle dv_array, nb::handle accumulate, nb::handle stream) {
  const char* const name = "attention_backward";
  Call call(name, stream);
  call.read_inputs(q, k, v);
  call.read_options(options);
  const Session& session = call.session;
  Tensor dout, out, lse, dlse;
  dout.import(dout_array, "dout", session);
  nb::object const dout_alive = packed_dout(dout_array, dout, session);
  out.import(out_array, "out", session);
  lse.import(lse_array, "lse", session);
  call.args.out = out.get();
  call.args.lse = lse.get();

  flashcore_attention_backward_args args{};
  args.struct_size = sizeof args;
  args.forward = &call.args;
  args.accumulate = read_bool(name, "accumulate", accumulate);
  args.dout = dout.get();
  if (!dlse_array.is_none()) {
    dlse.import(dlse_array, "dlse", session);
    args.dlse = dlse.get();
  }

  Output dq, dk, dv, dbias, dsinks;
  auto use = [&](Output& to, const char* what, nb::handle given) {
    if (!given.is_none()) to.use(given, what, session);
    return to.tensor.get();
  };
  args.dq = use(dq, "dq", dq_array);
  args.dk = use(dk, "dk", dk_array);
  args.dv = use(dv, "dv", dv_array);

  auto make_missing = [&](Output& to, const char* what, nb::handle like, const Tensor& source) {
    if (!to.tensor.given()) to.make_like(what, session, like, source, args.accumulate != 0);
    return to.tensor.get();
  };
  // A plan first, without the gradients still to be made: it checks every input.
  flashcore_plan plan{};
  plan.struct_size = sizeof plan;
  check(flashcore_attention_backward_plan(&args, &plan));
  args.dq = make_missing(dq, "dq", q, call.q);
  args.dk = make_missing(dk, "dk", k, call.k);
  args.dv = make_missing(dv, "dv", v, call.v);
  if (call.bias.given()) {
    Shape const shape(call.bias->shape, call.bias->shape + call.bias->ndim);
    dbias.make("dbias", session, shape, statistics_dtype(call.q), args.accumulate != 0);
    args.dbias = dbias.tensor.get();
  }
  if (call.sinks.given()) {
    Shape const shape(call.sinks->shape, call.sinks->shape + call.sinks->ndim);
    dsinks.make("dsinks", session, shape, call.sinks->dtype, args.accumulate != 0);
    args.dsinks = dsinks.tensor.get();
  }
  // And one with them: the workspace depends on which gradients there are.
  check(flashcore_attention_backward_plan(&args, &plan));
  Workspace const workspace(session, plan.workspace_bytes);
  check(without_gil([&] {
    return flashcore_attention_backward(&args, workspace.data(), plan.workspace_bytes,
                                        session.stream);
  }));
  return nb::make_tuple(dq.take(session), dk.take(session), dv.take(session), dbias.take(session),
                        dsinks.take(session));
}

nb::tuple explain(nb::handle q, nb::handle k, nb::handle v, const nb::dict& options,
                  bool backward) {
  Call call(backward ? "attention_backward" : "attention", nb::none());
  call.read_inputs(q, k, v);
  call.read_options(options);
  flashcore_attention_backward_args args{};
  args.struct_size = sizeof args;
  args.forward = &call.args;
  return backward ? explain_tuple(args) : explain_tuple(call.args);
}

// The items of a list, a tuple or any other sequence.
nb::object items(const char* name, nb::handle sequence) {
  nb::object tuple;
  if (PySequence_Check(sequence.ptr())) tuple = nb::steal(PySequence_Tuple(sequence.ptr()));
  if (PyErr_Occurred()) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw nb::python_error();
    PyErr_Clear();
  }
  if (!tuple)
    refuse_type("[merge] ", name, " must be a sequence of arrays, got ", type_text(sequence));
  return tuple;
}

nb::tuple merge(nb::handle out_sequence, nb::handle lse_sequence, nb::handle layout,
                nb::handle out_dtype, nb::handle stream) {
  Call call("merge", stream);  // for its session and stream; merge has no options of its own
  Session& session = call.session;
  nb::object const out_arrays = items("outs", out_sequence),
                   lse_arrays = items("lses", lse_sequence);
  size_t const count = nb::len(out_arrays);
  if (count == 0 || count != nb::len(lse_arrays))
    refuse_argument("[merge] outs and lses must be sequences of one length, at least 1, got ",
                    count, " and ", nb::len(lse_arrays));
  std::deque<Tensor> outs(count), lses(count);
  std::vector<const DLTensor*> out_pointers, lse_pointers;
  for (size_t s = 0; s < count; ++s) {
    nb::handle const out = PyTuple_GetItem(out_arrays.ptr(), static_cast<Py_ssize_t>(s));
    nb::handle const lse = PyTuple_GetItem(lse_arrays.ptr(), static_cast<Py_ssize_t>(s));
    std::string const out_name = text("outs[", s, "]"), lse_name = text("lses[", s, "]");
    if (s == 0)
      outs[s].import_lead(out, out_name.c_str(), session);
    else
      outs[s].import(out, out_name.c_str(), session);
    lses[s].import(lse, lse_name.c_str(), session);
    out_pointers.push_back(outs[s].get());
    lse_pointers.push_back(lses[s].get());
  }
  flashcore_merge_args args{};
  args.struct_size = sizeof args;
  args.layout = read_layout("merge", layout);
  args.count = static_cast<int32_t>(count);
  args.outs = out_pointers.data();
  args.lses = lse_pointers.data();
  auto shape_of = [](const Tensor& t) { return Shape(t->shape, t->shape + t->ndim); };
  Output out, lse;
  DLDataType const inherited = outs[0]->dtype;
  out.make("out", session, shape_of(outs[0]), output_dtype("merge", out_dtype, inherited));
  lse.make("lse", session, shape_of(lses[0]), lses[0]->dtype);
  args.out = out.tensor.get();
  args.lse = lse.tensor.get();
  check(without_gil([&] { return flashcore_merge(&args, session.stream); }));
  return nb::make_tuple(out.take(session), lse.take(session));
}

void dropout_mask(nb::handle keep_array, nb::handle p, nb::handle rng, nb::handle stream) {
  Call call("dropout_mask", stream);
  Session& session = call.session;
  Tensor keep;
  keep.import_lead(keep_array, "out", session, Access::write);
  DLDataType const type = keep->dtype;
  if (type.bits != 8 || (type.code != kDLBool && type.code != kDLUInt))
    refuse_argument("[dropout_mask] out must be bool or uint8, got ", dtype_name(type));
  double const dropout_p = read_double("dropout_mask", "p", p);
  if (!(dropout_p >= 0.0 && dropout_p < 1.0))
    refuse_argument("[dropout_mask] p must be in [0, 1), got ", dropout_p);
  int64_t values[2];
  read_seed_and_offset("dropout_mask", rng, values);
  check(without_gil(
      [&] { return flashcore_dropout_mask(keep.get(), dropout_p, values, session.stream); }));
}

nb::list kernels() {
  nb::list list;
  for (int32_t i = 0; i < flashcore_kernel_count(); ++i) {
    flashcore_kernel_info info{};
    info.struct_size = sizeof info;
    check(flashcore_kernel_at(i, &info));
    list.append(kernel_tuple(info));
  }
  return list;
}

nb::list devices() {
  nb::list list;
  for (int32_t i = 0; i < flashcore_device_count(); ++i) {
    flashcore_device_info info{};
    info.struct_size = sizeof info;
    check(flashcore_device_at(i, &info));
    const char* const kind = info.device.device_type == kDLCUDA ? "cuda" : "cpu";
    list.append(nb::make_tuple(kind, info.device.device_id, nb::str(info.name), nb::str(info.isa),
                               info.multiprocessors, info.memory_bytes));
  }
  return list;
}

// Refusal -> flashcore.errors.<class>. Errors are rare, so the class is looked up then.
void translate(const std::exception_ptr& error, void*) {
  try {
    std::rethrow_exception(error);
  } catch (const Refusal& refusal) {
    nb::object const type = nb::module_::import_("flashcore.errors").attr(refusal.python_class);
    PyErr_SetString(type.ptr(), refusal.what());
  }
}

}  // namespace
}  // namespace flashcore::python

NB_MODULE(_core, m) {
  using namespace flashcore::python;
  using nb::literals::operator""_a;
  nb::register_exception_translator(translate);

  m.attr("OPTION_NAMES") = Call::option_names();
  m.attr("VERSION") = flashcore_version();

  // Anything may be passed anywhere: what is refused is refused with our own words.
  m.def("attention", attention, "q"_a.none(), "k"_a.none(), "v"_a.none(), "options"_a,
        "out"_a.none(), "out_dtype"_a.none(), "return_lse"_a.none(), "return_max_logits"_a.none(),
        "stream"_a.none());
  m.def("attention_backward", attention_backward, "dout"_a.none(), "q"_a.none(), "k"_a.none(),
        "v"_a.none(), "out"_a.none(), "lse"_a.none(), "options"_a, "dlse"_a.none(), "dq"_a.none(),
        "dk"_a.none(), "dv"_a.none(), "accumulate"_a.none(), "stream"_a.none());
  m.def("explain", explain, "q"_a.none(), "k"_a.none(), "v"_a.none(), "options"_a, "backward"_a);
  m.def("merge", merge, "outs"_a.none(), "lses"_a.none(), "layout"_a.none(), "out_dtype"_a.none(),
        "stream"_a.none());
  m.def("dropout_mask", dropout_mask, "keep"_a.none(), "p"_a.none(), "rng"_a.none(),
        "stream"_a.none());
  m.def("kernels", kernels);
  m.def("devices", devices);
  m.def(
      "set_num_threads",
      [](nb::handle n) { flashcore_set_num_threads(read_int32("set_num_threads", "n", n)); },
      "n"_a.none());
  m.def("get_num_threads", [] { return flashcore_get_num_threads(); });
  bind_xla(m);
}
