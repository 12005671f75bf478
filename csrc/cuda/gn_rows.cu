// Group norm over rows: sums along them, a small kernel, then the columns with what the parameters' gradients need. The
// rest of the workspace of a derivative has the sums of the columns.
#include "cuda/gn_rows.cuh"

#include "cuda/gn_rows.hpp"
#include "cuda/norm.hpp"

namespace fg::cuda {
namespace {

// The two views of x: a piece of a row (one group of a sample) as a channel, and a column as a channel.
struct Views {
  Walk pieces, columns;

  Views(const char* op, const GnShape& s)
      : pieces(op, 1, s.N * s.groups, s.C / s.groups * s.HW, 1, false), columns(op, s.N, s.C * s.HW, 1, 1, true) {
    pieces.columns = false;  // also where a piece is one element
    if (s.channels_last && s.HW > 1)
      throw std::invalid_argument(std::string(op) + ": fewer than 16 pixels want NCHW, got channels_last");
  }
};

template <class Args>
RowNorm row_norm_of(const GnShape& s, const Args& a) {
  return {a.weight,
          a.bias,
          a.mean,
          a.var,
          s.eps,
          s.act,
          s.slope,
          static_cast<int>(s.groups),
          static_cast<int>(s.C / s.groups),
          static_cast<int>(s.HW)};
}

GnRowFinish finish_of(const GnShape& s, const RowNorm& norm, const Reduction& plan, const float* partials, float* k) {
  const double m = static_cast<double>(s.C / s.groups) * static_cast<double>(s.HW);
  return {partials, plan.splits, static_cast<int>(s.N * s.groups), norm, 1.0 / m, k};
}

unsigned finish_grid(const char* op, int64_t n) { return grid_of(op, divide_up(n, FINISH_COLUMNS)); }

}  // namespace

int64_t gn_rows_forward(const GnShape& s, const NormForwardArgs& a, const Target& target) {
  constexpr auto op = "gn_act_forward";
  const Views views(op, s);
  const NormTensors t(s.dtype, a);
  Norm plain{};
  plain.channels_per_statistic = 1;  // a piece is the channel
  const Reduction plan = plan_norm(views.pieces, t, NormSums::STATISTICS);
  auto* partials = static_cast<float*>(target.workspace);
  if (!partials) return plan.floats(views.pieces, Moments::WORDS) * int64_t{sizeof(float)};
  reduce_norm(op, views.pieces, t, plain, NormSums::STATISTICS, plan, partials, target.stream);
  const RowNorm norm = row_norm_of(s, a);
  FG_LAUNCH(FG_KERNEL(gn_rows_statistics_kernel), finish_grid(op, s.N * s.groups), THREADS, 0, target.stream,
            finish_of(s, norm, plan, partials, nullptr), pivot_of(views.pieces, t, plain), a.mean, a.var);
  check_launch(op);
  by_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    apply(op, views.columns, GnRowForward<T>{{static_cast<const T*>(a.x)}, {static_cast<T*>(a.y)}, norm},
          target.stream);
  });
  return 0;
}

int64_t gn_rows_backward(const GnShape& s, const NormBackwardArgs& a, const Target& target) {
  constexpr auto op = "gn_act_backward";
  const Views views(op, s);
  const RowNorm norm = row_norm_of(s, a);
  const int64_t pieces = s.N * s.groups;
  return by_dtype(s.dtype, [&](auto zero) -> int64_t {
    using T = decltype(zero);
    const T *dy = static_cast<const T*>(a.dy), *x = static_cast<const T*>(a.x);
    const GnRowSums<T> sums{{dy, x}, norm};
    GnRowBackward<T> body{{dy, x}, {static_cast<T*>(a.dx)}, norm, nullptr, pieces};
    const Reduction plan = plan_reduce(views.pieces, sums), columns = plan_reduce(views.columns, body);
    const Workspace w{plan.floats(views.pieces, 2), 2 * pieces, columns.floats(views.columns, 2)};
    auto* memory = static_cast<float*>(target.workspace);
    if (!memory) return w.bytes();
    reduce(op, views.pieces, sums, plan, memory, target.stream);
    FG_LAUNCH(FG_KERNEL(gn_rows_backward_finish_kernel), finish_grid(op, pieces), THREADS, 0, target.stream,
              finish_of(s, norm, plan, memory, memory + w.partials));
    check_launch(op);
    body.k = memory + w.partials;
    if (!a.dweight && !a.dbias) {
      apply(op, views.columns, body, target.stream);
      return 0;
    }
    float* partials = memory + w.partials + w.coefs;
    reduce(op, views.columns, body, columns, partials, target.stream);
    FG_LAUNCH(FG_KERNEL(gn_rows_parameters_kernel, 2), finish_grid(op, s.C), THREADS, 0, target.stream, partials,
              columns.splits, static_cast<int>(s.C), static_cast<int>(s.HW), a.dweight, a.dbias);
    check_launch(op);
    return 0;
  });
}

int64_t gn_rows_double_backward(const GnShape& s, const NormDoubleBackwardArgs& a, const Target& target) {
  constexpr auto op = "gn_act_double_backward";
  const Views views(op, s);
  const RowNorm norm = row_norm_of(s, a);
  const int64_t pieces = s.N * s.groups;
  return by_dtype(s.dtype, [&](auto zero) -> int64_t {
    using T = decltype(zero);
    const T *ddx = static_cast<const T*>(a.ddx), *dy = static_cast<const T*>(a.dy), *x = static_cast<const T*>(a.x);
    const GnRowDoubleSums<T> sums{{ddx, dy, x}, norm, a.ddweight};
    GnRowDouble<T> body{
        {ddx, dy, x}, {static_cast<T*>(a.d_dy), static_cast<T*>(a.d_x)}, norm, a.ddweight, a.ddbias, nullptr, pieces};
    const Reduction plan = plan_reduce(views.pieces, sums), columns = plan_reduce(views.columns, body);
    const Workspace w{plan.floats(views.pieces, 7), ROW_COEFS * pieces, columns.floats(views.columns, 1)};
    auto* memory = static_cast<float*>(target.workspace);
    if (!memory) return w.bytes();
    reduce(op, views.pieces, sums, plan, memory, target.stream);
    FG_LAUNCH(FG_KERNEL(gn_rows_double_backward_finish_kernel), finish_grid(op, pieces), THREADS, 0, target.stream,
              finish_of(s, norm, plan, memory, memory + w.partials));
    check_launch(op);
    body.k = memory + w.partials;
    if (!a.d_weight) {
      apply(op, views.columns, body, target.stream);
      return 0;
    }
    float* partials = memory + w.partials + w.coefs;
    reduce(op, views.columns, body, columns, partials, target.stream);
    FG_LAUNCH(FG_KERNEL(gn_rows_parameters_kernel, 1), finish_grid(op, s.C), THREADS, 0, target.stream, partials,
              columns.splits, static_cast<int>(s.C), static_cast<int>(s.HW), a.d_weight, static_cast<float*>(nullptr));
    check_launch(op);
    return 0;
  });
}

}  // namespace fg::cuda
