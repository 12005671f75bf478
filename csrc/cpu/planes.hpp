// VF planes of a tensor [N, C, H, W] side by side: lane l of every vector belongs to plane first + l, plane n C + c. A
// filter then works on whole, aligned vectors in both layouts, however short the rows are.
#pragma once

#include <type_traits>

#include "cpu/fir.hpp"
#include "cpu/simd.hpp"

namespace fg::ISA {

// The planes from `first` on, VF of them or what is left, in memory.
template <class T>
struct Planes {
  T* base[VF];  // row 0 of every lane; lanes behind the last plane repeat it
  int64_t C, W;
  int64_t lanes, pixel, pitch;  // elements between two pixels and two rows
  bool together;                // the lanes of a pixel are neighbours

  Planes(T* data, int64_t N, int64_t C_, int64_t H, int64_t W_, bool channels_last, int64_t first)
      : C(C_), W(W_), lanes(std::min<int64_t>(VF, N * C_ - first)) {
    pixel = channels_last ? C : 1;
    pitch = W * pixel;
    together = channels_last && first % C + lanes <= C;
    for (int64_t l = 0; l < VF; ++l) {
      const int64_t p = first + std::min(l, lanes - 1);
      base[l] = channels_last ? data + p / C * H * pitch + p % C : data + p * H * pitch;
    }
  }

  // Row r plus a value for each lane, into W vectors.
  void read(int64_t r, vf plus, float* to) const {
    const int64_t row = r * pitch;
    if (together) {
      for (int64_t w = 0; w < W; ++w)
        store(to + w * VF, load_some(base[0] + row + w * pixel, static_cast<int>(lanes)) + plus);
    } else if (pixel > 1) {
      float lane[VF];
      for (int64_t w = 0; w < W; ++w) {
        for (int l = 0; l < VF; ++l) lane[l] = load_tail(base[l] + row + w * pixel, 1)[0];
        store(to + w * VF, load(lane) + plus);
      }
    } else {
      each(0, W, [&](int64_t w, int n) {
        vf v[VF];
        for (int l = 0; l < VF; ++l) v[l] = load_some(base[l] + row + w, n);
        transpose(v);
        for (int i = 0; i < n; ++i) store(to + (w + i) * VF, v[i] + plus);
      });
    }
  }

  // W vectors to row r; lanes behind the last plane are left out.
  void write(int64_t r, const float* from) const {
    const int64_t row = r * pitch;
    if (together) {
      for (int64_t w = 0; w < W; ++w)
        store_some(base[0] + row + w * pixel, load(from + w * VF), static_cast<int>(lanes));
    } else if (pixel > 1) {
      for (int64_t w = 0; w < W; ++w)
        for (int64_t l = 0; l < lanes; ++l) store_tail(base[l] + row + w * pixel, set1(from[w * VF + l]), 1);
    } else {
      each(0, W, [&](int64_t w, int n) {
        vf v[VF];
        for (int i = 0; i < VF; ++i) v[i] = i < n ? load(from + (w + i) * VF) : zero();
        transpose(v);
        for (int64_t l = 0; l < lanes; ++l) store_some(base[l] + row + w, v[l], n);
      });
    }
  }
};

// A row as a filter along it reads it: its samples as vectors, and zeros on both sides where taps reach beyond them.
struct Margins {
  int64_t before, length;  // vectors
  explicit Margins(const Axis& a)
      : before(-std::min<int64_t>(a.lowest, 0)), length(std::max(a.highest + 1, a.in) + before) {}
  explicit Margins(int64_t samples) : before(0), length(samples) {}
};

// out[i] = sum over j < count of taps[j apart] from[i step + j], for V neighbours in registers: 8 of them hide the
// latency of an FMA on two ports.
template <int V>
FG_INLINE void filtered(const float* from, int64_t step, const float* taps, int64_t apart, int64_t count, bool add,
                        float* out, int64_t out_step) {
  vf acc[V];
  for (int i = 0; i < V; ++i) acc[i] = zero();
  for (int64_t j = 0; j < count; ++j) {
    const vf w = set1(taps[j * apart]);
    for (int i = 0; i < V; ++i) acc[i] = fma(load(from + (i * step + j) * VF), w, acc[i]);
  }
  for (int i = 0; i < V; ++i) {
    float* to = out + i * out_step * VF;
    store(to, add ? load(to) + acc[i] : acc[i]);
  }
}

// A row of vectors through a filter along it: out [a.out] is set, or added to. `samples` is sample 0 of a.in; zeros lie
// around them as `Margins` says.
static FG_NOINLINE void filter_row(const Axis& a, const float* taps, const float* samples, bool add, float* out) {
  for (int64_t r = 0; r < a.phases; ++r) {
    const Phase& p = a.phase(r);
    const float* from = samples + p.first * VF;
    int64_t m = 0;
    const auto run = [&](auto width) {
      constexpr int V = decltype(width)::value;
      for (; m + V <= p.outputs; m += V)
        filtered<V>(from + m * a.step * VF, a.step, taps + p.tap, a.up, p.count, add, out + (r + m * a.phases) * VF,
                    a.phases);
    };
    run(std::integral_constant<int, 8>());
    run(std::integral_constant<int, 2>());
    run(std::integral_constant<int, 1>());
  }
}

// out[i] = sum over j < count of weights[j apart] rows[j][i], i < n vectors.
static FG_NOINLINE void combine_rows(const float* const* rows, const float* weights, int64_t apart, int64_t count,
                                     int64_t n, float* out) {
  int64_t i = 0;
  const auto run = [&](auto width) {
    constexpr int V = decltype(width)::value;
    for (; i + V <= n; i += V) {
      vf acc[V];
      for (int k = 0; k < V; ++k) acc[k] = zero();
      for (int64_t j = 0; j < count; ++j) {
        const vf w = set1(weights[j * apart]);
        for (int k = 0; k < V; ++k) acc[k] = fma(load(rows[j] + (i + k) * VF), w, acc[k]);
      }
      for (int k = 0; k < V; ++k) store(out + (i + k) * VF, acc[k]);
    }
  };
  run(std::integral_constant<int, 8>());
  run(std::integral_constant<int, 1>());
}

// Rows of samples, of which the last `slots` are kept.
struct Ring {
  int64_t slots, pitch, before;  // floats between two rows, vectors before sample 0
  float* memory = nullptr;

  Ring(int64_t slots_, const Margins& m) : slots(slots_), pitch(m.length * VF), before(m.before) {}
  int64_t floats() const { return slots * pitch; }
  float* row(int64_t r) const { return memory + r % slots * pitch + before * VF; }
};

// A filter with its axes, over rows of vectors.
struct Stage {
  Axis vertical, horizontal;
  Filter filter;
  Margins margins;  // of the rows that it reads

  Stage(const Axis& v, const Axis& h, const Filter& f) : vertical(v), horizontal(h), filter(f), margins(h) {}
  // Rows that an output row reads, at most.
  int64_t rows_read() const { return (vertical.taps + vertical.up - 1) / vertical.up; }
  int64_t floats() const { return margins.length * VF; }

  // The rows [from, to) that output row o reads, and the tap of the first.
  struct Reach {
    int64_t from, to, tap;
  };
  Reach reach(int64_t o) const {
    const Phase& p = vertical.phase(o % vertical.phases);
    const int64_t top = vertical.first(o), from = std::max<int64_t>(top, 0);
    return {from, std::min(top + p.count, vertical.in), p.tap + (from - top) * vertical.up};
  }

  // Output row o [horizontal.out]: down the columns first, then along the row. sum: [floats()], 0 at its margins; rows:
  // [rows_read()].
  void make(int64_t o, const Ring& inputs, float* sum, const float** rows, float* out) const {
    const auto [from, to, tap] = reach(o);
    if (from >= to) {
      std::fill_n(out, horizontal.out * VF, 0.0f);
    } else if (filter.product) {
      for (int64_t r = from; r < to; ++r) rows[r - from] = inputs.row(r);
      float* sample_0 = sum + margins.before * VF;
      combine_rows(rows, filter.column + tap, vertical.up, to - from, horizontal.in, sample_0);
      filter_row(horizontal, filter.rows, sample_0, false, out);
    } else {
      for (int64_t r = from; r < to; ++r)
        filter_row(horizontal, filter.rows + (tap + (r - from) * vertical.up) * horizontal.taps, inputs.row(r),
                   r > from, out);
    }
  }
};

}  // namespace fg::ISA
