// Batch norm: what becomes of the sums of each channel and group. A block has 32 channels; its threads merge the splits
// of a channel in a fixed order, then one thread a channel combines them in double.
#pragma once

#include "cuda/norm.cuh"

namespace fg::cuda {

// mean, var [G][C] from partials. Grid: G x 32 channels.
static __global__ void __launch_bounds__(THREADS)
    bn_act_statistics_kernel(const float* partials, int splits, int channels, Pivot pivot, float* mean, float* var) {
  const int tiles = (channels + FINISH_COLUMNS - 1) / FINISH_COLUMNS;
  const i64 group = blockIdx.x / tiles;
  const int channel = blockIdx.x % tiles * FINISH_COLUMNS + threadIdx.x % FINISH_COLUMNS;
  const Moments m = merge_splits<Moments>(partials, group, splits, channel, channels);
  if (threadIdx.x >= FINISH_COLUMNS || channel >= channels) return;
  store(mean + group * channels + channel, pivot.at(group, channel) + m.mean());
  store(var + group * channels + channel, m.variance());
}

struct BnFinish {
  const float* partials;
  int groups, splits, channels;
  Norm norm;
  double inv_n;  // 0 in eval mode, where mean and var are constants
  float* k;      // coefficients of the next pass
  i64 stride;    // G C
};

// K0, K1 of NormBackward, and the parameters' gradients, which add up over the groups. Grid: 32 channels a block.
static __global__ void __launch_bounds__(THREADS)
    bn_act_backward_finish_kernel(BnFinish f, float* dweight, float* dbias) {
  const int channel = blockIdx.x * FINISH_COLUMNS + threadIdx.x % FINISH_COLUMNS;
  const bool mine = threadIdx.x < FINISH_COLUMNS && channel < f.channels;
  double sum_weight = 0.0, sum_bias = 0.0;
  for (int group = 0; group < f.groups; ++group) {
    const Sums<2> s = merge_splits<Sums<2>>(f.partials, group, f.splits, channel, f.channels);
    if (!mine) continue;
    const i64 i = static_cast<i64>(group) * f.channels + channel;
    const double r = rstd_of(f.norm, i), scale = load_or(f.norm.weight, channel, 1.0f) * r;
    const double s1 = s.word[0], s2 = s.word[1] * r;
    sum_bias += s1;
    sum_weight += s2;
    // dx = weight r (dt - s1/n - xhat s2/n)
    store(f.k + i, static_cast<float>(-scale * s1 * f.inv_n));
    store(f.k + f.stride + i, static_cast<float>(-scale * r * s2 * f.inv_n));
  }
  if (!mine) return;
  if (dweight) store(dweight + channel, static_cast<float>(sum_weight));
  if (dbias) store(dbias + channel, static_cast<float>(sum_bias));
}

// The coefficients of NormDouble (docs/maths.md, section 2; inv = 1/n):
//   A = A0 - (W1 s1 + W2 s2) inv, d_weight = r A
//   sum q = -(weight r inv)(W1 s2 + W2 s1) + v_weight s1, sum q xhat = -2 (weight r inv) W2 s2 + v_weight s2
static __global__ void __launch_bounds__(THREADS)
    bn_act_double_backward_finish_kernel(BnFinish f, const float* ddweight, const float* ddbias, float* d_weight) {
  const int channel = blockIdx.x * FINISH_COLUMNS + threadIdx.x % FINISH_COLUMNS;
  const bool mine = threadIdx.x < FINISH_COLUMNS && channel < f.channels;
  double sum_weight = 0.0;
  for (int group = 0; group < f.groups; ++group) {
    const Sums<5> s = merge_splits<Sums<5>>(f.partials, group, f.splits, channel, f.channels);
    if (!mine) continue;
    const i64 i = static_cast<i64>(group) * f.channels + channel;
    const double r = rstd_of(f.norm, i), scale = load_or(f.norm.weight, channel, 1.0f) * r, inv = f.inv_n;
    const double v_weight = load_or(ddweight, channel, 0.0f), v_bias = load_or(ddbias, channel, 0.0f);
    const double s1 = s.word[0], s2 = s.word[1] * r, W1 = s.word[2], W2 = s.word[3] * r;
    const double A = s.word[4] - (W1 * s1 + W2 * s2) * inv;
    const double sum_q = -scale * inv * (W1 * s2 + W2 * s1) + v_weight * s1;
    const double sum_qx = -2.0 * scale * inv * W2 * s2 + v_weight * s2;
    sum_weight += r * A;
    const double k[DOUBLE_COEFS] = {v_bias - scale * W1 * inv, r * (v_weight - scale * W2 * inv), -scale * r * s2 * inv,
                                    -r * sum_q * inv, -r * (r * sum_qx + scale * A * r) * inv};
    for (int j = 0; j < DOUBLE_COEFS; ++j) store(f.k + j * f.stride + i, static_cast<float>(k[j]));
  }
  if (mine && d_weight) store(d_weight + channel, static_cast<float>(sum_weight));
}

}  // namespace fg::cuda
