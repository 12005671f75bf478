// y = every down-th sample of gain (f * x with up - 1 zeros behind each sample, padded), in one pass.
//
// An output row is made in two steps, both in cached rows: the input rows that its taps meet are combined into one row
// (down the columns, whole vectors in both layouts), and that row is filtered along itself. A filter that is a product
// of a column and a row needs this once, 2 K multiplications an output in the place of K²; any other filter once for
// each of its rows. Taps that would meet the zeros of upsampling are never visited.
//
// Bound: x read once, y written once. StyleGAN2's [1, 3, 3, 1], up 2: 5 bytes and 6 FLOPs an output in float32.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/kernels.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "cpu/simd.hpp"

namespace fg::ISA {
namespace {

// Outputs r, r + phases, r + 2 phases, ... use the same taps: output m of them is the sum over j < count of
// taps[j] sample[first + m step + j].
struct Phase {
  int64_t first, count, outputs;
  int64_t tap;    // of the first sample, in steps of `up` from there
  int64_t array;  // of a plane's samples: the one that holds the first sample of output 0, and its place in `padded`
  int64_t start;
};

struct Axis {
  int64_t in, out, taps, up, down, pad, phases, step;
  Phase* table;  // [phases], found once: a row's divisions took as long as 32 outputs of it

  Axis(int64_t in_, int64_t out_, int64_t taps_, int64_t up_, int64_t down_, int64_t pad_, Phase* memory)
      : in(in_), out(out_), taps(taps_), up(up_), down(down_), pad(pad_), table(memory) {
    const int64_t common = std::gcd(up, down);
    phases = up / common;
    step = down / common;
    for (int64_t r = 0; r < phases; ++r) table[r] = found(r);
  }
  const Phase& phase(int64_t r) const { return table[r]; }
  Phase found(int64_t r) const {
    const int64_t start = r * down - pad, tap = ((-start) % up + up) % up;
    return {(start + tap) / up, tap < taps ? (taps - 1 - tap) / up + 1 : 0, (out - r + phases - 1) / phases, tap, 0, 0};
  }
};

// The filter as the kernel applies it: turned as `flip` says, with its gain. `row` r is one of `rows` that are filtered
// and added up: of a product the only one.
struct Filter {
  bool product;
  const float* column;  // [KH], of a product
  const float* rows;    // [KW], or [KH][KW]

  // f = column row^T where that is so to a rounding of the largest tap.
  static bool factor(const Upfirdn2dArgs& a, float* column, float* row) {
    int64_t p = 0;
    for (int64_t i = 1; i < a.KH * a.KW; ++i)
      if (std::abs(a.f[i]) > std::abs(a.f[p])) p = i;
    const float pivot = a.f[p];
    const int64_t pi = p / a.KW, pj = p % a.KW;
    for (int64_t i = 0; i < a.KH; ++i) column[i] = a.f[i * a.KW + pj];
    for (int64_t j = 0; j < a.KW; ++j) row[j] = pivot == 0.0f ? 0.0f : a.f[pi * a.KW + j] / pivot;
    for (int64_t i = 0; i < a.KH; ++i)
      for (int64_t j = 0; j < a.KW; ++j)
        if (!(std::abs(a.f[i * a.KW + j] - column[i] * row[j]) <= 0x1p-22f * std::abs(pivot))) return false;
    return true;
  }

  static size_t floats(const Upfirdn2dArgs& a) { return size_t(a.KH + a.KW + (a.separable ? 0 : a.KH * a.KW)); }

  Filter(const Upfirdn2dArgs& a, float* into) {
    float *c = into, *r = into + a.KH;
    if (a.separable) {
      product = true;
      std::copy_n(a.f, a.KH, c);
      std::copy_n(a.f, a.KW, r);
    } else {
      product = factor(a, c, r);
      if (!product) std::copy_n(a.f, a.KH * a.KW, r);
    }
    const int64_t width = product ? a.KW : a.KH * a.KW;
    if (!a.flip) {  // a convolution: what is slid over the samples is the filter turned by 180 degrees
      std::reverse(c, c + a.KH);
      std::reverse(r, r + width);
    }
    for (int64_t i = 0; i < width; ++i) r[i] *= a.gain;
    column = c;
    rows = r;
  }
};

// One thread's rows. `unit` neighbours are of one pixel: C in channels_last, else 1.
template <class T>
struct Rows {
  const Upfirdn2dArgs& a;
  const Filter& filter;
  const Axis &vertical, &horizontal;
  int64_t unit;
  int64_t lowest, samples;  // the samples that outputs read: [lowest, lowest + samples)
  int64_t lane;             // elements between two of the `step` arrays in which a plane's samples are kept
  float *padded, *line, *out;

  static constexpr int64_t SLACK = 4 * VF;

  Rows(const Upfirdn2dArgs& args, const Filter& f, const Axis& v, const Axis& h)
      : a(args), filter(f), vertical(v), horizontal(h), unit(args.channels_last ? args.C : 1) {
    int64_t highest = INT64_MIN;
    lowest = INT64_MAX;
    for (int64_t r = 0; r < h.phases && r < h.out; ++r) {
      const Phase& p = h.phase(r);
      lowest = std::min(lowest, p.first);
      highest = std::max(highest, p.first + (p.outputs - 1) * h.step + std::max<int64_t>(p.count, 1) - 1);
    }
    samples = highest - lowest + 1;
    lane = (samples + h.step - 1) / h.step + SLACK;
  }
  // Where the phases' samples lie: the same for all threads.
  void place() const {
    for (int64_t r = 0; r < horizontal.phases; ++r) {
      Phase& p = horizontal.table[r];
      const int64_t at = p.first - lowest;
      p.array = at % horizontal.step;
      p.start = p.array * lane + at / horizontal.step;
    }
  }
  int64_t step() const { return unit == 1 ? horizontal.step : 1; }  // arrays in which the samples are kept
  int64_t padded_floats() const { return unit == 1 ? lane * horizontal.step : samples * unit + SLACK; }
  int64_t line_floats() const { return a.W * unit + SLACK; }
  int64_t out_floats() const { return (horizontal.out + horizontal.phases * SLACK) * unit + SLACK; }
  size_t floats() const { return size_t(padded_floats() + line_floats() + out_floats()); }
  void use(float* memory) {
    padded = memory;
    line = padded + padded_floats();
    out = line + line_floats();
    std::fill_n(padded, padded_floats(), 0.0f);
  }

  const T* row(int64_t image, int64_t iy) const { return static_cast<const T*>(a.x) + (image * a.H + iy) * a.W * unit; }

  // sum over j of weights[j * stride] of row first + j, into `padded` where the outputs look for it; false: no row.
  bool combine(int64_t image, int64_t first, int64_t count, const float* weights, int64_t stride) {
    const int64_t j0 = std::max<int64_t>(0, -first), j1 = std::min(count, a.H - first);
    const int64_t from = std::max<int64_t>(lowest, 0), to = std::min(lowest + samples, a.W);
    if (j0 >= j1 || from >= to) return false;
    const bool direct = step() == 1;
    float* to_row = direct ? padded + (from - lowest) * unit : line;
    const T* top = row(image, first + j0) + from * unit;
    const float* w = weights + j0 * stride;
    const int64_t pitch = a.W * unit, rows = j1 - j0;
    each(0, (to - from) * unit, [&](int64_t i, int n) {
      vf sum = load_some(top + i, n) * set1(w[0]);
      for (int64_t j = 1; j < rows; ++j) sum = fma(load_some(top + j * pitch + i, n), set1(w[j * stride]), sum);
      store_some(to_row + i, sum, n);
    });
    if (!direct) spread(from, to);
    return true;
  }

  // `line` by turns into the arrays of `padded`, so that what a tap reads for neighbouring outputs is contiguous.
  void spread(int64_t from, int64_t to) {
    const int64_t s = horizontal.step, at = from - lowest, count = to - from;
    for (int64_t k = 0; k < s && k < count; ++k) {
      float* __restrict d = padded + (at + k) % s * lane + (at + k) / s;
      const float* __restrict l = line + k;
      const int64_t n = (count - k + s - 1) / s;
      if (s == 2)
        for (int64_t i = 0; i < n; ++i) d[i] = l[2 * i];
      else
        for (int64_t i = 0; i < n; ++i) d[i] = l[s * i];
    }
  }

  // acc[i] = sum over the taps of a phase for outputs m + i VF, i < V, of a plane.
  template <int V>
  FG_INLINE_MEMBER void along(const Phase& p, const float* taps, int64_t m, vf (&acc)[V]) const {
    for (int i = 0; i < V; ++i) acc[i] = zero();
    int64_t array = p.array;
    const float* from = padded + p.start + m;
    for (int64_t j = 0; j < p.count; ++j) {
      const vf w = set1(taps[p.tap + j * horizontal.up]);
      for (int i = 0; i < V; ++i) acc[i] = fma(load(from + i * VF), w, acc[i]);
      from += lane;
      if (++array == horizontal.step) {
        array = 0;
        from += 1 - horizontal.step * lane;
      }
    }
  }

  // A plane's row of one or two phases, straight to y. The last vector reads into the slack.
  void plane_row(const float* taps, T* y) const {
    const Phase& even = horizontal.phase(0);
    if (horizontal.phases == 1) {
      vf v[4];
      int64_t m = 0;
      for (; m + 4 * VF <= horizontal.out; m += 4 * VF) {
        along(even, taps, m, v);
        for (int i = 0; i < 4; ++i) store(y + m + i * VF, v[i]);
      }
      for (; m < horizontal.out; m += 2 * VF) {
        vf two[2];
        along(even, taps, m, two);
        for (int i = 0; i < 2; ++i)
          if (const int64_t left = horizontal.out - m - i * VF; left > 0)
            store_some(y + m + i * VF, two[i], static_cast<int>(std::min<int64_t>(VF, left)));
      }
      return;
    }
    const Phase& odd = horizontal.phase(1);
    for (int64_t m = 0; m < even.outputs; m += 2 * VF) {
      vf e[2], o[2];
      along(even, taps, m, e);
      along(odd, taps, m, o);
      for (int i = 0; i < 2; ++i) {
        const int64_t left = horizontal.out - 2 * (m + i * VF);
        const vf both[2] = {zip_low(e[i], o[i]), zip_high(e[i], o[i])};
        for (int half = 0; half < 2; ++half)
          if (left > half * VF)
            store_some(y + 2 * (m + i * VF) + half * VF, both[half],
                       static_cast<int>(std::min<int64_t>(VF, left - half * VF)));
      }
    }
  }

  // A plane's row of any number of phases, added to `out`, phase by phase.
  void add_plane_row(const float* taps) const {
    float* into = out;
    for (int64_t r = 0; r < horizontal.phases; ++r) {
      const Phase& p = horizontal.phase(r);
      for (int64_t m = 0; m < p.outputs; m += VF) {
        vf v[1];
        along(p, taps, m, v);
        store(into + m, load(into + m) + v[0]);
      }
      into += horizontal.out / horizontal.phases + SLACK;
    }
  }

  // Pixels of C channels: to(i, n, sum) for every vector of the row, i counting its elements.
  template <class To>
  FG_INLINE_MEMBER void pixel_row(const float* taps, const To& to) const {
    const Axis& h = horizontal;
    const bool whole = h.phases == 1 && h.step == 1;  // the row is one run of pixels
    const int64_t runs = whole ? 1 : h.out, length = whole ? h.out * unit : unit;
    for (int64_t r = 0; r < h.phases && r < h.out; ++r) {
      const Phase& p = h.phase(r);
      for (int64_t o = r, m = 0; o < runs; o += h.phases, ++m) {
        const float* from = padded + (p.first - lowest + m * h.step) * unit;
        each(0, length, [&](int64_t i, int n) {
          vf sum = zero();
          for (int64_t j = 0; j < p.count; ++j)
            sum = fma(load_some(from + j * unit + i, n), set1(taps[p.tap + j * h.up]), sum);
          to(o * unit + i, n, sum);
        });
      }
    }
  }

  void write_zero(T* y) const {
    each(0, horizontal.out * unit, [&](int64_t i, int n) { store_some(y + i, zero(), n); });
  }

  void clear_out() const { std::fill_n(out, out_floats(), 0.0f); }

  void write_out(T* y) const {
    if (unit > 1 || horizontal.phases == 1) {
      each(0, horizontal.out * unit, [&](int64_t i, int n) { store_some(y + i, load_some(out + i, n), n); });
      return;
    }
    const int64_t between = horizontal.out / horizontal.phases + SLACK;
    for (int64_t r = 0; r < horizontal.phases; ++r) {
      const float* from = out + r * between;
      for (int64_t o = r, m = 0; o < horizontal.out; o += horizontal.phases, ++m) store_one(y + o, from[m]);
    }
  }
  static void store_one(float* y, float v) { *y = v; }
  static void store_one(bf16* y, float v) { store_tail(y, set1(v), 1); }

  // Output row oy of an image (channels_last) or of a plane.
  void operator()(int64_t image, int64_t oy) {
    const Phase& p = vertical.phase(oy % vertical.phases);
    const int64_t first = p.first + oy / vertical.phases * vertical.step;
    T* y = static_cast<T*>(a.y) + (image * vertical.out + oy) * horizontal.out * unit;
    if (filter.product) {
      if (!combine(image, first, p.count, filter.column + p.tap, vertical.up)) return write_zero(y);
      if (unit > 1) return pixel_row(filter.rows, [&](int64_t i, int n, vf v) { store_some(y + i, v, n); });
      if (horizontal.phases <= 2) return plane_row(filter.rows, y);
      clear_out();
      add_plane_row(filter.rows);
      return write_out(y);
    }
    const float one = 1.0f;
    clear_out();
    for (int64_t j = 0; j < p.count; ++j) {
      if (!combine(image, first + j, 1, &one, 1)) continue;
      const float* taps = filter.rows + (p.tap + j * vertical.up) * a.KW;
      if (unit > 1)
        pixel_row(taps, [&](int64_t i, int n, vf v) { store_some(out + i, load_some(out + i, n) + v, n); });
      else
        add_plane_row(taps);
    }
    write_out(y);
  }
};

template <class T>
void filtered(const Upfirdn2dArgs& a) {
  const Scratch<Phase> phases(a.up_y + a.up_x);
  const Axis vertical(a.H, a.OH, a.KH, a.up_y, a.down_y, a.pad_y, phases.data);
  const Axis horizontal(a.W, a.OW, a.KW, a.up_x, a.down_x, a.pad_x, phases.data + a.up_y);
  const int64_t images = a.channels_last ? a.N : a.N * a.C, rows = images * a.OH;
  const int threads = team_for(a.N * a.C * a.OH * a.OW, a.threads);
  const Scratch<float> taps(Filter::floats(a));
  const Filter filter(a, taps.data);
  const Rows<T> all(a, filter, vertical, horizontal);
  all.place();
  const size_t own = (all.floats() + VF - 1) / VF * VF;
  const Scratch<float> memory(threads * own);
#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size();
    Rows<T> mine(a, filter, vertical, horizontal);
    mine.use(memory.data + thread * own);
    for (int64_t i = part_begin(rows, thread, team); i < part_begin(rows, thread + 1, team); ++i)
      mine(i / a.OH, i % a.OH);
  }
}

}  // namespace

void upfirdn2d(const Upfirdn2dArgs& args) { args.dtype == BF16 ? filtered<bf16>(args) : filtered<float>(args); }

}  // namespace fg::ISA
