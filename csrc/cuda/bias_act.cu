#include "cuda/bias_act.cuh"

#include <limits>

#include "cuda/kernels.hpp"
#include "cuda/sweep.hpp"

namespace fg::cuda {

static Phi phi_of(const BiasActShape& s) {
  return {s.act, s.slope, s.gain, s.clamp < 0.0f ? std::numeric_limits<float>::quiet_NaN() : s.clamp};
}

int64_t bias_act_forward(const BiasActShape& s, const BiasActForwardArgs& a, const Target& target) {
  constexpr auto op = "bias_act_forward";
  const Walk walk(op, s.N, s.C, s.HW, 1, s.channels_last);
  if (walk.elements() == 0) return 0;
  by_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    apply(op, walk, BiasActForward<T>{{static_cast<const T*>(a.x)}, {static_cast<T*>(a.y)}, a.bias, phi_of(s)},
          target.stream);
  });
  return 0;
}

// One pass: the reduction that sums dbias writes dx on the way.
int64_t bias_act_backward(const BiasActShape& s, const BiasActBackwardArgs& a, const Target& target) {
  constexpr auto op = "bias_act_backward";
  const Walk walk(op, s.N, s.C, s.HW, 1, s.channels_last);
  return by_dtype(s.dtype, [&](auto zero) -> int64_t {
    using T = decltype(zero);
    const BiasActBackward<T> body{
        {static_cast<const T*>(a.dy), static_cast<const T*>(a.y)}, {static_cast<T*>(a.dx)}, phi_of(s)};
    if (!a.dbias) {
      apply(op, walk, body, target.stream);
      return 0;
    }
    const Reduction plan = plan_reduce(walk, body);
    auto* partials = static_cast<float*>(target.workspace);
    if (!partials) return plan.floats(walk, 1) * int64_t{sizeof(float)};
    reduce(op, walk, body, plan, partials, target.stream);
    FG_LAUNCH(FG_KERNEL(bias_act_dbias_kernel), grid_of(op, divide_up(s.C, FINISH_COLUMNS)), THREADS, 0, target.stream,
              partials, plan.splits, static_cast<int>(s.C), a.dbias);
    check_launch(op);
    return 0;
  });
}

}  // namespace fg::cuda
