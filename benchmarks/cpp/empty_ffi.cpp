// An XLA FFI handler that does nothing: the floor of what a custom call can cost.
#include "bindings/xla_abi.h"

using namespace flashcore::xla;

extern "C" Error* empty(CallFrame* frame) {
  if (frame->extensions && frame->extensions->type == kMetadata) {
    Metadata& metadata = *reinterpret_cast<MetadataExtension*>(frame->extensions)->metadata;
    metadata.version.major = kMajor;
    metadata.version.minor = kOldestMinor;
  }
  return nullptr;
}
