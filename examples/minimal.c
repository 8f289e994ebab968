/* Attention from C: one causal head, checked against the definition. */
#include <flashcore/flashcore.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { N = 200, D = 48 };
static float q[N][D], k[N][D], v[N][D], out[N][D];

/* (batch, seqlen, heads, head_dim) = (1, N, 1, D), row-major and packed. */
static DLTensor tensor(float* data) {
  static int64_t shape[4] = {1, N, 1, D};
  static int64_t strides[4] = {N * D, D, D, 1};
  DLTensor t = {0};
  t.data = data;
  t.device.device_type = kDLCPU;
  t.ndim = 4;
  t.dtype.code = kDLFloat;
  t.dtype.bits = 32;
  t.dtype.lanes = 1;
  t.shape = shape;
  t.strides = strides;
  return t;
}

/* The largest |out - expected|, with expected computed from the definition in double. */
static double error(void) {
  double worst = 0;
  for (int i = 0; i < N; ++i) {
    double p[N], sum = 0;
    for (int j = 0; j <= i; ++j) {
      double s = 0;
      for (int d = 0; d < D; ++d) s += (double)q[i][d] * k[j][d];
      sum += p[j] = exp(s / sqrt(D));
    }
    for (int d = 0; d < D; ++d) {
      double o = 0;
      for (int j = 0; j <= i; ++j) o += p[j] / sum * v[j][d];
      worst = fmax(worst, fabs(o - out[i][d]));
    }
  }
  return worst;
}

static int failed(void) {
  fprintf(stderr, "flashcore: %s\n", flashcore_last_error());
  return 1;
}

int main(void) {
  for (int i = 0; i < N; ++i)
    for (int d = 0; d < D; ++d) {
      q[i][d] = (float)sin(0.7 * i + d);
      k[i][d] = (float)cos(0.3 * i * (d + 1));
      v[i][d] = (float)sin(0.1 * i - 0.5 * d);
    }

  DLTensor tq = tensor(&q[0][0]), tk = tensor(&k[0][0]), tv = tensor(&v[0][0]);
  DLTensor to = tensor(&out[0][0]);
  flashcore_attention_args args = {0};
  args.struct_size = sizeof args;
  args.q = &tq;
  args.k = &tk;
  args.v = &tv;
  args.out = &to;
  args.causal = 1;

  flashcore_plan plan = {0};
  plan.struct_size = sizeof plan;
  if (flashcore_attention_plan(&args, &plan)) return failed();
  /* A little more than asked for, to round the pointer up to the alignment. */
  char* block = malloc(plan.workspace_bytes + FLASHCORE_WORKSPACE_ALIGNMENT);
  if (!block) return 1;
  char* workspace =
      block + FLASHCORE_WORKSPACE_ALIGNMENT - (uintptr_t)block % FLASHCORE_WORKSPACE_ALIGNMENT;
  flashcore_status status = flashcore_attention_forward(&args, workspace, plan.workspace_bytes, 0);
  free(block);
  if (status) return failed();

  double const e = error();
  printf("C: %s, largest error %.1e\n", plan.kernel.name, e);
  return e < 2e-6 ? 0 : 1;
}
