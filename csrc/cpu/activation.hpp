// Activations and their gradients, once for every kernel of the CPU.
//
// relu differs from leaky_relu with slope 0 in that relu(-inf) = 0 and that its derivative stops a NaN or inf of the
// gradient where t <= 0, as torch's does. A NaN of t stays one.
#pragma once

#include "common/codes.hpp"
#include "cpu/vmath.hpp"

namespace fg::ISA {

constexpr float SELU_SCALE = 1.0507009873554805f, SELU_NEGATIVE = 1.7580993408473766f;  // scale, scale alpha

// t (1 + tanh(sqrt(2/pi) (t + 0.044715 t^3))) / 2 = t sigmoid(of this), and its derivative.
FG_INLINE vf gelu_logit(vf t) { return t * fma(t * t, set1(0.0713548162726f), set1(1.59576912160573f)); }
FG_INLINE vf gelu_logit_slope(vf t) { return fma(t * t, set1(0.2140644488178f), set1(1.59576912160573f)); }

template <Act ACT>
FG_INLINE vf activate(vf t, float slope) {
  if constexpr (ACT == ACT_RELU) return select(le(t, zero()), zero(), t);
  if constexpr (ACT == ACT_LEAKY_RELU) return select(gt(t, zero()), t, t * set1(slope));
  if constexpr (ACT == ACT_TANH) return tanh(t);
  if constexpr (ACT == ACT_SIGMOID) return sigmoid(t);
  if constexpr (ACT == ACT_ELU) return select(le(t, zero()), expm1_below(t), t);
  if constexpr (ACT == ACT_SELU)
    return select(le(t, zero()), expm1_below(t) * set1(SELU_NEGATIVE), t * set1(SELU_SCALE));
  if constexpr (ACT == ACT_SOFTPLUS) return softplus(t);
  if constexpr (ACT == ACT_SWISH) return t * sigmoid(t);
  if constexpr (ACT == ACT_GELU) return t * normal(t).phi;
  if constexpr (ACT == ACT_GELU_TANH) return t * sigmoid(gelu_logit(t));
  return t;
}

// g φ'(t) from y = φ(t): tanh' = 1 - y², sigmoid' = y (1 - y), elu' = y + 1 below 0, softplus' = 1 - e^-y. (Leaky) relu
// may be given t in the place of y, since both have one sign; swish and gelu must be given t.
template <Act ACT>
FG_INLINE vf activate_gradient(vf g, vf y, float slope) {
  if constexpr (ACT == ACT_RELU) return select(le(y, zero()), zero(), g);
  if constexpr (ACT == ACT_LEAKY_RELU) return select(gt(y, zero()), g, g * set1(slope));
  if constexpr (ACT == ACT_TANH) return g * (set1(1.0f) - y * y);
  if constexpr (ACT == ACT_SIGMOID) return g * (y * (set1(1.0f) - y));
  if constexpr (ACT == ACT_ELU) return g * select(le(y, zero()), y + set1(1.0f), set1(1.0f));
  if constexpr (ACT == ACT_SELU) return g * select(le(y, zero()), y + set1(SELU_NEGATIVE), set1(SELU_SCALE));
  if constexpr (ACT == ACT_SOFTPLUS) return zero() - g * expm1_below(zero() - y);
  if constexpr (ACT == ACT_SWISH) {
    const vf s = sigmoid(y);
    return g * (s + y * s * (set1(1.0f) - s));
  }
  if constexpr (ACT == ACT_GELU) {
    const Normal of = normal(y);
    return g * fma(y * of.bell, set1(0.398942280401f), of.phi);
  }
  if constexpr (ACT == ACT_GELU_TANH) {
    const vf u = gelu_logit(y), e = exp(zero() - abs(u)), w = set1(1.0f) / (set1(1.0f) + e);
    return g * fma(y * e * w * w, gelu_logit_slope(y), select(gt(zero(), u), e, set1(1.0f)) * w);
  }
  return g;
}

// f<ACT>() of an activation that is known only at run time; the identity calls nothing.
template <class F>
FG_INLINE void by_act(Act act, const F& f) {
  switch (act) {
    case ACT_RELU:
      return f.template operator()<ACT_RELU>();
    case ACT_LEAKY_RELU:
      return f.template operator()<ACT_LEAKY_RELU>();
    case ACT_TANH:
      return f.template operator()<ACT_TANH>();
    case ACT_SIGMOID:
      return f.template operator()<ACT_SIGMOID>();
    case ACT_ELU:
      return f.template operator()<ACT_ELU>();
    case ACT_SELU:
      return f.template operator()<ACT_SELU>();
    case ACT_SOFTPLUS:
      return f.template operator()<ACT_SOFTPLUS>();
    case ACT_SWISH:
      return f.template operator()<ACT_SWISH>();
    case ACT_GELU:
      return f.template operator()<ACT_GELU>();
    case ACT_GELU_TANH:
      return f.template operator()<ACT_GELU_TANH>();
    case ACT_IDENTITY:
      return;
  }
}

// The same where the activation is known only at run time: at the end of a convolution's epilogue.
static inline vf activate(vf t, Act act, float slope) {
  switch (act) {
    case ACT_RELU:
      return activate<ACT_RELU>(t, slope);
    case ACT_LEAKY_RELU:
      return activate<ACT_LEAKY_RELU>(t, slope);
    case ACT_TANH:
      return activate<ACT_TANH>(t, slope);
    case ACT_SIGMOID:
      return activate<ACT_SIGMOID>(t, slope);
    default:
      return t;
  }
}

}  // namespace fg::ISA
