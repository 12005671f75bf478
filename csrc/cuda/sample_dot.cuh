// dot[n] = sum x[n] y[n]. A sample is a row of sweep.cuh.
#pragma once

#include "cuda/sweep.cuh"

namespace fg::cuda {

template <class T_>
struct SampleProducts {
  using T = T_;
  using Acc = Sums<1>;
  static constexpr int INPUTS = 2;
  static constexpr bool WRITES = false;
  const T* in[2];  // x, y

  struct Coef {};
  template <int V>
  FG_MEMBER void coefs(i64, int, Coef (&)[V]) const {}
  template <int M>
  FG_MEMBER void accumulate(Acc& acc, const Coef&, const float (&v)[2][M], int count) const {
#pragma unroll
    for (int i = 0; i < M; ++i)
      if (i < count) acc.word[0] += v[0][i] * v[1][i];
  }
};

// Grid: 32 samples a block.
static __global__ void __launch_bounds__(THREADS)
    sample_dot_finish_kernel(const float* partials, int splits, int samples, float* dot) {
  const int sample = blockIdx.x * FINISH_COLUMNS + threadIdx.x % FINISH_COLUMNS;
  const Sums<1> sum = merge_splits<Sums<1>>(partials, 0, splits, sample, samples);
  if (threadIdx.x < FINISH_COLUMNS && sample < samples) store(dot + sample, sum.word[0]);
}

}  // namespace fg::cuda
