// flashcore in C++20: a header-only face over flashcore.h. Nothing here computes; every function
// fills a C structure, calls the library and turns a failure into flashcore::Error.
//
//     flashcore::attention({.q = q, .k = k, .v = v, .out = out, .causal = true});
//
// Fields are named as in docs/api.md, stand in the order of the structures below (a rule of
// designated initialisers), and those that are left out keep their default. Views own nothing: the
// caller's arrays must outlive the call (on CUDA, the work that the call enqueued).
#ifndef FLASHCORE_FLASHCORE_HPP_
#define FLASHCORE_FLASHCORE_HPP_

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "flashcore.h"

namespace flashcore {
inline namespace v1 {

class Error : public std::runtime_error {
 public:
  Error(flashcore_status status, const std::string& text)
      : std::runtime_error(text), status_(status) {}
  flashcore_status status() const noexcept { return status_; }

 private:
  flashcore_status status_;
};

// ---- element types and devices ------------------------------------------------------------------

inline constexpr DLDataType float16{kDLFloat, 16, 1};
inline constexpr DLDataType bfloat16{kDLBfloat, 16, 1};
inline constexpr DLDataType float32{kDLFloat, 32, 1};
inline constexpr DLDataType float64{kDLFloat, 64, 1};
inline constexpr DLDataType int32{kDLInt, 32, 1};
inline constexpr DLDataType int64{kDLInt, 64, 1};
inline constexpr DLDataType uint8{kDLUInt, 8, 1};
inline constexpr DLDataType boolean{kDLBool, 8, 1};

// The element type of a C++ type. Specialise it for a 16-bit float of your own, e.g.
//     template <> inline constexpr DLDataType flashcore::dtype_of<__nv_bfloat16> =
//     flashcore::bfloat16;
template <class T>
inline constexpr DLDataType dtype_of = [] {
  static_assert(!sizeof(T), "no element type is known for T: specialise flashcore::dtype_of<T>");
  return DLDataType{};
}();
template <>
inline constexpr DLDataType dtype_of<float> = float32;
template <>
inline constexpr DLDataType dtype_of<double> = float64;
template <>
inline constexpr DLDataType dtype_of<std::int32_t> = int32;
template <>
inline constexpr DLDataType dtype_of<std::int64_t> = int64;
template <>
inline constexpr DLDataType dtype_of<std::uint8_t> = uint8;
template <>
inline constexpr DLDataType dtype_of<bool> = boolean;

inline constexpr DLDevice cpu{kDLCPU, 0};
constexpr DLDevice cuda(std::int32_t id = 0) { return {kDLCUDA, id}; }

// ---- tensor views -------------------------------------------------------------------------------

// A pointer with an element type, a shape, strides (in elements) and a device. Default-constructed
// it means "not given". Inputs are taken as ConstTensorView, outputs as TensorView.
template <bool kConst>
class BasicTensorView {
  using Void = std::conditional_t<kConst, const void, void>;

 public:
  static constexpr int kMaxRank = 8;

  BasicTensorView() = default;

  template <class T>
    requires(!std::is_void_v<T> && (kConst || !std::is_const_v<T>))
  BasicTensorView(T* data, std::initializer_list<std::int64_t> shape, DLDevice device = cpu)
      : BasicTensorView(data, dtype_of<std::remove_const_t<T>>, shape, device) {}

  // Row-major and packed.
  BasicTensorView(Void* data, DLDataType dtype, std::span<const std::int64_t> shape,
                  DLDevice device = cpu)
      : BasicTensorView(data, dtype, shape, {}, device) {
    std::int64_t stride = 1;
    for (int i = ndim_; i-- > 0; stride *= shape_[i]) strides_[i] = stride;
  }
  BasicTensorView(Void* data, DLDataType dtype, std::initializer_list<std::int64_t> shape,
                  DLDevice device = cpu)
      : BasicTensorView(data, dtype, std::span(shape.begin(), shape.size()), device) {}

  // Any strides. Attention needs stride 1 in the last dimension of q, k, v and out.
  BasicTensorView(Void* data, DLDataType dtype, std::span<const std::int64_t> shape,
                  std::span<const std::int64_t> strides, DLDevice device)
      : data_(data), dtype_(dtype), device_(device), ndim_(static_cast<int>(shape.size())) {
    if (shape.size() > kMaxRank || (!strides.empty() && strides.size() != shape.size()))
      throw Error(FLASHCORE_INVALID_ARGUMENT,
                  "TensorView: a shape has at most 8 dimensions and as many strides, got " +
                      std::to_string(shape.size()) + " and " + std::to_string(strides.size()));
    for (int i = 0; i < ndim_; ++i) shape_[i] = shape[i];
    for (std::size_t i = 0; i < strides.size(); ++i) strides_[i] = strides[i];
  }
  BasicTensorView(Void* data, DLDataType dtype, std::initializer_list<std::int64_t> shape,
                  std::initializer_list<std::int64_t> strides, DLDevice device = cpu)
      : BasicTensorView(data, dtype, std::span(shape.begin(), shape.size()),
                        std::span(strides.begin(), strides.size()), device) {}

  // A tensor that came through DLPack.
  BasicTensorView(const DLTensor& t)  // NOLINT(google-explicit-constructor)
      : BasicTensorView(static_cast<std::byte*>(t.data) + t.byte_offset, t.dtype,
                        std::span<const std::int64_t>(t.shape, t.ndim), t.device) {
    for (int i = 0; t.strides && i < ndim_; ++i) strides_[i] = t.strides[i];
  }

  // A mutable view is a const view.
  template <bool kOther>
    requires(kConst && !kOther)
  BasicTensorView(const BasicTensorView<kOther>& other)  // NOLINT(google-explicit-constructor)
      : BasicTensorView(other.data(), other.dtype(), other.shape(), other.strides(),
                        other.device()) {}

  explicit operator bool() const { return ndim_ > 0; }
  Void* data() const { return data_; }
  DLDataType dtype() const { return dtype_; }
  DLDevice device() const { return device_; }
  std::span<const std::int64_t> shape() const { return {shape_.data(), std::size_t(ndim_)}; }
  std::span<const std::int64_t> strides() const { return {strides_.data(), std::size_t(ndim_)}; }

  // The C structure. It points into this view and is valid while the view lives.
  DLTensor dl() const {
    DLTensor t{};
    t.data = const_cast<void*>(static_cast<const void*>(data_));
    t.device = device_;
    t.ndim = ndim_;
    t.dtype = dtype_;
    t.shape = const_cast<std::int64_t*>(shape_.data());
    t.strides = const_cast<std::int64_t*>(strides_.data());
    return t;
  }

 private:
  Void* data_ = nullptr;
  DLDataType dtype_{};
  DLDevice device_ = cpu;
  int ndim_ = 0;
  std::array<std::int64_t, kMaxRank> shape_{};
  std::array<std::int64_t, kMaxRank> strides_{};
};

using TensorView = BasicTensorView<false>;
using ConstTensorView = BasicTensorView<true>;

// ---- arguments ----------------------------------------------------------------------------------

enum class Layout { bshd = FLASHCORE_BSHD, bhsd = FLASHCORE_BHSD };
enum class Align { bottom_right = FLASHCORE_BOTTOM_RIGHT, top_left = FLASHCORE_TOP_LEFT };

struct Rng {
  std::int64_t seed = 0;
  std::int64_t offset = 0;
};

struct BlockMask {
  std::int32_t block_q = 0;
  std::int32_t block_k = 0;
  std::int64_t seqlen_q = 0, seqlen_k = 0;
  ConstTensorView kv_num_blocks{};
  ConstTensorView kv_indices{};
  ConstTensorView q_num_blocks{};
  ConstTensorView q_indices{};
};

// Shapes and meaning of every field: flashcore_attention_args in flashcore.h.
struct AttentionArgs {
  ConstTensorView q{}, k{}, v{};
  TensorView out{}, lse{}, max_logits{};
  Layout layout = Layout::bshd;

  std::optional<double> scale{};
  bool causal = false;
  std::optional<std::int64_t> window_left{}, window_right{};
  Align align = Align::bottom_right;
  std::optional<std::int64_t> q_offset{};
  ConstTensorView q_offset_tensor{};

  double softcap = 0.0;
  ConstTensorView alibi_slopes{}, bias{}, mask{}, sinks{};
  std::optional<BlockMask> block_mask{};

  double dropout_p = 0.0;
  std::optional<Rng> rng{};
  ConstTensorView rng_tensor{};

  ConstTensorView cu_seqlens_q{}, cu_seqlens_k{};
  std::int64_t max_seqlen_q = 0, max_seqlen_k = 0;
  ConstTensorView seqlens_q{}, seqlens_k{};

  std::int32_t num_splits = 0;
  std::int64_t split_size = 0;
  bool deterministic = false;
  std::int32_t num_threads = 0;
};

struct BackwardArgs {
  AttentionArgs forward{};  // the same options; out and lse are inputs here
  ConstTensorView dout{}, dlse{};
  TensorView dq{}, dk{}, dv{}, dbias{}, dsinks{};
  bool accumulate = false;
};

struct MergeArgs {
  std::vector<ConstTensorView> outs{}, lses{};
  TensorView out{}, lse{};
  Layout layout = Layout::bshd;
};

// Scratch memory on q's device, aligned to FLASHCORE_WORKSPACE_ALIGNMENT. Size: plan().
struct Workspace {
  void* data = nullptr;
  std::size_t bytes = 0;
};

using Plan = flashcore_plan;
using KernelInfo = flashcore_kernel_info;
using DeviceInfo = flashcore_device_info;

struct Considered {
  KernelInfo kernel{};
  std::string refusal{};  // empty: this kernel would run the call
};

// ---- from C++ to C ------------------------------------------------------------------------------

namespace detail {

inline void check(flashcore_status status) {
  if (status != FLASHCORE_OK) throw Error(status, flashcore_last_error());
}

template <class T>
T sized() {
  T t{};
  t.struct_size = sizeof(T);
  return t;
}

// The C form of an argument structure. It points into itself and into args, which must outlive it.
class Call {
 public:
  explicit Call(const AttentionArgs& args) { fill(args); }
  explicit Call(const BackwardArgs& args) {
    fill(args.forward);
    backward.forward = &forward;
    backward.accumulate = args.accumulate;
    backward.dout = tensor(args.dout);
    backward.dlse = tensor(args.dlse);
    backward.dq = tensor(args.dq);
    backward.dk = tensor(args.dk);
    backward.dv = tensor(args.dv);
    backward.dbias = tensor(args.dbias);
    backward.dsinks = tensor(args.dsinks);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  flashcore_attention_args forward = sized<flashcore_attention_args>();
  flashcore_attention_backward_args backward = sized<flashcore_attention_backward_args>();

 private:
  template <bool kConst>
  DLTensor* tensor(const BasicTensorView<kConst>& view) {
    if (!view) return nullptr;
    tensors_[used_] = view.dl();
    return &tensors_[used_++];
  }

  template <class T>
  static const T* optional(const std::optional<T>& value) {
    return value ? &*value : nullptr;
  }

  void fill(const AttentionArgs& a) {
    flashcore_attention_args& c = forward;
    c.layout = static_cast<flashcore_layout>(a.layout);
    c.q = tensor(a.q);
    c.k = tensor(a.k);
    c.v = tensor(a.v);
    c.out = tensor(a.out);
    c.lse = tensor(a.lse);
    c.max_logits = tensor(a.max_logits);
    c.scale = optional(a.scale);
    c.causal = a.causal;
    c.align = static_cast<flashcore_align>(a.align);
    c.window_left = optional(a.window_left);
    c.window_right = optional(a.window_right);
    c.q_offset = optional(a.q_offset);
    c.q_offset_tensor = tensor(a.q_offset_tensor);
    c.softcap = a.softcap;
    c.alibi_slopes = tensor(a.alibi_slopes);
    c.bias = tensor(a.bias);
    c.mask = tensor(a.mask);
    c.sinks = tensor(a.sinks);
    if (a.block_mask) {
      block_mask_.block_q = a.block_mask->block_q;
      block_mask_.block_k = a.block_mask->block_k;
      block_mask_.seqlen_q = a.block_mask->seqlen_q;
      block_mask_.seqlen_k = a.block_mask->seqlen_k;
      block_mask_.kv_num_blocks = tensor(a.block_mask->kv_num_blocks);
      block_mask_.kv_indices = tensor(a.block_mask->kv_indices);
      block_mask_.q_num_blocks = tensor(a.block_mask->q_num_blocks);
      block_mask_.q_indices = tensor(a.block_mask->q_indices);
      c.block_mask = &block_mask_;
    }
    c.dropout_p = a.dropout_p;
    if (a.rng) {
      rng_ = {a.rng->seed, a.rng->offset};
      c.rng = rng_.data();
    }
    c.rng_tensor = tensor(a.rng_tensor);
    c.cu_seqlens_q = tensor(a.cu_seqlens_q);
    c.cu_seqlens_k = tensor(a.cu_seqlens_k);
    c.max_seqlen_q = a.max_seqlen_q;
    c.max_seqlen_k = a.max_seqlen_k;
    c.seqlens_q = tensor(a.seqlens_q);
    c.seqlens_k = tensor(a.seqlens_k);
    c.num_splits = a.num_splits;
    c.split_size = a.split_size;
    c.deterministic = a.deterministic;
    c.num_threads = a.num_threads;
  }

  static constexpr int kMaxTensors = 32;  // more than both structures have
  std::array<DLTensor, kMaxTensors> tensors_{};
  int used_ = 0;
  flashcore_block_mask block_mask_ = sized<flashcore_block_mask>();
  std::array<std::int64_t, 2> rng_{};
};

// Scratch for one CPU call.
class HostWorkspace {
 public:
  explicit HostWorkspace(std::size_t bytes)
      : data_(bytes ? ::operator new(bytes, kAlignment) : nullptr), bytes_(bytes) {}
  operator Workspace() const { return {data_.get(), bytes_}; }

 private:
  static constexpr std::align_val_t kAlignment{FLASHCORE_WORKSPACE_ALIGNMENT};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<void, Free> data_;
  std::size_t bytes_;
};

// Runs launch(workspace) with the caller's workspace, or with one made here for CPU tensors. CUDA
// memory belongs to the caller: the library never allocates on a device.
template <class Launch>
void with_workspace(std::string_view what, DLDevice device, Workspace given, const Plan& plan,
                    Launch&& launch) {
  if (given.data || plan.workspace_bytes == 0) return check(launch(given));
  if (device.device_type != kDLCPU)
    throw Error(FLASHCORE_INVALID_ARGUMENT,
                std::string(what) + ": workspace: this call needs " +
                    std::to_string(plan.workspace_bytes) +
                    " bytes on q's device and got none; allocate plan.workspace_bytes there and "
                    "pass {pointer, bytes}");
  HostWorkspace const scratch(plan.workspace_bytes);
  check(launch(scratch));
}

inline void collect(void* user, const flashcore_kernel_info* kernel, const char* refusal) noexcept {
  static_cast<std::vector<Considered>*>(user)->push_back({*kernel, refusal ? refusal : ""});
}

}  // namespace detail

// ---- calls --------------------------------------------------------------------------------------

// What a call would do, and the workspace it needs. out (and the gradients) may be left out.
inline Plan plan(const AttentionArgs& args) {
  detail::Call const call(args);
  Plan plan = detail::sized<Plan>();
  detail::check(flashcore_attention_plan(&call.forward, &plan));
  return plan;
}
inline Plan plan_backward(const BackwardArgs& args) {
  detail::Call const call(args);
  Plan plan = detail::sized<Plan>();
  detail::check(flashcore_attention_backward_plan(&call.backward, &plan));
  return plan;
}

// out (and lse, max_logits when given) <- attention. stream: a cudaStream_t; ignored on the CPU.
inline void attention(const AttentionArgs& args, void* stream = nullptr, Workspace workspace = {}) {
  detail::Call const call(args);
  Plan plan = detail::sized<Plan>();
  if (!workspace.data) detail::check(flashcore_attention_plan(&call.forward, &plan));
  detail::with_workspace("attention", args.q.device(), workspace, plan, [&](Workspace w) {
    return flashcore_attention_forward(&call.forward, w.data, w.bytes, stream);
  });
}

// The gradients that are given <- backward of attention.
inline void attention_backward(const BackwardArgs& args, void* stream = nullptr,
                               Workspace workspace = {}) {
  detail::Call const call(args);
  Plan plan = detail::sized<Plan>();
  if (!workspace.data) detail::check(flashcore_attention_backward_plan(&call.backward, &plan));
  detail::with_workspace(
      "attention_backward", args.forward.q.device(), workspace, plan, [&](Workspace w) {
        return flashcore_attention_backward(&call.backward, w.data, w.bytes, stream);
      });
}

// Every kernel of q's device in order of preference, each with the reason it would not run the
// call.
inline std::vector<Considered> explain(const AttentionArgs& args) {
  detail::Call const call(args);
  std::vector<Considered> list;
  detail::check(flashcore_attention_explain(&call.forward, detail::collect, &list));
  return list;
}
inline std::vector<Considered> explain_backward(const BackwardArgs& args) {
  detail::Call const call(args);
  std::vector<Considered> list;
  detail::check(flashcore_attention_backward_explain(&call.backward, detail::collect, &list));
  return list;
}

// Combines partial results over disjoint keys: out and lse as if all keys had been seen at once.
inline void merge(const MergeArgs& args, void* stream = nullptr) {
  if (args.outs.size() != args.lses.size())
    throw Error(FLASHCORE_INVALID_ARGUMENT, "merge: outs and lses must come in pairs, got " +
                                                std::to_string(args.outs.size()) + " and " +
                                                std::to_string(args.lses.size()));
  std::size_t const n = args.outs.size();
  std::vector<DLTensor> tensors;
  std::vector<const DLTensor*> outs, lses;
  tensors.reserve(2 * n);
  for (auto const& t : args.outs) outs.push_back(&tensors.emplace_back(t.dl()));
  for (auto const& t : args.lses) lses.push_back(&tensors.emplace_back(t.dl()));
  DLTensor out = args.out.dl();
  DLTensor lse = args.lse.dl();
  auto c = detail::sized<flashcore_merge_args>();
  c.layout = static_cast<flashcore_layout>(args.layout);
  c.count = static_cast<std::int32_t>(n);
  c.outs = outs.data();
  c.lses = lses.data();
  c.out = args.out ? &out : nullptr;
  c.lse = args.lse ? &lse : nullptr;
  detail::check(flashcore_merge(&c, stream));
}

// keep (B, H, Sq, Sk), bool or uint8: 1 where the kernels keep the entry.
inline void dropout_mask(const TensorView& keep, double dropout_p, Rng rng,
                         void* stream = nullptr) {
  DLTensor t = keep.dl();
  std::int64_t const state[2] = {rng.seed, rng.offset};
  detail::check(flashcore_dropout_mask(&t, dropout_p, state, stream));
}

inline std::vector<KernelInfo> kernels() {
  std::vector<KernelInfo> list(static_cast<std::size_t>(flashcore_kernel_count()),
                               detail::sized<KernelInfo>());
  for (std::size_t i = 0; i < list.size(); ++i)
    detail::check(flashcore_kernel_at(static_cast<std::int32_t>(i), &list[i]));
  return list;
}

inline std::vector<DeviceInfo> devices() {
  std::vector<DeviceInfo> list(static_cast<std::size_t>(flashcore_device_count()),
                               detail::sized<DeviceInfo>());
  for (std::size_t i = 0; i < list.size(); ++i)
    detail::check(flashcore_device_at(static_cast<std::int32_t>(i), &list[i]));
  return list;
}

inline void set_num_threads(int n) { flashcore_set_num_threads(n); }
inline int get_num_threads() { return flashcore_get_num_threads(); }
inline std::string_view version() { return flashcore_version(); }

}  // namespace v1
}  // namespace flashcore
#endif  // FLASHCORE_FLASHCORE_HPP_
