// What batch norm and group norm share: activations, statistics, and what each pass does to a vector.
//
// x̂ = (x - mean) r, t = weight x̂ + bias, y = φ(t), m = φ'(t). Every pass computes t by the same expression, so the mask
// m needs no storage. x - mean is taken before any scaling: folding mean into the bias would cancel for data with a
// large mean. Coefficients are per channel of a statistics group; the two norms differ in what these are.
#pragma once

#include <cmath>

#include "common/norm_derivatives.hpp"
#include "common/scratch.hpp"
#include "cpu/activation.hpp"
#include "cpu/sweep.hpp"

namespace fg::ISA {

// Calls f<T, ACT>() for the shape's dtype and activation. Identity runs as leaky_relu with slope 1.
template <class Shape, class F>
static void by_kernel(const Shape& shape, const F& f) {
  const auto by_act = [&]<class T>() {
    if (shape.act == ACT_RELU)
      f.template operator()<T, ACT_RELU>();
    else
      f.template operator()<T, ACT_LEAKY_RELU>();
  };
  if (shape.dtype == BF16)
    by_act.template operator()<bf16>();
  else
    by_act.template operator()<float>();
}

template <class Shape>
static float slope_of(const Shape& shape) {
  return shape.act == ACT_IDENTITY ? 1.0f : shape.slope;
}

// ------------------------------------------------------------------------------------------------ statistics

// Sums of x - K and (x - K)² with K the mean so far: no cancellation, whatever the mean of the data.
template <class T>
struct StatisticsBody {
  static constexpr int COEFS = 1, SUMS = 2;
  const T* x;
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf* s) const {
    const vf d = lane.load(x) - k[0];
    s[0] = s[0] + d;
    s[1] = fma(d, d, s[1]);
  }
};

// Running count, mean and M2 of one column, merged by Chan's formula. The mean is the weighted one, not mean + d nB/n:
// in float64 both are exact enough, and this one keeps an infinite mean infinite.
FG_INLINE void merge(double& count, double& mean, double& m2, double count_b, double mean_b, double m2_b) {
  const double total = count + count_b;
  const double d = mean_b - mean;
  m2 += m2_b + d * d * (count * count_b / total);
  mean = (count * mean + count_b * mean_b) / total;
  count = total;
}

constexpr int COUNT = 0, MEAN = 1, M2 = 2;

// First guess of the mean per column, for the first block of a share: the mean of its first elements. If these are
// outliers, the guess is off by d and the block's sum of squares exceeds its M2 by at most 8 times (128 rows to 16; 64
// times for planes), which is what the cancellation can cost.
template <class T>
static void guess_mean(const Grid& grid, const Share& share, int64_t group, const T* x, float* guess) {
  const auto finite = [](float v) { return std::isfinite(v) ? v : 0.0f; };
  const T* base = x + group * grid.group_elements;
  if (grid.columns) {
    const int64_t rest = grid.group_elements % grid.width;
    for (int64_t j = 0; j < grid.padded; ++j) guess[j] = 0.0f;
    if (share.row0 < share.row1) {
      const int64_t rows = share.row1 - share.row0 < 16 ? share.row1 - share.row0 : 16;
      for (int64_t r = share.row0; r < share.row0 + rows; ++r)
        for (int64_t j = 0; j < grid.width; ++j) guess[j] += to_float(base[r * grid.width + j]);
      for (int64_t j = 0; j < grid.width; ++j) guess[j] = finite(guess[j] / static_cast<float>(rows));
    } else if (share.remainder) {
      for (int64_t j = 0; j < rest; ++j) guess[j] = finite(to_float(base[grid.group_elements - rest + j]));
    }
    return;
  }
  const int64_t length = share.h1 - share.h0 < 64 ? share.h1 - share.h0 : 64;
  if (length <= 0 || share.n0 >= share.n1) return;
  for (int64_t c = share.c0; c < share.c1; ++c) {
    const T* p = base + (share.n0 * grid.C + c) * grid.HW + share.h0;
    float total = 0.0f;
    for (int64_t h = 0; h < length; ++h) total += to_float(p[h]);
    guess[c] = finite(total / static_cast<float>(length));
  }
}

template <class T>
static void statistics(const Grid& grid, const Share& share, int64_t group, const T* x, float* guess, float* sums,
                       const Partials<3>& partials) {
  partials.clear(grid, share, group);
  guess_mean(grid, share, group, x, guess);
  double* into = partials.at(group, share.slot);
  double *counts = into + COUNT * grid.padded, *means = into + MEAN * grid.padded, *m2s = into + M2 * grid.padded;
  sweep(grid, share, group, StatisticsBody<T>{x}, guess, sums, false,
        [&](const float* s, int64_t stride, int64_t column, int64_t columns, int64_t count) {
          const double n = static_cast<double>(count);
          for (int64_t j = 0; j < columns; ++j) {
            const double first = s[j], second = s[stride + j], mean = first / n;
            const double m2 = second - first * mean;
            const int64_t at = column + j;
            merge(counts[at], means[at], m2s[at], n, guess[at] + mean, m2 < 0.0 ? 0.0 : m2);
            const float next = static_cast<float>(means[at]);
            guess[at] = std::isfinite(next) ? next : 0.0f;
          }
        });
}

// Pools the partials of channels [c0, c1) of a group, in fixed order: mean and biased variance. The mean is the
// weighted one, which keeps an infinite mean infinite.
static inline void pool_statistics(const Grid& grid, int64_t group, int64_t c0, int64_t c1, const Partials<3>& partials,
                                   float* mean, float* var) {
  const auto each = [&](const auto& visit) {
    for (int slot = 0; slot < partials.slots; ++slot) {
      const double* p = partials.at(group, slot);
      for (int64_t rep = 0; rep < grid.width; rep += grid.C)
        for (int64_t j = rep + c0; j < rep + c1; ++j)
          if (p[COUNT * grid.padded + j] > 0.0)
            visit(p[COUNT * grid.padded + j], p[MEAN * grid.padded + j], p[M2 * grid.padded + j]);
    }
  };
  double count = 0.0, total = 0.0, m2 = 0.0;
  each([&](double n, double m, double) {
    count += n;
    total += n * m;
  });
  const double pooled = total / count;
  each([&](double n, double m, double within) { m2 += within + n * (m - pooled) * (m - pooled); });
  *mean = static_cast<float>(pooled);
  *var = static_cast<float>(m2 / count);
}

// ------------------------------------------------------------------------------------------------ passes

// Coefficients 0..2 of every body: t = (x - mean) * scale + bias.
constexpr int K_MEAN = 0, K_SCALE = 1, K_BIAS = 2;

// The element `by` of a tensor that may be absent.
template <class T>
static const T* moved(const void* p, int64_t by) {
  return p ? static_cast<const T*>(p) + by : nullptr;
}
template <class T>
static T* moved(void* p, int64_t by) {
  return p ? static_cast<T*>(p) + by : nullptr;
}

template <class T, Act ACT>
struct NormForwardBody {
  static constexpr int COEFS = 3, SUMS = 0;
  const T* x;
  T* y;
  float slope;
  NormForwardBody(const NormForwardArgs& a, float slope_, int64_t by = 0)
      : x(moved<T>(a.x, by)), y(moved<T>(a.y, by)), slope(slope_) {}
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf*) const {
    const vf t = fma(lane.load(x) - k[K_MEAN], k[K_SCALE], k[K_BIAS]);
    lane.store(y, activate<ACT>(t, slope));
  }
};

// s1 = Σ dt and Σ dt (x - mean); the second becomes s2 = Σ dt x̂ when multiplied by r.
template <class T, Act ACT>
struct NormBackwardSumsBody {
  static constexpr int COEFS = 3, SUMS = 2;
  const T *dy, *x;
  float slope;
  NormBackwardSumsBody(const NormBackwardArgs& a, float slope_, int64_t by = 0)
      : dy(moved<T>(a.dy, by)), x(moved<T>(a.x, by)), slope(slope_) {}
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf* s) const {
    const vf centred = lane.load(x) - k[K_MEAN];
    const vf dt = activate_gradient<ACT>(lane.load(dy), fma(centred, k[K_SCALE], k[K_BIAS]), slope);
    s[0] = s[0] + dt;
    s[1] = fma(dt, centred, s[1]);
  }
};

// k v + k0; k0 where k is 0 for mean and var are constants: times that, a NaN in x would stay one.
FG_INLINE vf along(vf k, vf v, vf k0, bool constant) {
  const vf y = fma(k, v, k0);
  return constant ? select(k == zero(), k0, y) : y;
}

// dx = scale dt + x1 (x - mean) + x0
template <class T, Act ACT>
struct NormBackwardBody {
  static constexpr int COEFS = 5, SUMS = 0;
  static constexpr int K_X0 = 3, K_X1 = 4;
  const T *dy, *x;
  T* dx;
  float slope;
  bool constant = false;  // mean and var do not depend on x
  NormBackwardBody(const NormBackwardArgs& a, float slope_, int64_t by = 0)
      : dy(moved<T>(a.dy, by)), x(moved<T>(a.x, by)), dx(moved<T>(a.dx, by)), slope(slope_) {}
  bool wanted() const { return dx; }
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf*) const {
    const vf centred = lane.load(x) - k[K_MEAN];
    const vf dt = activate_gradient<ACT>(lane.load(dy), fma(centred, k[K_SCALE], k[K_BIAS]), slope);
    lane.store(dx, fma(k[K_SCALE], dt, along(k[K_X1], centred, k[K_X0], constant)));
  }
};

// The cotangent w of dx, or zero where there is none.
template <class T, class Lane>
FG_INLINE vf cotangent(Lane lane, const T* ddx) {
  return ddx ? lane.load(ddx) : zero();
}

// s1, s2, W1 = Σ w, W2 = Σ w x̂, A0 = Σ w dt; sums 1 and 3 still lack their factor r.
template <class T, Act ACT>
struct NormDoubleSumsBody {
  static constexpr int COEFS = 3, SUMS = 5;
  const T *ddx, *dy, *x;
  float slope;
  NormDoubleSumsBody(const NormDoubleBackwardArgs& a, float slope_, int64_t by = 0)
      : ddx(moved<T>(a.ddx, by)), dy(moved<T>(a.dy, by)), x(moved<T>(a.x, by)), slope(slope_) {}
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf* s) const {
    const vf centred = lane.load(x) - k[K_MEAN];
    const vf dt = activate_gradient<ACT>(lane.load(dy), fma(centred, k[K_SCALE], k[K_BIAS]), slope);
    const vf w = cotangent(lane, ddx);
    s[0] = s[0] + dt;
    s[1] = fma(dt, centred, s[1]);
    s[2] = s[2] + w;
    s[3] = fma(w, centred, s[3]);
    s[4] = fma(w, dt, s[4]);
  }
};

// d_dy = m (scale w + u1 (x - mean) + u0),  d_x = xw w + u1 dt + x1 (x - mean) + x0
template <class T, Act ACT>
struct NormDoubleBody {
  static constexpr int COEFS = 8, SUMS = 0;
  static constexpr int K_U0 = 3, K_U1 = 4, K_XW = 5, K_X0 = 6, K_X1 = 7;
  const T *ddx, *dy, *x;
  T *d_dy, *d_x;
  float slope;
  bool constant = false;  // as NormBackwardBody's
  NormDoubleBody(const NormDoubleBackwardArgs& a, float slope_, int64_t by = 0)
      : ddx(moved<T>(a.ddx, by)),
        dy(moved<T>(a.dy, by)),
        x(moved<T>(a.x, by)),
        d_dy(moved<T>(a.d_dy, by)),
        d_x(moved<T>(a.d_x, by)),
        slope(slope_) {}
  bool wanted() const { return d_dy || d_x; }
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf*) const {
    const vf centred = lane.load(x) - k[K_MEAN];
    const vf t = fma(centred, k[K_SCALE], k[K_BIAS]);
    const vf w = cotangent(lane, ddx);
    if (d_dy) {
      const vf u = fma(k[K_SCALE], w, along(k[K_U1], centred, k[K_U0], constant));
      lane.store(d_dy, activate_gradient<ACT>(u, t, slope));
    }
    if (d_x) {
      const vf dt = activate_gradient<ACT>(lane.load(dy), t, slope);
      lane.store(d_x, fma(k[K_XW], w, fma(k[K_U1], dt, along(k[K_X1], centred, k[K_X0], constant))));
    }
  }
};

// ------------------------------------------------------------------------------------------------ coefficients

// The variance is used as stored, so that every pass sees the same r.
struct Statistic {
  double mean, r;
  Statistic(const float* means, const float* vars, int64_t at, float eps)
      : mean(means[at]), r(1.0 / std::sqrt(static_cast<double>(vars[at]) + static_cast<double>(eps))) {}
};

static inline double value_of(const float* p, int64_t c, double otherwise) { return p ? p[c] : otherwise; }

static inline void fill_zero(float* p, int64_t n) {
  if (p)
    for (int64_t i = 0; i < n; ++i) p[i] = 0.0f;
}

static inline void clear_padding(const Grid& grid, float* coef, int coefs) {
  for (int i = 0; i < coefs; ++i)
    for (int64_t j = grid.width; j < grid.padded; ++j) coef[i * grid.padded + j] = 0.0f;
}

static inline void put_affine(const Grid& grid, float* coef, int64_t c, const Statistic& s, double weight,
                              double bias) {
  put(grid, coef, K_MEAN, c, static_cast<float>(s.mean));
  put(grid, coef, K_SCALE, c, static_cast<float>(weight * s.r));
  put(grid, coef, K_BIAS, c, static_cast<float>(bias));
}

template <class Body>
static void put_first_order(const Grid& grid, float* coef, int64_t c, const FirstOrder& o) {
  put(grid, coef, Body::K_X0, c, static_cast<float>(o.x0));
  put(grid, coef, Body::K_X1, c, static_cast<float>(o.x1));
}

template <class Body>
static void put_second_order(const Grid& grid, float* coef, int64_t c, const SecondOrder& o, double u0, double u1) {
  put_first_order<Body>(grid, coef, c, o);
  put(grid, coef, Body::K_XW, c, static_cast<float>(o.xw));
  put(grid, coef, Body::K_U0, c, static_cast<float>(u0));
  put(grid, coef, Body::K_U1, c, static_cast<float>(u1));
}

}  // namespace fg::ISA
