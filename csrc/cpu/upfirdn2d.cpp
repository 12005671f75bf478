// y = every down-th sample of gain (f * x with up - 1 zeros behind each sample, padded), in one pass.
//
// An output row is made in two steps, both in cached rows: the input rows that its taps meet are combined into one row
// (down the columns, whole vectors in both layouts), and that row is filtered along itself. A vector holds neighbours
// of a row, or in NCHW, where there are enough planes, the same pixel of VF planes. A filter that is a product of a
// column and a row needs this once, 2 K multiplications an output in the place of K²; any other filter once for each of
// its rows. Taps that would meet the zeros of upsampling are never visited.
//
// Bound: x read once, y written once. StyleGAN2's [1, 3, 3, 1], up 2: 5 bytes and 6 FLOPs an output in float32.
#include "common/kernels.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "cpu/planes.hpp"

namespace fg::ISA {
namespace {

// Of a plane's samples: the array that holds the first sample of a phase's output 0, and its place in `padded`.
struct Place {
  int64_t array, start;
};

// One thread's rows. `unit` neighbours are of one pixel: C in channels_last, else 1.
template <class T>
struct Rows {
  const Upfirdn2dArgs& a;
  const Filter& filter;
  const Axis &vertical, &horizontal;
  Place* places;  // [horizontal.phases]
  int64_t unit;
  int64_t lowest, samples;  // the samples that outputs read: [lowest, lowest + samples)
  int64_t lane;             // elements between two of the `step` arrays in which a plane's samples are kept
  float *padded, *line, *out;

  static constexpr int64_t SLACK = 4 * VF;

  Rows(const Upfirdn2dArgs& args, const Filter& f, const Axis& v, const Axis& h, Place* memory)
      : a(args), filter(f), vertical(v), horizontal(h), places(memory), unit(args.channels_last ? args.C : 1) {
    lowest = h.lowest;
    samples = h.highest - lowest + 1;
    lane = (samples + h.step - 1) / h.step + SLACK;
  }
  // Where the phases' samples lie: the same for all threads.
  void place() const {
    for (int64_t r = 0; r < horizontal.phases; ++r) {
      const int64_t at = horizontal.phase(r).first - lowest, array = at % horizontal.step;
      places[r] = {array, array * lane + at / horizontal.step};
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
  FG_INLINE_MEMBER void along(int64_t phase, const float* taps, int64_t m, vf (&acc)[V]) const {
    for (int i = 0; i < V; ++i) acc[i] = zero();
    const Phase& p = horizontal.phase(phase);
    int64_t array = places[phase].array;
    const float* from = padded + places[phase].start + m;
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
    if (horizontal.phases == 1) {
      vf v[4];
      int64_t m = 0;
      for (; m + 4 * VF <= horizontal.out; m += 4 * VF) {
        along(0, taps, m, v);
        for (int i = 0; i < 4; ++i) store(y + m + i * VF, v[i]);
      }
      for (; m < horizontal.out; m += 2 * VF) {
        vf two[2];
        along(0, taps, m, two);
        for (int i = 0; i < 2; ++i)
          if (const int64_t left = horizontal.out - m - i * VF; left > 0)
            store_some(y + m + i * VF, two[i], static_cast<int>(std::min<int64_t>(VF, left)));
      }
      return;
    }
    for (int64_t m = 0; m < horizontal.phase(0).outputs; m += 2 * VF) {
      vf e[2], o[2];
      along(0, taps, m, e);
      along(1, taps, m, o);
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
        along(r, taps, m, v);
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
void by_rows(const Upfirdn2dArgs& a, const Filter& filter, const Axis& vertical, const Axis& horizontal, int threads) {
  const int64_t images = a.channels_last ? a.N : a.N * a.C, rows = images * a.OH;
  const Scratch<Place> places(horizontal.phases);
  const Rows<T> all(a, filter, vertical, horizontal, places.data);
  all.place();
  const size_t own = (all.floats() + VF - 1) / VF * VF;
  const Scratch<float> memory(threads * own);
#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size();
    Rows<T> mine(a, filter, vertical, horizontal, places.data);
    mine.use(memory.data + thread * own);
    for (int64_t i = part_begin(rows, thread, team); i < part_begin(rows, thread + 1, team); ++i)
      mine(i / a.OH, i % a.OH);
  }
}

// ---- VF planes side by side: no load straddles two cache lines, and no lane of a short row is idle.

// Output rows [begin, end) of the planes from `first` on. memory: zeros at first, [inputs][sum][line].
template <class T>
void band(const Upfirdn2dArgs& a, const Stage& stage, Ring inputs, int64_t first, int64_t begin, int64_t end,
          float* memory, const float** rows) {
  const Planes<const T> x(static_cast<const T*>(a.x), a.N, a.C, a.H, a.W, a.channels_last, first);
  const Planes<T> y(static_cast<T*>(a.y), a.N, a.C, a.OH, a.OW, a.channels_last, first);
  inputs.memory = memory;
  float *sum = memory + inputs.floats(), *line = sum + stage.floats();
  int64_t read = -1;
  for (int64_t o = begin; o < end; ++o) {
    const auto [from, to, tap] = stage.reach(o);
    for (read = std::max(read, from - 1); read < to - 1; ++read) x.read(read + 1, zero(), inputs.row(read + 1));
    stage.make(o, inputs, sum, rows, line);
    y.write(o, line);
  }
}

template <class T>
void by_planes(const Upfirdn2dArgs& a, const Filter& filter, const Axis& vertical, const Axis& horizontal,
               int threads) {
  const Stage stage(vertical, horizontal, filter);
  const Ring inputs(stage.rows_read() + 1, stage.margins);
  const int64_t own = inputs.floats() + stage.floats() + a.OW * VF, pointers = stage.rows_read();
  const Scratch<float> memory(threads * own);
  const Scratch<const float*> rows(threads * pointers);
  // Bands where there are few planes. Each band reads the rows above it anew, so it is at least eight times as high as
  // the filter.
  const int64_t blocks = (a.N * a.C + VF - 1) / VF, most = std::max<int64_t>(1, a.OH / (8 * stage.rows_read()));
  const int64_t bands = std::clamp<int64_t>((4 * threads + blocks - 1) / blocks, 1, most), jobs = blocks * bands;
#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size();
    float* mine = memory.data + thread * own;
    std::fill_n(mine, own, 0.0f);
    for (int64_t i = part_begin(jobs, thread, team); i < part_begin(jobs, thread + 1, team); ++i)
      band<T>(a, stage, inputs, i / bands * VF, part_begin(a.OH, i % bands, bands),
              part_begin(a.OH, i % bands + 1, bands), mine, rows.data + thread * pointers);
  }
}

// One thread, AVX-512: planes took 0.18 ms where rows took 0.45 for [16, 64, 32, 32] by a 4x4 filter, down 2, 0.43 for
// 0.61 without a factor, 1.15 for 1.33 up 2. With 6 planes, 10 of 16 lanes idle, they took twice as long as rows. In
// channels_last rows are runs of whole vectors already, but upsampled pixels of few channels: [16, 3, 64, 64], 12 taps,
// up 2, took 0.6 ms by planes and 1.9 by rows.
bool planes_pay(const Upfirdn2dArgs& a, const Axis& horizontal) {
  if (a.channels_last) return horizontal.phases > 1 && a.C < VF;
  const int64_t planes = a.N * a.C, lanes = (planes + VF - 1) / VF * VF;
  return 4 * planes >= 3 * lanes;
}

template <class T>
void filtered(const Upfirdn2dArgs& a) {
  const Scratch<Phase> phases(a.up_y + a.up_x);
  const Axis vertical(a.H, a.OH, a.KH, a.up_y, a.down_y, a.pad_y, phases.data);
  const Axis horizontal(a.W, a.OW, a.KW, a.up_x, a.down_x, a.pad_x, phases.data + a.up_y);
  const Taps f{a.f, a.KH, a.KW, a.separable};
  const Scratch<float> taps(f.floats());
  const Filter filter(f, a.flip, a.gain, taps.data);
  const int threads = team_for(a.N * a.C * a.OH * a.OW, a.threads);
  const auto run = planes_pay(a, horizontal) ? by_planes<T> : by_rows<T>;
  run(a, filter, vertical, horizontal, threads);
}

}  // namespace

void upfirdn2d(const Upfirdn2dArgs& args) { args.dtype == BF16 ? filtered<bf16>(args) : filtered<float>(args); }

}  // namespace fg::ISA
