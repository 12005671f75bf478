// y = act(x + bias) and its gradient from the output: dx = dy act'(y), dbias = sum of dx per channel.
#pragma once

#include "cuda/sweep.cuh"

namespace fg::cuda {

template <class T_>
struct BiasActForward {
  using T = T_;
  static constexpr int INPUTS = 1, OUTPUTS = 1;
  const T* in[1];  // x
  T* out[1];       // y
  const float* bias;
  Act act;
  float slope;

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
  FG_MEMBER void apply(const Coef& c, const float (&v)[1], float (&y)[1]) const {
    y[0] = activate(v[0] + c.bias, act, slope);
  }
};

template <class T_>
struct BiasActBackward {
  using T = T_;
  using Acc = Sums<1>;
  static constexpr int INPUTS = 2, OUTPUTS = 1;
  static constexpr bool WRITES = true;
  const T* in[2];  // dy, y
  T* out[1];       // dx
  Act act;
  float slope;

  struct Coef {};
  template <int V>
  FG_MEMBER void coefs(i64, int, Coef (&)[V]) const {}
  FG_MEMBER void apply(const Coef&, const float (&v)[2], float (&dx)[1]) const {
    dx[0] = activate_gradient(v[0], v[1], act, slope);
  }
  template <int M>
  FG_MEMBER void accumulate(Acc& acc, const Coef&, const float (&v)[2][M], int count) const {
#pragma unroll
    for (int i = 0; i < M; ++i)
      if (i < count) acc.word[0] += activate_gradient(v[0][i], v[1][i], act, slope);
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
