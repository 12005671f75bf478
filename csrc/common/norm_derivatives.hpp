// The derivatives of the norms, once for C++ and CUDA: from sums over a group to the coefficients of the last pass
// (docs/maths.md, sections 2 and 5). Batch norm is the case of one channel a group. No include: NVRTC reads this file
// too.
#pragma once

#ifndef FG_MEMBER
#define FG_MEMBER inline  // prelude.cuh has device functions of it
#endif

namespace fg {
namespace {  // the tables share no inline function

// Of one group of M elements, x̂ = (x - mean) r; dt = dy phi'(t), w = ddx. All sums are over the group. inv_m is 1/M, or
// 0 where mean and var are constants: what finish() makes is then 0, whatever the sums. Times 0, a NaN of one sample
// would reach all.

struct FirstOrder {
  double s1, s2;  // Σ weight dt, Σ weight dt x̂
  double x0, x1;  // dx = weight r dt + x1 (x - mean) + x0

  // Of a channel alone, from its Σ dt, Σ dt (x - mean). Not by add(): 0 + -0 would change the sign of a gradient of 0.
  template <class Sums>
  static FG_MEMBER FirstOrder of(const Sums& s, double weight, double r) {
    return {weight * s[0], weight * s[1] * r, -0.0, -0.0};  // dt of -0 stays -0
  }
  template <class Sums>
  FG_MEMBER void add(const Sums& s, double weight, double r) {
    s1 += weight * s[0];
    s2 += weight * s[1] * r;
  }
  FG_MEMBER void finish(double inv_m, double r) {
    if (inv_m == 0.0) return;
    x0 = -r * s1 * inv_m;
    x1 = -r * r * s2 * inv_m;
  }
};

struct SecondOrder : FirstOrder {
  double W1, W2, A0;  // Σ w, Σ w x̂, Σ weight w dt
  double vdt, vdtx;   // Σ v_weight dt, Σ v_weight dt x̂
  double w1, w2;      // W1 / M, W2 / M
  double xw;          // d_x = xw w + u1 dt + x1 (x - mean) + x0

  // A channel's Σ dt, Σ dt (x - mean), Σ w, Σ w (x - mean), Σ w dt.
  template <class Sums>
  FG_MEMBER void add(const Sums& s, double weight, double v_weight, double r) {
    FirstOrder::add(s, weight, r);
    W1 += s[2];
    W2 += s[3] * r;
    A0 += weight * s[4];
    vdt += v_weight * s[0];
    vdtx += v_weight * s[1] * r;
  }
  FG_MEMBER void finish(double inv_m, double r) {
    if (inv_m == 0.0) return;
    const double A = A0 - (W1 * s1 + W2 * s2) * inv_m;
    const double sum_q = -r * inv_m * (W1 * s2 + W2 * s1) + vdt;
    const double sum_qx = -2.0 * r * inv_m * W2 * s2 + vdtx;
    w1 = W1 * inv_m;
    w2 = W2 * inv_m;
    xw = -r * r * s2 * inv_m;
    x0 = -r * sum_q * inv_m;
    x1 = -r * r * (sum_qx + A * r) * inv_m;
  }
  // Of a channel, after finish(): its share of d_weight, and d_dy = phi'(t) (weight r w + u1 (x - mean) + u0).
  template <class Sums>
  FG_MEMBER double d_weight(const Sums& s, double inv_m, double r) const {
    return inv_m == 0.0 ? r * s[4] : r * (s[4] - (w1 * s[0] + w2 * s[1] * r));
  }
  FG_MEMBER double u0(double weight, double v_bias, double r) const { return v_bias - weight * r * w1; }
  FG_MEMBER double u1(double weight, double v_weight, double r) const { return r * (v_weight - weight * r * w2); }
};

}  // namespace
}  // namespace fg
