/* flashcore: exact, IO-aware attention. The C ABI (C99).
 *
 *     O = softmax(scale * Q K^T + bias, restricted to the visible keys) V
 *
 * One call path: fill an argument structure, ask for a plan (it validates everything and names the
 * kernel and the workspace), allocate the workspace, run. The library allocates nothing on a
 * device, never synchronises, keeps no state between calls except the CPU thread pool, and may be
 * called from any number of threads at once.
 *
 * Conventions
 *   - Zero-initialise a structure, set struct_size, then the fields you need. A NULL pointer is
 *     "not given"; so is 0 for every scalar whose zero means the default.
 *   - Tensors are DLTensor. Strides are free but the last dimension has stride 1.
 *   - Shapes are written for the default layout "bshd": (batch, seqlen, heads, head_dim).
 *   - Every function returns a status; flashcore_last_error() holds the text for this thread.
 *   - Semantics in full: docs/api.md. Symbols: docs/notation.md. */
#ifndef FLASHCORE_FLASHCORE_H_
#define FLASHCORE_FLASHCORE_H_

#include "dlpack.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define FLASHCORE_API
#else
#define FLASHCORE_API __attribute__((visibility("default")))
#endif

#define FLASHCORE_VERSION_MAJOR 0
#define FLASHCORE_VERSION_MINOR 1
#define FLASHCORE_VERSION_PATCH 0

typedef enum flashcore_status {
  FLASHCORE_OK = 0,
  FLASHCORE_INVALID_ARGUMENT = 1, /* the arguments contradict each other or the contract */
  FLASHCORE_UNSUPPORTED = 2,      /* a valid request that no compiled kernel can honour */
  FLASHCORE_DEVICE_ERROR = 3,     /* the device or its driver failed; the text says how */
  FLASHCORE_INTERNAL_ERROR = 4    /* a defect in flashcore: please report it */
} flashcore_status;

/* Order of the dimensions of 4-D tensors. Packed (varlen) tensors are always
 * (total, heads, head_dim). */
typedef enum flashcore_layout { FLASHCORE_BSHD = 0, FLASHCORE_BHSD = 1 } flashcore_layout;

/* Which key the first query row faces when seqlen_q != seqlen_k (causal, window):
 * bottom_right: row i faces key i + seqlen_k - seqlen_q; top_left: row i faces key i. */
typedef enum flashcore_align { FLASHCORE_BOTTOM_RIGHT = 0, FLASHCORE_TOP_LEFT = 1 } flashcore_align;

/* Which (query block, key block) pairs are kept; every other pair is excluded. Combines with
 * causal, window, mask and lengths: a key is visible when all of them let it be.
 * B and H may be 1 (broadcast). All tensors are int32 on q's device; their last dimension has
 * stride 1. kv_num_blocks  (B, H, q_blocks)                kept key blocks of each query block
 *   kv_indices     (B, H, q_blocks, capacity)      their indices, ascending, no duplicates
 *   q_num_blocks   (B, H, kv_blocks)               the transpose: needed by backward
 *   q_indices      (B, H, kv_blocks, capacity)
 * q_blocks = ceil(seqlen_q / block_q), kv_blocks = ceil(seqlen_k / block_k). Entries past the
 * count are ignored. seqlen_q, seqlen_k: the lengths it was made for, which a call that is not
 * packed must have; 0 = any with as many blocks, each for itself. */
typedef struct flashcore_block_mask {
  uint32_t struct_size;
  int32_t block_q;
  int32_t block_k;
  int32_t reserved;
  int64_t seqlen_q;
  int64_t seqlen_k;
  const DLTensor* kv_num_blocks;
  const DLTensor* kv_indices;
  const DLTensor* q_num_blocks;
  const DLTensor* q_indices;
} flashcore_block_mask;

/* B batch, Sq/Sk query/key length, Hq/Hkv heads (Hkv divides Hq), D/Dv head dims of q,k / of v.
 * Packed form (cu_seqlens given): q (total_q, Hq, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv). */
typedef struct flashcore_attention_args {
  uint32_t struct_size; /* sizeof(flashcore_attention_args) */
  flashcore_layout layout;

  const DLTensor* q;    /* (B, Sq, Hq, D)   float16, bfloat16, float32 or float64 */
  const DLTensor* k;    /* (B, Sk, Hkv, D)  same dtype and device as q */
  const DLTensor* v;    /* (B, Sk, Hkv, Dv) same dtype and device as q */
  DLTensor* out;        /* (B, Sq, Hq, Dv)  q's dtype, or float32. May be NULL in a plan */
  DLTensor* lse;        /* (B, Hq, Sq) or packed (Hq, total_q); float32 (float64 for float64 q).
                           Natural logarithm of the softmax denominator. Optional in forward */
  DLTensor* max_logits; /* same shape and dtype as lse: the largest visible score. Optional */

  const double* scale; /* default 1/sqrt(D) */
  int32_t causal;      /* key j is visible to row i only when j <= i + q_offset */
  flashcore_align align;
  const int64_t* window_left;      /* keys j >= i + q_offset - window_left;  NULL or -1 = open */
  const int64_t* window_right;     /* keys j <= i + q_offset + window_right; NULL or -1 = open */
  const int64_t* q_offset;         /* overrides align, for every sequence */
  const DLTensor* q_offset_tensor; /* int32 (B): the same, per sequence */

  double softcap;               /* > 0: score = softcap * tanh(scale * qk / softcap) */
  const DLTensor* alibi_slopes; /* float32 (Hq) or (B, Hq): score -= slope * |i + q_offset - j| */
  const DLTensor* bias;         /* (B|1, Hq|1, Sq|1, Sk|1): added to the score. q's dtype or float32
                                   (float64 for float64 q) */
  const DLTensor* mask;         /* bool or uint8 (B|1, Hq|1, Sq|1, Sk|1): nonzero = visible */
  const DLTensor* sinks;        /* float32 (Hq): one extra logit per head, with no value row */
  const flashcore_block_mask* block_mask;

  double dropout_p;           /* 0 <= p < 1, rounded to a multiple of 2^-16 */
  const int64_t* rng;         /* {seed, offset} in host memory; needed when dropout_p > 0 ... */
  const DLTensor* rng_tensor; /* ... or int64 (2) on q's device */

  const DLTensor* cu_seqlens_q; /* int32 (B + 1): packed sequences; row b is [cu[b], cu[b+1]) */
  const DLTensor* cu_seqlens_k;
  int64_t max_seqlen_q;      /* upper bound of the packed lengths; 0 = total_q (or read from */
  int64_t max_seqlen_k;      /* cu_seqlens where that needs no device read-back) */
  const DLTensor* seqlens_q; /* int32 (B): valid lengths of padded batches */
  const DLTensor* seqlens_k;
  const DLTensor* page_table; /* not built yet: must be NULL */
  const DLTensor* q_descale;  /* not built yet: must be NULL */
  const DLTensor* k_descale;
  const DLTensor* v_descale;

  int32_t num_splits;    /* 0 = automatic */
  int32_t deterministic; /* nonzero: refuse if the backward pass could not be bitwise repeatable */
  int64_t split_size;    /* > 0: keys per split, which makes a row independent of its batch */
  int32_t num_threads;   /* CPU: use at most this many threads; 0 = flashcore_get_num_threads() */
  int32_t reserved;
} flashcore_attention_args;

typedef struct flashcore_attention_backward_args {
  uint32_t struct_size;                    /* sizeof(flashcore_attention_backward_args) */
  int32_t accumulate;                      /* nonzero: add into dq, dk, dv, dbias, dsinks */
  const flashcore_attention_args* forward; /* the same options; out and lse are inputs here */
  const DLTensor* dout;                    /* shape of out; q's dtype or float32 */
  const DLTensor* dlse;                    /* optional: gradient of lse, shape and dtype of lse */
  DLTensor* dq;                            /* shape of q; q's dtype, or float32. Each of the five */
  DLTensor* dk;                            /* outputs may be NULL: that gradient is not computed */
  DLTensor* dv;
  DLTensor* dbias;  /* shape of bias; float32 (float64 for float64 q) */
  DLTensor* dsinks; /* (Hq); float32 */
} flashcore_attention_backward_args;

typedef enum flashcore_direction {
  FLASHCORE_FORWARD = 0,
  FLASHCORE_BACKWARD = 1
} flashcore_direction;

/* One compiled kernel. Strings live as long as the library. */
typedef struct flashcore_kernel_info {
  uint32_t struct_size;
  flashcore_direction direction;
  const char* name;    /* unique, e.g. "sm90-fwd-bf16-d128-window-128x128" */
  const char* backend; /* "cpu", "sm90" */
  const char* isa;     /* instruction set: "avx512", "sm_90a" */
  const char* dtype;   /* "float32" */
  const char* mask;    /* what it can exclude: "any", "blocks", "window", "causal", "none" */
  int32_t head_dim;    /* largest head dim it takes; 0 = any */
  int32_t head_dim_v;
  int32_t block_m; /* query rows per tile */
  int32_t block_n; /* keys per tile */
  int32_t usable;  /* nonzero if a device of this machine can run it */
} flashcore_kernel_info;

typedef struct flashcore_device_info {
  uint32_t struct_size;
  DLDevice device;
  char name[128];
  char isa[32];            /* "avx512_bf16", "sm_90" */
  int32_t multiprocessors; /* CUDA: SMs. CPU: threads flashcore would use */
  int32_t reserved;
  uint64_t memory_bytes; /* total; 0 if unknown */
} flashcore_device_info;

/* What a call would do. */
typedef struct flashcore_plan {
  uint32_t struct_size;
  int32_t num_splits;
  flashcore_kernel_info kernel;
  uint64_t workspace_bytes; /* alignment FLASHCORE_WORKSPACE_ALIGNMENT, on q's device */
  int32_t deterministic;    /* nonzero: bitwise repeatable from run to run */
  int32_t reserved;
} flashcore_plan;

#define FLASHCORE_WORKSPACE_ALIGNMENT 256

/* Validates the arguments and decides everything a call would do, without running it.
 * out, lse (and the gradients) may be NULL here. */
FLASHCORE_API flashcore_status flashcore_attention_plan(const flashcore_attention_args* args,
                                                        flashcore_plan* plan);
FLASHCORE_API flashcore_status flashcore_attention_backward_plan(
    const flashcore_attention_backward_args* args, flashcore_plan* plan);

/* Runs attention. workspace: at least plan.workspace_bytes on q's device (NULL if that is 0).
 * stream: a cudaStream_t for CUDA tensors (NULL = the legacy default stream), ignored on the CPU.
 * CUDA work is only enqueued; CPU work is complete on return. */
FLASHCORE_API flashcore_status flashcore_attention_forward(const flashcore_attention_args* args,
                                                           void* workspace, size_t workspace_bytes,
                                                           void* stream);
FLASHCORE_API flashcore_status
flashcore_attention_backward(const flashcore_attention_backward_args* args, void* workspace,
                             size_t workspace_bytes, void* stream);

/* Calls visit once per compiled kernel of q's device type, in order of preference: refusal is NULL
 * for a kernel that would run the call, else one sentence saying why it cannot. */
typedef void (*flashcore_visit_kernel)(void* user, const flashcore_kernel_info* kernel,
                                       const char* refusal);
FLASHCORE_API flashcore_status flashcore_attention_explain(const flashcore_attention_args* args,
                                                           flashcore_visit_kernel visit,
                                                           void* user);
FLASHCORE_API flashcore_status flashcore_attention_backward_explain(
    const flashcore_attention_backward_args* args, flashcore_visit_kernel visit, void* user);

/* Combines n partial results over disjoint key sets: outs[s] (B, Sq, Hq, Dv) in the given layout or
 * packed (total_q, Hq, Dv), lses[s] (B, Hq, Sq) or (Hq, total_q); lse may be NULL. */
typedef struct flashcore_merge_args {
  uint32_t struct_size;
  flashcore_layout layout;
  int32_t count;
  int32_t reserved;
  const DLTensor* const* outs;
  const DLTensor* const* lses;
  DLTensor* out;
  DLTensor* lse;
} flashcore_merge_args;
FLASHCORE_API flashcore_status flashcore_merge(const flashcore_merge_args* args, void* stream);

/* Writes which entries the kernels keep: keep (B, H, Sq, Sk), bool or uint8, 1 = kept. */
FLASHCORE_API flashcore_status flashcore_dropout_mask(DLTensor* keep, double dropout_p,
                                                      const int64_t* rng, void* stream);

/* Every compiled kernel, in order of preference. */
FLASHCORE_API int32_t flashcore_kernel_count(void);
FLASHCORE_API flashcore_status flashcore_kernel_at(int32_t index, flashcore_kernel_info* info);

/* The CPU, then every CUDA device. */
FLASHCORE_API int32_t flashcore_device_count(void);
FLASHCORE_API flashcore_status flashcore_device_at(int32_t index, flashcore_device_info* info);

/* Threads a CPU call may use: FLASHCORE_NUM_THREADS, else OMP_NUM_THREADS, else the cores this
 * process may run on. Results do not depend on it. n <= 0 restores that default. */
FLASHCORE_API void flashcore_set_num_threads(int32_t n);
FLASHCORE_API int32_t flashcore_get_num_threads(void);

/* Text of the last failure on this thread; "" if none. Valid until this thread's next call. */
FLASHCORE_API const char* flashcore_last_error(void);
FLASHCORE_API const char* flashcore_version(void);

#ifdef __cplusplus
}
#endif
#endif /* FLASHCORE_FLASHCORE_H_ */
