// What csrc/cuda/tensor_core.cuh's instructions do, lane by lane: fragments travel by real warp exchanges.
#pragma once

#include "simt.hpp"

namespace simt {

inline void exchange(uint32_t low, uint32_t high, uint64_t out[32], Where where) {
  meet(Meeting::EXCHANGE, ~0u, low | static_cast<uint64_t>(high) << 32, out, where);
}

template <class T>
float half_of(uint64_t word, int index) {
  T v;
  v.bits = static_cast<uint16_t>(word >> (16 * index));
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(v);
  else
    return __bfloat162float(v);
}

template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_WHERE) {
  if (current->lane == 0) count_product();
  uint64_t left[32], right[32], lower[32];  // A's columns 0..7 and 8..15, B
  exchange(a[0], a[1], left, {file_, line_});
  exchange(a[2], a[3], right, {file_, line_});
  exchange(b[0], b[1], lower, {file_, line_});
  const int g = current->lane / 4, t = current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int below = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint64_t* half = k < 8 ? left : right;
      const float x = half_of<T>(half[g * 4 + k % 8 / 2], below * 2 + k % 2);
      const float y = half_of<T>(lower[column * 4 + k % 8 / 2], k / 8 * 2 + k % 2);
      c[i] += x * y;
    }
  }
}

// cvt.rna: to the nearest of 10 fraction bits, halves away from zero.
inline uint32_t to_tf32(float v) {
  const auto u = static_cast<uint32_t>(pack(v));
  return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & ~0x1fffu;
}

inline void mma_1688_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_WHERE) {
  if (current->lane == 0) count_product();
  uint64_t left[32], right[32], lower[32];
  exchange(a[0], a[1], left, {file_, line_});
  exchange(a[2], a[3], right, {file_, line_});
  exchange(b[0], b[1], lower, {file_, line_});
  const auto tf32 = [](uint64_t word, int index) {
    return unpack<float>(static_cast<uint32_t>(word >> (32 * index)) & ~0x1fffu);  // the hardware drops 13 bits
  };
  const int g = current->lane / 4, t = current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int below = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 8; ++k)
      c[i] += tf32((k < 4 ? left : right)[g * 4 + k % 4], below) * tf32(lower[column * 4 + k % 4], k / 4);
  }
}

template <int N>
void ldmatrix(uint32_t (&r)[N], const void* row, bool transposed, SIMT_WHERE) {
  uint64_t rows[32];
  if (current->lane < 8 * N) {
    if (reinterpret_cast<uintptr_t>(row) % 16)
      fail("ldmatrix", {file_, line_}, "a row must lie at a multiple of 16 bytes");
    shared_access(row, 16);
  }
  meet(Meeting::EXCHANGE, ~0u, pack(row), rows, {file_, line_});
  const int g = current->lane / 4, t = current->lane % 4;
  for (int m = 0; m < N; ++m) {
    uint32_t pair = 0;
    for (int e = 0; e < 2; ++e) {
      const int i = transposed ? 2 * t + e : g, j = transposed ? g : 2 * t + e;
      pair |= static_cast<uint32_t>(unpack<const uint16_t*>(rows[8 * m + i])[j]) << (16 * e);
    }
    r[m] = pair;
  }
}

}  // namespace simt
