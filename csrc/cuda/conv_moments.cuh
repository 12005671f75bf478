// The statistics of a convolution's output for the batch norm that follows: moments of the sums that a block holds.
//
// The rows of y fall into groups of samples (D(real) and D(fake) in one batch), and each group has blocks of its own,
// so that no block adds up rows of two. A block leaves one part: of every channel the mean of its rows and the sum of
// squared differences from it, and how many rows those are. A second kernel merges a group's parts by Chan's formula.
// Both work in a fixed order. The moments are of y as it is stored, rounded: that y is what the norm reads.
//
// Bytes    8 a part and channel, written and read once: with 128 rows a part a sixteenth of a 16-bit y, with 64 an
//          eighth, in the place of reading y once
// Shuffles 6 a column on tensor cores: 48 a thread with 8 columns, beside the 32 that bring its values side by side
#pragma once

#include "cuda/conv_compute.cuh"

namespace fg::cuda {

// Rows of y that a block has: [first, end), of which it computes the first Block::ROWS.
struct Span {
  int first, end;
};

struct MomentParts {
  float* data;          // means [count][channels], squares [count][channels], rows [count]
  int count, channels;  // parts in all; channels of y in all
  int tiles, phases;    // blocks of rows a group of samples and phase; part = (group phases + phase) tiles + tile
  int samples;          // of a group

  FG_MEMBER int of_group() const { return phases * tiles; }
  FG_MEMBER int part(int tile, int phase) const { return (tile / tiles * phases + phase) * tiles + tile % tiles; }
  FG_MEMBER i64 at(int part, int channel) const { return static_cast<i64>(part) * channels + channel; }
  FG_MEMBER i64 squares() const { return static_cast<i64>(count) * channels; }

  FG_MEMBER void leave_rows(int part, float rows) const { store(data + 2 * squares() + part, rows); }
  FG_MEMBER void leave(int part, int channel, const Moments& m) const {
    store(data + at(part, channel), m.word[1]);
    store(data + squares() + at(part, channel), m.word[2]);
    if (channel == 0) leave_rows(part, m.word[0]);
  }
  FG_MEMBER Moments take(int part, int channel) const {
    Moments m;
    m.word[0] = load(data + 2 * squares() + part);
    m.word[1] = load(data + at(part, channel));
    m.word[2] = load(data + squares() + at(part, channel));
    return m;
  }
};

// The rows of block number `tile`: `rows` of them a group of samples, one group where there are no statistics.
template <int ROWS, bool STATISTICS>
FG_DEVICE Span rows_of(const MomentParts& parts, int tile, int rows) {
  if constexpr (!STATISTICS) return {tile * ROWS, rows};
  const int group = tile / parts.tiles;
  return {group * rows + tile % parts.tiles * ROWS, (group + 1) * rows};
}

// The sums become what y will hold: with the bias, rounded to its type. Rounding them again changes nothing.
template <class G>
FG_DEVICE void round_outputs(typename G::Compute& compute, const float* bias, int first_column, int columns) {
  using Compute = typename G::Compute;
#pragma unroll
  for (int j = 0; j < Compute::HELD_COLUMNS; ++j) {
    const int column = first_column + compute.column(j);
    const float added = column < columns ? load_or(bias, column, 0.0f) : 0.0f;
#pragma unroll
    for (int i = 0; i < Compute::HELD_ROWS; ++i)
      compute.value(i, j) = to_float(from_float<typename G::T>(compute.value(i, j) + added));
  }
}

// Adds over the lanes whose numbers agree modulo FIRST.
template <int FIRST>
FG_DEVICE float sum_lanes(float v) {
#pragma unroll
  for (int lanes = FIRST; lanes < WARP; lanes *= 2) v += __shfl_xor_sync(ALL_LANES, v, lanes);
  return v;
}

// The moments of the block's values inside `rows`, a part. Each warp takes the mean of its rows first and the squares
// around it, from registers: a mean of thousands of standard deviations costs no digits. The warps that share columns
// meet in the pipeline's memory, which is free behind the barrier.
template <class G>
FG_DEVICE void leave_moments(typename G::Compute& compute, const MomentParts& parts, int part, const Span& rows,
                             int first_column, int columns, int first_channel) {
  using Compute = typename G::Compute;
  constexpr int COLUMNS = G::Block::COLUMNS, SHARES = Compute::SHARES, LANES = Compute::LANES;
  static_assert(Moments::WORDS * SHARES * COLUMNS * sizeof(float) <= G::SHARED_BYTES && COLUMNS <= G::THREADS);
  FG_DYN_SHARED(float, shared);
  const auto at = [&](int word, int share, int column) { return shared + (word * SHARES + share) * COLUMNS + column; };
  bool live[Compute::HELD_ROWS];
  float count = 0.0f;
#pragma unroll
  for (int i = 0; i < Compute::HELD_ROWS; ++i) {
    live[i] = rows.first + compute.row(i) < rows.end;
    count += live[i] ? 1.0f : 0.0f;
  }
  count = sum_lanes<LANES>(count);
  const float share_of_one = 1.0f / fmaxf(count, 1.0f);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < Compute::HELD_COLUMNS; ++j) {
    float mean = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < Compute::HELD_ROWS; ++i) mean += live[i] ? compute.value(i, j) : 0.0f;
    mean = sum_lanes<LANES>(mean) * share_of_one;
#pragma unroll
    for (int i = 0; i < Compute::HELD_ROWS; ++i) {
      const float distance = live[i] ? compute.value(i, j) - mean : 0.0f;
      squares = fmaf(distance, distance, squares);
    }
    squares = sum_lanes<LANES>(squares);
    if (threadIdx.x % WARP < LANES) {
      store_shared(at(0, compute.share(), compute.column(j)), count);
      store_shared(at(1, compute.share(), compute.column(j)), mean);
      store_shared(at(2, compute.share(), compute.column(j)), squares);
    }
  }
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column >= COLUMNS || first_column + column >= columns) return;
  Moments total;
#pragma unroll
  for (int share = 0; share < SHARES; ++share) {
    Moments one;
#pragma unroll
    for (int k = 0; k < Moments::WORDS; ++k) one.word[k] = load_shared<float>(at(k, share, column));
    if (share == 0)
      total = one;
    else
      total.merge(one);
  }
  parts.leave(part, first_channel + first_column + column, total);
}

constexpr int FINISH_THREADS = 256;
constexpr int FINISH_CHANNELS = 8;  // 32 bytes of a row of parts, a sector; the 32 rows of a block find more parts so

// mean, var [groups][channels] from the parts of each group. Grid: groups x CHANNELS channels. Four parts in flight a
// thread; a part may be empty, and then its mean is undefined.
template <int CHANNELS>
__global__ void __launch_bounds__(FINISH_THREADS) conv_statistics_kernel(MomentParts parts, float* mean, float* var) {
  constexpr int ROWS = FINISH_THREADS / CHANNELS, UNROLL = 4;
  const int tiles = (parts.channels + CHANNELS - 1) / CHANNELS, group = blockIdx.x / tiles;
  const int channel = blockIdx.x % tiles * CHANNELS + threadIdx.x % CHANNELS;
  Moments total;
  total.clear();
  for (int first = threadIdx.x / CHANNELS; first < parts.of_group(); first += ROWS * UNROLL) {
    Moments part[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int i = first + u * ROWS;
      part[u].clear();
      if (i < parts.of_group() && channel < parts.channels) part[u] = parts.take(group * parts.of_group() + i, channel);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) total.merge(part[u]);
  }
  merge_block<FINISH_THREADS, CHANNELS>(total);
  if (threadIdx.x >= CHANNELS || channel >= parts.channels) return;
  const i64 at = static_cast<i64>(group) * parts.channels + channel;
  store(mean + at, total.mean());
  store(var + at, total.variance());
}

}  // namespace fg::cuda
