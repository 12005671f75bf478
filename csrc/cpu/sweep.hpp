// A sweep: one pass over tensors [N, C, HW] with coefficients per channel and, if wanted, sums per channel.
//
// What is done to a vector is a Body:
//   static constexpr int COEFS, SUMS;
//   void operator()(lane, const vf* k, vf* s) const     lane.load(p), lane.store(p, v): the vector of this position
// where k are the channel's coefficients and s its running sums. The engine owns the rest: both layouts, threads,
// tails, and the order of the sums, which depends on nothing but the shape and the number of threads.
//
// Two walks:
//   columns  channels_last (or HW == 1): a matrix [rows][C]. Few channels would leave vectors half empty, so `reps`
//            pixels are taken as one row of width reps * C; the columns of one channel are added up at the end.
//   planes   [N][C][HW]: each (n, c) plane is contiguous, its coefficients are broadcast.
//
// Sums are kept in fp32 for at most 4096 elements a lane-group, then handed to `flush`, which keeps float64.
#pragma once

#include "common/kernels.hpp"
#include "common/parallel.hpp"
#include "cpu/simd.hpp"

namespace fg::ISA {

struct FullLane {
  int64_t at;
  template <class T>
  vf load(const T* p) const {
    return fg::ISA::load(p + at);
  }
  template <class T>
  void store(T* p, vf v) const {
    fg::ISA::store(p + at, v);
  }
};

struct TailLane {
  int64_t at;
  int n;
  template <class T>
  vf load(const T* p) const {
    return load_tail(p + at, n);
  }
  template <class T>
  void store(T* p, vf v) const {
    store_tail(p + at, v, n);
  }
};

// Shape of a sweep, G groups of samples.
struct Grid {
  bool columns;
  int64_t C, HW, G;
  int64_t samples;      // per group
  int64_t reps, width;  // columns: pixels in a row, reps * C; planes: 1, C
  int64_t padded;       // width rounded up to whole vectors: the stride of every per-column array
  int64_t group_elements;

  Grid(int64_t N, int64_t C_, int64_t HW_, int64_t G_, bool channels_last)
      : columns(channels_last || HW_ == 1), C(C_), HW(HW_), G(G_), samples(N / G_), reps(1) {
    if (columns && C < 64) {
      // Whole vectors first (C = 3: 16 pixels are 3 AVX-512 vectors), then at least 64 columns, to fill the loop.
      while (reps * C % VF) ++reps;
      while (reps * C < 64) reps *= 2;
    }
    width = reps * C;
    padded = (width + VF - 1) / VF * VF;
    group_elements = samples * C * HW;
  }
  bool empty() const { return group_elements == 0; }
  int64_t elements() const { return group_elements * G; }
};

// One thread's share of a group. `slot` tells which of `slots` partial sums per channel the thread writes.
struct Share {
  int slot, slots;
  int64_t row0, row1;              // columns
  bool remainder;                  // columns: this thread takes the incomplete last row, too
  int64_t n0, n1, c0, c1, h0, h1;  // planes

  Share(const Grid& grid, int thread, int team)
      : slot(thread),
        slots(team),
        row0(0),
        row1(0),
        remainder(thread == team - 1),
        n0(0),
        n1(grid.samples),
        c0(0),
        c1(grid.C),
        h0(0),
        h1(grid.HW) {
    if (grid.columns) {
      const int64_t rows = grid.group_elements / grid.width;
      row0 = part_begin(rows, thread, team);
      row1 = part_begin(rows, thread + 1, team);
      return;
    }
    // Planes are cut along one axis: channels if that is even (no sums to merge afterwards), else samples, else pixels.
    const auto even = [team](int64_t n) { return n % team == 0 || n >= 8 * team; };
    const int64_t longest = grid.HW > grid.samples ? grid.HW : grid.samples;
    const auto cut = [&](int64_t n, int64_t* begin, int64_t* end) {
      *begin = part_begin(n, thread, team);
      *end = part_begin(n, thread + 1, team);
    };
    if (even(grid.C) || (!even(longest) && grid.C >= longest)) {
      slot = 0;
      slots = 1;
      cut(grid.C, &c0, &c1);
    } else if (even(grid.samples) || (!even(grid.HW) && grid.samples >= grid.HW)) {
      cut(grid.samples, &n0, &n1);
    } else {
      cut(grid.HW, &h0, &h1);
    }
  }
};

// ------------------------------------------------------------------------------------------------ columns

// A few rows of `width` columns starting at element `at`; coefficients and sums are arrays with stride `padded`. Taking
// several rows at once reads these once for all of them. The loop over them is not unrolled and the function is
// not inlined: neither would be faster (memory is the limit), and the body is compiled often enough.
template <class Body>
static __attribute__((noinline)) void sweep_rows(const Grid& grid, const Body& body, int64_t at, int64_t rows,
                                                 int64_t width, const float* coef, float* sums) {
  vf k[Body::COEFS + 1], s[Body::SUMS + 1];
  const auto open = [&](int64_t j) {
    for (int i = 0; i < Body::COEFS; ++i) k[i] = load(coef + i * grid.padded + j);
    for (int i = 0; i < Body::SUMS; ++i) s[i] = load(sums + i * grid.padded + j);
  };
  int64_t j = 0;
  for (; j + VF <= width; j += VF) {
    open(j);
    for (int64_t r = 0; r < rows; ++r) body(FullLane{at + r * grid.width + j}, k, s);
    for (int i = 0; i < Body::SUMS; ++i) store(sums + i * grid.padded + j, s[i]);
  }
  if (j == width) return;
  open(j);
  const int n = static_cast<int>(width - j);
  for (int64_t r = 0; r < rows; ++r) body(TailLane{at + r * grid.width + j, n}, k, s);
  for (int i = 0; i < Body::SUMS; ++i) {
    float* p = sums + i * grid.padded + j;
    store(p, select(first(n), s[i], load(p)));
  }
}

template <class Body, class Flush>
static void sweep_columns(const Grid& grid, const Share& share, int64_t group, const Body& body, const float* coef,
                          float* sums, bool reverse, const Flush& flush) {
  constexpr int64_t BLOCK = 128, ROWS = 4;  // rows between two flushes, rows at once
  const int64_t base = group * grid.group_elements;
  const auto clear = [&] {
    for (int64_t i = 0; i < Body::SUMS * grid.padded; ++i) sums[i] = 0.0f;
  };
  const auto rows = [&](int64_t begin, int64_t end) {
    clear();
    for (int64_t r = begin; r < end; r += ROWS)
      sweep_rows(grid, body, base + r * grid.width, end - r < ROWS ? end - r : ROWS, grid.width, coef, sums);
    if constexpr (Body::SUMS > 0) flush(sums, grid.padded, int64_t{0}, grid.width, end - begin);
  };
  const int64_t rest = share.remainder ? grid.group_elements % grid.width : 0;
  const auto incomplete_row = [&] {
    if (!rest) return;
    clear();
    sweep_rows(grid, body, base + grid.group_elements - rest, 1, rest, coef, sums);
    if constexpr (Body::SUMS > 0) flush(sums, grid.padded, int64_t{0}, rest, int64_t{1});
  };
  if (reverse) {
    incomplete_row();
    for (int64_t end = share.row1; end > share.row0;) {
      const int64_t begin = end - BLOCK > share.row0 ? end - BLOCK : share.row0;
      rows(begin, end);
      end = begin;
    }
    return;
  }
  for (int64_t begin = share.row0; begin < share.row1; begin += BLOCK)
    rows(begin, begin + BLOCK < share.row1 ? begin + BLOCK : share.row1);
  incomplete_row();
}

// ------------------------------------------------------------------------------------------------ planes

// `length` contiguous elements of one channel, sums in two independent sets to hide the latency of the additions.
template <class Body>
static inline void sweep_run(const Body& body, int64_t at, int64_t length, const vf* k, vf* even, vf* odd) {
  int64_t h = 0;
  for (; h + 2 * VF <= length; h += 2 * VF) {
    body(FullLane{at + h}, k, even);
    body(FullLane{at + h + VF}, k, odd);
  }
  while (h < length) {
    const int n = length - h < VF ? static_cast<int>(length - h) : VF;
    vf s[Body::SUMS + 1];
    for (int i = 0; i < Body::SUMS; ++i) s[i] = odd[i];
    body(TailLane{at + h, n}, k, s);
    for (int i = 0; i < Body::SUMS; ++i) odd[i] = select(first(n), s[i], odd[i]);
    h += n;
  }
}

template <class Body, class Flush>
static void sweep_planes(const Grid& grid, const Share& share, int64_t group, const Body& body, const float* coef,
                         bool reverse, const Flush& flush) {
  constexpr int64_t RUN = 4096;  // elements between two flushes
  const int64_t length = share.h1 - share.h0, samples = share.n1 - share.n0;
  if (length <= 0 || samples <= 0) return;
  // Short planes: up to 8 samples of a channel share one flush. More of them would be as many streams of memory.
  int64_t step = 1;
  if constexpr (Body::SUMS > 0) {
    step = 512 / length < 1 ? 1 : 512 / length < 8 ? 512 / length : 8;
    if (step > samples) step = samples;
  }
  const int64_t blocks = (samples + step - 1) / step;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t n0 = share.n0 + (reverse ? blocks - 1 - b : b) * step;
    const int64_t n1 = n0 + step < share.n1 ? n0 + step : share.n1;
    for (int64_t c = share.c0; c < share.c1; ++c) {
      for (int64_t h = share.h0; h < share.h1; h += RUN) {
        const int64_t run = h + RUN < share.h1 ? RUN : share.h1 - h;
        vf k[Body::COEFS + 1], even[Body::SUMS + 1], odd[Body::SUMS + 1];
        for (int i = 0; i < Body::COEFS; ++i) k[i] = set1(coef[i * grid.padded + c]);
        for (int i = 0; i < Body::SUMS; ++i) even[i] = odd[i] = zero();
        for (int64_t n = n0; n < n1; ++n)
          sweep_run(body, ((group * grid.samples + n) * grid.C + c) * grid.HW + h, run, k, even, odd);
        if constexpr (Body::SUMS > 0) {
          float total[Body::SUMS];
          for (int i = 0; i < Body::SUMS; ++i) total[i] = sum(even[i] + odd[i]);
          flush(total, int64_t{1}, c, int64_t{1}, (n1 - n0) * run);
        }
      }
    }
  }
}

// One thread's share of one group. coef is [COEFS][padded]; sums is room for [SUMS][padded].
// flush(sums, stride, first, columns, elements per column) gets the sums of `columns` columns from `first` on, sum i of
// column c at sums[i * stride + c - first]. `reverse` starts at the end, which the last sweep left in the cache.
template <class Body, class Flush>
static void sweep(const Grid& grid, const Share& share, int64_t group, const Body& body, const float* coef, float* sums,
                  bool reverse, const Flush& flush) {
  if (grid.columns)
    sweep_columns(grid, share, group, body, coef, sums, reverse, flush);
  else
    sweep_planes(grid, share, group, body, coef, reverse, flush);
}

template <class Body>
static void sweep_elementwise(const Grid& grid, const Share& share, int64_t group, const Body& body, const float* coef,
                              bool reverse) {
  static_assert(Body::SUMS == 0);
  sweep(grid, share, group, body, coef, nullptr, reverse, [](const float*, int64_t, int64_t, int64_t, int64_t) {});
}

// Elements [begin, end) of a body without coefficients and sums, to which a channel means nothing.
template <class Body>
static void sweep_flat(int64_t begin, int64_t end, const Body& body) {
  static_assert(Body::COEFS == 0 && Body::SUMS == 0);
  vf none[1];
  sweep_run(body, begin, end - begin, none, none, none);
}

// ------------------------------------------------------------------------------------------------ sums per channel

// Partial sums in float64: [G][slots][SUMS][padded].
template <int SUMS>
struct Partials {
  double* data;
  int64_t padded;
  int slots;

  static int64_t count(const Grid& grid, int team) { return grid.G * team * SUMS * grid.padded; }
  double* at(int64_t group, int slot) const { return data + (group * slots + slot) * SUMS * padded; }

  // The columns that a share writes are cleared by that share: no barrier is needed before the sweep.
  void clear(const Grid& grid, const Share& share, int64_t group) const {
    const int64_t begin = grid.columns ? 0 : share.c0, end = grid.columns ? grid.width : share.c1;
    for (int i = 0; i < SUMS; ++i)
      for (int64_t j = begin; j < end; ++j) at(group, share.slot)[i * padded + j] = 0.0;
  }

  // Channel c of a group: slots in order, then the columns of the channel in order.
  void total(const Grid& grid, int64_t group, int64_t c, double (&sums)[SUMS]) const {
    for (double& s : sums) s = 0.0;
    for (int slot = 0; slot < slots; ++slot)
      for (int64_t rep = 0; rep < grid.reps; ++rep)
        for (int i = 0; i < SUMS; ++i) sums[i] += at(group, slot)[i * padded + rep * grid.C + c];
  }
};

// Sweeps a Body whose sums are plain additions into the partials of its share.
template <class Body>
static void sweep_sums(const Grid& grid, const Share& share, int64_t group, const Body& body, const float* coef,
                       float* sums, const Partials<Body::SUMS>& partials) {
  partials.clear(grid, share, group);
  double* into = partials.at(group, share.slot);
  sweep(grid, share, group, body, coef, sums, false,
        [&](const float* s, int64_t stride, int64_t column, int64_t columns, int64_t) {
          for (int i = 0; i < Body::SUMS; ++i)
            for (int64_t j = 0; j < columns; ++j) into[i * partials.padded + column + j] += double(s[i * stride + j]);
        });
}

// Writes coefficient i of a channel into all its columns.
static inline void put(const Grid& grid, float* coef, int i, int64_t c, float value) {
  for (int64_t rep = 0; rep < grid.reps; ++rep) coef[i * grid.padded + rep * grid.C + c] = value;
}

}  // namespace fg::ISA
