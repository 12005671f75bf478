// Batch norm + identity, relu or leaky_relu: forward, backward and double backward, each one reduction pass (absent in
// eval mode where nothing needs it) and one elementwise pass.
//
// Per channel and group, n elements, r = (var + eps)^(-1/2), x̂ = (x - mean) r, t = weight x̂ + bias, y = φ(t), m =
// φ'(t).
#include "common/kernels.hpp"
#include "common/scratch.hpp"
#include "common/second_order.hpp"
#include "cpu/norm.hpp"

namespace fg::ISA {
namespace {

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

void put_affine(const Grid& grid, float* coef, int64_t c, const Channel& ch) {
  put(grid, coef, K_MEAN, c, static_cast<float>(ch.mean));
  put(grid, coef, K_SCALE, c, static_cast<float>(ch.weight * ch.r));
  put(grid, coef, K_BIAS, c, static_cast<float>(ch.bias));
}

// ------------------------------------------------------------------------------------------------ forward

template <class T, Act ACT>
void forward(const BnShape& shape, const NormForwardArgs& args) {
  const Grid grid(shape.N, shape.C, shape.HW, shape.G, shape.channels_last);
  if (grid.empty()) return;
  using Body = NormForwardBody<T, ACT>;
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
        if (shape.training)
          pool_statistics(grid, g, c, c + 1, partials, args.mean + g * grid.C + c, args.var + g * grid.C + c);
        put_affine(grid, coef, c, channel_of(grid, shape, g, c, args.weight, args.bias, args.mean, args.var));
      }
    }
#pragma omp barrier
    for (int64_t g = grid.G - 1; g >= 0; --g)
      sweep_elementwise(grid, share, g, body, coefs + g * Body::COEFS * row, shape.training);
  }
}

// ------------------------------------------------------------------------------------------------ backward

// Coefficients of channel c in all groups, and the parameters' gradients, which add up over the groups.
template <class Body>
void finish_backward(const Grid& grid, const BnShape& shape, const NormBackwardArgs& args, int64_t c, bool summed,
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
    // dx = weight r (dt - s1/n - x̂ s2/n)
    const double scale = ch.weight * ch.r;
    put(grid, coef, Body::K_X0, c, static_cast<float>(-scale * s[0] * ch.inv_n));
    put(grid, coef, Body::K_X1, c, static_cast<float>(-scale * ch.r * s[1] * ch.inv_n));
  }
  if (args.dweight) args.dweight[c] = static_cast<float>(dweight);
  if (args.dbias) args.dbias[c] = static_cast<float>(dbias);
}

template <class T, Act ACT>
void backward(const BnShape& shape, const NormBackwardArgs& args) {
  const Grid grid(shape.N, shape.C, shape.HW, shape.G, shape.channels_last);
  if (grid.empty()) {
    for (int64_t c = 0; c < shape.C; ++c) {
      if (args.dweight) args.dweight[c] = 0.0f;
      if (args.dbias) args.dbias[c] = 0.0f;
    }
    return;
  }
  using Sums = NormBackwardSumsBody<T, ACT>;
  using Body = NormBackwardBody<T, ACT>;
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

template <class Body>
void finish_double_backward(const Grid& grid, const BnShape& shape, const NormDoubleBackwardArgs& args, int64_t c,
                            const Partials<5>& partials, float* coefs) {
  const double v_weight = args.ddweight ? args.ddweight[c] : 0.0, v_bias = args.ddbias ? args.ddbias[c] : 0.0;
  double d_weight = 0.0;
  for (int64_t g = 0; g < grid.G; ++g) {
    const Channel ch = channel_of(grid, shape, g, c, args.weight, args.bias, args.mean, args.var);
    double s[5];
    partials.total(grid, g, c, s);
    SecondOrder o{};
    o.add(s, ch.weight, v_weight, ch.r);
    o.finish(ch.inv_n, ch.r);
    d_weight += o.d_weight(s, ch.r);
    float* coef = coefs + g * Body::COEFS * grid.padded;
    const auto set = [&](int i, double value) { put(grid, coef, i, c, static_cast<float>(value)); };
    set(Body::K_U0, o.u0(ch.weight, v_bias, ch.r));
    set(Body::K_U1, o.u1(ch.weight, v_weight, ch.r));
    set(Body::K_XW, o.xw);
    set(Body::K_X0, o.x0);
    set(Body::K_X1, o.x1);
  }
  if (args.d_weight) args.d_weight[c] = static_cast<float>(d_weight);
}

template <class T, Act ACT>
void double_backward(const BnShape& shape, const NormDoubleBackwardArgs& args) {
  const Grid grid(shape.N, shape.C, shape.HW, shape.G, shape.channels_last);
  if (grid.empty()) {
    if (args.d_weight)
      for (int64_t c = 0; c < shape.C; ++c) args.d_weight[c] = 0.0f;
    return;
  }
  using Sums = NormDoubleSumsBody<T, ACT>;
  using Body = NormDoubleBody<T, ACT>;
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

void bn_act_forward(const BnShape& shape, const NormForwardArgs& args) {
  by_kernel(shape, [&]<class T, Act ACT>() { forward<T, ACT>(shape, args); });
}
void bn_act_backward(const BnShape& shape, const NormBackwardArgs& args) {
  by_kernel(shape, [&]<class T, Act ACT>() { backward<T, ACT>(shape, args); });
}
void bn_act_double_backward(const BnShape& shape, const NormDoubleBackwardArgs& args) {
  by_kernel(shape, [&]<class T, Act ACT>() { double_backward<T, ACT>(shape, args); });
}

}  // namespace fg::ISA
