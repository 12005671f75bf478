// GAN losses on logits; the table of formulas is in fastgan/ops/gan_loss.py.
// sp(r) - (1-s) r is computed as sp(-r) + s r, which does not cancel for large r.
#pragma once

#include "cuda/prelude.cuh"

namespace fg::cuda {

constexpr int LOSS_THREADS = 256;

template <class T>
struct GanLogits {
  const T *fake, *real;  // [n_fake], [n_real]
  i64 n_fake, n_real;
  Loss kind;
  Side side;
  float smoothing;
};

FG_DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
FG_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Loss and slope of one logit; the relativistic kind goes by pairs.
struct Point {
  float loss, slope;
};

FG_DEVICE Point real_point(float r, Loss kind, float smoothing) {
  if (kind == LOSS_BCE || kind == LOSS_MINIMAX) return {softplus(-r) + smoothing * r, smoothing - sigmoid(-r)};
  if (kind == LOSS_LSGAN) {
    const float d = r - (1.0f - smoothing);
    return {0.5f * d * d, d};
  }
  if (kind == LOSS_HINGE) return 1.0f - r <= 0.0f ? Point{0.0f, 0.0f} : Point{1.0f - r, -1.0f};
  return {-r, -1.0f};
}

FG_DEVICE Point fake_point(float f, Loss kind, Side side) {
  const bool d_side = side == SIDE_D;
  if (kind == LOSS_BCE) return d_side ? Point{softplus(f), sigmoid(f)} : Point{softplus(-f), -sigmoid(-f)};
  if (kind == LOSS_MINIMAX) return d_side ? Point{softplus(f), sigmoid(f)} : Point{-softplus(f), -sigmoid(f)};
  if (kind == LOSS_LSGAN) {
    const float d = d_side ? f : f - 1.0f;
    return {0.5f * d * d, d};
  }
  if (kind == LOSS_HINGE && d_side) return 1.0f + f <= 0.0f ? Point{0.0f, 0.0f} : Point{1.0f + f, 1.0f};
  return d_side ? Point{f, 1.0f} : Point{-f, -1.0f};
}

FG_DEVICE Point pair_point(float f, float r, Side side) {  // slope: of f; r's is its negative
  const float z = side == SIDE_D ? f - r : r - f;
  return {softplus(z), side == SIDE_D ? sigmoid(z) : -sigmoid(z)};
}

// Of the fake and of the real logits: loss, logit, sigmoid, how many are right.
using LossSums = Sums<8>;

// statistics: mean r, mean f, mean sigmoid(r), mean sigmoid(f), share r > 0, share f < 0; null: not wanted.
template <class T>
FG_DEVICE void write_loss(const GanLogits<T>& a, const LossSums& s, float* loss, float* statistics) {
  const float inv_f = 1.0f / static_cast<float>(a.n_fake);
  const float inv_r = a.n_real ? 1.0f / static_cast<float>(a.n_real) : 0.0f;
  store(loss, s.word[0] * inv_f + s.word[4] * inv_r);
  if (!statistics) return;
  for (int k = 1; k < 4; ++k) {
    store(statistics + 2 * k - 2, s.word[4 + k] * inv_r);
    store(statistics + 2 * k - 1, s.word[k] * inv_f);
  }
}

// One block: the results are finished; several: each leaves its sums in partials [8][blocks].
template <class T>
__global__ void __launch_bounds__(LOSS_THREADS)
    gan_loss_forward_kernel(GanLogits<T> a, float* partials, float* loss, float* statistics) {
  LossSums s;
  s.clear();
  const i64 step = static_cast<i64>(gridDim.x) * LOSS_THREADS, first = static_cast<i64>(blockIdx.x) * LOSS_THREADS;
  for (i64 i = first + threadIdx.x; i < a.n_fake; i += step) {
    const float f = to_float(load(a.fake + i));
    const Point p =
        a.kind == LOSS_RELATIVISTIC ? pair_point(f, to_float(load(a.real + i)), a.side) : fake_point(f, a.kind, a.side);
    const float add[4] = {p.loss, f, sigmoid(f), f < 0.0f ? 1.0f : 0.0f};
    for (int k = 0; k < 4; ++k) s.word[k] += add[k];
  }
  const bool real_counts = a.side == SIDE_D && a.kind != LOSS_RELATIVISTIC;
  for (i64 i = first + threadIdx.x; i < a.n_real; i += step) {
    const float r = to_float(load(a.real + i));
    const float loss = real_counts ? real_point(r, a.kind, a.smoothing).loss : 0.0f;
    const float add[4] = {loss, r, sigmoid(r), r > 0.0f ? 1.0f : 0.0f};
    for (int k = 0; k < 4; ++k) s.word[4 + k] += add[k];
  }
  merge_block<LOSS_THREADS>(s);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    write_loss(a, s, loss, statistics);
  } else {
    for (int k = 0; k < 8; ++k) store(partials + k * gridDim.x + blockIdx.x, s.word[k]);
  }
}

// One block.
template <class T>
__global__ void __launch_bounds__(LOSS_THREADS)
    gan_loss_finish_kernel(GanLogits<T> a, const float* partials, int blocks, float* loss, float* statistics) {
  LossSums s;
  s.clear();
  for (int b = threadIdx.x; b < blocks; b += LOSS_THREADS)
    for (int k = 0; k < 8; ++k) s.word[k] += load(partials + k * blocks + b);
  merge_block<LOSS_THREADS>(s);
  if (threadIdx.x == 0) write_loss(a, s, loss, statistics);
}

// Grid: any.
template <class T>
__global__ void __launch_bounds__(LOSS_THREADS)
    gan_loss_backward_kernel(GanLogits<T> a, const float* dloss, T* dfake, T* dreal) {
  const float scale = load(dloss), scale_f = scale / static_cast<float>(a.n_fake);
  const float scale_r = a.n_real ? scale / static_cast<float>(a.n_real) : 0.0f;
  const bool pairs = a.kind == LOSS_RELATIVISTIC;
  const i64 step = static_cast<i64>(gridDim.x) * LOSS_THREADS, first = static_cast<i64>(blockIdx.x) * LOSS_THREADS;
  for (i64 i = first + threadIdx.x; i < a.n_fake; i += step) {
    const float f = to_float(load(a.fake + i));
    const float slope = scale_f * (pairs ? pair_point(f, to_float(load(a.real + i)), a.side).slope
                                         : fake_point(f, a.kind, a.side).slope);
    if (dfake) store(dfake + i, from_float<T>(slope));
    if (pairs && dreal) store(dreal + i, from_float<T>(-slope));
  }
  if (pairs || !dreal) return;
  for (i64 i = first + threadIdx.x; i < a.n_real; i += step) {
    const float slope = a.side == SIDE_D ? real_point(to_float(load(a.real + i)), a.kind, a.smoothing).slope : 0.0f;
    store(dreal + i, from_float<T>(scale_r * slope));
  }
}

// L'' by either logit, L''(f - r) for the relativistic kind; sigma'(x) = e/(1+e)^2 with e = exp(-|x|).
FG_DEVICE float loss_curve(float v, Loss kind, Side side) {
  if (kind == LOSS_LSGAN) return 1.0f;
  if (kind == LOSS_HINGE || kind == LOSS_WASSERSTEIN) return 0.0f;
  const float e = expf(-fabsf(v)), bump = e / ((1.0f + e) * (1.0f + e));
  return kind == LOSS_MINIMAX && side == SIDE_G ? -bump : bump;
}

// What follows from the cotangents (ddfake, ddreal) of the gradients: d_dloss = sum dd slope, d_logit = dloss dd L''.
// One block finishes d_dloss; several leave their sums in partials [blocks].
template <class T>
__global__ void __launch_bounds__(LOSS_THREADS)
    gan_loss_double_backward_kernel(GanLogits<T> a, const T* ddfake, const T* ddreal, const float* dloss,
                                    float* partials, float* d_dloss, T* d_fake, T* d_real) {
  const float inv_f = 1.0f / static_cast<float>(a.n_fake), scale = load(dloss);
  const float inv_r = a.n_real ? 1.0f / static_cast<float>(a.n_real) : 0.0f;
  const bool pairs = a.kind == LOSS_RELATIVISTIC;
  const i64 step = static_cast<i64>(gridDim.x) * LOSS_THREADS, first = static_cast<i64>(blockIdx.x) * LOSS_THREADS;
  Sums<1> sum;
  sum.clear();
  for (i64 i = first + threadIdx.x; i < a.n_fake; i += step) {
    const float f = to_float(load(a.fake + i)), r = pairs ? to_float(load(a.real + i)) : 0.0f;
    const float u = to_float(load(ddfake + i)) - (pairs ? to_float(load(ddreal + i)) : 0.0f);
    const Point p = pairs ? pair_point(f, r, a.side) : fake_point(f, a.kind, a.side);
    const float d = scale * inv_f * u * loss_curve(f - r, a.kind, a.side);
    sum.word[0] += inv_f * u * p.slope;
    store(d_fake + i, from_float<T>(d));
    if (pairs) store(d_real + i, from_float<T>(-d));
  }
  if (!pairs)
    for (i64 i = first + threadIdx.x; i < a.n_real; i += step) {
      float d = 0.0f;
      if (a.side == SIDE_D) {
        const float r = to_float(load(a.real + i)), u = to_float(load(ddreal + i));
        sum.word[0] += inv_r * u * real_point(r, a.kind, a.smoothing).slope;
        d = scale * inv_r * u * loss_curve(r, a.kind, a.side);
      }
      store(d_real + i, from_float<T>(d));
    }
  merge_block<LOSS_THREADS>(sum);
  if (threadIdx.x == 0) store(gridDim.x == 1 ? d_dloss : partials + blockIdx.x, sum.word[0]);
}

// One block.
static __global__ void __launch_bounds__(LOSS_THREADS)
    gan_loss_double_backward_finish_kernel(const float* partials, int blocks, float* d_dloss) {
  Sums<1> sum;
  sum.clear();
  for (int b = threadIdx.x; b < blocks; b += LOSS_THREADS) sum.word[0] += load(partials + b);
  merge_block<LOSS_THREADS>(sum);
  if (threadIdx.x == 0) store(d_dloss, sum.word[0]);
}

}  // namespace fg::cuda
