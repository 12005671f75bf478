// y = f_down * phi(f_up * (x + bias)) in one pass, phi a leaky ReLU with gain and clamp, and its derivative, in which
// phi is a product with the slope that the forward pass left as signs. The upsampled image, "fine" below, stays on
// chip.
//
// A block walks down a strip of columns of a plane (in channels_last of up to 8 planes side by side, so that a pixel's
// 32 bytes are used) in steps of a few output rows. Rows that a vertical filter will reach again slide up in shared
// memory instead of being made again: x is read once and a fine row made once a strip; strips overlap by a filter.
// A filter that is a product runs along the rows first; any other one is summed in full by the vertical pass.
//
// Bound: x, y and the signs once, 6.3 MB of a [8, 64, 36, 36] in float32, 3 us on an A100; StyleGAN3's 12 taps, up 2
// and down 2, are 112 MFLOP of it, 6 us. A thread makes four sums with one load of a tap, which are 25 accesses of
// shared memory for each fine sample, and 46 as counted, with idle lanes, two columns to a bank and the rows before a
// walk's first: one a cycle for 32 samples, they take 32 us there and bind.
#pragma once

#include "cuda/upfirdn2d.cuh"

namespace fg::cuda {

constexpr int FILTERED_THREADS = 256, FILTERED_ROWS = 4;  // sums that a thread makes with one load of a tap

// What the blocks share. Windows are those of one step: what its filters read and make.
struct Filtering {
  FirAxis up_y, up_x, down_y, down_x;      // from x to the fine image and from there to y
  int channels, lanes;                     // lanes: planes of a block
  int rows, columns, strips, band, bands;  // output rows of a step and of a band, columns of a strip
  int coarse_rows, coarse_columns, fine_rows, fine_columns, raw_rows, kept_rows;
  int raw_plane, coarse_plane, fine_plane, kept_plane;  // floats of a plane's window
  int taps_up, taps_down;                               // floats
  bool separable_up, separable_down, flip, channels_last;
  float gain_up, gain, low, clamp;  // low: gain slope

  // Rows before the last vertical filter have gone along a product's rows already.
  __host__ FG_MEMBER int coarse_pitch() const { return separable_up ? fine_columns : coarse_columns; }
  __host__ FG_MEMBER int kept_pitch() const { return separable_down ? columns : fine_columns; }
  __host__ FG_MEMBER int words() const { return (up_x.out + WARP - 1) / WARP; }
  // Fine columns of a strip begin where a word of signs does, which the forward pass (pad 0) writes.
  __host__ FG_MEMBER int first_fine(int column, bool forward) const {
    const int first = column * down_x.down - down_x.pad;
    return forward ? first / WARP * WARP : first;
  }
};

// known: of the backward pass, signs: of the forward pass, both [1 or 2][planes][fine rows][words].
template <class T>
struct FilteredTensors {
  const T* x;
  const float *bias, *f_up, *f_down;
  T* y;
  const u32* known;
  u32* signs;
  i64 planes;
};

// How many of taps tap, tap + up, ... there are.
FG_DEVICE int taps_left(const FirAxis& a, int tap) { return tap < a.taps ? (a.taps - tap + a.up - 1) / a.up : 0; }

using FilteredSums = float[FILTERED_ROWS];

// sums[r] += taps over samples at[apart[r]], `step` from one another.
FG_DEVICE void add_taps(const float* at, int step, const int (&apart)[FILTERED_ROWS], const float* taps, int tap_step,
                        int count, FilteredSums& sums) {
  for (int k = 0; k < count; ++k, at += step, taps += tap_step) {
    const float weight = load_shared<float>(taps);
#pragma unroll
    for (int r = 0; r < FILTERED_ROWS; ++r) sums[r] += weight * load_shared<float>(at + apart[r]);
  }
}

template <class T, bool FORWARD>
struct FilteredBlock {
  const Filtering& f;
  const FilteredTensors<T>& t;
  float *up, *down, *raw, *coarse, *fine, *kept;  // shared memory: taps, then the windows
  int here;                                       // planes that there are
  int begin, end, left, right;                    // output rows and columns
  int fine_left, coarse_left;
  int own_rows_begin, own_rows_end, own_word_begin, own_word_end;  // of the signs
  i64 plane, sample;                                               // the first plane, its first channel's sample

  FG_MEMBER FilteredBlock(const Filtering& filtering, const FilteredTensors<T>& tensors, float* memory)
      : f(filtering), t(tensors) {
    up = memory;
    down = up + f.taps_up;
    raw = down + f.taps_down;
    coarse = raw + f.lanes * f.raw_plane;
    fine = coarse + f.lanes * f.coarse_plane;
    kept = fine + f.lanes * f.fine_plane;
    i64 b = blockIdx.x;
    const int strip = static_cast<int>(b % f.strips), band = static_cast<int>(b / f.strips % f.bands);
    b = b / f.strips / f.bands;
    const int groups = (f.channels + f.lanes - 1) / f.lanes, channel = static_cast<int>(b % groups) * f.lanes;
    sample = b / groups;
    plane = sample * f.channels + channel;
    here = min(f.lanes, f.channels - channel);
    begin = band * f.band;
    end = min(begin + f.band, f.down_y.out);
    left = strip * f.columns;
    right = min(left + f.columns, f.down_x.out);
    fine_left = f.first_fine(left, FORWARD);
    coarse_left = taps_at(f.up_x, fine_left).first;
    own_rows_begin = begin * f.down_y.down;
    own_rows_end = band + 1 == f.bands ? f.up_y.out : end * f.down_y.down;
    own_word_begin = fine_left / WARP;
    own_word_end = strip + 1 == f.strips ? f.words() : f.first_fine(right, FORWARD) / WARP;
  }

  FG_MEMBER void run() const {
    load_taps(up, t.f_up, f.up_y, f.up_x, f.separable_up, f.gain_up);
    load_taps(down, t.f_down, f.down_y, f.down_x, f.separable_down, 1.0f);
    const int lag = f.down_y.taps - 1, prime = (lag + f.fine_rows - 1) / f.fine_rows;
    const auto fine_row = [&](int step) {
      return (begin + step * f.rows) * f.down_y.down - f.down_y.pad + lag;  // the first one that a step makes
    };
    int first = taps_at(f.up_y, fine_row(-prime)).first, loaded = first;
    for (int step = -prime; begin + step * f.rows < end; ++step) {
      const int row = fine_row(step), before = first;
      first = taps_at(f.up_y, row).first;
      slide(coarse, f.coarse_plane, f.coarse_rows, f.coarse_pitch(), first - before);
      slide(kept, f.kept_plane, f.kept_rows, f.kept_pitch(), f.fine_rows);
      __syncthreads();
      while (loaded < first + f.coarse_rows) loaded += add_coarse(loaded, first);
      add_fine(row, first);
      __syncthreads();
      if (f.separable_down) {
        along_fine();
        __syncthreads();
      }
      if (step >= 0) finish(begin + step * f.rows);
      __syncthreads();
    }
  }

  // The filter as it is slid, with its gain: of a product the column, then the row.
  FG_MEMBER void load_taps(float* to, const float* from, const FirAxis& y, const FirAxis& x, bool separable,
                           float gain) const {
    const int count = separable ? y.taps + x.taps : y.taps * x.taps;
    for (int i = threadIdx.x; i < count; i += FILTERED_THREADS) {
      float tap;
      if (!separable)
        tap = gain * load(from + place(y, i / x.taps, f.flip) * x.taps + place(x, i % x.taps, f.flip));
      else if (i < y.taps)
        tap = load(from + place(y, i, f.flip));
      else
        tap = gain * load(from + place(x, i - y.taps, f.flip));
      store_shared(to + i, tap);
    }
  }

  // Rows move up by `by`: a thread keeps to its columns, so none overtakes another.
  FG_MEMBER void slide(float* window, int size, int rows, int pitch, int by) const {
    for (int i = threadIdx.x; i < here * pitch; i += FILTERED_THREADS) {
      float* at = window + i / pitch * size + i % pitch;
      for (int r = 0; r + by < rows; ++r, at += pitch) store_shared(at, load_shared<float>(at + by * pitch));
    }
  }

  // Calls visit(plane, row, column) for every place of a window; `side_by_side`: neighbouring threads have the planes
  // of a pixel, as channels_last does, else the pixels of a plane.
  template <class F>
  FG_MEMBER void each_place(int rows, int columns, bool side_by_side, const F& visit) const {
    for (int i = threadIdx.x; i < here * rows * columns; i += FILTERED_THREADS) {
      const int lane = side_by_side ? i % here : i / (rows * columns), pixel = side_by_side ? i / here : i;
      visit(lane, pixel / columns % rows, pixel % columns);
    }
  }

  // As each_place, by warps: 32 columns of one row, and past the window's last column too.
  template <class F>
  FG_MEMBER void each_warp(int rows, int columns, const F& visit) const {
    const int words = (columns + WARP - 1) / WARP;
    for (int i = threadIdx.x / WARP; i < here * rows * words; i += FILTERED_THREADS / WARP)
      visit(i / words / rows, i / words % rows, i % words * WARP + static_cast<int>(threadIdx.x % WARP));
  }

  // Up to raw_rows rows of x from `row` on, into the coarse window that begins with row `first`; how many.
  FG_MEMBER int add_coarse(int row, int first) const {
    const int count = min(f.raw_rows, first + f.coarse_rows - row), inner = f.channels_last ? f.channels : 1;
    const int window = f.separable_up ? 0 : row - first, size = f.separable_up ? f.raw_plane : f.coarse_plane;
    float* to = f.separable_up ? raw : coarse;
    const i64 image = (f.channels_last ? sample * f.channels : plane) * f.up_y.in * f.up_x.in +
                      (f.channels_last ? plane - sample * f.channels : 0);
    each_place(count, f.coarse_columns, f.channels_last, [&](int lane, int r, int c) {
      const int i = row + r, j = coarse_left + c;
      float value = 0.0f;
      if (i >= 0 && i < f.up_y.in && j >= 0 && j < f.up_x.in) {
        value = to_float(load(t.x + image + lane + (static_cast<i64>(i) * f.up_x.in + j) * inner));
        if (FORWARD) value += load_or(t.bias, (plane + lane) % f.channels, 0.0f);
      }
      store_shared(to + lane * size + (window + r) * f.coarse_columns + c, value);
    });
    __syncthreads();
    if (!f.separable_up) return count;
    each_place((count + FILTERED_ROWS - 1) / FILTERED_ROWS, f.fine_columns, false, [&](int lane, int group, int c) {
      const FirTaps x = taps_at(f.up_x, fine_left + c);
      const int r = group * FILTERED_ROWS;
      FilteredSums sums{};
      along(raw + lane * f.raw_plane + r * f.coarse_columns + x.first - coarse_left, f.coarse_columns, count - r,
            up + f.up_y.taps + x.tap, f.up_x.up, taps_left(f.up_x, x.tap), sums);
      keep(sums, coarse + lane * f.coarse_plane + (row + r - first) * f.fine_columns + c, f.fine_columns, count - r);
    });
    __syncthreads();
    return count;
  }

  // Sums along up to four rows; those past the last are the last one's.
  FG_MEMBER void along(const float* at, int pitch, int rows, const float* taps, int tap_step, int count,
                       FilteredSums& sums) const {
    int apart[FILTERED_ROWS];
#pragma unroll
    for (int r = 0; r < FILTERED_ROWS; ++r) apart[r] = min(r, rows - 1) * pitch;
    add_taps(at, 1, apart, taps, tap_step, count, sums);
  }
  FG_MEMBER void keep(const FilteredSums& sums, float* to, int pitch, int rows) const {
#pragma unroll
    for (int r = 0; r < FILTERED_ROWS; ++r)
      if (r < rows) store_shared(to + r * pitch, sums[r]);
  }

  // Sums down the rows of a product, over rows and columns of any other filter; every `apart` rows one, `rows` of them.
  FG_MEMBER void across(const float* at, int pitch, int apart, int rows, const float* taps, bool separable,
                        const FirAxis& y, const FirAxis& x, int tap_y, int tap_x, FilteredSums& sums) const {
    int offset[FILTERED_ROWS];
#pragma unroll
    for (int r = 0; r < FILTERED_ROWS; ++r) offset[r] = min(r, rows - 1) * apart * pitch;
    const int count = taps_left(y, tap_y);
    if (separable) return add_taps(at, pitch, offset, taps + tap_y, y.up, count, sums);
    for (int k = 0; k < count; ++k)
      add_taps(at + k * pitch, 1, offset, taps + (tap_y + k * y.up) * x.taps + tap_x, x.up, taps_left(x, tap_x), sums);
  }

  // The fine rows from `row` on through phi. A thread's rows are `up` apart: they meet the same taps.
  FG_MEMBER void add_fine(int row, int first) const {
    const int factor = f.up_y.up, high = FILTERED_ROWS * factor;
    const int groups = (f.fine_rows + high - 1) / high * factor;
    each_warp(groups, f.fine_columns, [&](int lane, int group, int c) {
      const int r = group / factor * high + group % factor, rows = (f.fine_rows - r + factor - 1) / factor;
      if (rows < 1) return;
      const FirTaps y = taps_at(f.up_y, row + r), x = taps_at(f.up_x, fine_left + min(c, f.fine_columns - 1));
      const float* at = coarse + lane * f.coarse_plane + (y.first - first) * f.coarse_pitch();
      FilteredSums sums{};
      across(at + (f.separable_up ? min(c, f.fine_columns - 1) : x.first - coarse_left), f.coarse_pitch(), 1, rows, up,
             f.separable_up, f.up_y, f.up_x, y.tap, x.tap, sums);
      float* to = f.separable_down ? fine + lane * f.fine_plane + r * f.fine_columns
                                   : kept + lane * f.kept_plane + (f.down_y.taps - 1 + r) * f.fine_columns;
#pragma unroll
      for (int k = 0; k < FILTERED_ROWS; ++k) {
        if (k >= rows) break;  // of the whole warp
        const float value = phi(sums[k], plane + lane, row + r + k * factor, c);
        if (c < f.fine_columns) store_shared(to + k * factor * f.fine_columns + c, value);
      }
    });
  }

  // phi of the sample in fine row `m` and column c of the window; 0 outside the fine image. All lanes of a warp call
  // it.
  FG_MEMBER float phi(float v, i64 of_plane, int m, int c) const {
    const int column = fine_left + c;
    const bool inside = m >= 0 && m < f.up_y.out && column >= 0 && column < f.up_x.out && c < f.fine_columns;
    const i64 word = (of_plane * f.up_y.out + m) * f.words() + column / WARP;
    const i64 kinds = t.planes * f.up_y.out * f.words();
    if (!FORWARD) {
      if (!inside) return 0.0f;
      const u32 bit = 1u << column % WARP, lows = load(t.known + word);
      const u32 helds = f.clamp >= 0.0f ? load(t.known + kinds + word) : 0u;
      return helds & bit ? 0.0f : v * (lows & bit ? f.low : f.gain);
    }
    const bool low = inside && !(v > 0.0f);
    v *= v > 0.0f ? f.gain : f.low;
    const bool held = inside && f.clamp >= 0.0f && fabsf(v) >= f.clamp;
    const u32 lows = __ballot_sync(ALL_LANES, low), helds = __ballot_sync(ALL_LANES, held);
    const int at = column / WARP;
    if (threadIdx.x % WARP == 0 && m >= own_rows_begin && m < own_rows_end && at >= own_word_begin &&
        at < own_word_end) {
      store(t.signs + word, lows);
      if (f.clamp >= 0.0f) store(t.signs + kinds + word, helds);
    }
    if (held) v = v > 0.0f ? f.clamp : -f.clamp;
    return inside ? v : 0.0f;
  }

  // New fine rows along a product's rows, to the end of what is kept.
  FG_MEMBER void along_fine() const {
    const int shift = left * f.down_x.down - f.down_x.pad - fine_left;
    each_place((f.fine_rows + FILTERED_ROWS - 1) / FILTERED_ROWS, f.columns, false, [&](int lane, int group, int c) {
      const int r = group * FILTERED_ROWS;
      FilteredSums sums{};
      along(fine + lane * f.fine_plane + r * f.fine_columns + shift + c * f.down_x.down, f.fine_columns,
            f.fine_rows - r, down + f.down_y.taps, 1, f.down_x.taps, sums);
      keep(sums, kept + lane * f.kept_plane + (f.down_y.taps - 1 + r) * f.columns + c, f.columns, f.fine_rows - r);
    });
  }

  // Output rows from `row` on.
  FG_MEMBER void finish(int row) const {
    const int shift = left * f.down_x.down - f.down_x.pad - fine_left, inner = f.channels_last ? f.channels : 1;
    const i64 image = (f.channels_last ? sample * f.channels : plane) * f.down_y.out * f.down_x.out +
                      (f.channels_last ? plane - sample * f.channels : 0);
    const int rows = min(f.rows, end - row);
    each_place((rows + FILTERED_ROWS - 1) / FILTERED_ROWS, right - left, f.channels_last,
               [&](int lane, int group, int c) {
                 const int r = group * FILTERED_ROWS;
                 const float* at = kept + lane * f.kept_plane + r * f.down_y.down * f.kept_pitch();
                 FilteredSums sums{};
                 across(at + (f.separable_down ? c : shift + c * f.down_x.down), f.kept_pitch(), f.down_y.down,
                        rows - r, down, f.separable_down, f.down_y, f.down_x, 0, 0, sums);
#pragma unroll
                 for (int k = 0; k < FILTERED_ROWS; ++k)
                   if (r + k < rows)
                     store(t.y + image + lane + (static_cast<i64>(row + r + k) * f.down_x.out + left + c) * inner,
                           from_float<T>(sums[k]));
               });
  }
};

// Grid: strips, then bands, then groups of planes. Dynamic shared memory: taps and windows. Three blocks a
// multiprocessor take 80 registers; without the bound ptxas spilled 28 bytes on sm_80 to keep within 48, for one it
// took 128 to 160.
template <class T, bool FORWARD>
__global__ void __launch_bounds__(FILTERED_THREADS, 3) filtered_lrelu_kernel(Filtering f, FilteredTensors<T> t) {
  FG_DYN_SHARED(float, memory);
  FilteredBlock<T, FORWARD>(f, t, memory).run();
}

}  // namespace fg::cuda
