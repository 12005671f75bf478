// exp, sigmoid, tanh, log1p(exp(-|x|)) and the normal distribution on vectors, in fp32. Errors against float64 are
// tested over the whole range: at most 3 ulp, more in Phi's lower tail (test_native_elementwise.py). NaN comes out as
// NaN, and the limits at ±inf are exact.
#pragma once

#include <limits>

#include "cpu/simd.hpp"

namespace fg::ISA {

// e^x / 2^n for n = x / ln(2), rounded: a minimax polynomial of degree 6, of Cephes' expf. ln(2) comes in two parts,
// the first with so few bits that n times it is exact.
FG_INLINE vf exp_fraction(vf x, vf n) {
  vf r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return fma(p, r * r, r) + set1(1.0f);
}

FG_INLINE vf over_ln2(vf x) { return round_even(x * set1(1.44269504f)); }

// e^x for |x| <= 87, where 2^n is a normal number.
FG_INLINE vf exp_bounded(vf x) {
  const vf n = over_ln2(x);
  return exp_fraction(x, n) * exp2_int(n);
}

// e^x of any x. 2^n is applied in two halves, for n = 128 and for results below the normal range.
FG_INLINE vf exp(vf x) {
  const vf high = set1(88.7228394f), low = set1(-103.972084f);
  vf clamped = select(gt(x, high), high, x);
  clamped = select(gt(low, clamped), low, clamped);
  const vf n = over_ln2(clamped), half = round_even(n * set1(0.5f));
  const vf e = exp_fraction(clamped, n) * exp2_int(half) * exp2_int(n - half);
  return select(gt(x, high), set1(std::numeric_limits<float>::infinity()), select(gt(low, x), zero(), e));
}

// With e = exp(-|x|) nothing overflows, and a result below the normal range keeps its digits.
FG_INLINE vf sigmoid(vf x) {
  const vf one = set1(1.0f), e = exp(zero() - abs(x));
  return select(gt(zero(), x), e, one) / (one + e);
}

// Odd polynomial of Cephes' tanhf below 0.625, where 1 - 2/(e^2x + 1) would cancel.
FG_INLINE vf tanh(vf x) {
  const vf a = abs(x), z = x * x;
  vf p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const vf small = fma(p * z, x, x);
  const vf capped = select(gt(a, set1(10.0f)), set1(10.0f), a);  // tanh(10) rounds to 1
  const vf magnitude = set1(1.0f) - set1(2.0f) / (exp_bounded(capped + capped) + set1(1.0f));
  const vf large = select(gt(zero(), x), zero() - magnitude, magnitude);
  return select(gt(set1(0.625f), a), small, large);
}

// e^x - 1 for x <= 0, by the tangent of half of it, whose digits a small x keeps.
FG_INLINE vf expm1_below(vf x) {
  const vf half = tanh(x * set1(0.5f));
  return (half + half) / (set1(1.0f) - half);
}

// softplus(x) = max(x, 0) + log1p(e^-|x|), with log1p(e) = 2 atanh(s), s = e / (2 + e) in [0, 1/3]: the series in s²
// has a remainder below 2e-9 after eight terms, and no term cancels.
FG_INLINE vf softplus(vf x) {
  const vf e = exp(zero() - abs(x));
  const vf s = e / (e + set1(2.0f)), z = s * s;
  vf p = set1(1.0f / 15.0f);
  p = fma(p, z, set1(1.0f / 13.0f));
  p = fma(p, z, set1(1.0f / 11.0f));
  p = fma(p, z, set1(1.0f / 9.0f));
  p = fma(p, z, set1(1.0f / 7.0f));
  p = fma(p, z, set1(1.0f / 5.0f));
  p = fma(p, z, set1(1.0f / 3.0f));
  p = fma(p, z, set1(1.0f));
  // x where x is NaN: max by comparison keeps it.
  return select(le(x, zero()), zero(), x) + (s + s) * p;
}

// The normal distribution's function Phi(t), and e^(-t^2/2), whose multiple its density is.
struct Normal {
  vf phi, bell;
};

// Phi(-|t|) = e^(-x^2) erfcx(x) / 2 with x = |t| / sqrt(2). erfcx(x) = u p(u) with u = 1 / (1 + x / 2): p is a
// polynomial of degree 9, fitted to 3e-8 at Chebyshev points, so that small results keep their digits.
FG_INLINE Normal normal(vf t) {
  const vf one = set1(1.0f), a = abs(t);
  const vf bell = exp(t * t * set1(-0.5f)), u = one / fma(a, set1(0.353553391f), one);
  vf p = set1(1.205465954e-2f);
  p = fma(p, u, set1(-1.217277506e-1f));
  p = fma(p, u, set1(4.246833622e-1f));
  p = fma(p, u, set1(-6.635204295e-1f));
  p = fma(p, u, set1(4.152148020e-1f));
  p = fma(p, u, set1(-9.475475587e-2f));
  p = fma(p, u, set1(2.242219108e-1f));
  p = fma(p, u, set1(2.389413320e-1f));
  p = fma(p, u, set1(2.828204693e-1f));
  p = fma(p, u, set1(2.820663826e-1f));
  const vf tail = set1(0.5f) * bell * u * p;
  return {select(gt(t, zero()), one - tail, tail), bell};
}

}  // namespace fg::ISA
