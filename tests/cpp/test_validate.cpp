// What validate makes of good arguments, and what it says about bad ones.
#include "validate.h"

#include <cmath>
#include <functional>
#include <limits>

#include "array.h"
#include "check.h"
#include "common/error.h"

using namespace flashcore;
using check::Array;
using Stage::plan;
using Stage::run;

namespace {

// A good call: B 2, Sq 3, Sk 5, heads 4 over 2, head_dim 8. Each test spoils one thing.
struct Call {
  Array<float> q{{2, 3, 4, 8}}, k{{2, 5, 2, 8}}, v{{2, 5, 2, 6}}, out{{2, 3, 4, 6}};
  Array<float> lse{{2, 4, 3}};
  flashcore_attention_args args{};

  Call() {
    args.struct_size = sizeof args;
    args.q = q;
    args.k = k;
    args.v = v;
    args.out = out;
    args.lse = lse;
  }
};

std::string refusal(const flashcore_attention_args& args, flashcore_status want, Stage stage) {
  try {
    validate(&args, stage);
  } catch (const Failure& f) {
    CHECK_EQ(static_cast<int>(f.status), static_cast<int>(want));
    return f.what();
  }
  return "(accepted)";
}
std::string refusal(const flashcore_attention_args& args) {
  return refusal(args, FLASHCORE_INVALID_ARGUMENT, run);
}

// spoil changes a good call; every part must be in the message.
void refuses(std::function<void(Call&)> spoil, std::initializer_list<const char*> parts,
             flashcore_status status = FLASHCORE_INVALID_ARGUMENT) {
  Call c;
  spoil(c);
  std::string const text = refusal(c.args, status, run);
  for (const char* part : parts) CHECK_CONTAINS(text, part);
  CHECK_CONTAINS(text, "[attention] ");
}

}  // namespace

TEST("defaults are resolved") {
  Call c;
  Problem const p = validate(&c.args, run);
  CHECK_EQ(p.batch, 2);
  CHECK_EQ(p.seqlen_q, 3);
  CHECK_EQ(p.seqlen_k, 5);
  CHECK_EQ(p.num_heads_q, 4);
  CHECK_EQ(p.num_heads_kv, 2);
  CHECK_EQ(p.head_dim, 8);
  CHECK_EQ(p.head_dim_v, 6);
  CHECK_EQ(p.total_q, 6);
  CHECK_EQ(p.total_k, 10);
  CHECK_EQ(p.scale, 1 / std::sqrt(8.0));
  CHECK(p.window.open());
  CHECK(!p.top_left);
  CHECK(!p.has_q_offset);
  CHECK_EQ(p.dropout_threshold, 0u);
  CHECK_EQ(p.q.batch_stride, 3 * 4 * 8);
  CHECK_EQ(p.q.row_stride, 4 * 8);
  CHECK_EQ(p.q.head_stride, 8);
  CHECK_EQ(p.lse.batch_stride, 12);
  CHECK_EQ(p.lse.head_stride, 3);
}

TEST("bhsd swaps rows and heads") {
  Array<float> q{{2, 4, 3, 8}}, k{{2, 2, 5, 8}}, v{{2, 2, 5, 6}}, out{{2, 4, 3, 6}};
  Call c;
  c.args.layout = FLASHCORE_BHSD;
  c.args.q = q, c.args.k = k, c.args.v = v, c.args.out = out;
  Problem const p = validate(&c.args, run);
  CHECK_EQ(p.seqlen_q, 3);
  CHECK_EQ(p.num_heads_q, 4);
  CHECK_EQ(p.q.row_stride, 8);
  CHECK_EQ(p.q.head_stride, 24);
}

TEST("causal is a window whose right side is 0") {
  Call c;
  c.args.causal = 1;
  int64_t left = 7, right = 3;
  c.args.window_left = &left;
  c.args.window_right = &right;
  Problem const p = validate(&c.args, run);
  CHECK_EQ(p.window.left, 7);
  CHECK_EQ(p.window.right, 0);
}

TEST("strides of dimensions of size 1 mean nothing") {
  Call c;
  Array<float> one{{1, 1, 1, 8}}, small{{1, 1, 1, 6}}, out{{1, 1, 1, 6}}, lse{{1, 1, 1}};
  for (auto* a : {&one, &small, &out}) a->stride = {999, -5, 7, 1};
  lse.stride = {3, 3, 3};
  c.args.q = one, c.args.k = one, c.args.v = small, c.args.out = out, c.args.lse = lse;
  CHECK_EQ(validate(&c.args, run).q.row_stride, 0);
}

TEST("NULL strides mean packed, byte_offset counts") {
  Call c;
  c.q.dl.strides = nullptr;
  Problem p = validate(&c.args, run);
  CHECK_EQ(p.q.batch_stride, 96);
  c.k.dl.byte_offset = 4;
  p = validate(&c.args, run);
  CHECK(p.k.data == c.k.data.data() + 1);
}

TEST("empty tensors may have no data") {
  Call c;
  Array<float> k{{2, 0, 2, 8}}, v{{2, 0, 2, 6}};
  k.dl.data = v.dl.data = nullptr;
  c.args.k = k, c.args.v = v;
  CHECK_EQ(validate(&c.args, run).seqlen_k, 0);
}

TEST("dropout_p is rounded to a multiple of 2^-16") {
  int64_t rng[2] = {-1, 5};
  Call c;
  c.args.dropout_p = 0.1;
  c.args.rng = rng;
  Problem const p = validate(&c.args, run);
  CHECK_EQ(p.dropout_threshold, 6554u);
  CHECK(std::abs(p.dropout_scale - 65536.0 / (65536 - 6554)) < 1e-12);
  CHECK_EQ(p.rng_seed, ~uint64_t{0});
  CHECK_EQ(p.rng_offset, uint64_t{5});
}

TEST("a plan needs no outputs") {
  Call c;
  c.args.out = nullptr;
  c.args.lse = nullptr;
  CHECK(!validate(&c.args, plan).out);
  CHECK_CONTAINS(refusal(c.args), "out is required");
}

TEST("packed sequences") {
  Array<float> q{{9, 4, 8}}, k{{11, 2, 8}}, v{{11, 2, 6}}, out{{9, 4, 6}}, lse{{4, 9}};
  Array<int32_t> cu_q{{4}}, cu_k{{4}};
  cu_q.data = {0, 2, 2, 9};
  cu_k.data = {0, 5, 6, 11};
  cu_q.dl.data = cu_q.data.data();
  cu_k.dl.data = cu_k.data.data();
  Call c;
  c.args.q = q, c.args.k = k, c.args.v = v, c.args.out = out, c.args.lse = lse;
  c.args.cu_seqlens_q = cu_q, c.args.cu_seqlens_k = cu_k;
  Problem const p = validate(&c.args, run);
  CHECK_EQ(p.batch, 3);
  CHECK_EQ(p.seqlen_q, 7);
  CHECK_EQ(p.seqlen_k, 5);
  CHECK_EQ(p.q.batch_stride, 0);
  CHECK_EQ(p.lse.batch_stride, 0);
  CHECK_EQ(p.lse.head_stride, 9);

  c.args.max_seqlen_q = 8;
  CHECK_EQ(validate(&c.args, run).seqlen_q, 8);
  c.args.max_seqlen_q = 6;
  CHECK_CONTAINS(refusal(c.args), "max_seqlen_q is 6 but a sequence has length 7");
  c.args.max_seqlen_q = -1;
  CHECK_CONTAINS(refusal(c.args), "max_seqlen_q must be in 0..");
  c.args.max_seqlen_q = 0;
  cu_q.data[1] = 3;
  cu_q.data[2] = 2;
  CHECK_CONTAINS(refusal(c.args), "cu_seqlens_q must not decrease: entry 2 is 2 after 3");
  cu_q.data[1] = 2;
  cu_q.data[3] = 10;
  CHECK_CONTAINS(refusal(c.args), "cu_seqlens_q must end at the packed total 9, got 10");
  cu_q.data[3] = 9;
  cu_q.data[0] = 1;
  CHECK_CONTAINS(refusal(c.args), "cu_seqlens_q[0] must be 0, got 1");
  cu_q.data[0] = 0;
  cu_k.dl.dtype = check::kI64;
  CHECK_CONTAINS(refusal(c.args), "cu_seqlens_k must be int32, got int64[4]");
  cu_k.dl.dtype = check::kI32;
  c.args.cu_seqlens_k = nullptr;
  CHECK_CONTAINS(refusal(c.args), "cu_seqlens_k is missing");
}

TEST("shapes that do not fit are refused by name") {
  using L = std::initializer_list<const char*>;
  struct Bad {
    std::vector<int64_t> q, k, v;
    L parts;
  };
  std::vector<int64_t> const q{2, 3, 4, 8}, k{2, 5, 2, 8}, v{2, 5, 2, 6};
  for (const Bad& bad :
       std::initializer_list<Bad>{{{3, 4, 8}, k, v, {"q must have 4 dimensions", "float32[3,4,8]"}},
                                  {q, {3, 5, 2, 8}, v, {"one batch size", "[3,5,2,8]"}},
                                  {q, k, {2, 6, 2, 6}, {"v must have k's seqlen", "[2,6,2,6]"}},
                                  {q, k, {2, 5, 1, 6}, {"v must have k's seqlen and heads"}},
                                  {q, {2, 5, 2, 7}, v, {"k must have q's head_dim 8", "[2,5,2,7]"}},
                                  {q, {2, 5, 3, 8}, {2, 5, 3, 6}, {"multiple of k's", "4 and 3"}},
                                  {{2, 3, 0, 8}, k, v, {"at least one head"}},
                                  {{2, 3, 4, 0}, {2, 5, 2, 0}, v, {"head_dim must be positive"}}}) {
    Array<float> a{bad.q}, b{bad.k}, c{bad.v};
    refuses([&](Call& call) { call.args.q = a, call.args.k = b, call.args.v = c; }, bad.parts);
  }
  refuses([](Call& c) { c.out.shape[1] = 4; }, {"out must have shape [2,3,4,6]", "[2,4,4,6]"});
  refuses([](Call& c) { c.lse.shape[2] = 4; }, {"lse must have shape [2,4,3]", "[2,4,4]"});
  refuses([](Call& c) { c.q.shape[0] = -1; }, {"q has an extent outside"});
  refuses([](Call& c) { c.q.shape[0] = int64_t{1} << 32; }, {"q has an extent outside"});
  refuses([](Call& c) { c.q.dl.shape = nullptr; }, {"q must have 4 dimensions", "no shape"});
}

TEST("memory that cannot be used is refused by name") {
  refuses([](Call& c) { c.args.k = nullptr; }, {"k is required"});
  refuses([](Call& c) { c.q.dl.data = nullptr; }, {"q has no data (NULL)", "float32[2,3,4,8]"});
  refuses([](Call& c) { c.v.stride[3] = 2; }, {"v must have stride 1", "got 2"});
  refuses([](Call& c) { c.out.stride[1] = 0; }, {"out is an output", "stride 0"});
  refuses([](Call& c) { c.args.out = c.q, c.v.shape[3] = 8; }, {"out shares memory"});
  refuses([](Call& c) { c.k.dl.device = {kDLCUDA, 1}; }, {"k is on cuda:1 but q is on cpu"});
}

TEST("dtypes") {
  refuses([](Call& c) { c.k.dl.dtype.bits = 16; }, {"k must have q's dtype float32", "float16"});
  refuses([](Call& c) { c.q.dl.dtype = check::kI32; }, {"q has dtype int32", "float16, bfloat16"},
          FLASHCORE_UNSUPPORTED);
  refuses([](Call& c) { c.q.dl.dtype = {kDLComplex, 64, 1}; }, {"complex64"},
          FLASHCORE_UNSUPPORTED);
  refuses([](Call& c) { c.q.dl.dtype.lanes = 4; }, {"float32x4"}, FLASHCORE_UNSUPPORTED);
  refuses([](Call& c) { c.out.dl.dtype.bits = 64; }, {"out must be float32", "float64"});
  refuses([](Call& c) { c.lse.dl.dtype.bits = 16; }, {"lse must be float32", "float16"});
}

TEST("scalars") {
  double const nan = std::numeric_limits<double>::quiet_NaN();
  double const inf = std::numeric_limits<double>::infinity();
  for (double bad : {nan, inf, -inf})
    refuses([&](Call& c) { c.args.scale = &bad; }, {"scale must be finite"});
  for (double bad : {nan, inf, -1.0})
    refuses([&](Call& c) { c.args.softcap = bad; }, {"softcap must be finite and >= 0"});
  int64_t rng[2] = {1, 2};
  for (double bad : {nan, 1.0, 1.5, -0.1, inf})
    refuses([&](Call& c) { c.args.dropout_p = bad, c.args.rng = rng; },
            {"dropout_p must be in [0, 1)"});
  refuses([&](Call& c) { c.args.dropout_p = 1 - 1e-9, c.args.rng = rng; },
          {"dropout_p must be at most 1 - 2^-16"});
  refuses([](Call& c) { c.args.dropout_p = 0.5; }, {"rng is required when dropout_p > 0"});
  int64_t bad = -2;
  refuses([&](Call& c) { c.args.window_left = &bad; }, {"window_size[0] must be >= 0", "-2"});
  refuses([&](Call& c) { c.args.window_right = &bad; }, {"window_size[1] must be >= 0"});
  int64_t far = int64_t{1} << 40;
  refuses([&](Call& c) { c.args.q_offset = &far; }, {"q_offset must be within"});
  far = INT64_MIN;
  refuses([&](Call& c) { c.args.q_offset = &far; }, {"q_offset must be within"});
  refuses([](Call& c) { c.args.num_splits = -1; }, {"num_splits must be >= 0", "-1"});
  refuses([](Call& c) { c.args.split_size = -1; }, {"split_size must be >= 0"});
  refuses([](Call& c) { c.args.num_splits = 2, c.args.split_size = 64; },
          {"num_splits and split_size exclude each other"});
  refuses([](Call& c) { c.args.num_threads = -1; }, {"num_threads must be >= 0"});
}

TEST("options with tensors") {
  Array<float> slopes{{3}}, bias{{2, 4, 3, 4}}, sinks{{3}};
  Array<uint8_t> mask{{1, 1, 2, 5}};
  Array<int32_t> lengths{{2}}, offsets{{3}};
  refuses([&](Call& c) { c.args.alibi_slopes = slopes; }, {"alibi_slopes must have shape [4] or"});
  refuses([&](Call& c) { c.args.bias = bias; }, {"bias must broadcast to [2,4,3,5]", "[2,4,3,4]"});
  refuses([&](Call& c) { c.args.mask = mask; }, {"mask must broadcast to [2,4,3,5]"});
  refuses([&](Call& c) { c.args.mask = bias; }, {"mask"});
  refuses([&](Call& c) { c.args.sinks = sinks; }, {"sinks must have shape [4]", "[3]"});
  refuses([&](Call& c) { c.args.q_offset_tensor = offsets; }, {"q_offset must have shape [2]"});
  lengths.data = {5, 6};
  lengths.dl.data = lengths.data.data();
  refuses([&](Call& c) { c.args.seqlens_k = lengths; }, {"seqlens_k[1] must be in 0..5, got 6"});
  lengths.data[1] = -1;
  refuses([&](Call& c) { c.args.seqlens_k = lengths; }, {"seqlens_k[1] must be in 0..5, got -1"});
  refuses([](Call& c) { c.args.max_seqlen_q = 3; }, {"max_seqlen_q and max_seqlen_k go with"});
}

TEST("block masks") {
  Array<int32_t> count{{1, 1, 2}}, indices{{1, 1, 2, 3}};
  count.data = {2, 1};
  count.dl.data = count.data.data();
  indices.data = {0, 2, 0, 1, 0, 0};
  indices.dl.data = indices.data.data();
  flashcore_block_mask m{};
  m.struct_size = sizeof m;
  m.block_q = m.block_k = 2;
  m.kv_num_blocks = count;
  m.kv_indices = indices;
  Call good;
  good.args.block_mask = &m;
  CHECK_EQ(validate(&good.args, run).block_k, 2);
  auto with_mask = [&](Call& c) { c.args.block_mask = &m; };
  m.block_q = 0;
  refuses(with_mask, {"block sizes must be positive"});
  m.block_q = 1;
  refuses(with_mask, {"block_mask.kv_num_blocks must have shape [2|1,4|1,3]", "[1,1,2]"});
  m.block_q = 2;
  indices.data[1] = 3;
  refuses(with_mask, {"block_mask.kv_indices[0,0,0] must ascend within 0..2", "got 3"});
  indices.data[1] = 0;
  refuses(with_mask, {"must ascend", "got 0 after 0"});
  indices.data[1] = 2;
  count.data[0] = 4;
  refuses(with_mask, {"block_mask.kv_num_blocks[0,0,0] must be in 0..3, got 4"});
  count.data[0] = 2;
  Problem const fits = validate(&good.args, run);
  m.seqlen_q = fits.seqlen_q - 1;
  m.seqlen_k = fits.seqlen_k;
  refuses(with_mask, {"block_mask is for seqlen_q", "make one for these lengths"});
  m.seqlen_q = fits.seqlen_q;
  CHECK_EQ(validate(&good.args, run).block_q, 2);
  m.struct_size = sizeof m + 8;
  refuses(with_mask, {"block_mask.struct_size"});
}

TEST("what is not built is UNSUPPORTED, with a way that works") {
  Array<int32_t> table{{2, 1}};
  Array<float> descale{{1}};
  refuses([&](Call& c) { c.args.page_table = table; }, {"page_table is not built yet", "seqlens_k"},
          FLASHCORE_UNSUPPORTED);
  refuses([&](Call& c) { c.args.q_descale = descale; }, {"fp8"}, FLASHCORE_UNSUPPORTED);
  refuses([](Call& c) { c.q.dl.device.device_type = kDLVulkan; },
          {"q is on device type 7", "cpu and cuda"}, FLASHCORE_UNSUPPORTED);
}

TEST("backward") {
  Call c;
  Array<float> dout{{2, 3, 4, 6}}, dq{{2, 3, 4, 8}}, dk{{2, 5, 2, 8}}, dv{{2, 5, 2, 6}};
  Array<float> bias{{1, 4, 3, 5}}, dbias{{1, 4, 3, 5}}, dsinks{{4}};
  flashcore_attention_backward_args b{};
  b.struct_size = sizeof b;
  b.forward = &c.args;
  b.dout = dout;
  b.dq = dq, b.dk = dk, b.dv = dv;
  auto text = [&] {
    try {
      validate(&b, run);
    } catch (const Failure& f) {
      return std::string(f.what());
    }
    return std::string("(accepted)");
  };
  CHECK_EQ(text(), "(accepted)");
  CHECK_EQ(static_cast<int>(validate(&b, run).direction), static_cast<int>(Direction::backward));
  b.dbias = dbias;
  CHECK_CONTAINS(text(), "[attention_backward] dbias was given but the call has no bias");
  c.args.bias = bias;
  CHECK_EQ(text(), "(accepted)");
  bias.shape[0] = 2;
  CHECK_CONTAINS(text(), "dbias must have bias's shape");
  c.args.bias = nullptr, b.dbias = nullptr, b.dsinks = dsinks;
  CHECK_CONTAINS(text(), "dsinks was given but the call has no sinks");
  b.dsinks = nullptr, b.dout = nullptr;
  CHECK_CONTAINS(text(), "dout is required");
  b.dout = dout, c.args.lse = nullptr;
  CHECK_CONTAINS(text(), "lse is required");
  c.args.lse = c.lse;
  dk.shape[1] = 6;
  CHECK_CONTAINS(text(), "dk must have shape [2,5,2,8], got float32[2,6,2,8]");
  b.dq = b.dk = b.dv = nullptr;
  CHECK_CONTAINS(text(), "no gradient was asked for");
  b.forward = nullptr;
  CHECK_CONTAINS(text(), "args.forward is NULL");
}

TEST("merge and dropout_mask") {
  Array<float> a{{1, 3, 2, 4}}, b{{1, 3, 2, 4}}, out{{1, 3, 2, 4}}, la{{1, 2, 3}}, lb{{1, 2, 3}};
  const DLTensor *outs[] = {a, b}, *lses[] = {la, lb};
  flashcore_merge_args args{};
  args.struct_size = sizeof args;
  args.count = 2;
  args.outs = outs;
  args.lses = lses;
  args.out = out;
  auto text = [&] {
    try {
      MergeStorage storage;
      validate(&args, storage);
    } catch (const Failure& f) {
      return std::string(f.what());
    }
    return std::string("(accepted)");
  };
  CHECK_EQ(text(), "(accepted)");
  b.shape[1] = 4;
  CHECK_CONTAINS(text(), "[merge] outs[1] must have shape [1,3,2,4]");
  b.shape[1] = 3;
  lses[1] = nullptr;
  CHECK_CONTAINS(text(), "lses[1] is required");
  args.count = 0;
  CHECK_CONTAINS(text(), "at least one partial result");

  Array<uint8_t> keep{{1, 1, 4, 4}};
  int64_t const rng[2] = {1, 2};
  CHECK_EQ(validate_dropout_mask(keep, 0.5, rng).threshold, 32768u);
  try {
    validate_dropout_mask(a, 0.5, rng);
    CHECK(false);
  } catch (const Failure& f) {
    CHECK_CONTAINS(f.what(), "[dropout_mask] keep must be bool or uint8, got float32[1,3,2,4]");
  }
}

TEST_MAIN()
