#include "cuda/interpolate.cuh"

#include "cuda/sweep.hpp"

namespace fg::cuda {

int64_t interpolate_forward(const InterpolateArgs& a, const Target& target) {
  constexpr auto op = "interpolate_forward";
  const Walk walk(op, 1, a.N, a.E, 1, false);
  by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto *real = static_cast<const T*>(a.real), *fake = static_cast<const T*>(a.fake);
    auto* y = static_cast<T*>(a.y);
    if (fake)
      apply(op, walk, Interpolate<T, 2>{{real, fake}, {y}, a.epsilon, a.rest}, target.stream);
    else
      apply(op, walk, Interpolate<T, 1>{{real}, {y}, a.epsilon, nullptr}, target.stream);
  });
  return 0;
}

}  // namespace fg::cuda
