// What every device file starts from: float conversion, vectors of 16 bytes, warp reductions, activations.
//
// Device code (.cuh) includes cuda_bf16.h, cuda_fp16.h and other .cuh only, so that NVRTC compiles it without a
// toolkit; launchers (.cu) add cuda/launch.hpp. Without nvcc both headers are those of cuda/nvrtc/toolkit.
// tests/emulation/simt puts its own first on the include path and compiles the same files with a C++ compiler: it
// defines FG_SIMT and the four macros below.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/codes.hpp"

#ifndef FG_SIMT
#define FG_SHARED(T, name, dims) __shared__ T name dims
#define FG_DYN_SHARED(T, name)                                 \
  extern __shared__ __align__(16) unsigned char fg_dynamic_[]; \
  T* name = reinterpret_cast<T*>(fg_dynamic_)
#define FG_READ(pointer, bytes)  // the emulator checks and counts here
#define FG_WRITE(pointer, bytes)
#endif

#define FG_DEVICE static __device__ __forceinline__
#define FG_MEMBER __device__ __forceinline__

namespace fg::cuda {

using i64 = long long;
using u32 = unsigned;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// ---------------------------------------------------------------------------------------------- values

FG_DEVICE float to_float(float v) { return v; }
FG_DEVICE float to_float(__half v) { return __half2float(v); }
FG_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
struct From;
template <>
struct From<float> {
  static FG_MEMBER float of(float v) { return v; }
};
template <>
struct From<__half> {
  static FG_MEMBER __half of(float v) { return __float2half_rn(v); }
};
template <>
struct From<__nv_bfloat16> {
  static FG_MEMBER __nv_bfloat16 of(float v) { return __float2bfloat16_rn(v); }
};
template <class T>
FG_DEVICE T from_float(float v) {
  return From<T>::of(v);
}

// ---------------------------------------------------------------------------------------------- global memory

// N elements that move in one access; N * sizeof(T) is 2, 4, 8 or 16 and the address is a multiple of it. A struct of
// that alignment becomes one LDG.128; a memcpy of the same bytes became four loads (tests/emulation counts them).
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T v[N];
};

template <class T>
constexpr int VECTOR = 16 / sizeof(T);

template <int N, class T>
FG_DEVICE Pack<T, N> load(const T* p) {
  FG_READ(p, sizeof(Pack<T, N>));
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <int N, class T>
FG_DEVICE void store(T* p, const Pack<T, N>& pack) {
  FG_WRITE(p, sizeof(Pack<T, N>));
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

template <class T>
FG_DEVICE T load(const T* p) {
  FG_READ(p, sizeof(T));
  return *p;
}

template <class T>
FG_DEVICE void store(T* p, T v) {
  FG_WRITE(p, sizeof(T));
  *p = v;
}

FG_DEVICE float load_or(const float* p, i64 i, float absent) { return p ? load(p + i) : absent; }

// V neighbours, four at a time where they lie so; a null p gives `absent`.
template <int V>
FG_DEVICE void load_neighbours(const float* p, i64 i, float absent, float (&v)[V]) {
  if constexpr (V % 4 == 0)
    if (p && reinterpret_cast<unsigned long long>(p + i) % 16 == 0) {
#pragma unroll
      for (int q = 0; q < V; q += 4) {
        const Pack<float, 4> four = load<4>(p + i + q);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[q + j] = four.v[j];
      }
      return;
    }
#pragma unroll
  for (int j = 0; j < V; ++j) v[j] = load_or(p, i + j, absent);
}

// ---------------------------------------------------------------------------------------------- dynamic shared memory

// Accesses that the emulator checks and counts.
template <class P>
FG_DEVICE P load_shared(const void* from) {
#ifdef FG_SIMT
  simt::shared_access(from, sizeof(P));
#endif
  return *static_cast<const P*>(from);
}

template <class P>
FG_DEVICE void store_shared(void* to, const P& value) {
#ifdef FG_SIMT
  simt::shared_access(to, sizeof(P));
#endif
  *static_cast<P*>(to) = value;
}

// ---------------------------------------------------------------------------------------------- activations

// Any activation; `act` is the same in every thread. A NaN stays one, so the comparisons are not turned round.
FG_DEVICE float activate(float t, Act act, float slope) {
  if (act == ACT_RELU) return t <= 0.0f ? 0.0f : t;
  if (act == ACT_LEAKY_RELU) return t <= 0.0f ? t * slope : t;
  if (act == ACT_TANH) return tanhf(t);
  if (act == ACT_SIGMOID) return 1.0f / (1.0f + expf(-t));
  return t;
}

// g phi'(t) from t or from y = phi(t) for (leaky) relu, whose signs agree; from y for tanh and sigmoid.
FG_DEVICE float activate_gradient(float g, float y, Act act, float slope) {
  if (act == ACT_RELU) return y <= 0.0f ? 0.0f : g;
  if (act == ACT_LEAKY_RELU) return y > 0.0f ? g : g * slope;
  if (act == ACT_TANH) return g * (1.0f - y * y);
  if (act == ACT_SIGMOID) return g * (y * (1.0f - y));
  return g;
}

// ---------------------------------------------------------------------------------------------- accumulators

// What a reduction adds up: K sums.
template <int K>
struct Sums {
  static constexpr int WORDS = K;
  float word[K];

  FG_MEMBER void clear() {
    for (int k = 0; k < K; ++k) word[k] = 0.0f;
  }
  FG_MEMBER void merge(const Sums& other) {
    for (int k = 0; k < K; ++k) word[k] += other.word[k];
  }
};

// Count, mean and sum of squared distances from it (Welford; merged as Chan, Golub and LeVeque do). E[x^2] - E[x]^2
// would lose every digit where |mean| is 3000 standard deviations. __fdividef, 2 ulp: the exact division is a call.
struct Moments {
  static constexpr int WORDS = 3;
  float word[3];

  FG_MEMBER void clear() { word[0] = word[1] = word[2] = 0.0f; }
  FG_MEMBER float mean() const { return word[1]; }
  FG_MEMBER float variance() const { return __fdividef(word[2], word[0]); }

  FG_MEMBER void merge(const Moments& other) {
    const float n = word[0] + other.word[0];
    if (other.word[0] == 0.0f) return;
    const float share = __fdividef(other.word[0], n), distance = other.word[1] - word[1];
    word[2] += other.word[2] + distance * distance * word[0] * share;
    word[1] += distance * share;
    word[0] = n;
  }

  // Adds the first `count` of M values: their own mean and squares in registers, then one merge.
  template <int M>
  FG_MEMBER void add(const float (&v)[M], int count) {
    if (count == 0) return;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < M; ++i)
      if (i < count) sum += v[i];
    Moments chunk;
    chunk.word[0] = static_cast<float>(count);
    chunk.word[1] = __fdividef(sum, chunk.word[0]);
    chunk.word[2] = 0.0f;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const float d = i < count ? v[i] - chunk.word[1] : 0.0f;
      chunk.word[2] += d * d;
    }
    merge(chunk);
  }
};

template <class Acc>
FG_DEVICE Acc shuffle_xor(const Acc& acc, int lanes) {
  Acc other;
#pragma unroll
  for (int k = 0; k < Acc::WORDS; ++k) other.word[k] = __shfl_xor_sync(ALL_LANES, acc.word[k], lanes);
  return other;
}

// Merges lanes whose numbers agree modulo `first`; every thread of the warp must call it.
template <class Acc>
FG_DEVICE void merge_lanes(Acc& acc, int first) {
  for (int lanes = first; lanes < WARP; lanes *= 2) acc.merge(shuffle_xor(acc, lanes));
}

// The totals of a block's threads whose numbers agree modulo COLUMNS, in its first COLUMNS threads and in a fixed
// order; every thread of a block of THREADS must call it.
template <int THREADS, int COLUMNS = 1, class Acc>
FG_DEVICE void merge_block(Acc& acc) {
  constexpr int WARPS = THREADS / WARP;
  FG_SHARED(float, part, [Acc::WORDS][WARPS][COLUMNS]);
  const u32 column = COLUMNS == 1 ? 0 : threadIdx.x % WARP;
  merge_lanes(acc, COLUMNS);
  if (threadIdx.x % WARP < COLUMNS)
    for (int k = 0; k < Acc::WORDS; ++k) part[k][threadIdx.x / WARP][column] = acc.word[k];
  __syncthreads();
  if (threadIdx.x < COLUMNS)
    for (int w = 1; w < WARPS; ++w) {
      Acc other;
      for (int k = 0; k < Acc::WORDS; ++k) other.word[k] = part[k][w][column];
      acc.merge(other);
    }
  __syncthreads();  // the caller may come again
}

}  // namespace fg::cuda
