// One vector type, so that a kernel is written once and compiled for every instruction set:
// vf holds VF floats; vm is the result of a comparison. Loads and stores take float or bf16, aligned or not.
// A tail load of n <= VF lanes fills the others with zero, a tail store leaves the bytes behind it untouched.
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

#if defined(__AVX512F__)

constexpr int VF = 16;
struct vf {
  __m512 v;
};
struct vm {
  __mmask16 m;
};

FG_INLINE vf set1(float a) { return {_mm512_set1_ps(a)}; }
FG_INLINE vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
FG_INLINE vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
FG_INLINE vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
FG_INLINE vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
FG_INLINE vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FG_INLINE vf abs(vf a) { return {_mm512_abs_ps(a.v)}; }
FG_INLINE vf sqrt(vf a) { return {_mm512_sqrt_ps(a.v)}; }
FG_INLINE vm gt(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
FG_INLINE vm le(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
FG_INLINE vf select(vm m, vf yes, vf no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }
FG_INLINE vm first(int n) { return {static_cast<__mmask16>((1u << n) - 1)}; }
FG_INLINE float sum(vf a) { return _mm512_reduce_add_ps(a.v); }

// 2^n for integral n in [-126, 127].
FG_INLINE vf exp2_int(vf n) {
  const __m512i i = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(i, 23))};
}
FG_INLINE vf round_even(vf a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

FG_INLINE __m256i narrow(vf a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(r);
}
FG_INLINE vf widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }

FG_INLINE vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
FG_INLINE vf load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
FG_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
FG_INLINE void store(bf16* p, vf a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
FG_INLINE vf load_tail(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n).m, p)}; }
FG_INLINE vf load_tail(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n).m, p)); }
FG_INLINE void store_tail(float* p, vf a, int n) { _mm512_mask_storeu_ps(p, first(n).m, a.v); }
FG_INLINE void store_tail(bf16* p, vf a, int n) { _mm256_mask_storeu_epi16(p, first(n).m, narrow(a)); }

#else

#if defined(__AVX2__)

constexpr int VF = 8;
struct vf {
  __m256 v;
};
struct vm {
  __m256 m;
};

FG_INLINE vf set1(float a) { return {_mm256_set1_ps(a)}; }
FG_INLINE vf operator+(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
FG_INLINE vf operator-(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
FG_INLINE vf operator*(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
FG_INLINE vf operator/(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
FG_INLINE vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FG_INLINE vf abs(vf a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FG_INLINE vf sqrt(vf a) { return {_mm256_sqrt_ps(a.v)}; }
FG_INLINE vm gt(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
FG_INLINE vm le(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
FG_INLINE vf select(vm m, vf yes, vf no) { return {_mm256_blendv_ps(no.v, yes.v, m.m)}; }
FG_INLINE vm first(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
}
FG_INLINE float sum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

FG_INLINE vf exp2_int(vf n) {
  const __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(i, 23))};
}
FG_INLINE vf round_even(vf a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

FG_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
FG_INLINE vf load(const bf16* p) {
  const __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16))};
}
FG_INLINE void store(float* p, vf a) { _mm256_storeu_ps(p, a.v); }
FG_INLINE void store(bf16* p, vf a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i high = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i both = _mm256_blendv_epi8(r, quiet, nan);
  const __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
}

#else

// Portable: the compilers' own 16-byte vectors (SSE2 on x86-64, NEON on aarch64).
constexpr int VF = 4;
typedef float float4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));
struct vf {
  float4 v;
};
struct vm {
  int4 m;
};

FG_INLINE vf set1(float a) { return {float4{a, a, a, a}}; }
FG_INLINE vf operator+(vf a, vf b) { return {a.v + b.v}; }
FG_INLINE vf operator-(vf a, vf b) { return {a.v - b.v}; }
FG_INLINE vf operator*(vf a, vf b) { return {a.v * b.v}; }
FG_INLINE vf operator/(vf a, vf b) { return {a.v / b.v}; }
FG_INLINE vf fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
FG_INLINE vm gt(vf a, vf b) { return {a.v > b.v}; }
FG_INLINE vm le(vf a, vf b) { return {a.v <= b.v}; }
FG_INLINE vf select(vm m, vf yes, vf no) { return {(float4)((m.m & (int4)yes.v) | (~m.m & (int4)no.v))}; }
FG_INLINE vf abs(vf a) { return {(float4)((int4)a.v & int4{0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff})}; }
FG_INLINE vf sqrt(vf a) {
  return {float4{__builtin_sqrtf(a.v[0]), __builtin_sqrtf(a.v[1]), __builtin_sqrtf(a.v[2]), __builtin_sqrtf(a.v[3])}};
}
FG_INLINE vm first(int n) { return {int4{0, 1, 2, 3} < int4{n, n, n, n}}; }
FG_INLINE float sum(vf a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

// Adding and subtracting 1.5 * 2^23 rounds |a| < 2^22 to the nearest integer, ties to even.
FG_INLINE vf round_even(vf a) {
  const vf magic = set1(12582912.0f);
  const vf shifted = a + magic;
  return shifted - magic;
}
FG_INLINE vf exp2_int(vf n) {
  const int4 i = (int4)(n.v + set1(12582912.0f + 127.0f).v);
  return {(float4)(i << 23)};
}

FG_INLINE vf load(const float* p) {
  vf a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
FG_INLINE vf load(const bf16* p) { return {float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}}; }
FG_INLINE void store(float* p, vf a) { std::memcpy(p, &a.v, sizeof a.v); }
FG_INLINE void store(bf16* p, vf a) {
  for (int i = 0; i < VF; ++i) p[i] = to_bf16(a.v[i]);
}

#endif

// Tails through a buffer: at most one per plane or row, so their cost does not show.
template <class T>
FG_INLINE vf load_tail(const T* p, int n) {
  T buffer[VF] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
FG_INLINE void store_tail(T* p, vf a, int n) {
  T buffer[VF];
  store(buffer, a);
  std::memcpy(p, buffer, n * sizeof(T));
}

#endif

FG_INLINE vf zero() { return set1(0.0f); }

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

}  // namespace fg::ISA
