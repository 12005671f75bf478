// What a program of layers (fastgan/program) needs besides the kernels of its ops: the change of layout at its edges, a
// batch norm folded into the convolution before it, and the running statistics. Memory or the call itself bounds each.
#include <cmath>

#include "common/kernels.hpp"
#include "common/parallel.hpp"
#include "cpu/simd.hpp"

namespace fg::ISA {

namespace {

// One type's values keep their bits.
FG_INLINE void put(float* to, vf v, const float*) { store(to, v); }
FG_INLINE void put(float* to, vf v, const bf16*) { store(to, v); }
FG_INLINE void put(bf16* to, vf v, const float*) { store(to, v); }
FG_INLINE void put(bf16* to, vf v, const bf16*) { *reinterpret_cast<vh_in_memory*>(to) = to_16_bits((vu)v >> 16); }

// VF x VF of x, through the registers.
template <class From, class To>
FG_INLINE void transpose_tile(const From* x, int64_t columns, To* y, int64_t rows) {
  vf v[VF];
#pragma GCC unroll 16
  for (int i = 0; i < VF; ++i) v[i] = load(x + i * columns);
  transpose(v);
#pragma GCC unroll 16
  for (int i = 0; i < VF; ++i) put(y + i * rows, v[i], x);
}

// height x width of x, one of them below VF: the whole of a side, as the three channels of an image.
template <class From, class To>
FG_INLINE void transpose_thin(const From* x, int64_t columns, To* y, int64_t rows, int height, int width) {
#if defined(__AVX512F__)
  vf v[VF];
  for (int i = 0; i < VF; ++i) v[i] = i < height ? load_some(x + i * columns, width) : zero();
  transpose(v);
  for (int i = 0; i < width; ++i) store_some(y + i * rows, v[i], height);
#else
  for (int i = 0; i < width; ++i)
    for (int j = 0; j < height; ++j) y[i * rows + j] = from_float<To>(to_float(x[j * columns + i]));
#endif
}

// Calls f(i, n) for i from begin on in steps of VF: n = VF, and the last one overlaps the one before it, unless all of
// [begin, end) is shorter.
template <class F>
FG_INLINE void each_overlapping(int64_t begin, int64_t end, const F& f) {
  const int n = static_cast<int>(end - begin < VF ? end - begin : VF);
  for (int64_t i = begin; i < end; i += VF) f(i + n > end ? end - n : i, n);
}

// y[n][c][r] = x[n][r][c], by pieces of SPAN or more along the longer side: tiles that follow each other there share
// the cache lines of one side, and a piece stays in the first-level cache until the lines of the other side are whole.
template <class From, class To>
void relay(const RelayoutArgs& a) {
  constexpr int64_t SPAN = 128;
  const bool tall = a.rows > a.columns;
  const int64_t length = tall ? a.rows : a.columns, breadth = tall ? a.columns : a.rows, image = a.rows * a.columns;
  const int64_t pieces = length < SPAN ? 1 : length / SPAN;
#pragma omp parallel for num_threads(team_for(a.N* image, a.threads)) collapse(2)
  for (int64_t n = 0; n < a.N; ++n)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const From* x = static_cast<const From*>(a.x) + n * image;
      To* y = static_cast<To*>(a.y) + n * image;
      const int64_t begin = part_begin(length, piece, pieces), end = part_begin(length, piece + 1, pieces);
      each_overlapping(0, breadth, [&](int64_t across, int wide) {
        each_overlapping(begin, end, [&](int64_t along, int deep) {
          const int64_t r = tall ? along : across, c = tall ? across : along;
          const From* from = x + r * a.columns + c;
          To* to = y + c * a.rows + r;
          if (deep == VF && wide == VF)
            transpose_tile(from, a.columns, to, a.rows);
          else
            transpose_thin(from, a.columns, to, a.rows, tall ? deep : wide, tall ? wide : deep);
        });
      });
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
  a.N == 1 && a.rows == 1 ? copy<From, To>(a) : relay<From, To>(a);
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
