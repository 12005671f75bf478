// What a program of layers (fastgan/program) needs besides the kernels of its ops: the change of layout at its edges, a
// batch norm folded into the convolution before it, and the running statistics. Each is bound by memory or by a call.
#include <cmath>

#include "common/kernels.hpp"
#include "common/parallel.hpp"
#include "cpu/simd.hpp"

namespace fg::ISA {

namespace {

// y[n][c][r] = x[n][r][c], in tiles of 16 x 16, so that both sides fill the cache lines that they touch.
template <class From, class To>
void transpose(const RelayoutArgs& a) {
  constexpr int64_t TILE = 16;
  const From* x = static_cast<const From*>(a.x);
  To* y = static_cast<To*>(a.y);
#pragma omp parallel for num_threads(team_for(a.N* a.rows* a.columns, a.threads)) collapse(2)
  for (int64_t n = 0; n < a.N; ++n)
    for (int64_t r0 = 0; r0 < a.rows; r0 += TILE) {
      const From* from = x + n * a.rows * a.columns;
      To* to = y + n * a.rows * a.columns;
      const int64_t r1 = r0 + TILE < a.rows ? r0 + TILE : a.rows;
      for (int64_t c0 = 0; c0 < a.columns; c0 += TILE) {
        const int64_t c1 = c0 + TILE < a.columns ? c0 + TILE : a.columns;
        for (int64_t c = c0; c < c1; ++c)
          for (int64_t r = r0; r < r1; ++r) to[c * a.rows + r] = from_float<To>(to_float(from[r * a.columns + c]));
      }
    }
}

// One row: the order stays, the type may change.
template <class From, class To>
void copy(const RelayoutArgs& a) {
  const From* x = static_cast<const From*>(a.x);
  To* y = static_cast<To*>(a.y);
#pragma omp parallel num_threads(team_for(a.columns, a.threads))
  {
    const int64_t end = part_begin(a.columns, thread_index() + 1, team_size());
    for (int64_t i = part_begin(a.columns, thread_index(), team_size()); i < end; i += VF) {
      const int lanes = end - i < VF ? static_cast<int>(end - i) : VF;
      store_some(y + i, load_some(x + i, lanes), lanes);
    }
  }
}

template <class From, class To>
void convert(const RelayoutArgs& a) {
  a.N == 1 && a.rows == 1 ? copy<From, To>(a) : transpose<From, To>(a);
}

}  // namespace

void relayout(const RelayoutArgs& a) {
  if (a.x_dtype == F32)
    a.y_dtype == F32 ? convert<float, float>(a) : convert<float, bf16>(a);
  else
    a.y_dtype == F32 ? convert<bf16, float>(a) : convert<bf16, bf16>(a);
}

// Rounded as fastgan.functional's torch expression is: beta has a loop of its own, so that no multiplication and
// addition become one instruction.
void bn_fold(const BnFoldArgs& a) {
  const auto scale_of = [&](int64_t k) {
    const float rstd = 1.0f / std::sqrt(a.var[k] + a.eps);
    return a.gamma ? a.gamma[k] * rstd : rstd;
  };
  for (int64_t k = 0; k < a.K; ++k) a.shift[k] = ((a.bias ? a.bias[k] : 0.0f) - a.mean[k]) * scale_of(k);
  if (a.beta)
    for (int64_t k = 0; k < a.K; ++k) a.shift[k] += a.beta[k];
#pragma omp parallel for num_threads(team_for(a.outer* a.K* a.inner, a.threads)) collapse(2)
  for (int64_t o = 0; o < a.outer; ++o)
    for (int64_t k = 0; k < a.K; ++k) {
      const float scale = scale_of(k);
      const int64_t at = (o * a.K + k) * a.inner;
      for (int64_t i = 0; i < a.inner; ++i) a.folded[at + i] = a.weight[at + i] * scale;
    }
}

// running <- running + momentum (batch - running), group after group, as plain PyTorch sees the batches; the running
// variance takes the unbiased one of `count` values.
void bn_update(const BnUpdateArgs& a) {
  const float unbiased = static_cast<float>(static_cast<double>(a.count) / static_cast<double>(a.count - 1));
  for (int64_t g = 0; g < a.G; ++g)
    for (int64_t c = 0; c < a.C; ++c) {
      const float mean = a.mean[g * a.C + c], var = a.var[g * a.C + c] * unbiased;
      a.running_mean[c] += a.momentum * (mean - a.running_mean[c]);
      a.running_var[c] += a.momentum * (var - a.running_var[c]);
    }
  if (a.batches) *a.batches += a.G;
}

}  // namespace fg::ISA
