// CUDA's device language for a C++ compiler: csrc/cuda is compiled against this header and runs on the CPU.
//
// Every CUDA thread is a fiber. Barriers, shuffles, votes and atomics are real, shared memory starts as NaN and is
// checked index by index, global memory is checked against the tensors that the caller declared, and the order of
// blocks and threads is drawn from a seed. A violation raises std::runtime_error from the launch: which rule, where,
// which thread. Compiled with -fsanitize=thread, races show too: within a block (Race::WITHIN) or between blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#define FG_SIMT 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace simt {

// ------------------------------------------------------------------------------------------------ control

enum class Race { WITHIN, BETWEEN };  // what a thread sanitizer is to look for (one context a thread, or one a block)

// The card that kernels run on: no more blocks of a cooperative launch than it holds at a time.
struct Card {
  static constexpr int RESERVED = 1 << 10,
                       THREADS = 1024;          // bytes that a block costs besides; threads a multiprocessor
  int multiprocessors = 4, shared = 100 << 10;  // bytes a multiprocessor
  bool cooperative = true;

  int shared_block() const { return shared - RESERVED; }
};

struct Settings {
  unsigned seed = 0;  // 0: natural order; else blocks and threads run in orders drawn from it
  Race race = Race::WITHIN;
  bool counting = false;
  unsigned last_blocks = 0;  // 0: every block of a grid; else so many of its last ones
  Card card;
};
extern Settings settings;

// A tensor that kernels may touch. While none is declared, global memory is not checked.
struct Region {
  uintptr_t begin, bytes;
  uint64_t requested = 0;  // distinct bytes asked for, warp instruction by warp instruction
  uint64_t sectors = 0;    // 32-byte sectors that those instructions touched
};
extern std::vector<Region> regions;

struct Launch {
  std::string kernel;
  unsigned blocks, threads;
  size_t shared;  // dynamic bytes of a block
  bool cooperative;
  uint64_t shared_wavefronts = 0, shared_ideal = 0;  // counted only with settings.counting
  uint64_t products = 0;                             // mma.sync instructions of its warps
};
extern std::vector<Launch> launches;

// ------------------------------------------------------------------------------------------------ the machine

struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
  int lane, warp;
  void* dynamic_shared;
};
extern Thread* current;

struct Where {
  const char* file;
  int line;
};
#define SIMT_WHERE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()

enum class Meeting { SYNC, EXCHANGE };

[[noreturn]] void fail(const char* rule, Where where, const std::string& text);
void barrier(Where where);
// Meets the lanes of `mask`; out[i] is lane i's word, all ones (a NaN) for lanes outside.
void meet(Meeting kind, unsigned mask, uint64_t mine, uint64_t out[32], Where where);
void yield();
void fence();
void before_atomic(void* p);
void after_atomic(void* p);
void global_access(const void* p, unsigned bytes, bool write);
void shared_access(const void* p, unsigned bytes);
void count_product();  // a warp's mma.sync
void* shared_memory(const void* key, size_t bytes);
void copy_later(void* shared, const void* global, unsigned bytes, unsigned valid);  // cp.async: done at the wait
void commit_copies();
void wait_copies(int groups_in_flight);
void allow_shared(const char* kernel, size_t bytes);  // beyond 48 KiB a launch needs it
void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared, bool cooperative,
            const std::function<void()>& body);

template <class T>
uint64_t pack(T v) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &v, sizeof v);
  return word;
}
template <class T>
T unpack(uint64_t word) {
  T v;
  std::memcpy(&v, &word, sizeof v);
  return v;
}

template <class T>
T shuffle(unsigned mask, T v, int source, bool inside, Where where) {
  uint64_t words[32];
  const int lane = current->lane;
  if (!(mask >> lane & 1)) fail("shuffle", where, "a lane must be in its own mask");
  meet(Meeting::EXCHANGE, mask, pack(v), words, where);
  if (!inside) return v;
  if (!(mask >> source & 1)) fail("shuffle", where, "reads lane " + std::to_string(source) + " outside its mask");
  return unpack<T>(words[source]);
}

// Shared memory whose every index is checked: Shared<float[4][33]> is used as the array would be.
template <class T>
struct Shared {
  T* begin;
  operator T*() const { return begin; }
};
template <class T, size_t N>
struct Shared<T[N]> {
  T (*array)[N];

  decltype(auto) operator[](int64_t i) const {
    if (i < 0 || i >= static_cast<int64_t>(N))
      fail("shared memory", {"", 0}, "index " + std::to_string(i) + " of an array of " + std::to_string(N));
    if constexpr (std::is_array_v<T>) {
      return Shared<T>{&(*array)[i]};
    } else {
      shared_access(&(*array)[i], sizeof(T));
      return static_cast<T&>((*array)[i]);
    }
  }
  std::remove_all_extents_t<T>* data() const { return reinterpret_cast<std::remove_all_extents_t<T>*>(array); }
};

}  // namespace simt

// ------------------------------------------------------------------------------------------------ the language

#define threadIdx (simt::current->thread)
#define blockIdx (simt::current->block)
#define blockDim (simt::current->block_size)
#define gridDim (simt::current->grid_size)

#define FG_SHARED(T, name, dims)                                                            \
  static const char name##_key = 0;                                                         \
  using name##_array = T dims;                                                              \
  const simt::Shared<name##_array> name {                                                   \
    reinterpret_cast<name##_array*>(simt::shared_memory(&name##_key, sizeof(name##_array))) \
  }
#define FG_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(simt::current->dynamic_shared)
#define FG_READ(pointer, bytes) simt::global_access(pointer, bytes, false)
#define FG_WRITE(pointer, bytes) simt::global_access(pointer, bytes, true)
#define FG_KERNEL(name, ...) (name __VA_OPT__(, ) __VA_ARGS__)  // in brackets: one argument of the launches
#define FG_FUNCTION(name, ...) name __VA_OPT__(<__VA_ARGS__>)
#define FG_TEXT(name, ...) #name __VA_OPT__("<" #__VA_ARGS__ ">")
#define FG_ALLOW_SHARED(kernel, bytes) simt::allow_shared(FG_TEXT kernel, bytes)
#define FG_LAUNCH_AS(cooperative, kernel, grid, block, shared_bytes, stream, ...)                   \
  ((void)(stream), simt::launch(FG_TEXT kernel, dim3(grid), dim3(block), shared_bytes, cooperative, \
                                [&] { (FG_FUNCTION kernel)(__VA_ARGS__); }))
#define FG_LAUNCH(...) FG_LAUNCH_AS(false, __VA_ARGS__)
#define FG_LAUNCH_COOPERATIVE(...) FG_LAUNCH_AS(true, __VA_ARGS__)

inline void __syncthreads(SIMT_WHERE) { simt::barrier({file_, line_}); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_WHERE) {
  uint64_t words[32];
  simt::meet(simt::Meeting::SYNC, mask, 0, words, {file_, line_});
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, SIMT_WHERE) {
  const int base = simt::current->lane & ~(width - 1);
  return simt::shuffle(mask, v, base + (source & (width - 1)), true, {file_, line_});
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned distance, int width = 32, SIMT_WHERE) {
  const int lane = simt::current->lane, source = lane + static_cast<int>(distance);
  return simt::shuffle(mask, v, source & 31, source < (lane & ~(width - 1)) + width, {file_, line_});
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned distance, int width = 32, SIMT_WHERE) {
  const int lane = simt::current->lane, source = lane - static_cast<int>(distance);
  return simt::shuffle(mask, v, source & 31, source >= (lane & ~(width - 1)), {file_, line_});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, SIMT_WHERE) {
  const int lane = simt::current->lane, source = lane ^ lanes;
  return simt::shuffle(mask, v, source & 31, source < (lane & ~(width - 1)) + width, {file_, line_});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_WHERE) {
  uint64_t words[32];
  simt::meet(simt::Meeting::EXCHANGE, mask, predicate != 0, words, {file_, line_});
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) votes |= static_cast<unsigned>(words[i]) << i;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, SIMT_WHERE) {
  return __ballot_sync(mask, predicate, file_, line_) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_WHERE) {
  return __ballot_sync(mask, predicate, file_, line_) == mask;
}

template <class T>
T atomicAdd(T* p, T v) {
  using U = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  simt::before_atomic(p);
  U seen = __atomic_load_n(reinterpret_cast<U*>(p), __ATOMIC_RELAXED), next;
  do {
    const T sum = simt::unpack<T>(seen) + v;
    std::memcpy(&next, &sum, sizeof next);
  } while (
      !__atomic_compare_exchange_n(reinterpret_cast<U*>(p), &seen, next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  simt::after_atomic(p);
  return simt::unpack<T>(seen);
}
template <class T>
T atomicExch(T* p, T v) {
  simt::before_atomic(p);
  const T seen = __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
  simt::after_atomic(p);
  return seen;
}
inline void __threadfence() { simt::fence(); }
inline void __nanosleep(unsigned) { simt::yield(); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __uint_as_float(unsigned bits) { return simt::unpack<float>(bits); }
inline float __fdividef(float a, float b) { return a / b; }
using std::max;
using std::min;

// ------------------------------------------------------------------------------------------------ 16-bit floats

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) { return simt::unpack<float>(static_cast<uint64_t>(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const auto u = static_cast<uint32_t>(simt::pack(f));
  if (f != f) return {static_cast<uint16_t>(u >> 16 | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
float __half2float(__half v);
__half __float2half_rn(float f);
