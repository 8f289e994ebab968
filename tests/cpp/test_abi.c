/* The C ABI from C99: what a program of today relies on must hold in every later release. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "flashcore/flashcore.h"

static int failures = 0;
#define CHECK(condition)                                     \
  do {                                                       \
    if (!(condition)) {                                      \
      ++failures;                                            \
      printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      printf("  last error: %s\n", flashcore_last_error());  \
    }                                                        \
  } while (0)

/* Sizes of version 0.1 on a 64-bit machine. A structure may only grow, at its end. */
static void sizes_only_grow(void) {
  CHECK(sizeof(flashcore_block_mask) >= 48);
  CHECK(sizeof(flashcore_attention_args) >= 280);
  CHECK(sizeof(flashcore_attention_backward_args) >= 72);
  CHECK(sizeof(flashcore_kernel_info) >= 72);
  CHECK(sizeof(flashcore_device_info) >= 192);
  CHECK(sizeof(flashcore_plan) >= 96);
  CHECK(sizeof(flashcore_merge_args) >= 48);
  CHECK(offsetof(flashcore_attention_args, struct_size) == 0);
  CHECK(offsetof(flashcore_attention_args, q) == 8);
  CHECK(offsetof(flashcore_attention_args, out) == 32);
  CHECK(offsetof(flashcore_attention_backward_args, forward) == 8);
  CHECK(FLASHCORE_OK == 0 && FLASHCORE_INVALID_ARGUMENT == 1 && FLASHCORE_UNSUPPORTED == 2);
  CHECK(FLASHCORE_BSHD == 0 && FLASHCORE_BHSD == 1);
  CHECK(FLASHCORE_BOTTOM_RIGHT == 0 && FLASHCORE_TOP_LEFT == 1);
}

static DLTensor tensor(void* data, int64_t* shape, int ndim) {
  DLTensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.device.device_type = kDLCPU;
  t.ndim = ndim;
  t.dtype.code = kDLFloat;
  t.dtype.bits = 32;
  t.dtype.lanes = 1;
  t.shape = shape;
  return t;
}

/* One key: softmax is 1 and the output is v. Every misuse around it must be refused, unharmed. */
static void a_call_and_its_misuses(void) {
  float q[4] = {1, 2, 3, 4}, k[4] = {1, 0, 1, 0}, v[4] = {5, 6, 7, 8}, out[4] = {-1, -1, -1, -1};
  float lse[1] = {-1};
  int64_t shape[4] = {1, 1, 1, 4}, stats[3] = {1, 1, 1};
  DLTensor tq = tensor(q, shape, 4), tk = tensor(k, shape, 4), tv = tensor(v, shape, 4);
  DLTensor to = tensor(out, shape, 4), tl = tensor(lse, stats, 3);
  flashcore_attention_args args;
  flashcore_plan plan;
  memset(&args, 0, sizeof args);
  memset(&plan, 0, sizeof plan);
  args.struct_size = sizeof args;
  plan.struct_size = sizeof plan;
  args.q = &tq, args.k = &tk, args.v = &tv, args.out = &to, args.lse = &tl;

  CHECK(flashcore_attention_plan(NULL, &plan) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(strstr(flashcore_last_error(), "NULL") != NULL);
  CHECK(flashcore_attention_plan(&args, NULL) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(flashcore_attention_forward(NULL, NULL, 0, NULL) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(flashcore_attention_backward(NULL, NULL, 0, NULL) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(flashcore_attention_backward_plan(NULL, &plan) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(flashcore_attention_explain(&args, NULL, NULL) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(flashcore_merge(NULL, NULL) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(flashcore_dropout_mask(NULL, 0.5, NULL, NULL) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(flashcore_kernel_at(0, NULL) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(flashcore_device_at(0, NULL) == FLASHCORE_INVALID_ARGUMENT);

  args.struct_size = sizeof args + 8;
  CHECK(flashcore_attention_plan(&args, &plan) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(strstr(flashcore_last_error(), "struct_size") != NULL);
  CHECK(strstr(flashcore_last_error(), "newer") != NULL);
  args.struct_size = 0;
  CHECK(flashcore_attention_plan(&args, &plan) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(strstr(flashcore_last_error(), "struct_size") != NULL);
  args.struct_size = sizeof args;
  plan.struct_size = sizeof plan + 8;
  CHECK(flashcore_attention_plan(&args, &plan) == FLASHCORE_INVALID_ARGUMENT);
  plan.struct_size = sizeof plan;

  args.q = NULL;
  CHECK(flashcore_attention_forward(&args, NULL, 0, NULL) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(strstr(flashcore_last_error(), "q ") != NULL);
  args.q = &tq;
  args.out = NULL;
  CHECK(flashcore_attention_plan(&args, &plan) == FLASHCORE_OK);
  CHECK(flashcore_attention_forward(&args, NULL, 0, NULL) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(strstr(flashcore_last_error(), "out") != NULL);
  args.out = &to;
  CHECK(out[0] == -1 && out[3] == -1 && lse[0] == -1);

  CHECK(flashcore_attention_plan(&args, &plan) == FLASHCORE_OK);
  CHECK(strcmp(flashcore_last_error(), "") == 0);
  CHECK(plan.kernel.name != NULL && strcmp(plan.kernel.backend, "cpu") == 0);
  if (plan.workspace_bytes) {
    CHECK(flashcore_attention_forward(&args, NULL, 0, NULL) == FLASHCORE_INVALID_ARGUMENT);
    CHECK(strstr(flashcore_last_error(), "workspace") != NULL);
    CHECK(out[0] == -1);
  } else {
    CHECK(flashcore_attention_forward(&args, NULL, 0, NULL) == FLASHCORE_OK);
    CHECK(out[0] == 5 && out[3] == 8);
    CHECK(fabsf(lse[0] - 2.0f) < 1e-6f); /* (1 + 3) / sqrt(4) */
  }
}

static void lists(void) {
  flashcore_kernel_info kernel;
  flashcore_device_info device;
  int32_t i, n = flashcore_kernel_count();
  CHECK(n > 0);
  for (i = 0; i < n; ++i) {
    memset(&kernel, 0, sizeof kernel);
    kernel.struct_size = sizeof kernel;
    CHECK(flashcore_kernel_at(i, &kernel) == FLASHCORE_OK);
    CHECK(kernel.name && kernel.backend && kernel.isa && kernel.dtype && kernel.mask);
  }
  CHECK(flashcore_kernel_at(n, &kernel) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(flashcore_kernel_at(-1, &kernel) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(flashcore_device_count() >= 1);
  memset(&device, 0, sizeof device);
  device.struct_size = sizeof device;
  CHECK(flashcore_device_at(0, &device) == FLASHCORE_OK);
  CHECK(device.device.device_type == kDLCPU);
  CHECK(flashcore_device_at(-1, &device) == FLASHCORE_INVALID_ARGUMENT);
  CHECK(flashcore_device_at(1 << 20, &device) == FLASHCORE_INVALID_ARGUMENT);
}

static void threads_and_version(void) {
  char version[32];
  int32_t before = flashcore_get_num_threads();
  CHECK(before >= 1);
  flashcore_set_num_threads(3);
  CHECK(flashcore_get_num_threads() == 3);
  flashcore_set_num_threads(0);
  CHECK(flashcore_get_num_threads() == before);
  flashcore_set_num_threads(-5);
  CHECK(flashcore_get_num_threads() == before);
  sprintf(version, "%d.%d.%d", FLASHCORE_VERSION_MAJOR, FLASHCORE_VERSION_MINOR,
          FLASHCORE_VERSION_PATCH);
  CHECK(strcmp(flashcore_version(), version) == 0);
}

int main(void) {
  sizes_only_grow();
  a_call_and_its_misuses();
  lists();
  threads_and_version();
  printf("%s\n", failures ? "FAIL" : "ok");
  return failures != 0;
}
