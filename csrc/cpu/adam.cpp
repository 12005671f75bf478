// Adam over many tensors in one parallel region, the moving average in the same pass: 9 accesses an element, bound by
// memory.
#include <cmath>

#include "common/kernels.hpp"
#include "common/parallel.hpp"
#include "cpu/simd.hpp"

namespace fg::ISA {
namespace {

// from + weight (to - from), as torch.lerp computes it: from the nearer end, exact at both.
struct Lerp {
  bool near_to;
  vf slope;

  explicit Lerp(double weight)
      : near_to(weight >= 0.5), slope(set1(static_cast<float>(near_to ? weight - 1.0 : weight))) {}
  vf operator()(vf from, vf to) const { return fma(slope, to - from, near_to ? to : from); }
};

struct Coefficients {
  Lerp first, average;
  vf step, root_correction, eps, beta2, rest2, l2, shrink, sign;

  Coefficients(const AdamArgs& a, const AdamTensor& t) : first(1.0 - a.beta1), average(a.weight) {
    const float lr = a.lr_at ? *a.lr_at : a.lr;
    const double n = *t.step;
    step = set1(static_cast<float>(-lr / -std::expm1(n * a.ln_beta1)));
    root_correction = set1(static_cast<float>(1.0 / std::sqrt(-std::expm1(n * a.ln_beta2))));
    eps = set1(a.eps);
    beta2 = set1(static_cast<float>(a.beta2));
    rest2 = set1(static_cast<float>(1.0 - a.beta2));
    l2 = set1(a.decoupled ? 0.0f : a.weight_decay);
    shrink = set1(a.decoupled ? 1.0f - lr * a.weight_decay : 1.0f);
    sign = set1(a.maximize ? -1.0f : 1.0f);
  }
};

void update(const AdamTensor& t, const Coefficients& k, int64_t begin, int64_t end) {
  each(begin, end, [&](int64_t i, int lanes) {
    const vf p = load_some(t.parameter + i, lanes);
    const vf g = fma(k.l2, p, k.sign * load_some(t.gradient + i, lanes));
    const vf m = k.first(load_some(t.exp_avg + i, lanes), g);
    const vf v = fma(k.rest2 * g, g, k.beta2 * load_some(t.exp_avg_sq + i, lanes));
    const vf updated = fma(k.step, m / fma(sqrt(v), k.root_correction, k.eps), k.shrink * p);
    store_some(t.exp_avg + i, m, lanes);
    store_some(t.exp_avg_sq + i, v, lanes);
    store_some(t.parameter + i, updated, lanes);
    if (t.average) store_some(t.average + i, k.average(load_some(t.average + i, lanes), updated), lanes);
  });
}

}  // namespace

void adam(const AdamArgs& a) {
  constexpr int64_t BLOCK = 16384;  // five streams of 64 KB: a tensor's coefficients cost nothing beside them
  int64_t elements = 0, blocks = 0;
  for (int64_t i = 0; i < a.tensors.count; ++i) {
    elements += a.tensors.first[i].count;
    blocks += (a.tensors.first[i].count + BLOCK - 1) / BLOCK;
  }
#pragma omp parallel num_threads(team_for(elements, a.threads))
  {
    int64_t block = 0;
    const int64_t first = part_begin(blocks, thread_index(), team_size());
    const int64_t last = part_begin(blocks, thread_index() + 1, team_size());
    for (int64_t i = 0; i < a.tensors.count; ++i) {
      const AdamTensor& t = a.tensors.first[i];
      const int64_t own = (t.count + BLOCK - 1) / BLOCK;
      const int64_t begin = first > block ? first - block : 0, end = last < block + own ? last - block : own;
      if (begin < end) {
        update(t, Coefficients(a, t), begin * BLOCK, end * BLOCK < t.count ? end * BLOCK : t.count);
      }
      block += own;
    }
  }
}

}  // namespace fg::ISA
