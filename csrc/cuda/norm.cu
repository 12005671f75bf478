#include "cuda/norm.hpp"

namespace fg::cuda {
namespace {

// Calls f(body) with the reduction's Body.
template <class F>
auto with_sums(const Walk& walk, const NormTensors& t, const Norm& norm, NormSums sums, const F& f) {
  return by_dtype(t.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *x = static_cast<const T*>(t.x), *dy = static_cast<const T*>(t.dy), *ddx = static_cast<const T*>(t.ddx);
    if (sums == NormSums::STATISTICS) return f(NormStatistics<T>{{x}, pivot_of(walk, t, norm)});
    if (sums == NormSums::BACKWARD) return f(NormBackwardSums<T>{{dy, x}, norm});
    return f(NormDoubleSums<T>{{ddx, dy, x}, norm});
  });
}

}  // namespace

Pivot pivot_of(const Walk& walk, const NormTensors& t, const Norm& norm) {
  return {t.x, t.dtype, walk.rows() * walk.planes.channels, walk.columns ? 1 : walk.planes.pixels,
          norm.channels_per_statistic};
}

Reduction plan_norm(const Walk& walk, const NormTensors& t, NormSums sums) {
  return with_sums(walk, t, Norm{}, sums, [&](const auto& body) { return plan_reduce(walk, body); });
}

void reduce_norm(const char* op, const Walk& walk, const NormTensors& t, const Norm& norm, NormSums sums,
                 const Reduction& plan, float* partials, void* stream) {
  with_sums(walk, t, norm, sums, [&](const auto& body) { reduce(op, walk, body, plan, partials, stream); });
}

void apply_norm_forward(const char* op, const Walk& walk, const NormTensors& t, const Norm& norm, void* stream) {
  by_dtype(t.dtype, [&](auto zero) { apply(op, walk, t.forward<decltype(zero)>(norm), stream); });
}

void apply_norm_backward(const char* op, const Walk& walk, const NormTensors& t, const Norm& norm, const float* k,
                         void* stream) {
  by_dtype(t.dtype, [&](auto zero) { apply(op, walk, t.backward<decltype(zero)>(norm, k, walk.planes), stream); });
}

void apply_norm_double(const char* op, const Walk& walk, const NormTensors& t, const Norm& norm, const float* k,
                       void* stream) {
  by_dtype(t.dtype,
           [&](auto zero) { apply(op, walk, t.double_backward<decltype(zero)>(norm, k, walk.planes), stream); });
}

}  // namespace fg::cuda
