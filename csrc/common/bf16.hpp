// Scalar bfloat16 in the namespace of the instruction set that is being compiled (see kernels.hpp for why).
#pragma once

#include <cstdint>
#include <cstring>

namespace fg::ISA {

struct bf16 {
  uint16_t bits;
};

static inline float to_float(float v) { return v; }

static inline float to_float(bf16 v) {
  const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

// Round to nearest even; a NaN keeps its sign and becomes quiet instead of rounding to infinity.
static inline bf16 to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <class T>
static inline T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
  return to_bf16(v);
}

}  // namespace fg::ISA
