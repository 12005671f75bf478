// y = gain act(x + bias) within +-clamp, and its gradient from the output: dx = dy gain act'(y / gain), 0 where the
// clamp holds y, dbias = sum of dx per channel.
#pragma once

#include "cuda/sweep.cuh"

namespace fg::cuda {

// An activation with its gain. limit: the clamp, or NaN where there is none, since no comparison with NaN holds. The
// activations that convolutions do not fuse stand here: in their epilogues they would cost registers.
struct Phi {
  Act act;
  float slope, gain, limit;

  FG_MEMBER static float sigmoid(float t) { return 1.0f / (1.0f + expf(-t)); }
  FG_MEMBER static float normal(float t) { return 0.5f * erfcf(-0.707106781187f * t); }
  // t (1 + tanh(sqrt(2/pi) (t + 0.044715 t^3))) / 2 = t sigmoid(of this)
  FG_MEMBER static float gelu_logit(float t) { return t * (1.59576912160573f + 0.0713548162726f * t * t); }
  FG_MEMBER float activation(float t) const {
    if (act == ACT_ELU) return t <= 0.0f ? expm1f(t) : t;
    if (act == ACT_SELU) return t <= 0.0f ? SELU_NEGATIVE * expm1f(t) : SELU_SCALE * t;
    if (act == ACT_SOFTPLUS) return (t <= 0.0f ? 0.0f : t) + log1pf(expf(-fabsf(t)));
    if (act == ACT_SWISH) return t * sigmoid(t);
    if (act == ACT_GELU) return t * normal(t);
    if (act == ACT_GELU_TANH) return t * sigmoid(gelu_logit(t));
    return activate(t, act, slope);
  }
  FG_MEMBER float value(float t) const {
    float y = gain * activation(t);
    y = y > limit ? limit : y;
    return y < -limit ? -limit : y;
  }
  // Of swish and gelu y is the input.
  FG_MEMBER float gradient(float g, float y) const {
    const float out = act >= ACT_SWISH ? gain * activation(y) : y;
    if (fabsf(out) >= limit) return 0.0f;
    const float u = act >= ACT_SWISH ? y : y / gain;
    g *= gain;
    if (act == ACT_ELU) return u <= 0.0f ? g * (u + 1.0f) : g;
    if (act == ACT_SELU) return g * (u <= 0.0f ? u + SELU_NEGATIVE : SELU_SCALE);
    if (act == ACT_SOFTPLUS) return -g * expm1f(-u);
    if (act == ACT_SWISH) {
      const float s = sigmoid(u);
      return g * (s + u * s * (1.0f - s));
    }
    if (act == ACT_GELU) return g * (normal(u) + 0.398942280401f * u * expf(-0.5f * u * u));
    if (act == ACT_GELU_TANH) {
      const float v = gelu_logit(u);
      return g * (sigmoid(v) + u * sigmoid(v) * sigmoid(-v) * (1.59576912160573f + 0.2140644488178f * u * u));
    }
    return activate_gradient(g, u, act, slope);
  }
  static constexpr float SELU_SCALE = 1.0507009873554805f, SELU_NEGATIVE = 1.7580993408473766f;  // scale, scale alpha
};

template <class T_>
struct BiasActForward {
  using T = T_;
  static constexpr int INPUTS = 1, OUTPUTS = 1;
  const T* in[1];  // x
  T* out[1];       // y
  const float* bias;
  Phi phi;

  struct Coef {
    float bias;
  };
  // -0 is what leaves every x, -0 included, as it is
  template <int V>
  FG_MEMBER void coefs(i64, int channel, Coef (&c)[V]) const {
    float b[V];
    load_neighbours(bias, channel, -0.0f, b);
#pragma unroll
    for (int j = 0; j < V; ++j) c[j].bias = b[j];
  }
  FG_MEMBER void apply(const Coef& c, const float (&v)[1], float (&y)[1]) const { y[0] = phi.value(v[0] + c.bias); }
};

template <class T_>
struct BiasActBackward {
  using T = T_;
  using Acc = Sums<1>;
  static constexpr int INPUTS = 2, OUTPUTS = 1;
  static constexpr bool WRITES = true;
  const T* in[2];  // dy, y
  T* out[1];       // dx
  Phi phi;

  struct Coef {};
  template <int V>
  FG_MEMBER void coefs(i64, int, Coef (&)[V]) const {}
  FG_MEMBER void apply(const Coef&, const float (&v)[2], float (&dx)[1]) const { dx[0] = phi.gradient(v[0], v[1]); }
  template <int M>
  FG_MEMBER void accumulate(Acc& acc, const Coef&, const float (&v)[2][M], int count) const {
#pragma unroll
    for (int i = 0; i < M; ++i)
      if (i < count) acc.word[0] += phi.gradient(v[0][i], v[1][i]);
  }
};

// Grid: 32 channels a block.
static __global__ void __launch_bounds__(THREADS)
    bias_act_dbias_kernel(const float* partials, int splits, int channels, float* dbias) {
  const int channel = blockIdx.x * FINISH_COLUMNS + threadIdx.x % FINISH_COLUMNS;
  const Sums<1> sum = merge_splits<Sums<1>>(partials, 0, splits, channel, channels);
  if (threadIdx.x < FINISH_COLUMNS && channel < channels) store(dbias + channel, sum.word[0]);
}

}  // namespace fg::cuda
