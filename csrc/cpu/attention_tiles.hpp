// Attention's building blocks: heads by their strides, packing, products on the convolutions' micro-kernel, and jobs.
//
// All products are one: out[i][j] (+)= sum over units u of left[i, u] right[u][j], the left side by two steps (rows of
// scores, or their columns, with no transposition), the right side rows of a head, or its transpose in panels. A unit
// is 4 bytes: a float or, for bf16 tensors where the table has vdpbf16ps, a pair of bf16 (PAIRS). Pairs are of
// neighbours along what is summed: elements of a head for scores; keys, or rows, of scores and of the right side for
// outputs.
#pragma once

#include "cpu/conv_geometry.hpp"
#include "cpu/conv_micro.hpp"
#include "cpu/vmath.hpp"

namespace fg::ISA {
namespace {

template <bool PAIRS>
using Micro = BroadcastKernel<PAIRS, true, true>;
constexpr int64_t PANEL = Micro<false>::COLUMNS;

template <class T>
constexpr bool PAIRED = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool PAIRED<bf16> = true;
#endif

template <bool PAIRS>
inline int64_t units(int64_t count) {
  return PAIRS ? ceil_div(count, 2) : count;
}

// ---- heads

// Rows of one head; a null `at` stands for zeros.
template <class T>
struct Rows {
  T* at;
  int64_t step;
  T* row(int64_t i) const { return at + i * step; }
};

template <class T>
inline Rows<T> head_of(T* tensor, const Strides& s, int64_t n, int64_t h) {
  return {tensor ? tensor + n * s[0] + h * s[1] : nullptr, s[2]};
}
template <class T>
inline Rows<const T> head_of(const void* tensor, const Strides& s, int64_t n, int64_t h) {
  return head_of(static_cast<const T*>(tensor), s, n, h);
}
template <class T>
inline Rows<T> head_of(void* tensor, const Strides& s, int64_t n, int64_t h) {
  return head_of(static_cast<T*>(tensor), s, n, h);
}

// Two neighbours of a row in each lane, `left` elements of it; zeros behind them.
inline vf load_pairs(const bf16* p, int64_t left) {
  if (left >= 2 * VF) return load(reinterpret_cast<const float*>(p));
  vf v = zero();
  std::memcpy(&v, p, sizeof(bf16) * static_cast<size_t>(left));
  return v;
}

inline void clear(float* row, int64_t from, int64_t to) {
  if (from < to) std::memset(row + from, 0, sizeof(float) * static_cast<size_t>(to - from));
}

// The left side of scores: units of rows [first, first + count), `step` from a row to the next, times factor (of
// floats).
template <bool PAIRS, class T>
FG_NOINLINE void pack_left(Rows<const T> rows, int64_t first, int64_t count, int64_t width, int64_t step, float factor,
                           float* to) {
  if (!rows.at) return clear(to, 0, count * step);
  for (int64_t i = 0; i < count; ++i, to += step) {
    const T* from = rows.row(first + i);
    if constexpr (PAIRS) {
      for (int64_t c = 0; c < width; c += 2 * VF) store(to + c / 2, load_pairs(from + c, width - c));
    } else {  // a tail load fills with zeros, and `step` is a whole number of vectors
      each(0, width, [&](int64_t c, int lanes) { store(to + c, load_some(from + c, lanes) * set1(factor)); });
    }
  }
}

// The right side of outputs: row u of units is row first + u, or a pair of rows; `padded` columns, zeros from `width`
// on and in a row that lacks its neighbour.
template <bool PAIRS, class T>
FG_NOINLINE void pack_right(Rows<const T> rows, int64_t first, int64_t count, int64_t width, int64_t padded,
                            float factor, float* to) {
  if constexpr (!PAIRS) {
    pack_left<false>(rows, first, count, width, padded, factor, to);
  } else {
    if (!rows.at) return clear(to, 0, units<true>(count) * padded);
    for (int64_t i = 0; i < count; i += 2, to += padded) {
      const bf16 *low = rows.row(first + i), *high = i + 1 < count ? rows.row(first + i + 1) : nullptr;
      each(0, width, [&](int64_t c, int lanes) {
        store(to + c, interleave(load_half_tail(low + c, lanes), high ? load_half_tail(high + c, lanes) : vh{}));
      });
    }
  }
}

// The right side of scores, the transpose in panels: to[j / PANEL][u][j % PANEL] = unit u of rows[first + j], zeros up
// to a whole vector of j.
template <bool PAIRS, class T>
FG_NOINLINE void pack_panels(Rows<const T> rows, int64_t first, int64_t count, int64_t width, float* to) {
  const int64_t all = units<PAIRS>(width);
  if (!rows.at) return clear(to, 0, round_up(count, PANEL) * all);
  for (int64_t j = 0; j < count; j += VF) {
    float* panel = to + j / PANEL * PANEL * all + j % PANEL;
    each(0, all, [&](int64_t u, int lanes) {
      vf v[VF];
      for (int i = 0; i < VF; ++i) {
        if (j + i >= count)
          v[i] = zero();
        else if constexpr (PAIRS)
          v[i] = load_pairs(rows.row(first + j + i) + 2 * u, width - 2 * u);
        else
          v[i] = load_some(rows.row(first + j + i) + u, lanes);
      }
      transpose(v);
      for (int i = 0; i < lanes; ++i) store(panel + (u + i) * PANEL, v[i]);
    });
  }
}

// rows[first + i][c] = factor from[i][c]
template <class T>
FG_NOINLINE void unpack_rows(const float* from, int64_t padded, float factor, Rows<T> rows, int64_t first,
                             int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i, from += padded) {
    T* to = rows.row(first + i);
    each(0, width, [&](int64_t c, int lanes) { store_some(to + c, load(from + c) * set1(factor), lanes); });
  }
}

// ---- products

struct Left {
  int64_t row_step, unit_step;
};
inline Left rows_of(int64_t ld) { return {ld, 1}; }
inline Left columns_of(int64_t ld) { return {1, ld}; }

struct Right {
  int64_t unit_step, panel_step;  // panel_step: to the next PANEL columns
};
inline Right in_rows(int64_t padded) { return {padded, PANEL}; }
inline Right in_panels(int64_t units) { return {PANEL, units * PANEL}; }

struct Term {
  const float *left, *right;
};

// out[i][j] (+)= the terms' sum. Writes whole vectors of columns and rows up to a multiple of TILE_ROWS.
template <bool PAIRS, int TERMS>
FG_NOINLINE void product(const Term (&term)[TERMS], Left left, Right right, int64_t units, int64_t rows,
                         int64_t columns, float* out, int64_t ld, bool accumulate) {
  Run run[TERMS];
  for (int t = 0; t < TERMS; ++t) run[t] = {term[t].right - term[0].right, units};
  for (int64_t j = 0; j < columns; j += PANEL) {
    const int width = static_cast<int>(least(PANEL, round_up(columns - j, VF)));
    const char* panel = reinterpret_cast<const char*>(term[0].right + j / PANEL * right.panel_step);
    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
      const char* from[TERMS * TILE_ROWS];
      for (int t = 0; t < TERMS; ++t)
        for (int r = 0; r < TILE_ROWS; ++r)
          from[t * TILE_ROWS + r] =
              reinterpret_cast<const char*>(term[t].left + least(i + r, rows - 1) * left.row_step);
      Micro<PAIRS>::tile(run, TERMS, from, left.unit_step * 4, TILE_ROWS, panel, right.unit_step * 4, width,
                         out + i * ld + j, ld, accumulate);
    }
  }
}

// ---- exponentials

// e^x for x <= 0, up to rounding; 0 below x = -87, where 2^n would leave the normal range. NaN stays NaN.
FG_INLINE vf exp_falling(vf x) {
  const vf low = set1(-87.0f);
  const vm under = gt(low, x);
  return select(under, zero(), exp_bounded(select(under, low, x)));
}

// ---- jobs

// A job is a stretch of query rows, of all heads that share a bias gradient one after the other, or of one head where
// no bias gradient is asked for. Jobs are independent: sums of several jobs for the same keys are kept apart and added
// in order.
struct Plan {
  const AttentionShape* s;
  int64_t shared_n, shared_heads;  // heads of a job along N and along heads
  int64_t groups, parts, block;    // parts of `block` rows each, a multiple of the row blocks
  int64_t d, dv;                   // padded to whole vectors
  int64_t left_d, left_dv;         // of units
  float scale_of_rows, scale;  // what q and ddq are multiplied by: floats when they are packed, pairs' products after

  int64_t jobs() const { return groups * parts; }
  int64_t first_row(int64_t job) const { return job % parts * block; }
  int64_t last_row(int64_t job) const { return least(s->rows, first_row(job) + block); }
  // f(n, h) for each head of the job.
  template <class F>
  void heads(int64_t job, const F& f) const {
    const int64_t group = job / parts, across = s->heads / shared_heads;
    const int64_t n0 = group / across * shared_n, h0 = group % across * shared_heads;
    for (int64_t n = n0; n < n0 + shared_n; ++n)
      for (int64_t h = h0; h < h0 + shared_heads; ++h) f(n, h);
  }
  int64_t visible(int64_t row) const { return s->causal ? least(s->keys, row + 1) : s->keys; }
};

// One part a head where whole heads fill the threads evenly; else about four jobs a thread.
inline Plan plan_jobs(const AttentionShape& s, bool pairs, int64_t rows_together, const float* dbias,
                      const Strides& dbias_strides) {
  Plan p;
  p.s = &s;
  p.shared_n = dbias && dbias_strides[0] == 0 ? s.N : 1;
  p.shared_heads = dbias && dbias_strides[1] == 0 ? s.heads : 1;
  p.groups = s.N * s.heads / (p.shared_n * p.shared_heads);
  const int64_t blocks = ceil_div(s.rows, rows_together);
  const bool level = p.groups % s.threads == 0 || p.groups >= 4 * s.threads;
  p.parts = level ? 1 : least(blocks, ceil_div(4 * s.threads, p.groups));
  p.block = ceil_div(blocks, p.parts) * rows_together;
  p.parts = ceil_div(s.rows, p.block);
  p.d = round_up(s.d, VF);
  p.dv = round_up(s.dv, VF);
  p.left_d = pairs ? round_up(units<true>(s.d), VF) : p.d;
  p.left_dv = pairs ? round_up(units<true>(s.dv), VF) : p.dv;
  p.scale_of_rows = pairs ? 1.0f : s.scale;
  p.scale = pairs ? s.scale : 1.0f;
  return p;
}

// Cuts float arrays from one block, each aligned to 64 bytes; without a block it only counts their bytes.
struct Cutter {
  float* at;
  int64_t used = 0;
  float* cut(int64_t count) {
    float* array = at ? at + used : nullptr;
    used += round_up(count, 16);
    return array;
  }
};

}  // namespace
}  // namespace fg::ISA
