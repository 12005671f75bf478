// A convolution and its adjoint as ONE problem: every output pixel is a sum over taps of source pixels.
//
// Per axis, output position o reads source position q * step + offset(tap), where
//   forward:  o = q, step = stride, offset = r * dilation - padding: one phase, every tap;
//   adjoint:  o = f + stride * q, step = 1, offset = (f + padding - r * dilation) / stride for the taps r that make
//             the division exact: each tap belongs to exactly one phase f, so no zero is ever multiplied.
// The phase pairs of the two axes are independent small stride-1 convolutions that the same kernels compute.
#pragma once

#include <type_traits>

#include "common/bf16.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

// The table below this one, which takes the work that this table's own instructions do not serve: AVX512_BF16 leaves it
// float32, AMX all that is no tile. So a kernel is compiled once, not three times.
#if defined(__AMX_BF16__) || defined(FG_AMX_EMULATED)
#define FG_BELOW avx512_bf16
#elif defined(__AVX512BF16__)
#define FG_BELOW avx512
#endif

namespace fg {

struct AxisTap {
  int64_t offset;  // source position of q = 0
  int64_t index;   // position in the weight, along R or S
};

struct AxisPhase {
  int64_t first_out;  // output position of q = 0
  int64_t count;      // output positions of the phase
  AxisTap* tap;       // ascending offsets, so that the valid taps of one q are an interval
  int64_t taps;
  int32_t *lo, *hi;  // [count]: that interval
};

struct Axis {
  int64_t step;      // source positions from q to q + 1
  int64_t out_step;  // output positions from q to q + 1
  int64_t phases;
  AxisPhase* phase;
};

// Both directions after translation. Channel counts are per group.
struct Problem {
  // As the caller gave it: with BF16, fp32 weights are rounded to bf16 wherever they are multiplied.
  DType source_dtype;
  DType out_dtype;
  const void* source;  // [N][SH][SW][groups * C]
  int64_t N, SH, SW;
  int64_t C;  // reduced over
  void* out;  // [N][OH][OW][groups * M]
  int64_t OH, OW;
  int64_t M;  // produced
  int64_t groups;
  Axis h, w;
  int64_t R, S;
  const void* weight;
  DType weight_dtype;
  int64_t stride_m, stride_c, stride_r, stride_s, stride_g;  // of the weight
  const float* bias;
  Act act;
  float slope;
  int threads;
};

}  // namespace fg

#if defined(FG_BELOW)
namespace fg::FG_BELOW {
void compute(const Problem& p);
void conv_transpose2d(const ConvShape& s, const ConvTranspose2dArgs& a);
void conv2d_weight(const ConvShape& s, const Conv2dWeightArgs& a);
}  // namespace fg::FG_BELOW
#endif

namespace fg::ISA {

// conv_compute.cpp
void compute(const Problem& p);
void widen(const bf16* from, float* to, int64_t count, int threads);  // only where there is no table below

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Bytes of memory an axis needs, for the most phases and taps it can have.
inline int64_t axis_bytes(int64_t phases, int64_t taps, int64_t out) {
  return round_up(phases * static_cast<int64_t>(sizeof(AxisPhase)) + taps * static_cast<int64_t>(sizeof(AxisTap)) +
                      2 * out * static_cast<int64_t>(sizeof(int32_t)),
                  64);
}

// Fills the valid intervals and drops the taps at either end that no output of the phase ever uses
// (all but one tap of a 3x3 kernel on a 1x1 source).
inline void find_valid_taps(AxisPhase& p, int64_t step, int64_t source) {
  int64_t from = p.taps, to = 0;
  for (int64_t q = 0; q < p.count; ++q) {
    int64_t lo = 0;
    while (lo < p.taps && q * step + p.tap[lo].offset < 0) ++lo;
    int64_t hi = lo;
    while (hi < p.taps && q * step + p.tap[hi].offset < source) ++hi;
    p.lo[q] = static_cast<int32_t>(lo);
    p.hi[q] = static_cast<int32_t>(hi);
    if (lo < hi) {
      from = least(from, lo);
      to = most(to, hi);
    }
  }
  if (from > to) from = to;
  for (int64_t q = 0; q < p.count; ++q) {
    const bool any = p.lo[q] < p.hi[q];
    p.lo[q] = any ? p.lo[q] - static_cast<int32_t>(from) : 0;
    p.hi[q] = any ? p.hi[q] - static_cast<int32_t>(from) : 0;
  }
  p.tap += from;
  p.taps = to - from;
}

inline Axis forward_axis(char* memory, int64_t source, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                         int64_t dilation) {
  Axis a{stride, 1, 1, reinterpret_cast<AxisPhase*>(memory)};
  AxisPhase& p = a.phase[0];
  p.first_out = 0;
  p.count = out;
  p.tap = reinterpret_cast<AxisTap*>(a.phase + 1);
  p.taps = kernel;
  p.lo = reinterpret_cast<int32_t*>(p.tap + kernel);
  p.hi = p.lo + out;
  for (int64_t r = 0; r < kernel; ++r) p.tap[r] = {r * dilation - pad, r};
  find_valid_taps(p, a.step, source);
  return a;
}

inline Axis adjoint_axis(char* memory, int64_t source, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                         int64_t dilation) {
  Axis a{1, stride, least(stride, out), reinterpret_cast<AxisPhase*>(memory)};
  AxisTap* tap = reinterpret_cast<AxisTap*>(a.phase + a.phases);
  int32_t* interval = reinterpret_cast<int32_t*>(tap + kernel);
  for (int64_t f = 0; f < a.phases; ++f) {
    AxisPhase& p = a.phase[f];
    p.first_out = f;
    p.count = ceil_div(out - f, stride);
    p.tap = tap;
    p.taps = 0;
    for (int64_t r = kernel - 1; r >= 0; --r)  // offsets fall with r
      if ((f + pad - r * dilation) % stride == 0) p.tap[p.taps++] = {(f + pad - r * dilation) / stride, r};
    tap += p.taps;
    p.lo = interval;
    p.hi = interval + p.count;
    interval += 2 * p.count;
    find_valid_taps(p, a.step, source);
  }
  return a;
}

}  // namespace
}  // namespace fg::ISA
