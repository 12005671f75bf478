#include "cuda/interpolate.cuh"

#include "cuda/sweep.hpp"

namespace fg::cuda {

int64_t interpolate(const InterpolateArgs& a, const Target& target) {
  constexpr auto op = "interpolate";
  by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    apply(op, Walk(op, 1, a.N, a.M, 1, false),
          Interpolate<T>{
              {static_cast<const T*>(a.real), static_cast<const T*>(a.fake)}, {static_cast<T*>(a.y)}, a.epsilon},
          target.stream);
  });
  return 0;
}

}  // namespace fg::cuda
