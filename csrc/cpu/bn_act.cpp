// Batch norm + identity, relu or leaky_relu: forward, backward and double backward, each one reduction pass (absent in
// eval mode where nothing needs it) and one elementwise pass.
//
// Per channel and group, n elements, r = (var + eps)^(-1/2), x̂ = (x - mean) r, t = weight x̂ + bias, y = φ(t), m =
// φ'(t). Every pass computes t by the same expression, so the mask m needs no storage. x - mean is taken before any
// scaling: folding mean into the bias would cancel for data with a large mean.
#include <cmath>

#include "common/kernels.hpp"
#include "common/scratch.hpp"
#include "cpu/sweep.hpp"

namespace fg::ISA {
namespace {

// φ and φ'·g. Identity runs as leaky_relu with slope 1. RELU differs from slope 0 in that relu(-inf) = 0 and that its
// derivative stops a NaN or inf of the gradient where t <= 0, as torch's does.
template <bool RELU>
FG_INLINE vf activate(vf t, float slope) {
  if constexpr (RELU) return select(le(t, zero()), zero(), t);
  return select(gt(t, zero()), t, t * set1(slope));
}

template <bool RELU>
FG_INLINE vf activate_gradient(vf g, vf t, float slope) {
  if constexpr (RELU) return select(le(t, zero()), zero(), g);
  return select(gt(t, zero()), g, g * set1(slope));
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
void guess_mean(const Grid& grid, const Share& share, int64_t group, const T* x, float* guess) {
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
void statistics(const Grid& grid, const Share& share, int64_t group, const T* x, float* guess, float* sums,
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

// Merges the partials of channel c in fixed order and writes the biased variance.
void finish_statistics(const Grid& grid, int64_t group, int64_t c, const Partials<3>& partials, float* mean,
                       float* var) {
  double count = 0.0, m = 0.0, m2 = 0.0;
  for (int slot = 0; slot < partials.slots; ++slot) {
    const double* p = partials.at(group, slot);
    for (int64_t j = c; j < grid.width; j += grid.C) {
      const double n = p[COUNT * grid.padded + j];
      if (n > 0.0) merge(count, m, m2, n, p[MEAN * grid.padded + j], p[M2 * grid.padded + j]);
    }
  }
  mean[group * grid.C + c] = static_cast<float>(m);
  var[group * grid.C + c] = static_cast<float>(m2 / count);
}

// ------------------------------------------------------------------------------------------------ shared

// What a channel of a group contributes to every formula. The variance is used as stored, so that the forward and the
// backward pass see the same r.
struct Channel {
  double mean, r, weight, bias;
  double inv_n;  // 0 in eval mode: mean and var are constants
};

Channel channel_of(const Grid& grid, const BnShape& shape, int64_t group, int64_t c, const float* weight,
                   const float* bias, const float* mean, const float* var) {
  const int64_t at = group * grid.C + c;
  Channel ch;
  ch.mean = mean[at];
  ch.r = 1.0 / std::sqrt(static_cast<double>(var[at]) + static_cast<double>(shape.eps));
  ch.weight = weight ? weight[c] : 1.0;
  ch.bias = bias ? bias[c] : 0.0;
  ch.inv_n = shape.training ? 1.0 / static_cast<double>(grid.samples * grid.HW) : 0.0;
  return ch;
}

// Coefficients 0..2 of every body: t = (x - mean) * scale + bias.
constexpr int K_MEAN = 0, K_SCALE = 1, K_BIAS = 2;

void put_affine(const Grid& grid, float* coef, int64_t c, const Channel& ch) {
  put(grid, coef, K_MEAN, c, static_cast<float>(ch.mean));
  put(grid, coef, K_SCALE, c, static_cast<float>(ch.weight * ch.r));
  put(grid, coef, K_BIAS, c, static_cast<float>(ch.bias));
}

void clear_padding(const Grid& grid, float* coef, int coefs) {
  for (int i = 0; i < coefs; ++i)
    for (int64_t j = grid.width; j < grid.padded; ++j) coef[i * grid.padded + j] = 0.0f;
}

float slope_of(const BnShape& shape) { return shape.act == ACT_IDENTITY ? 1.0f : shape.slope; }

// ------------------------------------------------------------------------------------------------ forward

template <class T, bool RELU>
struct ForwardBody {
  static constexpr int COEFS = 3, SUMS = 0;
  const T* x;
  T* y;
  float slope;
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf*) const {
    const vf t = fma(lane.load(x) - k[K_MEAN], k[K_SCALE], k[K_BIAS]);
    lane.store(y, activate<RELU>(t, slope));
  }
};

template <class T, bool RELU>
void forward(const BnShape& shape, const BnActForwardArgs& args) {
  const Grid grid(shape.N, shape.C, shape.HW, shape.G, shape.channels_last);
  if (grid.empty()) return;
  using Body = ForwardBody<T, RELU>;
  const Body body{static_cast<const T*>(args.x), static_cast<T*>(args.y), slope_of(shape)};
  const int threads = team_for(grid.elements(), shape.threads);
  const size_t row = grid.padded;
  Scratch scratch(Scratch::bytes_for<float>(grid.G * Body::COEFS * row) + Scratch::bytes_for<float>(threads * 3 * row) +
                  Scratch::bytes_for<double>(Partials<3>::count(grid, threads)));
  float* coefs = scratch.cut<float>(grid.G * Body::COEFS * row);
  float* own = scratch.cut<float>(threads * 3 * row);
  double* sums = scratch.cut<double>(Partials<3>::count(grid, threads));

#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size();
    const Share share(grid, thread, team);
    const Partials<3> partials{sums, grid.padded, share.slots};
    float* guess = own + thread * 3 * row;
    if (shape.training) {
      for (int64_t g = 0; g < grid.G; ++g) statistics(grid, share, g, body.x, guess, guess + row, partials);
#pragma omp barrier
    }
    for (int64_t g = 0; g < grid.G; ++g) {
      float* coef = coefs + g * Body::COEFS * row;
      if (thread == 0) clear_padding(grid, coef, Body::COEFS);
      for (int64_t c = part_begin(grid.C, thread, team); c < part_begin(grid.C, thread + 1, team); ++c) {
        if (shape.training) finish_statistics(grid, g, c, partials, args.mean, args.var);
        put_affine(grid, coef, c, channel_of(grid, shape, g, c, args.weight, args.bias, args.mean, args.var));
      }
    }
#pragma omp barrier
    for (int64_t g = grid.G - 1; g >= 0; --g)
      sweep_elementwise(grid, share, g, body, coefs + g * Body::COEFS * row, shape.training);
  }
}

// ------------------------------------------------------------------------------------------------ backward

// s1 = Σ dt and Σ dt (x - mean); the second becomes s2 = Σ dt x̂ when multiplied by r.
template <class T, bool RELU>
struct BackwardSumsBody {
  static constexpr int COEFS = 3, SUMS = 2;
  const T *dy, *x;
  float slope;
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf* s) const {
    const vf centred = lane.load(x) - k[K_MEAN];
    const vf dt = activate_gradient<RELU>(lane.load(dy), fma(centred, k[K_SCALE], k[K_BIAS]), slope);
    s[0] = s[0] + dt;
    s[1] = fma(dt, centred, s[1]);
  }
};

// dx = (weight r) (dt - s1/n - x̂ s2/n)
template <class T, bool RELU>
struct BackwardBody {
  static constexpr int COEFS = 5, SUMS = 0;
  static constexpr int K_S1 = 3, K_S2 = 4;  // s1/n and r s2/n
  const T *dy, *x;
  T* dx;
  float slope;
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf*) const {
    const vf centred = lane.load(x) - k[K_MEAN];
    const vf dt = activate_gradient<RELU>(lane.load(dy), fma(centred, k[K_SCALE], k[K_BIAS]), slope);
    lane.store(dx, k[K_SCALE] * (dt - fma(centred, k[K_S2], k[K_S1])));
  }
};

// Coefficients of channel c in all groups, and the parameters' gradients, which add up over the groups.
template <class Body>
void finish_backward(const Grid& grid, const BnShape& shape, const BnActBackwardArgs& args, int64_t c, bool summed,
                     const Partials<2>& partials, float* coefs) {
  double dweight = 0.0, dbias = 0.0;
  for (int64_t g = 0; g < grid.G; ++g) {
    const Channel ch = channel_of(grid, shape, g, c, args.weight, args.bias, args.mean, args.var);
    double s[2] = {0.0, 0.0};
    if (summed) partials.total(grid, g, c, s);
    s[1] *= ch.r;
    dbias += s[0];
    dweight += s[1];
    float* coef = coefs + g * Body::COEFS * grid.padded;
    put(grid, coef, Body::K_S1, c, static_cast<float>(s[0] * ch.inv_n));
    put(grid, coef, Body::K_S2, c, static_cast<float>(s[1] * ch.r * ch.inv_n));
  }
  if (args.dweight) args.dweight[c] = static_cast<float>(dweight);
  if (args.dbias) args.dbias[c] = static_cast<float>(dbias);
}

template <class T, bool RELU>
void backward(const BnShape& shape, const BnActBackwardArgs& args) {
  const Grid grid(shape.N, shape.C, shape.HW, shape.G, shape.channels_last);
  if (grid.empty()) {
    for (int64_t c = 0; c < shape.C; ++c) {
      if (args.dweight) args.dweight[c] = 0.0f;
      if (args.dbias) args.dbias[c] = 0.0f;
    }
    return;
  }
  using Sums = BackwardSumsBody<T, RELU>;
  using Body = BackwardBody<T, RELU>;
  const T *dy = static_cast<const T*>(args.dy), *x = static_cast<const T*>(args.x);
  const Sums sums_body{dy, x, slope_of(shape)};
  const Body body{dy, x, static_cast<T*>(args.dx), slope_of(shape)};
  const bool summed = shape.training || args.dweight || args.dbias;
  const int threads = team_for(grid.elements(), shape.threads);
  const size_t row = grid.padded;
  Scratch scratch(Scratch::bytes_for<float>(grid.G * Body::COEFS * row) +
                  Scratch::bytes_for<float>(threads * Sums::SUMS * row) +
                  Scratch::bytes_for<double>(Partials<2>::count(grid, threads)));
  float* coefs = scratch.cut<float>(grid.G * Body::COEFS * row);
  float* own = scratch.cut<float>(threads * Sums::SUMS * row);
  double* sums = scratch.cut<double>(Partials<2>::count(grid, threads));

#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size();
    const int64_t c0 = part_begin(grid.C, thread, team), c1 = part_begin(grid.C, thread + 1, team);
    const Share share(grid, thread, team);
    const Partials<2> partials{sums, grid.padded, share.slots};
    for (int64_t g = 0; g < grid.G; ++g) {
      float* coef = coefs + g * Body::COEFS * row;
      if (thread == 0) clear_padding(grid, coef, Body::COEFS);
      for (int64_t c = c0; c < c1; ++c)
        put_affine(grid, coef, c, channel_of(grid, shape, g, c, args.weight, args.bias, args.mean, args.var));
    }
#pragma omp barrier
    if (summed)
      for (int64_t g = 0; g < grid.G; ++g)
        sweep_sums(grid, share, g, sums_body, coefs + g * Body::COEFS * row, own + thread * Sums::SUMS * row, partials);
#pragma omp barrier
    for (int64_t c = c0; c < c1; ++c) finish_backward<Body>(grid, shape, args, c, summed, partials, coefs);
#pragma omp barrier
    if (body.dx)
      for (int64_t g = grid.G - 1; g >= 0; --g)
        sweep_elementwise(grid, share, g, body, coefs + g * Body::COEFS * row, summed);
  }
}

// ------------------------------------------------------------------------------------------------ double backward

// The cotangent w of dx, or zero where there is none.
template <class T, class Lane>
FG_INLINE vf cotangent(Lane lane, const T* ddx) {
  return ddx ? lane.load(ddx) : zero();
}

// s1, s2, W1 = Σ w, W2 = Σ w x̂, A0 = Σ w dt; sums 1 and 3 still lack their factor r.
template <class T, bool RELU>
struct DoubleSumsBody {
  static constexpr int COEFS = 3, SUMS = 5;
  const T *ddx, *dy, *x;
  float slope;
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf* s) const {
    const vf centred = lane.load(x) - k[K_MEAN];
    const vf dt = activate_gradient<RELU>(lane.load(dy), fma(centred, k[K_SCALE], k[K_BIAS]), slope);
    const vf w = cotangent(lane, ddx);
    s[0] = s[0] + dt;
    s[1] = fma(dt, centred, s[1]);
    s[2] = s[2] + w;
    s[3] = fma(w, centred, s[3]);
    s[4] = fma(w, dt, s[4]);
  }
};

// d_dy = m (scale w + u1 (x - mean) + u0),  d_x = xw w + xt dt + x1 (x - mean) + x0
template <class T, bool RELU>
struct DoubleBody {
  static constexpr int COEFS = 9, SUMS = 0;
  static constexpr int K_U0 = 3, K_U1 = 4, K_XW = 5, K_XT = 6, K_X0 = 7, K_X1 = 8;
  const T *ddx, *dy, *x;
  T *d_dy, *d_x;
  float slope;
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf*) const {
    const vf centred = lane.load(x) - k[K_MEAN];
    const vf t = fma(centred, k[K_SCALE], k[K_BIAS]);
    const vf w = cotangent(lane, ddx);
    if (d_dy) {
      const vf u = fma(k[K_SCALE], w, fma(k[K_U1], centred, k[K_U0]));
      lane.store(d_dy, activate_gradient<RELU>(u, t, slope));
    }
    if (d_x) {
      const vf dt = activate_gradient<RELU>(lane.load(dy), t, slope);
      lane.store(d_x, fma(k[K_XW], w, fma(k[K_XT], dt, fma(k[K_X1], centred, k[K_X0]))));
    }
  }
};

// MATHS of the second order, per channel and group (inv = 1/n, or 0 in eval mode):
//   u      = γ r (w - W1/n - x̂ W2/n) + v_γ x̂ + v_β,  d_dy = u m
//   d_γ    = r A,  A = A0 - W1 s1/n - W2 s2/n
//   q      = -(γ r / n)(w s2 + W2 dt) + v_γ dt, with Σq and Σ q x̂ in closed form
//   d_x    = r (q - Σq/n - x̂ Σ(q x̂)/n) - γ A r² x̂ / n
template <class Body>
void finish_double_backward(const Grid& grid, const BnShape& shape, const BnActDoubleBackwardArgs& args, int64_t c,
                            const Partials<5>& partials, float* coefs) {
  const double v_weight = args.ddweight ? args.ddweight[c] : 0.0, v_bias = args.ddbias ? args.ddbias[c] : 0.0;
  double d_weight = 0.0;
  for (int64_t g = 0; g < grid.G; ++g) {
    const Channel ch = channel_of(grid, shape, g, c, args.weight, args.bias, args.mean, args.var);
    const double r = ch.r, inv = ch.inv_n, scale = ch.weight * ch.r;
    double s[5];
    partials.total(grid, g, c, s);
    const double s1 = s[0], s2 = s[1] * r, W1 = s[2], W2 = s[3] * r;
    const double A = s[4] - (W1 * s1 + W2 * s2) * inv;
    const double sum_q = -scale * inv * (W1 * s2 + W2 * s1) + v_weight * s1;
    const double sum_qx = -2.0 * scale * inv * W2 * s2 + v_weight * s2;
    d_weight += r * A;
    float* coef = coefs + g * Body::COEFS * grid.padded;
    const auto set = [&](int i, double value) { put(grid, coef, i, c, static_cast<float>(value)); };
    set(Body::K_U0, v_bias - scale * W1 * inv);
    set(Body::K_U1, r * (v_weight - scale * W2 * inv));
    set(Body::K_XW, -scale * r * s2 * inv);
    set(Body::K_XT, r * (v_weight - scale * W2 * inv));
    set(Body::K_X0, -r * sum_q * inv);
    set(Body::K_X1, -r * (r * sum_qx + scale * A * r) * inv);
  }
  if (args.d_weight) args.d_weight[c] = static_cast<float>(d_weight);
}

template <class T, bool RELU>
void double_backward(const BnShape& shape, const BnActDoubleBackwardArgs& args) {
  const Grid grid(shape.N, shape.C, shape.HW, shape.G, shape.channels_last);
  if (grid.empty()) {
    if (args.d_weight)
      for (int64_t c = 0; c < shape.C; ++c) args.d_weight[c] = 0.0f;
    return;
  }
  using Sums = DoubleSumsBody<T, RELU>;
  using Body = DoubleBody<T, RELU>;
  const T *ddx = static_cast<const T*>(args.ddx), *dy = static_cast<const T*>(args.dy);
  const T* x = static_cast<const T*>(args.x);
  const Sums sums_body{ddx, dy, x, slope_of(shape)};
  const Body body{ddx, dy, x, static_cast<T*>(args.d_dy), static_cast<T*>(args.d_x), slope_of(shape)};
  const int threads = team_for(grid.elements(), shape.threads);
  const size_t row = grid.padded;
  Scratch scratch(Scratch::bytes_for<float>(grid.G * Body::COEFS * row) +
                  Scratch::bytes_for<float>(threads * Sums::SUMS * row) +
                  Scratch::bytes_for<double>(Partials<5>::count(grid, threads)));
  float* coefs = scratch.cut<float>(grid.G * Body::COEFS * row);
  float* own = scratch.cut<float>(threads * Sums::SUMS * row);
  double* sums = scratch.cut<double>(Partials<5>::count(grid, threads));

#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size();
    const int64_t c0 = part_begin(grid.C, thread, team), c1 = part_begin(grid.C, thread + 1, team);
    const Share share(grid, thread, team);
    const Partials<5> partials{sums, grid.padded, share.slots};
    for (int64_t g = 0; g < grid.G; ++g) {
      float* coef = coefs + g * Body::COEFS * row;
      if (thread == 0) clear_padding(grid, coef, Body::COEFS);
      for (int64_t c = c0; c < c1; ++c)
        put_affine(grid, coef, c, channel_of(grid, shape, g, c, args.weight, args.bias, args.mean, args.var));
    }
#pragma omp barrier
    for (int64_t g = 0; g < grid.G; ++g)
      sweep_sums(grid, share, g, sums_body, coefs + g * Body::COEFS * row, own + thread * Sums::SUMS * row, partials);
#pragma omp barrier
    for (int64_t c = c0; c < c1; ++c) finish_double_backward<Body>(grid, shape, args, c, partials, coefs);
#pragma omp barrier
    for (int64_t g = grid.G - 1; g >= 0; --g)
      sweep_elementwise(grid, share, g, body, coefs + g * Body::COEFS * row, true);
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------------ by dtype and act

#define FG_BY_TYPE(kernel)                                                                      \
  if (shape.dtype == BF16)                                                                      \
    shape.act == ACT_RELU ? kernel<bf16, true>(shape, args) : kernel<bf16, false>(shape, args); \
  else                                                                                          \
    shape.act == ACT_RELU ? kernel<float, true>(shape, args) : kernel<float, false>(shape, args)

void bn_act_forward(const BnShape& shape, const BnActForwardArgs& args) { FG_BY_TYPE(forward); }
void bn_act_backward(const BnShape& shape, const BnActBackwardArgs& args) { FG_BY_TYPE(backward); }
void bn_act_double_backward(const BnShape& shape, const BnActDoubleBackwardArgs& args) { FG_BY_TYPE(double_backward); }

}  // namespace fg::ISA
