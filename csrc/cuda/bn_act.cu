// Batch norm + activation: in one pass where the tensor fits the device's shared memory (resident.hpp), else in two
// with a small kernel between them that turns sums into coefficients.
#include "cuda/bn_act.cuh"

#include "cuda/norm.hpp"
#include "cuda/resident.hpp"

namespace fg::cuda {
namespace {

template <class Args>
Norm norm_of(const BnShape& s, const Args& a) {
  return {a.weight, a.bias, a.mean, a.var, s.eps, static_cast<int>(s.C), 1, s.act, s.slope};
}

// 1 / elements of a channel and group. In eval mode mean and var are constants, and every 1/n of the derivatives is 0.
double inverse_n(const BnShape& s) {
  return s.training ? 1.0 / (static_cast<double>(s.N / s.G) * static_cast<double>(s.HW)) : 0.0;
}

BnFinish finish_of(const BnShape& s, const Norm& norm, const Reduction& plan, const Workspace& w, float* memory) {
  return {memory, static_cast<int>(s.G), plan.splits,         static_cast<int>(s.C),
          norm,   inverse_n(s),          memory + w.partials, s.G * s.C};
}

std::optional<int64_t> forward_in_one(const char* op, const Walk& walk, const NormTensors& t, const Norm& norm,
                                      const NormForwardArgs& a, const Target& target) {
  return by_dtype(t.dtype, [&](auto zero) {
    using T = decltype(zero);
    return run_resident(op, walk, BnResidentForward<T>{t.forward<T>(norm), pivot_of(walk, t, norm), a.mean, a.var},
                        target);
  });
}

std::optional<int64_t> backward_in_one(const char* op, const Walk& walk, const NormTensors& t, const Norm& norm,
                                       double inv_n, const NormBackwardArgs& a, const Target& target) {
  return by_dtype(t.dtype, [&](auto zero) {
    using T = decltype(zero);
    const NormBackward<T> map = t.backward<T>(norm, nullptr, walk.planes);
    return run_resident(op, walk, BnResidentBackward<T>{map, inv_n, a.dweight, a.dbias}, target);
  });
}

std::optional<int64_t> double_backward_in_one(const char* op, const Walk& walk, const NormTensors& t, const Norm& norm,
                                              double inv_n, const NormDoubleBackwardArgs& a, const Target& target) {
  return by_dtype(t.dtype, [&](auto zero) {
    using T = decltype(zero);
    const NormDouble<T> map = t.double_backward<T>(norm, nullptr, walk.planes);
    return run_resident(op, walk, BnResidentDouble<T>{map, inv_n, {a.ddweight, a.ddbias}, a.d_weight}, target);
  });
}

}  // namespace

int64_t bn_act_forward(const BnShape& s, const NormForwardArgs& a, const Target& target) {
  constexpr auto op = "bn_act_forward";
  const Walk walk(op, s.N, s.C, s.HW, s.G, s.channels_last);
  const NormTensors t(s.dtype, a);
  const Norm norm = norm_of(s, a);
  if (s.training) {
    if (const auto done = forward_in_one(op, walk, t, norm, a, target)) return *done;
    const Reduction plan = plan_norm(walk, t, NormSums::STATISTICS);
    auto* partials = static_cast<float*>(target.workspace);
    if (!partials) return plan.floats(walk, Moments::WORDS) * int64_t{sizeof(float)};
    reduce_norm(op, walk, t, norm, NormSums::STATISTICS, plan, partials, target.stream);
    FG_LAUNCH(FG_KERNEL(bn_act_statistics_kernel), grid_of(op, s.G * divide_up(s.C, FINISH_COLUMNS)), THREADS, 0,
              target.stream, partials, plan.splits, static_cast<int>(s.C), pivot_of(walk, t, norm), a.mean, a.var);
    check_launch(op);
  }
  apply_norm_forward(op, walk, t, norm, target.stream);
  return 0;
}

int64_t bn_act_backward(const BnShape& s, const NormBackwardArgs& a, const Target& target) {
  constexpr auto op = "bn_act_backward";
  const Walk walk(op, s.N, s.C, s.HW, s.G, s.channels_last);
  const NormTensors t(s.dtype, a);
  const Norm norm = norm_of(s, a);
  if (a.dx)
    if (const auto done = backward_in_one(op, walk, t, norm, inverse_n(s), a, target)) return *done;
  const Reduction plan = plan_norm(walk, t, NormSums::BACKWARD);
  const Workspace w{plan.floats(walk, 2), 2 * s.G * s.C, 0};
  auto* memory = static_cast<float*>(target.workspace);
  if (!memory) return w.bytes();
  const BnFinish finish = finish_of(s, norm, plan, w, memory);
  reduce_norm(op, walk, t, norm, NormSums::BACKWARD, plan, memory, target.stream);
  FG_LAUNCH(FG_KERNEL(bn_act_backward_finish_kernel), grid_of(op, divide_up(s.C, FINISH_COLUMNS)), THREADS, 0,
            target.stream, finish, a.dweight, a.dbias);
  check_launch(op);
  if (a.dx) apply_norm_backward(op, walk, t, norm, finish.k, target.stream);
  return 0;
}

int64_t bn_act_double_backward(const BnShape& s, const NormDoubleBackwardArgs& a, const Target& target) {
  constexpr auto op = "bn_act_double_backward";
  const Walk walk(op, s.N, s.C, s.HW, s.G, s.channels_last);
  const NormTensors t(s.dtype, a);
  const Norm norm = norm_of(s, a);
  if (a.d_dy || a.d_x)
    if (const auto done = double_backward_in_one(op, walk, t, norm, inverse_n(s), a, target)) return *done;
  const Reduction plan = plan_norm(walk, t, NormSums::DOUBLE);
  const Workspace w{plan.floats(walk, 5), DOUBLE_COEFS * s.G * s.C, 0};
  auto* memory = static_cast<float*>(target.workspace);
  if (!memory) return w.bytes();
  const BnFinish finish = finish_of(s, norm, plan, w, memory);
  reduce_norm(op, walk, t, norm, NormSums::DOUBLE, plan, memory, target.stream);
  FG_LAUNCH(FG_KERNEL(bn_act_double_backward_finish_kernel), grid_of(op, divide_up(s.C, FINISH_COLUMNS)), THREADS, 0,
            target.stream, finish, BnCotangents{a.ddweight, a.ddbias}, a.d_weight);
  check_launch(op);
  if (a.d_dy || a.d_x) apply_norm_double(op, walk, t, norm, finish.k, target.stream);
  return 0;
}

}  // namespace fg::cuda
