// The part of XLA's FFI that a handler meets, in its binary form. Declared here under our own names
// instead of included from jaxlib: one build then serves every runtime in which these structures
// are the same, needs no jaxlib at build time, and cannot ask for more than the oldest of them has.
//
// Compared with the headers of FFI 0.1, 0.3, 0.4 and 0.5 (jaxlib 0.6.2, 0.10.2, 0.11.2, 0.12.0);
// tests/python/test_jax_ffi.py compares it with the header of the jaxlib that is installed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace flashcore::xla {

// The versions of the interface in which everything below is the same.
inline constexpr int kMajor = 0, kOldestMinor = 1, kNewestMinor = 5;

struct Error;    // the runtime's
struct Context;  // of one call, the runtime's

enum ErrorCode : int { kInvalidArgument = 3, kUnimplemented = 12, kInternal = 13 };
enum DataType : int {
  kPred = 1,
  kS8 = 2,
  kS16 = 3,
  kS32 = 4,
  kS64 = 5,
  kU8 = 6,
  kU16 = 7,
  kU32 = 8,
  kU64 = 9,
  kF16 = 10,
  kF32 = 11,
  kF64 = 12,
  kC64 = 15,
  kBF16 = 16,
};
enum AttributeType : int { kScalar = 3 };
enum ExtensionType : int { kMetadata = 1 };
enum Stage : int { kExecute = 3 };
enum Traits : uint32_t { kCommandBufferCompatible = 1 };

struct Extension {
  size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct Version {
  size_t struct_size;
  Extension* extensions;
  int major;
  int minor;
};

struct Buffer {  // dense, row-major
  size_t struct_size;
  Extension* extensions;
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

struct Buffers {  // arguments, results
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  int* types;  // all buffers: there is no other type
  Buffer** values;
};

struct Text {
  const char* data;
  size_t size;
};

struct Scalar {
  DataType dtype;
  void* value;
};

struct Attributes {  // in alphabetical order of their names
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  AttributeType* types;
  Text** names;
  void** values;  // Scalar* of a scalar
};

struct ErrorArgs {
  size_t struct_size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};

struct StreamArgs {
  size_t struct_size;
  Extension* extensions;
  Context* context;
  void* stream;  // out
};

struct DeviceOrdinalArgs {
  size_t struct_size;
  Extension* extensions;
  Context* context;
  int32_t ordinal;  // out
};

struct Api {
  size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(ErrorArgs*);
  void* unused_1[3];
  Error* (*get_stream)(StreamArgs*);
  void* unused_2[12];
  Error* (*get_device_ordinal)(DeviceOrdinalArgs*);
};

struct CallFrame {
  size_t struct_size;
  Extension* extensions;
  const Api* api;
  Context* context;
  Stage stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
};

// What the runtime asks of a handler once, instead of a call. Newer ones append to it.
struct Metadata {
  size_t struct_size;
  Version version;
  uint32_t traits;
};
struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

using Handler = Error*(CallFrame*);

}  // namespace flashcore::xla
