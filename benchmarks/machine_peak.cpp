// machine_peak.cpp: what one core can do at most, for benchmarks/matmul.py, which compiles and loads it.
//
// Multiply-adds from registers alone, in chains that hide the latency; and reading memory once. Needs AVX-512 for the
// vdpbf16ps peak; elsewhere that one is 0.
#include <immintrin.h>
#include <stdint.h>
#include <time.h>

namespace {

double seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

}  // namespace

#define CHAINS(OP) OP(0) OP(1) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9) OP(10) OP(11)
#define START(i) "vxorps %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n"
#define USED(i) "xmm" #i,

// GFLOP/s of CPU time of 12 chains of an instruction; `flops` each.
#define PEAK(NAME, TARGET, STEP, flops)                                                                     \
  extern "C" __attribute__((target(TARGET))) double NAME(int64_t rounds) {                                  \
    const double start = seconds();                                                                         \
    int64_t left = rounds;                                                                                  \
    asm volatile(CHAINS(START) START(14) START(15) ".balign 32\n1:\n" CHAINS(STEP) "dec %0\njnz 1b\n"      \
                 : "+r"(left)                                                                               \
                 :                                                                                          \
                 : CHAINS(USED) "xmm14", "xmm15", "cc");                                                    \
    return (double)rounds * 12 * flops / (seconds() - start) * 1e-9;                                        \
  }

#define FMA512(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #i "\n"
#define FMA256(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n"
#define DOT512(i) "vdpbf16ps %%zmm14, %%zmm15, %%zmm" #i "\n"
PEAK(peak_fma512, "avx512f", FMA512, 32)
PEAK(peak_fma256, "avx2,fma", FMA256, 16)
PEAK(peak_dot512, "avx512f,avx512bf16", DOT512, 64)

// GB/s of CPU time reading `bytes` once, as `streams` runs of `run` bytes side by side, fetched to L2 2 KiB ahead; bytes
// is a multiple of streams * run, run of 64.
extern "C" __attribute__((target("avx2"))) double peak_read(const char *from, int64_t bytes, int64_t streams, int64_t run) {
  __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  const double start = seconds();
  for (int64_t block = 0; block < bytes; block += streams * run)
    for (int64_t j = 0; j < run; j += 64)
      for (int64_t i = 0; i < streams; i++) {
        const char *at = from + block + i * run + j;
        __builtin_prefetch((const void *)((uintptr_t)at + 2048), 0, 2);
        sum[0] = _mm256_xor_si256(sum[0], _mm256_loadu_si256((const __m256i *)at));
        sum[1] = _mm256_xor_si256(sum[1], _mm256_loadu_si256((const __m256i *)(at + 32)));
      }
  const double spent = seconds() - start;
  asm volatile("" ::"x"(_mm256_xor_si256(sum[0], sum[1])));
  return (double)bytes / spent * 1e-9;
}
