// y = e[n] real + (1 - e[n]) fake, as torch.lerp computes it. A sample is a row of sweep.cuh, its coefficient a
// channel's.
#pragma once

#include "cuda/sweep.cuh"

namespace fg::cuda {

template <class T_>
struct Interpolate {
  using T = T_;
  static constexpr int INPUTS = 2, OUTPUTS = 1;
  const T* in[2];  // real, fake
  T* out[1];       // y
  const float* epsilon;

  struct Coef {
    float e;
  };
  template <int V>
  FG_MEMBER void coefs(i64, int sample, Coef (&c)[V]) const {
    float e[V];
    load_neighbours(epsilon, sample, 0.0f, e);
#pragma unroll
    for (int j = 0; j < V; ++j) c[j].e = e[j];
  }
  FG_MEMBER void apply(const Coef& c, const float (&v)[2], float (&y)[1]) const {
    const float distance = v[0] - v[1];
    y[0] = c.e < 0.5f ? v[1] + c.e * distance : v[0] - distance * (1.0f - c.e);
  }
};

}  // namespace fg::cuda
