#include "cuda/grad_norm_penalty.cuh"

#include "cuda/sweep.hpp"

namespace fg::cuda {

int64_t grad_norm_penalty_forward(const GradNormPenaltyShape& s, const GradNormPenaltyForwardArgs& a,
                                  const Target& target) {
  constexpr auto op = "grad_norm_penalty_forward";
  const Walk walk(op, 1, s.N, s.E, 1, false);
  return by_dtype(s.dtype, [&](auto zero) -> int64_t {
    using T = decltype(zero);
    const GradSquares<T> body{{static_cast<const T*>(a.gradient)}};
    const Reduction plan = plan_reduce(walk, body);
    auto* partials = static_cast<float*>(target.workspace);
    if (!partials) return plan.floats(walk, 1) * int64_t{sizeof(float)};
    reduce(op, walk, body, plan, partials, target.stream);
    FG_LAUNCH(FG_KERNEL(grad_norm_penalty_finish_kernel), grid_of(op, divide_up(s.N, FINISH_COLUMNS)), THREADS, 0,
              target.stream, partials, plan.splits, static_cast<int>(s.N), s.target, a.penalty, a.norm);
    check_launch(op);
    return 0;
  });
}

int64_t grad_norm_penalty_backward(const GradNormPenaltyShape& s, const GradNormPenaltyBackwardArgs& a,
                                   const Target& target) {
  constexpr auto op = "grad_norm_penalty_backward";
  by_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    apply(op, Walk(op, 1, s.N, s.E, 1, false),
          GradNormBackward<T>{
              {static_cast<const T*>(a.gradient)}, {static_cast<T*>(a.dgradient)}, a.dpenalty, a.norm, s.target},
          target.stream);
  });
  return 0;
}

}  // namespace fg::cuda
