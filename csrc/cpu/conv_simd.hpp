// One vector type for the convolution kernels: 16, 8 or 4 floats, whichever the table is compiled for. Written with
// the vector extensions of GCC and Clang, so that one text serves AVX-512, AVX2, SSE2 and NEON; intrinsics appear only
// where the compilers make poor code of it (broadcasts, masked tails, bfloat16 rounding).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common/bf16.hpp"
#include "common/kernels.hpp"

namespace fg::ISA {
namespace {

#if defined(__AVX512F__)
constexpr int VF = 16;
#elif defined(__AVX2__)
constexpr int VF = 8;
#else
constexpr int VF = 4;
#endif

// Keeps one copy of a function that several kernels call: compile time, and no cost beside the work it does.
#define FG_NOINLINE __attribute__((noinline))

typedef float vec __attribute__((vector_size(VF * 4)));
typedef int32_t veci __attribute__((vector_size(VF * 4)));
typedef uint32_t vecu __attribute__((vector_size(VF * 4)));
typedef uint16_t vech __attribute__((vector_size(VF * 2)));

inline vec vset(float a) {
#if defined(__AVX512F__)
  return (vec)_mm512_set1_ps(a);
#elif defined(__AVX2__)
  return (vec)_mm256_set1_ps(a);
#else
  return vec{a, a, a, a};
#endif
}

inline vec vload(const void* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void vstore(void* p, vec v) { std::memcpy(p, &v, sizeof v); }

// a * b + c in one rounding where the table has FMA (-ffp-contract=fast).
inline vec vfma(vec a, vec b, vec c) { return a * b + c; }

// The first n of VF floats, zeros behind them; reads nothing past them.
inline vec vload_n(const void* p, int n) {
#if defined(__AVX512F__)
  return (vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  vec v = {};
  std::memcpy(&v, p, sizeof(float) * static_cast<size_t>(n));
  return v;
#endif
}

inline void vstore_n(void* p, vec v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#else
  std::memcpy(p, &v, sizeof(float) * static_cast<size_t>(n));
#endif
}

inline vec widen(vech h) {
  const vecu u = __builtin_convertvector(h, vecu) << 16;
  vec v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

// Round to nearest even; NaN stays NaN. vcvtneps2bf16 differs from the integer form on denormals alone: it flushes
// them to zero, as vdpbf16ps and AMX do.
inline vech narrow(vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  vech r;
  std::memcpy(&r, &h, sizeof r);
  return r;
#else
  vecu u;
  std::memcpy(&u, &v, sizeof u);
  const vecu nan = (u >> 16) | 0x40u;
  const vecu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded, vech);
#endif
}

inline vec vload(const float* p) { return vload(static_cast<const void*>(p)); }

inline vec vload(const bf16* p) {
  vech h;
  std::memcpy(&h, p, sizeof h);
  return widen(h);
}

inline vec vload_n(const float* p, int n) { return vload_n(static_cast<const void*>(p), n); }

// The first n of VF bf16 elements, zeros behind them.
inline vech load_half_n(const bf16* p, int n) {
  vech h = {};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m256i m = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  std::memcpy(&h, &m, sizeof h);
#else
  std::memcpy(&h, p, sizeof(bf16) * static_cast<size_t>(n));
#endif
  return h;
}

inline vec vload_n(const bf16* p, int n) { return widen(load_half_n(p, n)); }

inline void vstore(float* p, vec v) { vstore(static_cast<void*>(p), v); }

inline void vstore(bf16* p, vec v) {
  const vech h = narrow(v);
  std::memcpy(p, &h, sizeof h);
}

inline void vstore_n(float* p, vec v, int n) { vstore_n(static_cast<void*>(p), v, n); }

inline void vstore_n(bf16* p, vec v, int n) {
  const vech h = narrow(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  __m256i w;
  std::memcpy(&w, &h, sizeof w);
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), w);
#else
  std::memcpy(p, &h, sizeof(bf16) * static_cast<size_t>(n));
#endif
}

// Halves are added until four lanes are left: the same order in every table of one width.
template <int N>
struct Halves {
  typedef float half __attribute__((vector_size(N * 2)));  // N / 2 floats
};

template <int N, class V>
inline float vsum_of(V v) {
  if constexpr (N == 1) {
    return v[0];
  } else if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typename Halves<N>::half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return vsum_of<N / 2>(low + high);
  }
}

inline float vsum(vec v) { return vsum_of<VF>(v); }

#if defined(__clang__)
#define FG_ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FG_ZIP(a, b, ...) __builtin_shuffle(a, b, veci{__VA_ARGS__})
#endif

inline vec zip_low(vec a, vec b) {
#if defined(__AVX512F__)
  return FG_ZIP(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return FG_ZIP(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return FG_ZIP(a, b, 0, 4, 1, 5);
#endif
}

inline vec zip_high(vec a, vec b) {
#if defined(__AVX512F__)
  return FG_ZIP(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return FG_ZIP(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return FG_ZIP(a, b, 2, 6, 3, 7);
#endif
}

// v[i][j] <-> v[j][i], by log2(VF) rounds of zips: 64 permutations for 256 floats with AVX-512.
inline void transpose(vec (&v)[VF]) {
#pragma GCC unroll 4
  for (int round = 1; round < VF; round *= 2) {
    vec t[VF];
#pragma GCC unroll 8
    for (int i = 0; i < VF / 2; ++i) {
      t[2 * i] = zip_low(v[i], v[i + VF / 2]);
      t[2 * i + 1] = zip_high(v[i], v[i + VF / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VF; ++i) v[i] = t[i];
  }
}

// The same bits as integers.
inline vec as_floats(vecu u) {
  vec v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

// lanes[i] = (low[i], high[i]) as two bfloat16: the element pairs that vdpbf16ps and AMX multiply.
inline vecu interleave_bf16(vec low, vec high) {
  return __builtin_convertvector(narrow(low), vecu) | (__builtin_convertvector(narrow(high), vecu) << 16);
}

inline vecu interleave_bf16(const bf16* low, const bf16* high) {
  vech l, h;
  std::memcpy(&l, low, sizeof l);
  std::memcpy(&h, high, sizeof h);
  return __builtin_convertvector(l, vecu) | (__builtin_convertvector(h, vecu) << 16);
}

// exp for |x| <= 88: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes expf, 2 ulp). NaN in, NaN out.
inline vec vexp(vec x) {
  const vec shifted = x * 1.44269504088896341f + 12582912.0f;  // the integer part lands in the low mantissa bits
  const vec n = shifted - 12582912.0f;
  vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vec p = vset(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  veci bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // 12582912.0f is 0x4b400000: shifted left by 23 only n's low bits remain
  vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// Cephes tanhf: an odd polynomial below 0.625, where 1 - 2 / (e^2x + 1) would cancel.
inline vec vtanh(vec x) {
  const vec a = x < 0.0f ? -x : x;
  const vec z = x * x;
  vec p = vset(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  p = p * z * x + x;
  const vec capped = a > 10.0f ? vset(10.0f) : a;  // tanh(10) rounds to 1; NaN passes
  vec q = 1.0f - 2.0f / (vexp(capped + capped) + 1.0f);
  q = x < 0.0f ? -q : q;
  return a < 0.625f ? p : q;
}

inline vec vsigmoid(vec x) {
  vec t = -x;
  t = t > 88.0f ? vset(88.0f) : t;
  t = t < -88.0f ? vset(-88.0f) : t;
  return 1.0f / (1.0f + vexp(t));
}

// As common/act.hpp, NaN included.
inline vec vact(vec x, Act act, float slope) {
  switch (act) {
    case ACT_RELU:
      return x <= 0.0f ? vset(0.0f) : x;
    case ACT_LEAKY_RELU:
      return x > 0.0f ? x : x * slope;
    case ACT_TANH:
      return vtanh(x);
    case ACT_SIGMOID:
      return vsigmoid(x);
    default:
      return x;
  }
}

}  // namespace
}  // namespace fg::ISA
