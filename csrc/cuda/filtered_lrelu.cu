#include "cuda/filtered_lrelu.cuh"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "cuda/kernels.hpp"
#include "cuda/launch.hpp"

namespace fg::cuda {
namespace {

// Bytes of shared memory that a block should have, which leave room for four and two blocks on every card but a T4 (two
// and one), and those that a long filter may take, a T4's. 32 taps and a factor of 32 fit: a strip of one column.
constexpr int64_t BUDGETS[] = {24 << 10, 48 << 10}, MOST = 64 << 10;
constexpr int SECTOR = 32;  // bytes that memory moves at a time: of a pixel in channels_last

Filtering filtering(const FilteredLreluShape& s, bool forward) {
  const auto axis = [](auto... v) { return FirAxis{static_cast<int>(v)...}; };
  Filtering f{};
  f.up_y = axis(s.H, s.MH, s.KH_up, s.up, 1, s.pad_y);
  f.up_x = axis(s.W, s.MW, s.KW_up, s.up, 1, s.pad_x);
  f.down_y = axis(s.MH, s.OH, s.KH_down, 1, s.down, s.pad_out_y);
  f.down_x = axis(s.MW, s.OW, s.KW_down, 1, s.down, s.pad_out_x);
  f.channels = static_cast<int>(s.C);
  f.separable_up = s.separable_up;
  f.separable_down = s.separable_down;
  f.flip = s.flip;
  f.channels_last = s.channels_last;
  f.gain_up = forward ? static_cast<float>(s.up * s.up) : 1.0f;
  f.gain = s.gain;
  f.low = s.gain * s.slope;
  f.clamp = s.clamp;
  f.taps_up = f.separable_up ? f.up_y.taps + f.up_x.taps : f.up_y.taps * f.up_x.taps;
  f.taps_down = f.separable_down ? f.down_y.taps + f.down_x.taps : f.down_y.taps * f.down_x.taps;
  return f;
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The windows of steps of so many output rows in strips of so many columns; the bytes that they take.
int64_t cut(Filtering& f, int lanes, int rows, int columns, bool forward) {
  const int whole = f.down_x.out, up = f.up_x.up, down = f.down_x.down;
  f.lanes = lanes;
  f.rows = rows;
  f.columns = columns;
  f.strips = ceil_div(whole, columns);
  const int early = forward && f.strips > 1 && columns * down % WARP ? WARP - 1 : 0;  // to the start of a word
  f.fine_rows = rows * down;
  f.fine_columns = columns * down + f.down_x.taps - 1 + early;
  f.coarse_rows = ceil_div(f.fine_rows - 1, up) + ceil_div(f.up_y.taps, up);
  f.coarse_columns = ceil_div(f.fine_columns - 1, up) + ceil_div(f.up_x.taps, up);
  f.raw_rows = ceil_div(f.fine_rows, up);
  f.kept_rows = f.down_y.taps - 1 + f.fine_rows;
  // Planes side by side lie 32 / lanes banks apart, so that a warp's pixels of all of them meet no bank twice.
  const auto plane = [lanes](int rows, int columns) {
    return lanes == 1 ? rows * columns : ceil_div(rows * columns, WARP) * WARP + WARP / lanes;
  };
  f.raw_plane = f.separable_up ? plane(f.raw_rows, f.coarse_columns) : 0;
  f.coarse_plane = plane(f.coarse_rows, f.coarse_pitch());
  f.fine_plane = f.separable_down ? plane(f.fine_rows, f.fine_columns) : 0;
  f.kept_plane = plane(f.kept_rows, f.kept_pitch());
  const int64_t windows = int64_t{f.raw_plane} + f.coarse_plane + f.fine_plane + f.kept_plane;
  return 4 * (f.taps_up + f.taps_down + lanes * windows);
}

// The first that fits: all planes of a pixel's sector, where there are as many, before fewer, wide strips before narrow
// ones (a strip makes the last filter's columns again: at most as many as its own, while there are planes to give up),
// 16 fine rows a step before 8, below which a thread's four sums are not all needed. Returns the bytes.
int64_t fit(Filtering& f, int element_size, bool forward) {
  const int down = f.down_x.down, unit = WARP / std::gcd(WARP, down);
  int most = f.channels_last ? SECTOR / element_size : 1;
  while (most / 2 >= f.channels) most /= 2;
  for (int lanes = most; lanes >= 1; lanes /= 2)
    for (const int64_t budget : BUDGETS)
      for (int strips = 1;; ++strips) {
        const int columns = strips == 1 ? f.down_x.out : ceil_div(ceil_div(f.down_x.out, strips), unit) * unit;
        for (const int fine_rows : {16, 8})
          if (const int64_t bytes = cut(f, lanes, ceil_div(fine_rows, down), columns, forward); bytes <= budget)
            return bytes;
        if (f.fine_columns > 2 * columns * down || columns <= unit) break;
      }
  for (int columns = f.down_x.out;; columns = ceil_div(columns, 2)) {  // long filters or large factors
    const int64_t bytes = cut(f, 1, 1, columns, forward);
    if (bytes <= MOST) return bytes;
    if (columns == 1) return 0;
  }
}

// Bands where there are few blocks: each makes the last filter's rows anew, so it is four times as high at least.
void band(Filtering& f, int64_t blocks) {
  const int64_t most = std::max<int64_t>(1, int64_t{f.down_y.out} * f.down_y.down / (4 * f.down_y.taps));
  const int64_t aim = divide_up(4 * int64_t{device_attribute(cudaDevAttrMultiProcessorCount)}, blocks);
  const int bands = static_cast<int>(std::clamp<int64_t>(aim, 1, most));
  f.band = ceil_div(ceil_div(f.down_y.out, bands), f.rows) * f.rows;
  f.bands = ceil_div(f.down_y.out, f.band);
}

struct Where {
  const void* x;
  const float *bias, *f_up, *f_down;
  void* y;
  const void* known;
  void* signs;
};

template <bool FORWARD>
void run(const char* op, const FilteredLreluShape& s, const Where& w, const Target& target) {
  const int64_t reach = std::max({s.H * s.up, s.W * s.up, s.MH, s.MW, s.OH * s.down, s.OW * s.down});
  if (reach + std::max({std::abs(s.pad_y), std::abs(s.pad_x), std::abs(s.pad_out_y), std::abs(s.pad_out_x)}) >
      INT32_MAX / 2)
    throw std::invalid_argument(std::string(op) + ": an axis with its zeros and padding must be below 2^30 long, got " +
                                std::to_string(reach));
  Filtering f = filtering(s, FORWARD);
  const int64_t bytes = fit(f, s.dtype == F32 ? 4 : 2, FORWARD);
  if (!bytes)
    throw std::invalid_argument(std::string(op) + ": filters and factors must be at most 32, got " +
                                std::to_string(std::max({s.KH_up, s.KW_up, s.KH_down, s.KW_down, s.up, s.down})));
  const int64_t blocks = s.N * divide_up(s.C, f.lanes) * f.strips;
  band(f, blocks);
  by_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    const FilteredTensors<T> t{
        static_cast<const T*>(w.x), w.bias,   w.f_up, w.f_down, static_cast<T*>(w.y), static_cast<const u32*>(w.known),
        static_cast<u32*>(w.signs), s.N * s.C};
    FG_ALLOW_SHARED(FG_KERNEL(filtered_lrelu_kernel, T, FORWARD), bytes);
    FG_LAUNCH(FG_KERNEL(filtered_lrelu_kernel, T, FORWARD), grid_of(op, blocks * f.bands), FILTERED_THREADS, bytes,
              target.stream, f, t);
  });
  check_launch(op);
}

}  // namespace

int64_t filtered_lrelu_forward(const FilteredLreluShape& s, const FilteredLreluForwardArgs& a, const Target& target) {
  run<true>("filtered_lrelu_forward", s, {a.x, a.bias, a.f_up, a.f_down, a.y, nullptr, a.signs}, target);
  return 0;
}

int64_t filtered_lrelu_backward(const FilteredLreluShape& s, const FilteredLreluBackwardArgs& a, const Target& target) {
  run<false>("filtered_lrelu_backward", s, {a.x, nullptr, a.f_up, a.f_down, a.y, a.signs, nullptr}, target);
  return 0;
}

}  // namespace fg::cuda
