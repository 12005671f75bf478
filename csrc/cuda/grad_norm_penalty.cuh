// penalty[n] = (|g[n]| - target)^2 and its derivative 2 (1 - target / |g|) g, 0 where |g| = 0. A sample is a row of
// sweep.cuh, its norm a channel's constant.
#pragma once

#include "cuda/sweep.cuh"

namespace fg::cuda {

template <class T_>
struct GradSquares {
  using T = T_;
  using Acc = Sums<1>;
  static constexpr int INPUTS = 1;
  static constexpr bool WRITES = false;
  const T* in[1];  // gradient

  struct Coef {};
  template <int V>
  FG_MEMBER void coefs(i64, int, Coef (&)[V]) const {}
  template <int M>
  FG_MEMBER void accumulate(Acc& acc, const Coef&, const float (&v)[1][M], int count) const {
#pragma unroll
    for (int i = 0; i < M; ++i)
      if (i < count) acc.word[0] += v[0][i] * v[0][i];
  }
};

// Grid: 32 samples a block.
static __global__ void __launch_bounds__(THREADS)
    grad_norm_penalty_finish_kernel(const float* partials, int splits, int samples, float target, float* penalty,
                                    float* norm) {
  const int sample = blockIdx.x * FINISH_COLUMNS + threadIdx.x % FINISH_COLUMNS;
  const Sums<1> sum = merge_splits<Sums<1>>(partials, 0, splits, sample, samples);
  if (threadIdx.x >= FINISH_COLUMNS || sample >= samples) return;
  const float length = sqrtf(sum.word[0]);
  store(norm + sample, length);
  store(penalty + sample, (length - target) * (length - target));
}

template <class T_>
struct GradNormBackward {
  using T = T_;
  static constexpr int INPUTS = 1, OUTPUTS = 1;
  const T* in[1];  // gradient
  T* out[1];
  const float *dpenalty, *norm;
  float target;

  struct Coef {
    float scale;
  };
  template <int V>
  FG_MEMBER void coefs(i64, int sample, Coef (&c)[V]) const {
    float length[V], scale[V];
    load_neighbours(norm, sample, 0.0f, length);
    load_neighbours(dpenalty, sample, 0.0f, scale);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float slope = target == 0.0f ? 2.0f : length[j] > 0.0f ? 2.0f - 2.0f * target / length[j] : 0.0f;
      c[j].scale = scale[j] * slope;
    }
  }
  FG_MEMBER void apply(const Coef& c, const float (&v)[1], float (&d)[1]) const { d[0] = v[0] * c.scale; }
};

}  // namespace fg::cuda
