// Group norm: batch norm's passes with every sample as its own statistic group, and these kernels between the passes. A
// block has one norm group of one sample; the parameters' gradients need a second kernel, since they cross samples.
#pragma once

#include "cuda/norm.cuh"

namespace fg::cuda {

struct GnFinish {
  const float* partials;  // [N][splits][WORDS][C]
  int samples, splits, channels, groups;
  Norm norm;
  double inv_m;  // 1 / elements of a group
  float* k;      // coefficients of the next pass
  i64 stride;    // N C
  float* w;      // double backward: [2][N groups], the groups' sums of ddx and of ddx xhat
};

// Merges the splits of a channel into acc.
template <class Acc>
FG_DEVICE void add_partials(Acc& acc, const GnFinish& f, i64 sample, int channel) {
  const float* p = partial_at(const_cast<float*>(f.partials), sample, f.splits, 0, Acc::WORDS, 0, f.channels) + channel;
  for (int left = f.splits * Acc::WORDS; left > 0; left -= Acc::WORDS) {
    Acc part;
#pragma unroll
    for (int k = 0; k < Acc::WORDS; ++k, p += f.channels) part.word[k] = load(p);
    acc.merge(part);
  }
}

template <class Acc>
FG_DEVICE Acc partials_of(const GnFinish& f, i64 sample, int channel) {
  Acc sum;
  sum.clear();
  add_partials(sum, f, sample, channel);
  return sum;
}

// Grid of the first three: N x groups.
static __global__ void __launch_bounds__(THREADS)
    gn_act_statistics_kernel(GnFinish f, Pivot pivot, float* mean, float* var) {
  const i64 sample = blockIdx.x / f.groups;
  const int width = f.channels / f.groups, first = blockIdx.x % f.groups * width;
  Moments m;
  m.clear();
  for (int c = threadIdx.x; c < width; c += THREADS) add_partials(m, f, sample, first + c);
  merge_block<THREADS>(m);
  if (threadIdx.x != 0) return;
  store(mean + blockIdx.x, pivot.at(sample, first) + m.mean());
  store(var + blockIdx.x, m.variance());
}

// K0, K1 of NormBackward from the group's sums of weight dt and weight dt xc.
static __global__ void __launch_bounds__(THREADS) gn_act_backward_finish_kernel(GnFinish f) {
  FG_SHARED(float, k, [2]);
  const i64 sample = blockIdx.x / f.groups;
  const int width = f.channels / f.groups, first = blockIdx.x % f.groups * width;
  Sums<2> s;
  s.clear();
  for (int c = threadIdx.x; c < width; c += THREADS) {
    const Sums<2> own = partials_of<Sums<2>>(f, sample, first + c);
    const float weight = load_or(f.norm.weight, first + c, 1.0f);
    s.word[0] += weight * own.word[0];
    s.word[1] += weight * own.word[1];
  }
  merge_block<THREADS>(s);
  if (threadIdx.x == 0) {
    const FirstOrder o = first_order(s, f.inv_m, rstd_of(f.norm, blockIdx.x));
    k[0] = static_cast<float>(o.x0);
    k[1] = static_cast<float>(o.x1);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < width; c += THREADS) {
    store(f.k + sample * f.channels + first + c, static_cast<float>(k[0]));
    store(f.k + f.stride + sample * f.channels + first + c, static_cast<float>(k[1]));
  }
}

// docs/maths.md, section 5: s1, s2, A0 weighted as above, W1 and W2 plain, and the sums that ddweight weighs.
static __global__ void __launch_bounds__(THREADS)
    gn_act_double_backward_finish_kernel(GnFinish f, const float* ddweight, const float* ddbias) {
  FG_SHARED(double, group, [5]);  // r, W1/M, W2/M, and X0, X1 of NormDouble
  FG_SHARED(float, along, [1]);   // XW
  const i64 sample = blockIdx.x / f.groups;
  const int width = f.channels / f.groups, first = blockIdx.x % f.groups * width;
  Sums<7> s;
  s.clear();
  for (int c = threadIdx.x; c < width; c += THREADS) {
    const Sums<5> own = partials_of<Sums<5>>(f, sample, first + c);
    const float weight = load_or(f.norm.weight, first + c, 1.0f), v_weight = load_or(ddweight, first + c, 0.0f);
    const float add[7] = {weight * own.word[0], weight * own.word[1],   own.word[2],           own.word[3],
                          weight * own.word[4], v_weight * own.word[0], v_weight * own.word[1]};
    for (int i = 0; i < 7; ++i) s.word[i] += add[i];
  }
  merge_block<THREADS>(s);
  if (threadIdx.x == 0) {
    const double r = rstd_of(f.norm, blockIdx.x);
    const SecondOrder o = second_order(s, f.inv_m, r);
    group[0] = r;
    group[1] = o.w1;
    group[2] = o.w2;
    group[3] = o.x0;
    group[4] = o.x1;
    along[0] = static_cast<float>(o.xw);
    store(f.w + blockIdx.x, static_cast<float>(o.W1));
    store(f.w + static_cast<i64>(f.samples) * f.groups + blockIdx.x, static_cast<float>(o.W2));
  }
  __syncthreads();
  const double r = group[0], w1 = group[1], w2 = group[2];
  for (int c = first + threadIdx.x; c < first + width; c += THREADS) {
    const double scale = load_or(f.norm.weight, c, 1.0f) * r;
    const double v_weight = load_or(ddweight, c, 0.0f), v_bias = load_or(ddbias, c, 0.0f);
    float* k = f.k + sample * f.channels + c;
    store(k + U0 * f.stride, static_cast<float>(v_bias - scale * w1));
    store(k + U1 * f.stride, static_cast<float>(r * (v_weight - scale * w2)));
    store(k + XW * f.stride, static_cast<float>(along[0]));
    store(k + X0 * f.stride, static_cast<float>(group[3]));
    store(k + X1 * f.stride, static_cast<float>(group[4]));
  }
}

// The parameters' gradients: dweight = sum r c2, dbias = sum c1 over the samples, c1 and c2 a channel's sums of dt and
// dt xc. Double backward (WORDS = 5): d_weight = sum r (a0 - (W1 c1 + W2 r c2)/M). Grid: 32 channels a block.
template <int WORDS>
__global__ void __launch_bounds__(THREADS) gn_act_parameters_kernel(GnFinish f, float* dweight, float* dbias) {
  const int channel = blockIdx.x * FINISH_COLUMNS + threadIdx.x % FINISH_COLUMNS;
  const int y = threadIdx.x / FINISH_COLUMNS;
  Sums<2> sum;
  sum.clear();
  if (channel < f.channels)
    for (int sample = y; sample < f.samples; sample += FINISH_ROWS) {
      const Sums<WORDS> own = partials_of<Sums<WORDS>>(f, sample, channel);
      const i64 i = f.norm.statistic(sample, channel);
      const double r = rstd_of(f.norm, i);
      if constexpr (WORDS == 5) {
        const double W1 = load(f.w + i), W2 = load(f.w + static_cast<i64>(f.samples) * f.groups + i);
        sum.word[0] += static_cast<float>(r * (own.word[4] - (W1 * own.word[0] + W2 * r * own.word[1]) * f.inv_m));
      } else {
        sum.word[0] += static_cast<float>(r * own.word[1]);
        sum.word[1] += own.word[0];
      }
    }
  merge_block<THREADS, FINISH_COLUMNS>(sum);
  if (threadIdx.x >= FINISH_COLUMNS || channel >= f.channels) return;
  if (dweight) store(dweight + channel, sum.word[0]);
  if (dbias) store(dbias + channel, sum.word[1]);
}

}  // namespace fg::cuda
