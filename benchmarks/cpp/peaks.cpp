// Ceilings of this core: multiply-add rates and read bandwidth. Prints one "name value" per line,
// GFLOP/s or GB/s, per CPU second of one thread. Compiled and run by benchmarks/peaks.py.
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// The best of several runs of work(), in units per second.
double best_rate(double units, void (*work)()) {
  double best = 0;
  for (int run = 0; run < 9; ++run) {
    double const begin = cpu_seconds();
    work();
    double const rate = units / (cpu_seconds() - begin);
    if (rate > best) best = rate;
  }
  return best * 1e-9;
}

constexpr int kChains = 12;  // independent sums: latency 4, two per cycle, and some to spare
constexpr int64_t kSteps = 4'000'000;

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void fma256() {
  __m256 sum[kChains] = {};
  __m256 const a = _mm256_set1_ps(0.5f);
  for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 12
    for (auto& s : sum) {
      s = _mm256_fmadd_ps(a, s, a);
      asm volatile("" : "+x"(s));
    }
}
__attribute__((target("avx512f"))) void fma512() {
  __m512 sum[kChains] = {};
  __m512 const a = _mm512_set1_ps(0.5f);
  for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 12
    for (auto& s : sum) {
      s = _mm512_fmadd_ps(a, s, a);
      asm volatile("" : "+v"(s));
    }
}
__attribute__((target("avx512f,avx512bf16"))) void bf16_512() {
  __m512 sum[kChains] = {};
  __m512bh const a = (__m512bh)_mm512_set1_epi16(0x3f00);
  for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 12
    for (auto& s : sum) {
      s = _mm512_dpbf16_ps(s, a, a);
      asm volatile("" : "+v"(s));
    }
}
#endif

std::vector<uint64_t> data(size_t{32} << 20, 1);  // 256 MB: past every cache
void read_all() {
  typedef uint64_t Wide __attribute__((vector_size(16)));
  Wide sum[8] = {};
  auto const* p = reinterpret_cast<const Wide*>(data.data());
  for (size_t i = 0; i < data.size() / 2; i += 8)
    for (int lane = 0; lane < 8; ++lane) sum[lane] += p[i + lane];
  for (auto& s : sum) asm volatile("" : : "m"(s));
}

}  // namespace

int main() {
  double const steps = double(kSteps) * kChains;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    std::printf("fma_avx2 %.1f\n", best_rate(steps * 16, fma256));
  if (__builtin_cpu_supports("avx512f"))
    std::printf("fma_avx512 %.1f\n", best_rate(steps * 32, fma512));
  if (__builtin_cpu_supports("avx512bf16"))
    std::printf("bf16_avx512 %.1f\n", best_rate(steps * 64, bf16_512));
#endif
  std::printf("read_bandwidth %.1f\n", best_rate(double(data.size()) * 8, read_all));
}
