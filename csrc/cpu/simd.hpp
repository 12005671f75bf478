// One vector type, so that a kernel is written once and compiled for every instruction set: vf holds VF floats, vm is
// the result of a comparison. Loads and stores take float or bf16, aligned or not. A tail load of n <= VF lanes fills
// the others with zero and reads nothing past them; a tail store leaves the bytes behind it untouched.
//
// The type is the vector extension of GCC and Clang; intrinsics appear only where the compilers make poor code of it
// (broadcasts, tails) or may not promise one rounding (fma).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/bf16.hpp"

namespace fg::ISA {

#define FG_INLINE static inline __attribute__((always_inline))
#define FG_INLINE_MEMBER inline __attribute__((always_inline))
// Keeps one copy of a function that several kernels call: compile time, and no cost beside the work it does.
#define FG_NOINLINE __attribute__((noinline))

#if defined(__AVX512F__)
constexpr int VF = 16;
#elif defined(__AVX2__)
constexpr int VF = 8;
#else
constexpr int VF = 4;  // SSE2 on x86-64, NEON on aarch64
#endif

typedef float vf __attribute__((vector_size(VF * 4)));
typedef int32_t vi __attribute__((vector_size(VF * 4)));
typedef uint32_t vu __attribute__((vector_size(VF * 4)));
typedef uint16_t vh __attribute__((vector_size(VF * 2)));  // VF bf16 elements
typedef vi vm;                                             // -1 in the lanes where the comparison holds, else 0

// ---- arithmetic beyond the operators

FG_INLINE vf set1(float a) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(a);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(a);
#else
  return vf{a, a, a, a};
#endif
}
FG_INLINE vf zero() { return set1(0.0f); }

// a * b + c, in one rounding where the table has FMA.
FG_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

FG_INLINE vf sqrt(vf a) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)a);
#else
  return vf{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
#endif
}

FG_INLINE vf abs(vf a) { return (vf)((vu)a & 0x7fffffffu); }
FG_INLINE vm gt(vf a, vf b) { return a > b; }
FG_INLINE vm le(vf a, vf b) { return a <= b; }
FG_INLINE vf select(vm m, vf yes, vf no) { return m ? yes : no; }

// Adding and subtracting 1.5 * 2^23 rounds |a| < 2^22 to the nearest integer, ties to even.
FG_INLINE vf round_even(vf a) {
  const vf shifted = a + 12582912.0f;
  return shifted - 12582912.0f;
}
// 2^n for integral n in [-126, 127]: the sum holds n + 127 in its lowest bits.
FG_INLINE vf exp2_int(vf n) { return (vf)((vu)(n + (12582912.0f + 127.0f)) << 23); }

// Halves are added until one lane is left: the same order in every table of one width.
FG_INLINE float sum(vf a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)a);
#elif defined(__AVX2__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return (a[0] + a[2]) + (a[1] + a[3]);
#endif
}

// ---- bfloat16

// Between vectors of 16 and 32 bits a lane. Intrinsics: gcc 12 makes four instructions of a 512-bit
// __builtin_convertvector where one serves, 20 % of a bf16 norm's time. What is narrowed must fit.
FG_INLINE vu to_32_bits(vh h) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}
FG_INLINE vh to_16_bits(vu a) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)a);
#elif defined(__AVX2__)
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)a), _mm256_extracti128_si256((__m256i)a, 1));
#else
  return __builtin_convertvector(a, vh);
#endif
}

FG_INLINE vf widen(vh h) { return (vf)(to_32_bits(h) << 16); }

// The nearest bf16 in the upper half of each lane, even where there are two; the lower half is left over. A NaN keeps
// its sign and becomes quiet. vcvtneps2bf16 is not used: it flushes denormals to zero.
FG_INLINE vu round_upper(vf a) {
  const vu u = (vu)a;
  return a != a ? u | 0x400000u : u + 0x7fffu + ((u >> 16) & 1u);
}
FG_INLINE vh narrow(vf a) { return to_16_bits(round_upper(a) >> 16); }
FG_INLINE vf round_bf16(vf a) { return (vf)(round_upper(a) & 0xffff0000u); }

// lanes[i] = (low[i], high[i]): the pairs of elements that vdpbf16ps and AMX multiply.
FG_INLINE vf interleave(vf low, vf high) { return (vf)((round_upper(low) >> 16) | (round_upper(high) & 0xffff0000u)); }
FG_INLINE vf interleave(vh low, vh high) { return (vf)(to_32_bits(low) | (to_32_bits(high) << 16)); }

// ---- memory

// Lanes below n.
FG_INLINE vm first(int n) {
#if defined(__AVX512F__)
  return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} < n;
#elif defined(__AVX2__)
  return vi{0, 1, 2, 3, 4, 5, 6, 7} < n;
#else
  return vi{0, 1, 2, 3} < n;
#endif
}

// Through types without alignment: gcc 12 copies with memcpy in integer registers of their own, and kept every
// accumulator of a product twice, 12 of 16 AVX2 registers on the stack between two runs.
typedef float vf_in_memory __attribute__((vector_size(VF * 4), aligned(4), may_alias));
typedef uint16_t vh_in_memory __attribute__((vector_size(VF * 2), aligned(2), may_alias));

FG_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_in_memory*>(p); }
FG_INLINE vh load_half(const bf16* p) { return *reinterpret_cast<const vh_in_memory*>(p); }
FG_INLINE vf load(const bf16* p) { return widen(load_half(p)); }

FG_INLINE void store(float* p, vf a) { *reinterpret_cast<vf_in_memory*>(p) = a; }
FG_INLINE void store(bf16* p, vf a) { *reinterpret_cast<vh_in_memory*>(p) = narrow(a); }

FG_INLINE vf load_tail(const float* p, int n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#elif defined(__AVX2__)
  return (vf)_mm256_maskload_ps(p, (__m256i)first(n));
#else
  vf a = {};
  std::memcpy(&a, p, sizeof(float) * static_cast<size_t>(n));
  return a;
#endif
}
FG_INLINE vh load_half_tail(const bf16* p, int n) {
#if defined(__AVX512F__)
  return (vh)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
#else
  vh h = {};
  std::memcpy(&h, p, sizeof(bf16) * static_cast<size_t>(n));
  return h;
#endif
}
FG_INLINE vf load_tail(const bf16* p, int n) { return widen(load_half_tail(p, n)); }

FG_INLINE void store_tail(float* p, vf a, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)a);
#else
  std::memcpy(p, &a, sizeof(float) * static_cast<size_t>(n));
#endif
}
FG_INLINE void store_tail(bf16* p, vf a, int n) {
  const vh h = narrow(a);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)h);
#else
  std::memcpy(p, &h, sizeof(bf16) * static_cast<size_t>(n));
#endif
}

// n <= VF lanes.
template <class T>
FG_INLINE vf load_some(const T* p, int n) {
  return n == VF ? load(p) : load_tail(p, n);
}
template <class T>
FG_INLINE void store_some(T* p, vf a, int n) {
  if (n == VF)
    store(p, a);
  else
    store_tail(p, a, n);
}

// Calls f(i, n) for every vector of [begin, end): n <= VF elements from i on.
template <class F>
FG_INLINE void each(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + VF <= end; i += VF) f(i, VF);
  if (i < end) f(i, static_cast<int>(end - i));
}

// ---- across lanes

#if defined(__clang__)
#define FG_ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FG_ZIP(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

FG_INLINE vf zip_low(vf a, vf b) {
#if defined(__AVX512F__)
  return FG_ZIP(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return FG_ZIP(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return FG_ZIP(a, b, 0, 4, 1, 5);
#endif
}

FG_INLINE vf zip_high(vf a, vf b) {
#if defined(__AVX512F__)
  return FG_ZIP(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return FG_ZIP(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return FG_ZIP(a, b, 2, 6, 3, 7);
#endif
}

// v[i][j] <-> v[j][i], by log2(VF) rounds of zips: 64 permutations for 256 floats with AVX-512.
FG_INLINE void transpose(vf (&v)[VF]) {
#pragma GCC unroll 4
  for (int round = 1; round < VF; round *= 2) {
    vf t[VF];
#pragma GCC unroll 8
    for (int i = 0; i < VF / 2; ++i) {
      t[2 * i] = zip_low(v[i], v[i + VF / 2]);
      t[2 * i + 1] = zip_high(v[i], v[i + VF / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VF; ++i) v[i] = t[i];
  }
}

}  // namespace fg::ISA
