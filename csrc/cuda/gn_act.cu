// Group norm + activation. Sums are kept per sample and channel, so a sample should have some pixels: fewer than 16,
// and layer norm's one, go to gn_rows.cu.
#include "cuda/gn_act.cuh"

#include "cuda/gn_rows.hpp"
#include "cuda/norm.hpp"

namespace fg::cuda {
namespace {

template <class Args>
Norm norm_of(const GnShape& s, const Args& a) {
  return {a.weight, a.bias, a.mean, a.var, s.eps, static_cast<int>(s.groups), static_cast<int>(s.C / s.groups),
          s.act,    s.slope};
}

// The rest of the workspace: two sums a group.
GnFinish finish_of(const GnShape& s, const Norm& norm, const Reduction& plan, const Workspace& w, float* memory) {
  const double m = static_cast<double>(s.C / s.groups) * static_cast<double>(s.HW);
  return {memory,  static_cast<int>(s.N), plan.splits, static_cast<int>(s.C),        static_cast<int>(s.groups), norm,
          1.0 / m, memory + w.partials,   s.N * s.C,   memory + w.partials + w.coefs};
}

}  // namespace

int64_t gn_act_forward(const GnShape& s, const NormForwardArgs& a, const Target& target) {
  if (s.HW < FEW_PIXELS) return gn_rows_forward(s, a, target);
  constexpr auto op = "gn_act_forward";
  const Walk walk(op, s.N, s.C, s.HW, s.N, s.channels_last);
  const NormTensors t(s.dtype, a);
  const Norm norm = norm_of(s, a);
  const Reduction plan = plan_norm(walk, t, NormSums::STATISTICS);
  const Workspace w{plan.floats(walk, Moments::WORDS), 0, 0};
  auto* memory = static_cast<float*>(target.workspace);
  if (!memory) return w.bytes();
  reduce_norm(op, walk, t, norm, NormSums::STATISTICS, plan, memory, target.stream);
  FG_LAUNCH(FG_KERNEL(gn_act_statistics_kernel), grid_of(op, s.N * s.groups), THREADS, 0, target.stream,
            finish_of(s, norm, plan, w, memory), pivot_of(walk, t, norm), a.mean, a.var);
  check_launch(op);
  apply_norm_forward(op, walk, t, norm, target.stream);
  return 0;
}

int64_t gn_act_backward(const GnShape& s, const NormBackwardArgs& a, const Target& target) {
  if (s.HW < FEW_PIXELS) return gn_rows_backward(s, a, target);
  constexpr auto op = "gn_act_backward";
  const Walk walk(op, s.N, s.C, s.HW, s.N, s.channels_last);
  const NormTensors t(s.dtype, a);
  const Norm norm = norm_of(s, a);
  const Reduction plan = plan_norm(walk, t, NormSums::BACKWARD);
  const Workspace w{plan.floats(walk, 2), 2 * s.N * s.C, 0};
  auto* memory = static_cast<float*>(target.workspace);
  if (!memory) return w.bytes();
  const GnFinish finish = finish_of(s, norm, plan, w, memory);
  reduce_norm(op, walk, t, norm, NormSums::BACKWARD, plan, memory, target.stream);
  if (a.dweight || a.dbias) {
    FG_LAUNCH(FG_KERNEL(gn_act_parameters_kernel, 2), grid_of(op, divide_up(s.C, FINISH_COLUMNS)), THREADS, 0,
              target.stream, finish, a.dweight, a.dbias);
    check_launch(op);
  }
  if (a.dx) {
    FG_LAUNCH(FG_KERNEL(gn_act_backward_finish_kernel), grid_of(op, s.N * s.groups), THREADS, 0, target.stream, finish);
    check_launch(op);
    apply_norm_backward(op, walk, t, norm, finish.k, target.stream);
  }
  return 0;
}

int64_t gn_act_double_backward(const GnShape& s, const NormDoubleBackwardArgs& a, const Target& target) {
  if (s.HW < FEW_PIXELS) return gn_rows_double_backward(s, a, target);
  constexpr auto op = "gn_act_double_backward";
  const Walk walk(op, s.N, s.C, s.HW, s.N, s.channels_last);
  const NormTensors t(s.dtype, a);
  const Norm norm = norm_of(s, a);
  const Reduction plan = plan_norm(walk, t, NormSums::DOUBLE);
  const Workspace w{plan.floats(walk, 5), DOUBLE_COEFS * s.N * s.C, 2 * s.N * s.groups};
  auto* memory = static_cast<float*>(target.workspace);
  if (!memory) return w.bytes();
  const GnFinish finish = finish_of(s, norm, plan, w, memory);
  reduce_norm(op, walk, t, norm, NormSums::DOUBLE, plan, memory, target.stream);
  FG_LAUNCH(FG_KERNEL(gn_act_double_backward_finish_kernel), grid_of(op, s.N * s.groups), THREADS, 0, target.stream,
            finish, a.ddweight, a.ddbias);
  check_launch(op);
  if (a.d_weight) {
    FG_LAUNCH(FG_KERNEL(gn_act_parameters_kernel, 5), grid_of(op, divide_up(s.C, FINISH_COLUMNS)), THREADS, 0,
              target.stream, finish, a.d_weight, static_cast<float*>(nullptr));
    check_launch(op);
  }
  if (a.d_dy || a.d_x) apply_norm_double(op, walk, t, norm, finish.k, target.stream);
  return 0;
}

}  // namespace fg::cuda
