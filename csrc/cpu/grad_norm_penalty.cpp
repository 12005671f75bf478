// norm[n] = |g[n]|, penalty[n] = (norm[n] - target)^2, and dg[n] = dpenalty[n] 2 (1 - target / norm[n]) g[n].
// Forward 1 access an element, backward 2: bound by memory.
#include "common/kernels.hpp"
#include "cpu/samples.hpp"

#include <cmath>

namespace fg::ISA {
namespace {

template <class T>
void forward(const GradNormPenaltyShape& s, const GradNormPenaltyForwardArgs& a) {
  const T* g = static_cast<const T*>(a.gradient);
  sum_samples(
      s.N, s.E, s.threads,
      [&](int64_t i, int lanes, vf so_far) {
        const vf v = load_some(g + i, lanes);
        return fma(v, v, so_far);
      },
      [&](int64_t n, double squares) {
        const double norm = std::sqrt(squares), beyond = norm - s.target;
        a.norm[n] = static_cast<float>(norm);
        a.penalty[n] = static_cast<float>(beyond * beyond);
      });
}

template <class T>
void backward(const GradNormPenaltyShape& s, const GradNormPenaltyBackwardArgs& a) {
  const T* g = static_cast<const T*>(a.gradient);
  T* dg = static_cast<T*>(a.dgradient);
#pragma omp parallel num_threads(team_for(s.N* s.E, s.threads))
  each_block(s.N, s.E, thread_index(), team_size(), [&](int64_t n, int64_t begin, int64_t end, int64_t) {
    const float norm = a.norm[n];
    const float slope = s.target == 0.0f ? 2.0f : norm > 0.0f ? 2.0f - 2.0f * s.target / norm : 0.0f;
    const vf scale = set1(a.dpenalty[n] * slope);
    each(n * s.E + begin, n * s.E + end,
         [&](int64_t i, int lanes) { store_some(dg + i, scale * load_some(g + i, lanes), lanes); });
  });
}

}  // namespace

void grad_norm_penalty_forward(const GradNormPenaltyShape& shape, const GradNormPenaltyForwardArgs& args) {
  shape.dtype == BF16 ? forward<bf16>(shape, args) : forward<float>(shape, args);
}

void grad_norm_penalty_backward(const GradNormPenaltyShape& shape, const GradNormPenaltyBackwardArgs& args) {
  shape.dtype == BF16 ? backward<bf16>(shape, args) : backward<float>(shape, args);
}

}  // namespace fg::ISA
