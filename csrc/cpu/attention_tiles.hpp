// Attention's building blocks: heads by their strides, packing, products on the convolutions' micro-kernel, and jobs.
//
// All products are one: out[i][j] (+)= sum over u of left[i, u] right[u][j], the left side by two steps (rows of
// scores, or their columns, with no transposition), the right side rows of a head, or its transpose in panels.
#pragma once

#include "cpu/conv_geometry.hpp"
#include "cpu/conv_micro.hpp"
#include "cpu/vmath.hpp"

namespace fg::ISA {
namespace {

using Micro = BroadcastKernel<false, true>;
constexpr int64_t PANEL = Micro::COLUMNS;

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

// to[i][c] = factor rows[first + i][c], zeros from `width` to `padded`.
template <class T>
FG_NOINLINE void pack_rows(Rows<const T> rows, int64_t first, int64_t count, int64_t width, int64_t padded,
                           float factor, float* to) {
  if (!rows.at) {
    std::memset(to, 0, sizeof(float) * static_cast<size_t>(count * padded));
    return;
  }
  for (int64_t i = 0; i < count; ++i, to += padded) {
    const T* from = rows.row(first + i);
    // a tail load fills with zeros, and `padded` is a whole number of vectors
    each(0, width, [&](int64_t c, int lanes) { store(to + c, load_some(from + c, lanes) * set1(factor)); });
  }
}

// The transpose in panels: to[j / PANEL][c][j % PANEL] = rows[first + j][c], zeros up to a whole vector of j.
template <class T>
FG_NOINLINE void pack_panels(Rows<const T> rows, int64_t first, int64_t count, int64_t width, float* to) {
  if (!rows.at) {
    std::memset(to, 0, sizeof(float) * static_cast<size_t>(round_up(count, PANEL) * width));
    return;
  }
  for (int64_t j = 0; j < count; j += VF) {
    float* panel = to + j / PANEL * PANEL * width + j % PANEL;
    each(0, width, [&](int64_t c, int lanes) {
      vf v[VF];
      for (int i = 0; i < VF; ++i) v[i] = j + i < count ? load_some(rows.row(first + j + i) + c, lanes) : zero();
      transpose(v);
      for (int i = 0; i < lanes; ++i) store(panel + (c + i) * PANEL, v[i]);
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
inline Right in_panels(int64_t width) { return {PANEL, width * PANEL}; }

struct Term {
  const float *left, *right;
};

// out[i][j] (+)= the terms' sum. Writes whole vectors of columns and rows up to a multiple of TILE_ROWS.
template <int TERMS>
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
      Micro::tile(run, TERMS, from, left.unit_step * 4, TILE_ROWS, panel, right.unit_step * 4, width, out + i * ld + j,
                  ld, accumulate);
    }
  }
}

// ---- exponentials

// e^x for x <= 0, up to rounding; below e^-87, where 2^n would leave the normal range, 0. NaN stays NaN.
FG_INLINE vf exp_falling(vf x) {
  const vf low = set1(-87.0f);
  const vm under = gt(low, x);
  return select(under, zero(), exp_bounded(select(under, low, x)));
}

// ---- jobs

// A job is a stretch of query rows of the heads that share a bias gradient, one after the other; of one head where none
// is asked for. Jobs are independent; what several of them add to the same keys is kept apart and added in order.
struct Plan {
  const AttentionShape* s;
  int64_t shared_n, shared_heads;  // heads of a job along N and along heads
  int64_t groups, parts, block;    // parts of `block` rows each, a multiple of the row blocks
  int64_t d, dv;                   // padded to whole vectors

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

// Heads alone where they fill the threads evenly; else about four jobs a thread.
inline Plan plan_jobs(const AttentionShape& s, int64_t rows_together, const float* dbias,
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
  return p;
}

// float arrays cut from one block, each aligned to 64 bytes; without a block it counts.
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
