// What this machine can do at best: bare instruction loops and bare memory sweeps, printed as one JSON object.
//
//   ceilings [table] [threads ...]        default: everything; 1 and the number of processors
//
// For each thread count: GFLOP/s of float32 FMA (the widest of portable, AVX2, AVX-512), of bf16 dot products
// (AVX512_BF16 and AMX, where the processor has them), and GB/s of copy and triad at several footprints.
// No torch and no BLAS: a ceiling must not depend on what is measured against it.
#include <algorithm>
#include <atomic>
#include <cctype>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

// Runs work(thread index) on all threads at once; seconds from the first start to the last end, so that threads which
// do not overlap are not added up.
template <class Work>
double together(int threads, Work work) {
  std::vector<Clock::time_point> begin(threads), end(threads);
  std::atomic<int> waiting{threads};
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      --waiting;
      while (waiting.load() > 0) std::this_thread::yield();
      begin[t] = Clock::now();
      work(t);
      end[t] = Clock::now();
    });
  for (std::thread& thread : pool) thread.join();
  return seconds(*std::min_element(begin.begin(), begin.end()), *std::max_element(end.begin(), end.end()));
}

// Best of seven: a ceiling is what was reached once, not what a busy moment left over.
template <class Work>
double best_rate(int threads, double amount, Work work) {
  double best = 0;
  for (int repeat = 0; repeat < 7; ++repeat) best = std::max(best, amount * threads / together(threads, work));
  return best / 1e9;
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------
// Sixteen independent accumulators: more than the 4 cycles x 2 ports that any current FMA unit needs in flight.

// No instructions beyond this table are used: the machine's own ceiling for a lower one.
enum Table { PORTABLE, AVX2, AVX512, AVX512_BF16, AMX, TABLES };
const char* const table_names[TABLES] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
int table = AMX;

constexpr int CHAINS = 16;
volatile float sink;

#if defined(__x86_64__)

constexpr int64_t FMA_ROUNDS = 10'000'000;

__attribute__((target("avx512f"))) void fma_avx512(int) {
  __m512 a[CHAINS];
  for (int i = 0; i < CHAINS; ++i) a[i] = _mm512_set1_ps(1e-3f * static_cast<float>(i));
  const __m512 b = _mm512_set1_ps(0.999f), c = _mm512_set1_ps(1e-3f);
  for (int64_t n = 0; n < FMA_ROUNDS; ++n)
    for (int i = 0; i < CHAINS; ++i) a[i] = _mm512_fmadd_ps(a[i], b, c);
  __m512 sum = a[0];
  for (int i = 1; i < CHAINS; ++i) sum = _mm512_add_ps(sum, a[i]);
  sink = _mm512_cvtss_f32(sum);
}

__attribute__((target("avx2,fma"))) void fma_avx2(int) {
  constexpr int WAYS = 12;  // 12 and two operands fit the 16 registers
  __m256 a[WAYS];
  for (int i = 0; i < WAYS; ++i) a[i] = _mm256_set1_ps(1e-3f * static_cast<float>(i));
  const __m256 b = _mm256_set1_ps(0.999f), c = _mm256_set1_ps(1e-3f);
  for (int64_t n = 0; n < FMA_ROUNDS; ++n)
    for (int i = 0; i < WAYS; ++i) a[i] = _mm256_fmadd_ps(a[i], b, c);
  __m256 sum = a[0];
  for (int i = 1; i < WAYS; ++i) sum = _mm256_add_ps(sum, a[i]);
  sink = _mm256_cvtss_f32(sum);
}

__attribute__((target("avx512f,avx512bf16"))) void bf16_avx512(int) {
  __m512 a[CHAINS];
  for (int i = 0; i < CHAINS; ++i) a[i] = _mm512_setzero_ps();
  const __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-3f), _mm512_set1_ps(1e-3f));
  for (int64_t n = 0; n < FMA_ROUNDS; ++n)
    for (int i = 0; i < CHAINS; ++i) a[i] = _mm512_dpbf16_ps(a[i], b, b);
  __m512 sum = a[0];
  for (int i = 1; i < CHAINS; ++i) sum = _mm512_add_ps(sum, a[i]);
  sink = _mm512_cvtss_f32(sum);
}

constexpr int64_t TILE_ROUNDS = 400'000;

struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {};
  uint8_t rows[16] = {};
};

// Inline assembly for the configuration: gcc 12 drops the stores to the struct before _tile_loadconfig.
__attribute__((target("amx-tile,amx-bf16"))) void bf16_amx(int) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.columns[i] = 64, config.rows[i] = 16;
  asm volatile("ldtilecfg %0" ::"m"(config));
  alignas(64) uint8_t zeros[1024] = {};
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t n = 0; n < TILE_ROUNDS; ++n) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

// AMX needs the processor, the operating system's save area (XCR0) and the process's permission (arch_prctl).
bool has_amx() {
  if (table < AMX) return false;
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

bool has_avx512_bf16() {
  if (table < AVX512_BF16) return false;
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx512f") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

#endif

// What is left elsewhere: GCC's vector type, which the compiler maps to the machine's own registers.
constexpr int64_t PORTABLE_ROUNDS = 10'000'000;
typedef float Four __attribute__((vector_size(16)));

void fma_portable(int) {
  Four a[CHAINS];
  for (int i = 0; i < CHAINS; ++i) a[i] = Four{} + 1e-3f * static_cast<float>(i);
  const Four b = Four{} + 0.999f, c = Four{} + 1e-3f;
  for (int64_t n = 0; n < PORTABLE_ROUNDS; ++n)
    for (int i = 0; i < CHAINS; ++i) a[i] = a[i] * b + c;
  Four sum = a[0];
  for (int i = 1; i < CHAINS; ++i) sum += a[i];
  sink = sum[0];
}

double fp32(int threads) {
#if defined(__x86_64__)
  if (table >= AVX512 && __builtin_cpu_supports("avx512f"))
    return best_rate(threads, FMA_ROUNDS * CHAINS * 32.0, fma_avx512);
  if (table >= AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return best_rate(threads, FMA_ROUNDS * 12 * 16.0, fma_avx2);
#endif
  return best_rate(threads, PORTABLE_ROUNDS * CHAINS * 8.0, fma_portable);
}

// ---- memory ---------------------------------------------------------------------------------------------------------
// STREAM's counting: copy moves 2 words an element, triad 3; a cache's own fetch before a store is not counted.

void copy(float* to, const float* from, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }

void triad(float* to, const float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] + 0.5f * y[i];
}

#if defined(__x86_64__)
// Past the caches: stores that do not fetch the line first. n is a multiple of 16, pointers are aligned to 64 bytes.
void copy_streaming(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 4) _mm_stream_ps(to + i, _mm_load_ps(from + i));
  _mm_sfence();
}

void triad_streaming(float* to, const float* x, const float* y, int64_t n) {
  const __m128 half = _mm_set1_ps(0.5f);
  for (int64_t i = 0; i < n; i += 4)
    _mm_stream_ps(to + i, _mm_add_ps(_mm_load_ps(x + i), _mm_mul_ps(half, _mm_load_ps(y + i))));
  _mm_sfence();
}
#endif

struct Sweep {
  double copy, triad;
};

// GB/s when all threads together touch `footprint` bytes again and again (each its own share of it).
Sweep memory(int threads, int64_t footprint) {
  const int64_t words = footprint / threads / 3 / 64 * 16;  // of each of three arrays of a thread
  const int64_t repeats = std::max<int64_t>(1, (int64_t{96} << 20) / footprint);
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<float, Free>> blocks;
  std::vector<float*> x(threads);
  const int64_t array = (words * 4 + 63) / 64 * 64;
  for (int t = 0; t < threads; ++t) {
    blocks.emplace_back(static_cast<float*>(std::aligned_alloc(64, 3 * array)));
    x[t] = blocks.back().get();
    if (!x[t]) std::abort();
  }
  together(threads, [&](int t) { std::fill(x[t], x[t] + 3 * array / 4, 1.0f); });  // touched by its own thread
  const int64_t step = array / 4;

  // copy walks all three arrays (0 -> 1, 1 -> 2, 2 -> 0), so that its footprint is the one asked for
  auto copies = [&](void (*run)(float*, const float*, int64_t)) {
    return best_rate(threads, 3.0 * repeats * words * 8, [&](int t) {
      for (int64_t r = 0; r < repeats; ++r)
        for (int k = 0; k < 3; ++k) run(x[t] + (k + 1) % 3 * step, x[t] + k * step, words);
    });
  };
  auto triads = [&](void (*run)(float*, const float*, const float*, int64_t)) {
    return best_rate(threads, 1.0 * repeats * words * 12, [&](int t) {
      for (int64_t r = 0; r < repeats; ++r) {
        run(x[t], x[t] + step, x[t] + 2 * step, words);
        asm volatile("" ::: "memory");
      }
    });
  };
  Sweep best{copies(copy), triads(triad)};
#if defined(__x86_64__)
  best.copy = std::max(best.copy, copies(copy_streaming));
  best.triad = std::max(best.triad, triads(triad_streaming));
#endif
  return best;
}

void report(int threads, bool last) {
  std::printf("  \"%d\": {\"fp32_gflops\": %.1f", threads, fp32(threads));
#if defined(__x86_64__)
  if (has_avx512_bf16())
    std::printf(", \"bf16_avx512_gflops\": %.1f", best_rate(threads, FMA_ROUNDS * CHAINS * 64.0, bf16_avx512));
  if (has_amx())
    std::printf(", \"bf16_amx_gflops\": %.1f", best_rate(threads, TILE_ROUNDS * 4 * 2.0 * 16 * 16 * 32, bf16_amx));
#endif
  std::printf(",\n        \"memory\": [");
  const char* comma = "";
  for (int64_t mib : {1, 4, 16, 64, 256}) {
    const Sweep sweep = memory(threads, mib << 20);
    std::printf("%s{\"mib\": %d, \"copy_gbs\": %.1f, \"triad_gbs\": %.1f}", comma, static_cast<int>(mib), sweep.copy,
                sweep.triad);
    comma = ", ";
  }
  std::printf("]}%s\n", last ? "" : ",");
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> counts;
  int first = 1;
  if (argc > 1 && !std::isdigit(static_cast<unsigned char>(argv[1][0]))) {
    first = 2;
    for (table = 0; table < TABLES && std::strcmp(argv[1], table_names[table]) != 0;) ++table;
    if (table == TABLES) {
      std::fprintf(stderr, "ceilings: the table must be portable, avx2, avx512, avx512_bf16 or amx, got %s\n", argv[1]);
      return 2;
    }
  }
  for (int i = first; i < argc; ++i) counts.push_back(std::max(1, std::atoi(argv[i])));
  if (counts.empty()) {
    counts.push_back(1);
    const int all = static_cast<int>(std::thread::hardware_concurrency());
    if (all > 1) counts.push_back(all);
  }
  std::printf("{\n");
  for (size_t i = 0; i < counts.size(); ++i) report(counts[i], i + 1 == counts.size());
  std::printf("}\n");
}
