// What batch norm and its siblings do to an element, for sweep.cuh. With xc = x - mean, r = rstd, t = weight r xc +
// bias, m = phi'(t), dt = dy m:
//   forward           y = phi(t)
//   backward          sums dt, dt xc;               dx   = weight r dt + K0 + K1 xc
//   double backward   sums dt, dt xc, w, w xc, w dt (w = ddx)
//                     d_dy = m (weight r w + U0 + U1 xc),  d_x = XW w + U1 dt + X0 + X1 xc
// Every kernel computes t by the same operations, so that no sign of t differs between two passes. Which statistic a
// channel of a group uses is the only difference between the siblings: `per_group` and `channels_per_statistic`.
#pragma once

#include "cuda/sweep.cuh"

#include "common/norm_derivatives.hpp"  // behind it: its functions are FG_MEMBERs

namespace fg::cuda {

struct Norm {
  const float *weight, *bias;  // [C] or null
  const float *mean, *var;
  float eps;
  int per_group, channels_per_statistic;
  Act act;  // identity, relu or leaky_relu
  float slope;

  FG_MEMBER i64 statistic(i64 group, int channel) const {
    return group * per_group + (channels_per_statistic == 1 ? channel : channel / channels_per_statistic);
  }
};

struct Affine {
  float mean, scale, bias;

  FG_MEMBER float t(float centred) const { return fmaf(centred, scale, bias); }
};

template <int V>
FG_DEVICE void affines_of(const Norm& n, i64 group, int channel, Affine (&a)[V]) {
  float mean[V], var[V], weight[V], bias[V];
  if (n.channels_per_statistic == 1) {
    load_neighbours(n.mean, n.statistic(group, channel), 0.0f, mean);
    load_neighbours(n.var, n.statistic(group, channel), 0.0f, var);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const i64 i = n.statistic(group, channel + j);
      mean[j] = load(n.mean + i);
      var[j] = load(n.var + i);
    }
  }
  load_neighbours(n.weight, channel, 1.0f, weight);
  load_neighbours(n.bias, channel, 0.0f, bias);
#pragma unroll
  for (int j = 0; j < V; ++j) a[j] = {mean[j], weight[j] * rsqrtf(var[j] + n.eps), bias[j]};
}

// The first element behind a statistic, which moments are taken around: where the mean is 3e4 standard deviations, a
// float32 mean is off by 1e-3 of one, and variances merged from such means by 1e-4. An outlier here costs nothing.
struct Pivot {
  const void* x;
  DType dtype;
  i64 group_stride, channel_stride;
  int channels_per_statistic;

  FG_MEMBER float at(i64 group, int channel) const {
    const i64 i = group * group_stride + channel / channels_per_statistic * channels_per_statistic * channel_stride;
    if (dtype == BF16) return to_float(load(static_cast<const __nv_bfloat16*>(x) + i));
    if (dtype == F16) return to_float(load(static_cast<const __half*>(x) + i));
    return load(static_cast<const float*>(x) + i);
  }
};

template <class T_>
struct NormStatistics {
  using T = T_;
  using Acc = Moments;
  static constexpr int INPUTS = 1;
  static constexpr bool WRITES = false;
  const T* in[1];  // x
  Pivot pivot;

  struct Coef {
    float pivot;
  };
  template <int V>
  FG_MEMBER void coefs(i64 group, int channel, Coef (&c)[V]) const {
    if constexpr (V == VECTOR<T>)
      if (pivot.channels_per_statistic == 1 && pivot.channel_stride == 1) {  // columns
        const Pack<T, V> first = load<V>(in[0] + group * pivot.group_stride + channel);
#pragma unroll
        for (int j = 0; j < V; ++j) c[j].pivot = to_float(first.v[j]);
        return;
      }
#pragma unroll
    for (int j = 0; j < V; ++j) c[j].pivot = pivot.at(group, channel + j);
  }
  template <int M>
  FG_MEMBER void accumulate(Acc& acc, const Coef& c, const float (&v)[1][M], int count) const {
    float distance[M];
#pragma unroll
    for (int i = 0; i < M; ++i) distance[i] = v[0][i] - c.pivot;
    acc.add(distance, count);
  }
};

template <class T_>
struct NormForward {
  using T = T_;
  static constexpr int INPUTS = 1, OUTPUTS = 1;
  const T* in[1];  // x
  T* out[1];       // y
  Norm norm;

  using Coef = Affine;
  template <int V>
  FG_MEMBER void coefs(i64 group, int channel, Coef (&c)[V]) const {
    affines_of(norm, group, channel, c);
  }
  FG_MEMBER void apply(const Coef& c, const float (&v)[1], float (&y)[1]) const {
    y[0] = activate(c.t(v[0] - c.mean), norm.act, norm.slope);
  }
};

template <class T_>
struct NormBackwardSums {
  using T = T_;
  using Acc = Sums<2>;
  static constexpr int INPUTS = 2;
  static constexpr bool WRITES = false;
  const T* in[2];  // dy, x
  Norm norm;

  using Coef = Affine;
  template <int V>
  FG_MEMBER void coefs(i64 group, int channel, Coef (&c)[V]) const {
    affines_of(norm, group, channel, c);
  }
  template <int M>
  FG_MEMBER void accumulate(Acc& acc, const Coef& c, const float (&v)[2][M], int count) const {
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if (i >= count) continue;
      const float centred = v[1][i] - c.mean, dt = activate_gradient(v[0][i], c.t(centred), norm.act, norm.slope);
      acc.word[0] += dt;
      acc.word[1] += dt * centred;
    }
  }
};

// k v + k0. k is 0 where mean and var are constants: times that, a NaN in x would stay one.
FG_DEVICE float along(float k, float v, float k0) { return k == 0.0f ? k0 : fmaf(k, v, k0); }

template <class T_>
struct NormBackward {
  using T = T_;
  static constexpr int INPUTS = 2, OUTPUTS = 1;
  const T* in[2];  // dy, x
  T* out[1];       // dx
  Norm norm;
  const float* k;  // [2][G C]
  i64 stride;      // G C
  int channels;

  struct Coef {
    Affine affine;
    float k0, k1;
  };
  template <int V>
  FG_MEMBER void coefs(i64 group, int channel, Coef (&c)[V]) const {
    Affine affine[V];
    float k0[V], k1[V];
    affines_of(norm, group, channel, affine);
    load_neighbours(k, group * channels + channel, 0.0f, k0);
    load_neighbours(k + stride, group * channels + channel, 0.0f, k1);
#pragma unroll
    for (int j = 0; j < V; ++j) c[j] = {affine[j], k0[j], k1[j]};
  }
  FG_MEMBER void apply(const Coef& c, const float (&v)[2], float (&dx)[1]) const {
    const float centred = v[1] - c.affine.mean;
    const float dt = activate_gradient(v[0], c.affine.t(centred), norm.act, norm.slope);
    dx[0] = fmaf(c.affine.scale, dt, along(c.k1, centred, c.k0));
  }
};

template <class T_>
struct NormDoubleSums {
  using T = T_;
  using Acc = Sums<5>;
  static constexpr int INPUTS = 3;
  static constexpr bool WRITES = false;
  const T* in[3];  // ddx (null: zero), dy, x
  Norm norm;

  using Coef = Affine;
  template <int V>
  FG_MEMBER void coefs(i64 group, int channel, Coef (&c)[V]) const {
    affines_of(norm, group, channel, c);
  }
  template <int M>
  FG_MEMBER void accumulate(Acc& acc, const Coef& c, const float (&v)[3][M], int count) const {
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if (i >= count) continue;
      const float w = v[0][i], centred = v[2][i] - c.mean;
      const float dt = activate_gradient(v[1][i], c.t(centred), norm.act, norm.slope);
      acc.word[0] += dt;
      acc.word[1] += dt * centred;
      acc.word[2] += w;
      acc.word[3] += w * centred;
      acc.word[4] += w * dt;
    }
  }
};

enum DoubleCoef : int { U0, U1, XW, X0, X1, DOUBLE_COEFS };

template <class T_>
struct NormDouble {
  using T = T_;
  static constexpr int INPUTS = 3, OUTPUTS = 2;
  const T* in[3];  // ddx (null: zero), dy, x
  T* out[2];       // d_dy, d_x; null: not wanted
  Norm norm;
  const float* k;  // [DOUBLE_COEFS][G C]
  i64 stride;      // G C
  int channels;

  struct Coef {
    Affine affine;
    float k[DOUBLE_COEFS];
  };
  template <int V>
  FG_MEMBER void coefs(i64 group, int channel, Coef (&c)[V]) const {
    Affine affine[V];
    affines_of(norm, group, channel, affine);
#pragma unroll
    for (int j = 0; j < V; ++j) c[j].affine = affine[j];
#pragma unroll
    for (int i = 0; i < DOUBLE_COEFS; ++i) {
      float row[V];
      load_neighbours(k + i * stride, group * channels + channel, 0.0f, row);
#pragma unroll
      for (int j = 0; j < V; ++j) c[j].k[i] = row[j];
    }
  }
  FG_MEMBER void apply(const Coef& c, const float (&v)[3], float (&d)[2]) const {
    const float w = v[0], centred = v[2] - c.affine.mean, t = c.affine.t(centred);
    const float dt = activate_gradient(v[1], t, norm.act, norm.slope);
    const float u = fmaf(c.affine.scale, w, along(c.k[U1], centred, c.k[U0]));
    d[0] = activate_gradient(u, t, norm.act, norm.slope);
    d[1] = fmaf(c.k[XW], w, fmaf(c.k[U1], dt, along(c.k[X1], centred, c.k[X0])));
  }
};

// rstd in double: what the few combinations of sums cancel is kept.
FG_DEVICE double rstd_of(const Norm& n, i64 statistic) {
  return 1.0 / sqrt(static_cast<double>(load(n.var + statistic)) + n.eps);
}

// Of sums that are weighted already: weight dt, weight dt xc.
FG_DEVICE FirstOrder first_order(const Sums<2>& s, double inv_m, double r) {
  FirstOrder o = FirstOrder::of(s.word, 1.0, r);
  o.finish(inv_m, r);
  return o;
}

// Of sums that are weighted already: weight dt, weight dt xc, w, w xc, weight w dt, v_weight dt, v_weight dt xc.
FG_DEVICE SecondOrder second_order(const Sums<7>& s, double inv_m, double r) {
  SecondOrder o{};
  o.s1 = s.word[0];
  o.s2 = s.word[1] * r;
  o.W1 = s.word[2];
  o.W2 = s.word[3] * r;
  o.A0 = s.word[4];
  o.vdt = s.word[5];
  o.vdtx = s.word[6] * r;
  o.finish(inv_m, r);
  return o;
}

}  // namespace fg::cuda
