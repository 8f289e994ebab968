// One call as XLA describes it, buffers and named numbers, as the arguments of the C ABI. Shared by
// the handlers, which run it, and by the planner, which knows shapes alone.
//
// An attribute is either an option (causal = 1, scale = 0.125) or the name of a tensor, and then
// its value says which operand or result that tensor is (bias = 3). Where every call has a tensor
// it has a fixed place, see `fixed_operands` and `fixed_results`.
#pragma once
#include <span>
#include <string_view>

#include "flashcore/flashcore.h"

namespace flashcore::xla {

// A dense row-major tensor with room for its shape. Not movable: tensor points into the object.
struct DenseTensor {
  static constexpr int kMaxDims = 8;

  DenseTensor() = default;
  DenseTensor(const DenseTensor&) = delete;
  DenseTensor& operator=(const DenseTensor&) = delete;
  void set(void* data, DLDevice device, DLDataType dtype, const int64_t* dims, int rank);

  DLTensor tensor{};
  int64_t shape[kMaxDims];
  int64_t strides[kMaxDims];
};

struct Call {
  // The names of the first operands and results.
  static std::span<const std::string_view> fixed_operands(flashcore_direction direction);
  static std::span<const std::string_view> fixed_results(flashcore_direction direction);

  explicit Call(flashcore_direction direction);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Each returns false if there is no such name.
  bool is_tensor(std::string_view name) const;
  bool is_result(std::string_view name) const;
  bool set_tensor(std::string_view name, DenseTensor& tensor);
  bool set_number(std::string_view name, double value);
  bool set_number(std::string_view name, int64_t value);

  bool backward() const { return direction_ == FLASHCORE_BACKWARD; }
  flashcore_status plan(flashcore_plan* plan) const;
  // workspace: at least bytes, wherever it begins.
  flashcore_status run(void* workspace, size_t bytes, void* stream) const;

  flashcore_attention_args args{};
  flashcore_attention_backward_args gradients{};
  flashcore_block_mask block_mask{};
  double scale = 0;
  int64_t window_left = 0, window_right = 0, q_offset = 0;

 private:
  struct TensorName;
  struct NumberName;
  static const TensorName kTensors[];
  static const NumberName kNumbers[];
  static const TensorName* find_tensor(std::string_view name);
  static const NumberName* find_number(std::string_view name);

  flashcore_direction direction_;
};

}  // namespace flashcore::xla
