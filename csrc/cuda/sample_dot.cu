#include "cuda/sample_dot.cuh"

#include "cuda/sweep.hpp"

namespace fg::cuda {

int64_t sample_dot(const SampleDotArgs& a, const Target& target) {
  constexpr auto op = "sample_dot";
  const Walk walk(op, 1, a.N, a.E, 1, false);
  return by_dtype(a.dtype, [&](auto zero) -> int64_t {
    using T = decltype(zero);
    const SampleProducts<T> body{{static_cast<const T*>(a.x), static_cast<const T*>(a.y)}};
    const Reduction plan = plan_reduce(walk, body);
    auto* partials = static_cast<float*>(target.workspace);
    if (!partials) return plan.floats(walk, 1) * int64_t{sizeof(float)};
    reduce(op, walk, body, plan, partials, target.stream);
    FG_LAUNCH(FG_KERNEL(sample_dot_finish_kernel), grid_of(op, divide_up(a.N, FINISH_COLUMNS)), THREADS, 0,
              target.stream, partials, plan.splits, static_cast<int>(a.N), a.dot);
    check_launch(op);
    return 0;
  });
}

}  // namespace fg::cuda
