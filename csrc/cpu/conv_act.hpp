// Activations at the end of a convolution's epilogue. exp and tanh are shorter than vmath.hpp's: no argument is large.
#pragma once

#include "common/kernels.hpp"
#include "cpu/simd.hpp"

namespace fg::ISA {
namespace {

// exp for |x| <= 88: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes expf, 2 ulp). NaN in, NaN out.
inline vf bounded_exp(vf x) {
  const vf shifted = x * 1.44269504088896341f + 12582912.0f;  // rounds to an integer, as round_even
  const vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = set1(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * exp2_int(n);
}

// Cephes tanhf: an odd polynomial below 0.625, where 1 - 2 / (e^2x + 1) would cancel.
inline vf bounded_tanh(vf x) {
  const vf a = x < 0.0f ? -x : x;
  const vf z = x * x;
  vf p = set1(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  p = p * z * x + x;
  const vf capped = a > 10.0f ? set1(10.0f) : a;  // tanh(10) rounds to 1; NaN passes
  vf q = 1.0f - 2.0f / (bounded_exp(capped + capped) + 1.0f);
  q = x < 0.0f ? -q : q;
  return a < 0.625f ? p : q;
}

inline vf bounded_sigmoid(vf x) {
  vf t = -x;
  t = t > 88.0f ? set1(88.0f) : t;
  t = t < -88.0f ? set1(-88.0f) : t;
  return 1.0f / (1.0f + bounded_exp(t));
}

// As common/act.hpp, NaN included.
inline vf activate(vf x, Act act, float slope) {
  switch (act) {
    case ACT_RELU:
      return x <= 0.0f ? zero() : x;
    case ACT_LEAKY_RELU:
      return x > 0.0f ? x : x * slope;
    case ACT_TANH:
      return bounded_tanh(x);
    case ACT_SIGMOID:
      return bounded_sigmoid(x);
    default:
      return x;
  }
}

}  // namespace
}  // namespace fg::ISA
