#include "bindings/xla.h"

#include <algorithm>
#include <deque>
#include <vector>

#include "bindings/plan.h"
#include "bindings/xla_call.h"
#include "bindings/xla_handlers.h"

namespace flashcore::python {
namespace {

constexpr const char* kCapsule = "xla._CUSTOM_CALL_TARGET";  // the name that jaxlib asks for

// [(target, platform, capsule)], as jax.ffi.register_ffi_target takes them.
nb::list xla_handlers() {
  nb::list list;
  for (flashcore_direction direction : {FLASHCORE_FORWARD, FLASHCORE_BACKWARD})
    for (DLDeviceType device : {kDLCPU, kDLCUDA}) {
      const char* const target =
          direction == FLASHCORE_FORWARD ? "flashcore_attention" : "flashcore_attention_backward";
      nb::capsule const capsule(reinterpret_cast<void*>(xla::handler(direction, device)), kCapsule);
      list.append(nb::make_tuple(target, device == kDLCPU ? "cpu" : "CUDA", capsule));
    }
  return list;
}

DLDataType dtype_named(const char* call, const std::string& tensor, const std::string& name) {
  struct Known {
    const char* name;
    DLDataType dtype;
  };
  static constexpr Known kKnown[] = {
      {"float16", {kDLFloat, 16, 1}},
      {"bfloat16", {kDLBfloat, 16, 1}},
      {"float32", {kDLFloat, 32, 1}},
      {"float64", {kDLFloat, 64, 1}},
      {"bool", {kDLBool, 8, 1}},
      {"int8", {kDLInt, 8, 1}},
      {"int16", {kDLInt, 16, 1}},
      {"int32", {kDLInt, 32, 1}},
      {"int64", {kDLInt, 64, 1}},
      {"uint8", {kDLUInt, 8, 1}},
      {"uint16", {kDLUInt, 16, 1}},
      {"uint32", {kDLUInt, 32, 1}},
      {"uint64", {kDLUInt, 64, 1}},
      {"complex64", {kDLComplex, 64, 1}},
      {"complex128", {kDLComplex, 128, 1}},
  };
  for (const Known& known : kKnown)
    if (name == known.name) return known.dtype;
  refuse_unsupported("[", call, "] ", tensor, " has dtype ", name,
                     ", which no kernel reads: cast it to float16, bfloat16 or float32");
}

// Tensors of shapes alone. What the core only points at gets an address that is never read, far
// from every other; what it reads on the CPU, as it checks values there, gets values that are
// allowed whenever any are, and that need as much workspace as any.
class Shapes {
 public:
  Shapes(xla::Call& call, DLDevice device) : call_(call), device_(device) {}

  void add(const std::string& name, DLDataType dtype, const std::vector<int64_t>& shape) {
    void* data = reinterpret_cast<void*>(uintptr_t{tensors_.size() + 1} << 52);
    int64_t entries = 1;
    for (int64_t n : shape) entries *= n;
    bool const is_read = name.starts_with("seqlens_") || name.starts_with("cu_seqlens_") ||
                         name.ends_with("_num_blocks") || name == "rng_tensor";
    if (device_.device_type == kDLCPU && is_read)
      data = values_.emplace_back(static_cast<size_t>(std::max<int64_t>(entries, 1)) + 2, 0).data();
    xla::DenseTensor& dense = tensors_.emplace_back();
    dense.set(data, device_, dtype, shape.data(), static_cast<int>(shape.size()));
    call_.set_tensor(name, dense);
  }

  // Packed sequences as long as they may be, then shorter ones.
  void fill_cu_seqlens() {
    fill(call_.args.cu_seqlens_q, call_.args.q, call_.args.max_seqlen_q);
    fill(call_.args.cu_seqlens_k, call_.args.k, call_.args.max_seqlen_k);
  }

 private:
  void fill(const DLTensor* cu, const DLTensor* packed, int64_t bound) {
    if (!cu || cu->ndim != 1 || cu->dtype.bits != 32 || device_.device_type != kDLCPU) return;
    int64_t const total = packed && packed->ndim == 3 ? packed->shape[0] : 0;
    auto* const values = static_cast<int32_t*>(cu->data);
    for (int64_t b = 1; b < cu->shape[0]; ++b)
      values[b] =
          static_cast<int32_t>(std::min<int64_t>(total, bound > 0 ? values[b - 1] + bound : total));
  }

  xla::Call& call_;
  DLDevice device_;
  std::deque<xla::DenseTensor> tensors_;
  std::deque<std::vector<int64_t>> values_;  // 64 bits each: enough for any of them
};

// A call without data. tensors: [(name, dtype, shape)]; attributes: {name: int or float}, without
// the places of tensors.
struct Described {
  Described(bool backward, const std::string& platform, int device_id, const nb::list& tensors,
            const nb::dict& attributes)
      : call(backward ? FLASHCORE_BACKWARD : FLASHCORE_FORWARD),
        shapes(call, {platform == "cuda" ? kDLCUDA : kDLCPU, device_id}) {
    const char* const name = backward ? "attention_backward" : "attention";
    for (nb::handle entry : tensors) add(name, entry);
    for (auto [key, value] : attributes) {
      std::string const option = nb::cast<std::string>(key);
      bool const known = PyFloat_Check(value.ptr())
                             ? call.set_number(option, nb::cast<double>(value))
                             : call.set_number(option, nb::cast<int64_t>(value));
      if (!known) refuse_argument("[", name, "] unknown attribute ", option);
    }
    shapes.fill_cu_seqlens();
  }

  xla::Call call;
  Shapes shapes;

 private:
  void add(const char* name, nb::handle entry) {
    std::string const tensor = nb::cast<std::string>(nb::object(entry[0]));
    std::string const dtype = nb::cast<std::string>(nb::object(entry[1]));
    std::vector<int64_t> shape;
    for (nb::handle n : nb::object(entry[2])) shape.push_back(nb::cast<int64_t>(n));
    if (!call.is_tensor(tensor)) refuse_argument("[", name, "] unknown tensor ", tensor);
    if (shape.size() > xla::DenseTensor::kMaxDims)
      refuse_argument("[", name, "] ", tensor, " has ", shape.size(), " dimensions; at most ",
                      xla::DenseTensor::kMaxDims, " can be read");
    shapes.add(tensor, dtype_named(name, tensor, dtype), shape);
  }
};

uint64_t xla_workspace(bool backward, const std::string& platform, int device_id,
                       const nb::list& tensors, const nb::dict& attributes) {
  Described const described(backward, platform, device_id, tensors, attributes);
  flashcore_plan plan{};
  check(described.call.plan(&plan));
  return plan.workspace_bytes;
}

nb::tuple xla_explain(bool backward, const std::string& platform, int device_id,
                      const nb::list& tensors, const nb::dict& attributes) {
  Described const described(backward, platform, device_id, tensors, attributes);
  return backward ? explain_tuple(described.call.gradients) : explain_tuple(described.call.args);
}

}  // namespace

void bind_xla(nb::module_& m) {
  using nb::literals::operator""_a;
  m.attr("XLA_FFI_VERSIONS") = nb::make_tuple(nb::make_tuple(xla::kMajor, xla::kOldestMinor),
                                              nb::make_tuple(xla::kMajor, xla::kNewestMinor));
  m.def("xla_handlers", xla_handlers);
  m.def("xla_workspace", xla_workspace, "backward"_a, "platform"_a, "device_id"_a, "tensors"_a,
        "attributes"_a);
  m.def("xla_explain", xla_explain, "backward"_a, "platform"_a, "device_id"_a, "tensors"_a,
        "attributes"_a);
}

}  // namespace flashcore::python
