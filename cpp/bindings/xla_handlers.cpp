#include "bindings/xla_handlers.h"

#include <algorithm>
#include <cfenv>
#include <exception>
#include <optional>
#include <string>

#include "bindings/xla_call.h"
#include "common/text.h"

namespace flashcore::xla {
namespace {

// More than a call can have: every tensor of Call, and the workspace.
constexpr int kMaxTensors = 32;

struct Failure {
  ErrorCode code;
  std::string message;
};

DLDataType dlpack_type(DataType type) {
  switch (type) {
    case kPred:
      return {kDLBool, 8, 1};
    case kS8:
      return {kDLInt, 8, 1};
    case kS16:
      return {kDLInt, 16, 1};
    case kS32:
      return {kDLInt, 32, 1};
    case kS64:
      return {kDLInt, 64, 1};
    case kU8:
      return {kDLUInt, 8, 1};
    case kU16:
      return {kDLUInt, 16, 1};
    case kU32:
      return {kDLUInt, 32, 1};
    case kU64:
      return {kDLUInt, 64, 1};
    case kF16:
      return {kDLFloat, 16, 1};
    case kF32:
      return {kDLFloat, 32, 1};
    case kF64:
      return {kDLFloat, 64, 1};
    case kBF16:
      return {kDLBfloat, 16, 1};
    case kC64:
      return {kDLComplex, 64, 1};
  }
  return {kDLOpaqueHandle, 8, 1};  // refused by the core
}

// The runtime asks before the first call: for which version is the handler, and what may be done
// with it. It is for all of them in which the structures are the same, so for the runtime's own:
// one that it no longer takes would end all of JAX in the process.
Error* describe(const CallFrame& frame, bool cuda) {
  Metadata& metadata = *reinterpret_cast<MetadataExtension*>(frame.extensions)->metadata;
  metadata.version.major = kMajor;
  metadata.version.minor =
      frame.api ? std::clamp(frame.api->version.minor, kOldestMinor, kNewestMinor) : kOldestMinor;
  // CUDA work is only enqueued, so it can be recorded in a graph.
  metadata.traits = cuda ? uint32_t{kCommandBufferCompatible} : 0;
  return nullptr;
}

struct Queue {
  DLDevice device;
  void* stream;
};

// Where the call runs. On an error of the runtime, which owns it, `error` is set.
Queue queue_of(const CallFrame& frame, DLDeviceType device, Error*& error) {
  if (device == kDLCPU) return {{kDLCPU, 0}, nullptr};
  StreamArgs stream{sizeof stream, nullptr, frame.context, nullptr};
  error = frame.api->get_stream(&stream);
  DeviceOrdinalArgs ordinal{sizeof ordinal, nullptr, frame.context, 0};
  if (!error) error = frame.api->get_device_ordinal(&ordinal);
  return {{device, ordinal.ordinal}, stream.stream};
}

class Decoder {
 public:
  Decoder(const CallFrame& frame, DLDevice device, Call& call)
      : frame_(frame), device_(device), call_(call) {}

  void decode(flashcore_direction direction) {
    int64_t at = 0;
    for (std::string_view name : Call::fixed_operands(direction))
      set_tensor(name, frame_.arguments, at++);
    at = 0;
    for (std::string_view name : Call::fixed_results(direction))
      set_tensor(name, frame_.results, at++);
    const Attributes& attributes = frame_.attributes;
    for (int64_t i = 0; i < attributes.size; ++i) {
      std::string_view const name(attributes.names[i]->data, attributes.names[i]->size);
      if (attributes.types[i] != kScalar) refuse(name);
      set_attribute(name, *static_cast<const Scalar*>(attributes.values[i]));
    }
  }

  void* workspace = nullptr;
  size_t workspace_bytes = 0;

 private:
  [[noreturn]] static void refuse(std::string_view name) {
    throw Failure{kInvalidArgument, text("flashcore: the custom call has no ", std::string(name),
                                         " of this kind: it was lowered by another version")};
  }

  void set_attribute(std::string_view name, Scalar scalar) {
    if (scalar.dtype == kF64) {
      if (!call_.set_number(name, *static_cast<const double*>(scalar.value))) refuse(name);
      return;
    }
    if (scalar.dtype != kS64) refuse(name);
    int64_t const value = *static_cast<const int64_t*>(scalar.value);
    if (name == "workspace") {
      const Buffer& buffer = at(name, frame_.results, value);
      workspace = buffer.data;
      workspace_bytes = buffer.rank == 1 ? static_cast<size_t>(buffer.dims[0]) : 0;
    } else if (call_.is_tensor(name)) {
      set_tensor(name, call_.is_result(name) ? frame_.results : frame_.arguments, value);
    } else if (!call_.set_number(name, value)) {
      refuse(name);
    }
  }

  static const Buffer& at(std::string_view name, const Buffers& buffers, int64_t index) {
    if (index < 0 || index >= buffers.size) refuse(name);
    return *buffers.values[index];
  }

  void set_tensor(std::string_view name, const Buffers& buffers, int64_t index) {
    const Buffer& buffer = at(name, buffers, index);
    if (count_ == kMaxTensors || buffer.rank > DenseTensor::kMaxDims) refuse(name);
    DenseTensor& dense = tensors_[count_++];
    dense.set(buffer.data, device_, dlpack_type(buffer.dtype), buffer.dims,
              static_cast<int>(buffer.rank));
    call_.set_tensor(name, dense);
  }

  const CallFrame& frame_;
  DLDevice device_;
  Call& call_;
  DenseTensor tensors_[kMaxTensors];
  int count_ = 0;
};

// Rounding to nearest, and no flushing of the smallest numbers to zero: XLA's threads flush, those
// of the core's pool do not, and bits must not depend on which of them computed a tile.
class DefaultFloats {
 public:
  DefaultFloats() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;
  ~DefaultFloats() { std::fesetenv(&before_); }

 private:
  std::fenv_t before_;
};

ErrorCode code_of(flashcore_status status) {
  return status == FLASHCORE_INVALID_ARGUMENT ? kInvalidArgument
         : status == FLASHCORE_UNSUPPORTED    ? kUnimplemented
                                              : kInternal;
}

Error* create_error(const Api& api, ErrorCode code, const char* message) {
  ErrorArgs args{sizeof args, nullptr, message, code};
  return api.create_error(&args);
}

// Reads the frame, calls the core, and nothing else: no memory is allocated, nothing is waited for.
template <flashcore_direction direction, DLDeviceType device>
Error* handle(CallFrame* frame) {
  if (frame->extensions && frame->extensions->type == kMetadata)
    return describe(*frame, device == kDLCUDA);
  try {
    Error* error = nullptr;
    Queue const queue = queue_of(*frame, device, error);
    if (error) return error;
    Call call(direction);
    Decoder decoder(*frame, queue.device, call);
    decoder.decode(direction);
    std::optional<DefaultFloats> floats;
    if (device == kDLCPU) floats.emplace();
    flashcore_status const status =
        call.run(decoder.workspace, decoder.workspace_bytes, queue.stream);
    if (status == FLASHCORE_OK) return nullptr;
    return create_error(*frame->api, code_of(status), flashcore_last_error());
  } catch (const Failure& failure) {
    return create_error(*frame->api, failure.code, failure.message.c_str());
  } catch (const std::exception& failure) {
    return create_error(*frame->api, kInternal, failure.what());
  }
}

}  // namespace

Handler* handler(flashcore_direction direction, DLDeviceType device) {
  bool const backward = direction == FLASHCORE_BACKWARD;
  if (device == kDLCUDA)
    return backward ? handle<FLASHCORE_BACKWARD, kDLCUDA> : handle<FLASHCORE_FORWARD, kDLCUDA>;
  return backward ? handle<FLASHCORE_BACKWARD, kDLCPU> : handle<FLASHCORE_FORWARD, kDLCPU>;
}

}  // namespace flashcore::xla
