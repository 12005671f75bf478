// Batch norm + identity, relu or leaky_relu: forward, backward and double backward, each one reduction pass (absent in
// eval mode where nothing needs it) and one elementwise pass.
//
// Per channel and group, n elements, r = (var + eps)^(-1/2), x̂ = (x - mean) r, t = weight x̂ + bias, y = φ(t), m =
// φ'(t).
#include "cpu/norm.hpp"

namespace fg::ISA {
namespace {

Grid grid_of(const BnShape& s) { return Grid(s.N, s.C, s.HW, s.G, s.channels_last); }

// 1 / elements of a channel and group, or 0 in eval mode: mean and var are constants.
double inverse_n(const BnShape& shape, const Grid& grid) {
  return shape.training ? 1.0 / static_cast<double>(grid.samples * grid.HW) : 0.0;
}

template <class Args>
Statistic statistic_of(const BnShape& shape, const Args& args, int64_t group, int64_t c) {
  return Statistic(args.mean, args.var, group * shape.C + c, shape.eps);
}

template <class Args>
void put_affine(const Grid& grid, float* coef, const BnShape& shape, const Args& args, int64_t group, int64_t c) {
  put_affine(grid, coef, c, statistic_of(shape, args, group, c), value_of(args.weight, c, 1.0),
             value_of(args.bias, c, 0.0));
}

// ------------------------------------------------------------------------------------------------ forward

template <class T, Act ACT>
void forward(const BnShape& shape, const NormForwardArgs& args) {
  const Grid grid = grid_of(shape);
  if (grid.empty()) return;
  using Body = NormForwardBody<T, ACT>;
  const Body body(args, slope_of(shape));
  const int threads = team_for(grid.elements(), shape.threads);
  const int64_t row = grid.padded;
  float *coefs, *own;
  double* sums;
  const ScratchArrays memory(Array(coefs, grid.G * Body::COEFS * row), Array(own, threads * 3 * row),
                             Array(sums, Partials<3>::count(grid, threads)));

#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size();
    const Share share(grid, thread, team);
    const Partials<3> partials{sums, row, share.slots};
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
        put_affine(grid, coef, shape, args, g, c);
      }
    }
#pragma omp barrier
    for (int64_t g = grid.G - 1; g >= 0; --g)
      sweep_elementwise(grid, share, g, body, coefs + g * Body::COEFS * row, shape.training);
  }
}

// ------------------------------------------------------------------------------------------------ derivatives

// Both derivatives: sums of every channel, finish(c, partials, coefs) for each channel, and the elements.
template <class Sums, class Body, class Args, class Finish>
void two_passes(const Grid& grid, const BnShape& shape, const Args& args, bool summed, const Finish& finish) {
  const Sums sums_body(args, slope_of(shape));
  Body body(args, slope_of(shape));
  body.constant = !shape.training;
  const int threads = team_for(grid.elements(), shape.threads);
  const int64_t row = grid.padded;
  float *coefs, *own;
  double* sums;
  const ScratchArrays memory(Array(coefs, grid.G * Body::COEFS * row), Array(own, threads * Sums::SUMS * row),
                             Array(sums, Partials<Sums::SUMS>::count(grid, threads)));

#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size();
    const int64_t c0 = part_begin(grid.C, thread, team), c1 = part_begin(grid.C, thread + 1, team);
    const Share share(grid, thread, team);
    const Partials<Sums::SUMS> partials{sums, row, share.slots};
    for (int64_t g = 0; g < grid.G; ++g) {
      float* coef = coefs + g * Body::COEFS * row;
      if (thread == 0) clear_padding(grid, coef, Body::COEFS);
      for (int64_t c = c0; c < c1; ++c) put_affine(grid, coef, shape, args, g, c);
    }
#pragma omp barrier
    if (summed)
      for (int64_t g = 0; g < grid.G; ++g)
        sweep_sums(grid, share, g, sums_body, coefs + g * Body::COEFS * row, own + thread * Sums::SUMS * row, partials);
#pragma omp barrier
    for (int64_t c = c0; c < c1; ++c) finish(c, partials, coefs);
#pragma omp barrier
    if (body.wanted())
      for (int64_t g = grid.G - 1; g >= 0; --g)
        sweep_elementwise(grid, share, g, body, coefs + g * Body::COEFS * row, summed);
  }
}

template <class T, Act ACT>
void backward(const BnShape& shape, const NormBackwardArgs& args) {
  using Body = NormBackwardBody<T, ACT>;
  const Grid grid = grid_of(shape);
  if (grid.empty()) {
    fill_zero(args.dweight, shape.C);
    fill_zero(args.dbias, shape.C);
    return;
  }
  const double inv_n = inverse_n(shape, grid);
  const bool summed = shape.training || args.dweight || args.dbias;
  // The parameters' gradients add up over the groups.
  const auto finish = [&](int64_t c, const Partials<2>& partials, float* coefs) {
    double dweight = 0.0, dbias = 0.0;
    for (int64_t g = 0; g < grid.G; ++g) {
      const double r = statistic_of(shape, args, g, c).r;
      double s[2] = {0.0, 0.0};
      if (summed) partials.total(grid, g, c, s);
      dbias += s[0];
      dweight += s[1] * r;
      FirstOrder o = FirstOrder::of(s, value_of(args.weight, c, 1.0), r);
      o.finish(inv_n, r);
      put_first_order<Body>(grid, coefs + g * Body::COEFS * grid.padded, c, o);
    }
    if (args.dweight) args.dweight[c] = static_cast<float>(dweight);
    if (args.dbias) args.dbias[c] = static_cast<float>(dbias);
  };
  two_passes<NormBackwardSumsBody<T, ACT>, Body>(grid, shape, args, summed, finish);
}

template <class T, Act ACT>
void double_backward(const BnShape& shape, const NormDoubleBackwardArgs& args) {
  using Body = NormDoubleBody<T, ACT>;
  const Grid grid = grid_of(shape);
  if (grid.empty()) return fill_zero(args.d_weight, shape.C);
  const double inv_n = inverse_n(shape, grid);
  const auto finish = [&](int64_t c, const Partials<5>& partials, float* coefs) {
    const double weight = value_of(args.weight, c, 1.0);
    const double v_weight = value_of(args.ddweight, c, 0.0), v_bias = value_of(args.ddbias, c, 0.0);
    double d_weight = 0.0;
    for (int64_t g = 0; g < grid.G; ++g) {
      const double r = statistic_of(shape, args, g, c).r;
      double s[5];
      partials.total(grid, g, c, s);
      SecondOrder o{};
      o.add(s, weight, v_weight, r);
      o.finish(inv_n, r);
      d_weight += o.d_weight(s, inv_n, r);
      put_second_order<Body>(grid, coefs + g * Body::COEFS * grid.padded, c, o, o.u0(weight, v_bias, r),
                             o.u1(weight, v_weight, r));
    }
    if (args.d_weight) args.d_weight[c] = static_cast<float>(d_weight);
  };
  two_passes<NormDoubleSumsBody<T, ACT>, Body>(grid, shape, args, true, finish);
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
