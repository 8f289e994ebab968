#include "bindings/xla_call.h"

#include <algorithm>
#include <iterator>

namespace flashcore::xla {
namespace {

using Args = flashcore_attention_args;
using Gradients = flashcore_attention_backward_args;

template <auto Field>
void tensor(Call& c, DLTensor* t) {
  c.args.*Field = t;
}
template <auto Field>
void gradient(Call& c, DLTensor* t) {
  c.gradients.*Field = t;
}
template <auto Field>
void block_list(Call& c, DLTensor* t) {
  c.block_mask.struct_size = sizeof c.block_mask;
  c.block_mask.*Field = t;
  c.args.block_mask = &c.block_mask;
}

template <auto Field>
void number(Call& c, double value) {
  c.args.*Field = static_cast<std::remove_reference_t<decltype(c.args.*Field)>>(value);
}
template <auto Field>
void integer(Call& c, int64_t value) {
  c.args.*Field = static_cast<std::remove_reference_t<decltype(c.args.*Field)>>(value);
}
template <auto Field, auto Storage>
void pointer(Call& c, int64_t value) {
  c.*Storage = value;
  c.args.*Field = &(c.*Storage);
}

constexpr std::string_view kForwardOperands[] = {"q", "k", "v"}, kForwardResults[] = {"out"},
                           kBackwardOperands[] = {"q", "k", "v", "out", "lse", "dout"},
                           kBackwardResults[] = {"dq", "dk", "dv"};

// {seed, offset} as the four 32-bit halves of it: JAX has no 64-bit integers by default.
bool is_rng_in_halves(const DLTensor& t) {
  return t.dtype.code == kDLUInt && t.dtype.bits == 32 && t.ndim == 1 && t.shape[0] == 4;
}

}  // namespace

void DenseTensor::set(void* data, DLDevice device, DLDataType dtype, const int64_t* dims,
                      int rank) {
  tensor = {data, device, rank, dtype, shape, strides, 0};
  int64_t packed = 1;
  for (int d = rank - 1; d >= 0; --d) {
    shape[d] = dims[d];
    strides[d] = packed;
    packed *= std::max<int64_t>(dims[d], 1);
  }
}

enum class Role { operand, result, gradient };  // result: of forward; an operand of backward

struct Call::TensorName {
  std::string_view name;
  Role role;
  void (*set)(Call&, DLTensor*);
};

const Call::TensorName Call::kTensors[] = {
    {"q", Role::operand, tensor<&Args::q>},
    {"k", Role::operand, tensor<&Args::k>},
    {"v", Role::operand, tensor<&Args::v>},
    {"out", Role::result, tensor<&Args::out>},
    {"lse", Role::result, tensor<&Args::lse>},
    {"max_logits", Role::result, tensor<&Args::max_logits>},
    {"bias", Role::operand, tensor<&Args::bias>},
    {"mask", Role::operand, tensor<&Args::mask>},
    {"sinks", Role::operand, tensor<&Args::sinks>},
    {"alibi_slopes", Role::operand, tensor<&Args::alibi_slopes>},
    {"q_offset_tensor", Role::operand, tensor<&Args::q_offset_tensor>},
    {"rng_tensor", Role::operand, tensor<&Args::rng_tensor>},
    {"cu_seqlens_q", Role::operand, tensor<&Args::cu_seqlens_q>},
    {"cu_seqlens_k", Role::operand, tensor<&Args::cu_seqlens_k>},
    {"seqlens_q", Role::operand, tensor<&Args::seqlens_q>},
    {"seqlens_k", Role::operand, tensor<&Args::seqlens_k>},
    {"page_table", Role::operand, tensor<&Args::page_table>},
    {"q_descale", Role::operand, tensor<&Args::q_descale>},
    {"k_descale", Role::operand, tensor<&Args::k_descale>},
    {"v_descale", Role::operand, tensor<&Args::v_descale>},
    {"kv_num_blocks", Role::operand, block_list<&flashcore_block_mask::kv_num_blocks>},
    {"kv_indices", Role::operand, block_list<&flashcore_block_mask::kv_indices>},
    {"q_num_blocks", Role::operand, block_list<&flashcore_block_mask::q_num_blocks>},
    {"q_indices", Role::operand, block_list<&flashcore_block_mask::q_indices>},
    {"dout", Role::operand, gradient<&Gradients::dout>},
    {"dlse", Role::operand, gradient<&Gradients::dlse>},
    {"dq", Role::gradient, gradient<&Gradients::dq>},
    {"dk", Role::gradient, gradient<&Gradients::dk>},
    {"dv", Role::gradient, gradient<&Gradients::dv>},
    {"dbias", Role::gradient, gradient<&Gradients::dbias>},
    {"dsinks", Role::gradient, gradient<&Gradients::dsinks>},
};

struct Call::NumberName {
  std::string_view name;
  void (*set_real)(Call&, double);      // one of the two
  void (*set_integer)(Call&, int64_t);  // is null
};

const Call::NumberName Call::kNumbers[] = {
    {"align", nullptr, integer<&Args::align>},
    {"block_k", nullptr,
     [](Call& c, int64_t n) { c.block_mask.block_k = static_cast<int32_t>(n); }},
    {"block_q", nullptr,
     [](Call& c, int64_t n) { c.block_mask.block_q = static_cast<int32_t>(n); }},
    {"block_seqlen_k", nullptr, [](Call& c, int64_t n) { c.block_mask.seqlen_k = n; }},
    {"block_seqlen_q", nullptr, [](Call& c, int64_t n) { c.block_mask.seqlen_q = n; }},
    {"causal", nullptr, integer<&Args::causal>},
    {"deterministic", nullptr, integer<&Args::deterministic>},
    {"dropout_p", number<&Args::dropout_p>, nullptr},
    {"layout", nullptr, integer<&Args::layout>},
    {"max_seqlen_k", nullptr, integer<&Args::max_seqlen_k>},
    {"max_seqlen_q", nullptr, integer<&Args::max_seqlen_q>},
    {"num_splits", nullptr, integer<&Args::num_splits>},
    {"num_threads", nullptr, integer<&Args::num_threads>},
    {"q_offset", nullptr, pointer<&Args::q_offset, &Call::q_offset>},
    {"scale",
     [](Call& c, double value) {
       c.scale = value;
       c.args.scale = &c.scale;
     },
     nullptr},
    {"softcap", number<&Args::softcap>, nullptr},
    {"split_size", nullptr, integer<&Args::split_size>},
    {"window_left", nullptr, pointer<&Args::window_left, &Call::window_left>},
    {"window_right", nullptr, pointer<&Args::window_right, &Call::window_right>},
};

Call::Call(flashcore_direction direction) : direction_(direction) {
  args.struct_size = sizeof args;
  gradients.struct_size = sizeof gradients;
  gradients.forward = &args;
}

std::span<const std::string_view> Call::fixed_operands(flashcore_direction direction) {
  if (direction == FLASHCORE_BACKWARD) return kBackwardOperands;
  return kForwardOperands;
}
std::span<const std::string_view> Call::fixed_results(flashcore_direction direction) {
  if (direction == FLASHCORE_BACKWARD) return kBackwardResults;
  return kForwardResults;
}

const Call::TensorName* Call::find_tensor(std::string_view name) {
  auto const* const found = std::find_if(std::begin(kTensors), std::end(kTensors),
                                         [&](const TensorName& t) { return t.name == name; });
  return found == std::end(kTensors) ? nullptr : found;
}
const Call::NumberName* Call::find_number(std::string_view name) {
  auto const* const found = std::find_if(std::begin(kNumbers), std::end(kNumbers),
                                         [&](const NumberName& n) { return n.name == name; });
  return found == std::end(kNumbers) ? nullptr : found;
}

bool Call::is_tensor(std::string_view name) const { return find_tensor(name) != nullptr; }

bool Call::is_result(std::string_view name) const {
  const TensorName* const found = find_tensor(name);
  return found && found->role == (backward() ? Role::gradient : Role::result);
}

bool Call::set_tensor(std::string_view name, DenseTensor& dense) {
  const TensorName* const found = find_tensor(name);
  if (!found) return false;
  if (name == "rng_tensor" && is_rng_in_halves(dense.tensor)) {
    int64_t const two = 2;
    dense.set(dense.tensor.data, dense.tensor.device, {kDLInt, 64, 1}, &two, 1);
  }
  found->set(*this, &dense.tensor);
  return true;
}

bool Call::set_number(std::string_view name, double value) {
  const NumberName* const found = find_number(name);
  if (!found || !found->set_real) return false;
  found->set_real(*this, value);
  return true;
}
bool Call::set_number(std::string_view name, int64_t value) {
  const NumberName* const found = find_number(name);
  if (!found || !found->set_integer) return false;
  found->set_integer(*this, value);
  return true;
}

flashcore_status Call::plan(flashcore_plan* plan) const {
  plan->struct_size = sizeof *plan;
  return backward() ? flashcore_attention_backward_plan(&gradients, plan)
                    : flashcore_attention_plan(&args, plan);
}

flashcore_status Call::run(void* workspace, size_t bytes, void* stream) const {
  constexpr uintptr_t kAlignment = FLASHCORE_WORKSPACE_ALIGNMENT;
  uintptr_t const begin = reinterpret_cast<uintptr_t>(workspace);
  size_t const skip = std::min<size_t>(bytes, -begin % kAlignment);
  bytes -= skip;
  void* const aligned = bytes ? static_cast<char*>(workspace) + skip : nullptr;
  return backward() ? flashcore_attention_backward(&gradients, aligned, bytes, stream)
                    : flashcore_attention_forward(&args, aligned, bytes, stream);
}

}  // namespace flashcore::xla
