// Batch norm: what becomes of the sums of each channel and group, combined in double.
//
// In three kernels the second does it: a block has 32 channels; its threads merge the splits of a channel in a fixed
// order, then one thread a channel combines them. In one (resident.cuh) every block does it for its own channels.
#pragma once

#include "cuda/norm.cuh"
#include "cuda/resident.cuh"

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

// What one group adds to the gradients of a channel's parameters, and K0, K1 of NormBackward.
struct BackwardTerms {
  double weight, bias;
  float k[2];
};

FG_DEVICE BackwardTerms backward_terms(const Norm& norm, double inv_n, const Sums<2>& s, i64 i, int channel) {
  const double r = rstd_of(norm, i);
  FirstOrder o = FirstOrder::of(s.word, load_or(norm.weight, channel, 1.0f), r);
  o.finish(inv_n, r);
  return {s.word[1] * r, s.word[0], {static_cast<float>(o.x0), static_cast<float>(o.x1)}};
}

// The same of the double backward: d_weight, and the coefficients of NormDouble.
struct DoubleTerms {
  double weight;
  float k[DOUBLE_COEFS];
};

struct BnCotangents {
  const float *ddweight, *ddbias;  // [C] or null (zero)
};

FG_DEVICE DoubleTerms double_terms(const Norm& norm, double inv, const Sums<5>& s, i64 i, int channel,
                                   const BnCotangents& v) {
  const double r = rstd_of(norm, i), weight = load_or(norm.weight, channel, 1.0f);
  const double v_weight = load_or(v.ddweight, channel, 0.0f), v_bias = load_or(v.ddbias, channel, 0.0f);
  SecondOrder o{};
  o.add(s.word, weight, v_weight, r);
  o.finish(inv, r);
  return {o.d_weight(s.word, inv, r),
          {static_cast<float>(o.u0(weight, v_bias, r)), static_cast<float>(o.u1(weight, v_weight, r)),
           static_cast<float>(o.xw), static_cast<float>(o.x0), static_cast<float>(o.x1)}};
}

// ---------------------------------------------------------------------------------------------- three kernels

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
    const BackwardTerms terms = backward_terms(f.norm, f.inv_n, s, i, channel);
    sum_bias += terms.bias;
    sum_weight += terms.weight;
    for (int j = 0; j < 2; ++j) store(f.k + j * f.stride + i, terms.k[j]);
  }
  if (!mine) return;
  if (dweight) store(dweight + channel, static_cast<float>(sum_weight));
  if (dbias) store(dbias + channel, static_cast<float>(sum_bias));
}

// The coefficients of NormDouble, and d_weight. Grid: 32 channels a block.
static __global__ void __launch_bounds__(THREADS)
    bn_act_double_backward_finish_kernel(BnFinish f, BnCotangents cotangents, float* d_weight) {
  const int channel = blockIdx.x * FINISH_COLUMNS + threadIdx.x % FINISH_COLUMNS;
  const bool mine = threadIdx.x < FINISH_COLUMNS && channel < f.channels;
  double sum_weight = 0.0;
  for (int group = 0; group < f.groups; ++group) {
    const Sums<5> s = merge_splits<Sums<5>>(f.partials, group, f.splits, channel, f.channels);
    if (!mine) continue;
    const i64 i = static_cast<i64>(group) * f.channels + channel;
    const DoubleTerms terms = double_terms(f.norm, f.inv_n, s, i, channel, cotangents);
    sum_weight += terms.weight;
    for (int j = 0; j < DOUBLE_COEFS; ++j) store(f.k + j * f.stride + i, terms.k[j]);
  }
  if (mine && d_weight) store(d_weight + channel, static_cast<float>(sum_weight));
}

// ---------------------------------------------------------------------------------------------- one

// The Ops of resident_kernel.
template <class T>
struct BnResidentForward {
  using Reduce = NormStatistics<T>;
  using Map = NormForward<T>;
  static constexpr bool JOINT = false;
  Map map;
  Pivot pivot;
  float *mean, *var;

  struct Total {
    float mean, var;
  };
  FG_MEMBER Reduce reduce() const { return {{map.in[0]}, pivot}; }
  FG_MEMBER Affine finish(const Moments& m, i64 group, int channel, Total& total) const {
    total = {pivot.at(group, channel) + m.mean(), m.variance()};
    const float scale = load_or(map.norm.weight, channel, 1.0f) * rsqrtf(total.var + map.norm.eps);
    return {total.mean, scale, load_or(map.norm.bias, channel, 0.0f)};
  }
  FG_MEMBER void publish(const Total& total, i64 group, int channel) const {
    const i64 i = map.norm.statistic(group, channel);
    store(mean + i, total.mean);
    store(var + i, total.var);
  }
};

template <class T>
struct BnResidentBackward {
  using Reduce = NormBackwardSums<T>;
  using Map = NormBackward<T>;
  static constexpr bool JOINT = true;
  Map map;
  double inv_n;
  float *dweight, *dbias;  // null: not wanted

  struct Total {
    double weight, bias;
  };
  FG_MEMBER Reduce reduce() const { return {{map.in[0], map.in[1]}, map.norm}; }
  FG_MEMBER typename Map::Coef finish(const Sums<2>& s, i64 group, int channel, Total& total) const {
    const BackwardTerms terms = backward_terms(map.norm, inv_n, s, map.norm.statistic(group, channel), channel);
    total.weight += terms.weight;
    total.bias += terms.bias;
    Affine affine[1];
    affines_of(map.norm, group, channel, affine);
    return {affine[0], terms.k[0], terms.k[1]};
  }
  FG_MEMBER void publish(const Total& total, i64, int channel) const {
    if (dweight) store(dweight + channel, static_cast<float>(total.weight));
    if (dbias) store(dbias + channel, static_cast<float>(total.bias));
  }
};

template <class T>
struct BnResidentDouble {
  using Reduce = NormDoubleSums<T>;
  using Map = NormDouble<T>;
  static constexpr bool JOINT = true;
  Map map;
  double inv_n;
  BnCotangents cotangents;
  float* d_weight;  // null: not wanted

  struct Total {
    double weight;
  };
  FG_MEMBER Reduce reduce() const { return {{map.in[0], map.in[1], map.in[2]}, map.norm}; }
  FG_MEMBER typename Map::Coef finish(const Sums<5>& s, i64 group, int channel, Total& total) const {
    const i64 i = map.norm.statistic(group, channel);
    const DoubleTerms terms = double_terms(map.norm, inv_n, s, i, channel, cotangents);
    total.weight += terms.weight;
    Affine affine[1];
    affines_of(map.norm, group, channel, affine);
    typename Map::Coef coef{affine[0], {}};
#pragma unroll
    for (int j = 0; j < DOUBLE_COEFS; ++j) coef.k[j] = terms.k[j];
    return coef;
  }
  FG_MEMBER void publish(const Total& total, i64, int channel) const {
    if (d_weight) store(d_weight + channel, static_cast<float>(total.weight));
  }
};

}  // namespace fg::cuda
