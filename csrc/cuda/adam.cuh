// Adam over many tensors in one launch, the moving average in the same pass: 9 accesses an element, bound by memory.
#pragma once

#include "cuda/prelude.cuh"

namespace fg::cuda {

constexpr int ADAM_TENSORS = 32;  // of a launch: 2 KB of the 4 KB that parameters may take
constexpr int ADAM_THREADS = 256;
constexpr int ADAM_BLOCK = 4096;  // elements: four vectors of 16 bytes a thread; a block's two roots cost little

// from + weight (to - from), as torch.lerp computes it: from the nearer end, exact at both.
struct AdamLerp {
  float slope;  // weight, or weight - 1 where `to` is the nearer end
  bool near_to;
};

struct AdamLaunch {
  struct Tensor {
    float* parameter;
    const float* gradient;
    float *exp_avg, *exp_avg_sq, *average;  // average null: none
    const float* step;
    i64 count;
  };
  Tensor tensors[ADAM_TENSORS];
  int first[ADAM_TENSORS + 1];  // block of each tensor; behind the last one the number of blocks
  const float* lr_at;           // null: lr
  float lr, ln_beta1, ln_beta2, beta2, rest2, eps, l2, decoupled, sign;
  AdamLerp first_moment, average;
};

struct AdamCoefficients {
  float step, root_correction, shrink;
};

FG_DEVICE float lerp(const AdamLerp& l, float from, float to) {
  return l.slope * (to - from) + (l.near_to ? to : from);
}

FG_DEVICE AdamCoefficients adam_coefficients(const AdamLaunch& a, const float* step) {
  const float n = load(step), lr = a.lr_at ? load(a.lr_at) : a.lr;
  return {-lr / -expm1f(n * a.ln_beta1), rsqrtf(-expm1f(n * a.ln_beta2)), 1.0f - lr * a.decoupled};
}

template <int V>
FG_DEVICE void adam_update(const AdamLaunch& a, const AdamLaunch::Tensor& t, const AdamCoefficients& k, i64 i) {
  auto p = load<V>(t.parameter + i), m = load<V>(t.exp_avg + i), v = load<V>(t.exp_avg_sq + i);
  const auto g = load<V>(t.gradient + i);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float gradient = a.sign * g.v[j] + a.l2 * p.v[j];
    m.v[j] = lerp(a.first_moment, m.v[j], gradient);
    v.v[j] = a.beta2 * v.v[j] + a.rest2 * gradient * gradient;
    p.v[j] = k.shrink * p.v[j] + k.step * (m.v[j] / (sqrtf(v.v[j]) * k.root_correction + a.eps));
  }
  store<V>(t.exp_avg + i, m);
  store<V>(t.exp_avg_sq + i, v);
  store<V>(t.parameter + i, p);
  if (t.average) {
    auto average = load<V>(t.average + i);
#pragma unroll
    for (int j = 0; j < V; ++j) average.v[j] = lerp(a.average, average.v[j], p.v[j]);
    store<V>(t.average + i, average);
  }
}

// V: floats to an access; 1 where an address of the launch is no multiple of 16 bytes. 4 blocks a multiprocessor: left
// to itself the compiler took 32 registers on sm_80 and spilled two.
template <int V>
static __global__ void __launch_bounds__(ADAM_THREADS, 4) adam_kernel(const AdamLaunch a) {
  int tensor = 0;
  while (static_cast<int>(blockIdx.x) >= a.first[tensor + 1]) ++tensor;
  const auto& t = a.tensors[tensor];
  const AdamCoefficients k = adam_coefficients(a, t.step);
  const i64 begin = static_cast<i64>(blockIdx.x - a.first[tensor]) * ADAM_BLOCK;
  const i64 end = begin + ADAM_BLOCK < t.count ? begin + ADAM_BLOCK : t.count;
  const i64 whole = end - end % V;
  for (i64 i = begin + threadIdx.x * V; i < whole; i += ADAM_THREADS * V) adam_update<V>(a, t, k, i);
  if constexpr (V > 1) {
    if (const i64 i = whole + threadIdx.x; i < end) adam_update<1>(a, t, k, i);
  }
}

}  // namespace fg::cuda
