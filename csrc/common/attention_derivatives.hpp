// Attention's second derivative element by element, once for C++ and CUDA (docs/maths.md, section 6). V is a float or a
// vector of them. No include: NVRTC reads this file too.
#pragma once

#ifndef FG_MEMBER
#define FG_MEMBER inline  // prelude.cuh has device functions of it
#endif

namespace fg {
namespace {  // the tables share no inline function

// ds from p, dp and delta = Σ p dp of the row.
template <class V>
FG_MEMBER V score_derivative(V p, V dp, V delta) {
  return p * (dp - delta);
}

// The row's alpha = Σ p a, delta = Σ p dp and gamma = Σ p (a dp + c).
template <class V>
struct ScoreSums {
  V alpha, delta, gamma;

  FG_MEMBER void add(V p, V dp, V a, V c) {
    alpha += p * a;
    delta += p * dp;
    gamma += p * (a * dp + c);
  }
};

// What the products of the double backward multiply beside p; shift = alpha delta - gamma.
template <class V>
struct ScoreCotangents {
  V ds, g, r;

  static FG_MEMBER ScoreCotangents of(V p, V dp, V a, V c, V alpha, V delta, V shift) {
    a -= alpha;
    dp -= delta;
    return {p * dp, p * a, p * (a * dp + (c + shift))};
  }
};

}  // namespace
}  // namespace fg
