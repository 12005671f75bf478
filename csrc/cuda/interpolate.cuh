// y = e[n] real + (1 - e[n]) fake, as torch.lerp computes it; with a rest, e real + rest fake; of one input, e real. A
// sample is a row of sweep.cuh, its coefficients a channel's.
#pragma once

#include "cuda/sweep.cuh"

namespace fg::cuda {

template <class T_, int INPUTS_>
struct Interpolate {
  using T = T_;
  static constexpr int INPUTS = INPUTS_, OUTPUTS = 1;
  const T* in[INPUTS];  // real, fake
  T* out[1];            // y
  const float *epsilon, *rest;

  struct Coef {
    float e, rest;
  };
  template <int V>
  FG_MEMBER void coefs(i64, int sample, Coef (&c)[V]) const {
    float e[V], other[V];
    load_neighbours(epsilon, sample, 0.0f, e);
    load_neighbours(rest, sample, 0.0f, other);
#pragma unroll
    for (int j = 0; j < V; ++j) c[j] = {e[j], other[j]};
  }
  FG_MEMBER void apply(const Coef& c, const float (&v)[INPUTS], float (&y)[1]) const {
    if constexpr (INPUTS == 1) {
      y[0] = c.e * v[0];
    } else if (rest) {
      y[0] = c.e * v[0] + c.rest * v[1];
    } else {
      const float distance = v[0] - v[1];
      y[0] = c.e < 0.5f ? v[1] + c.e * distance : v[0] - distance * (1.0f - c.e);
    }
  }
};

}  // namespace fg::cuda
