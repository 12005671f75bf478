// The four ways in which a memory-bound kernel walks a dense activation tensor.
//
//              NCHW: rows of HW pixels of one channel        channels_last: rows of C channels
//   apply      apply_rows_kernel: any thread, any row        apply_columns_kernel: a thread keeps its channels
//   reduce     reduce_rows_kernel: a block keeps its channel reduce_columns_kernel: a thread keeps its channels
//
// An op gives a Body: which tensors come and go, the constants of V neighbouring channels (coefs), and what happens to
// an element. The N samples fall into G groups of N/G, and a channel's constants may differ by group. V elements move
// at a time: 16 bytes where rows and addresses allow it, else 1. Reductions leave partials [G][splits][WORDS][C]; the
// splits depend on the shape alone, so sums are bit-equal from run to run and from card to card. A Body that WRITES is
// applied by its reduction too, in the same pass. Two kinds of Body know of both axes: one with ALONG > 0 has
// per-channel vectors along its rows, which reduce_rows gives it as further inputs; one with At has constants of each
// row of columns too, which at_row(row, coefs, at) joins with those of the columns.
#pragma once

#include "cuda/prelude.cuh"

namespace fg::cuda {

constexpr int THREADS = 256;
constexpr int COLUMN_LANES = 16;  // vectors side by side in a block: 256 bytes of a row, whole sectors

struct Planes {
  int groups, channels;  // G, C
  i64 samples, pixels;   // N/G, HW
};

// Vectors in flight a thread: 64 bytes of loads, whatever the number of inputs.
template <class Body>
constexpr int UNROLL = Body::INPUTS >= 3 ? 1 : 4 / Body::INPUTS;

// A null input reads as zero, a null output is not written: the same for every thread of a kernel.
template <class Body, int V>
FG_DEVICE void load_inputs(const Body& body, i64 at, Pack<typename Body::T, V> (&raw)[Body::INPUTS]) {
#pragma unroll
  for (int k = 0; k < Body::INPUTS; ++k) {
    if (body.in[k]) {
      raw[k] = load<V>(body.in[k] + at);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) raw[k].v[j] = from_float<typename Body::T>(0.0f);
    }
  }
}

template <class Body, int V, class CoefOf>
FG_DEVICE void apply_one(const Body& body, i64 at, const Pack<typename Body::T, V> (&raw)[Body::INPUTS],
                         const CoefOf& coef_of) {
  using T = typename Body::T;
  Pack<T, V> result[Body::OUTPUTS];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    float in[Body::INPUTS], out[Body::OUTPUTS];
#pragma unroll
    for (int k = 0; k < Body::INPUTS; ++k) in[k] = to_float(raw[k].v[j]);
    body.apply(coef_of(j), in, out);
#pragma unroll
    for (int k = 0; k < Body::OUTPUTS; ++k) result[k].v[j] = from_float<T>(out[k]);
  }
#pragma unroll
  for (int k = 0; k < Body::OUTPUTS; ++k)
    if (body.out[k]) store<V>(body.out[k] + at, result[k]);
}

template <class Body>
concept ByRow = requires { typename Body::At; };

template <class Body>
constexpr int ALONG = 0;
template <class Body>
  requires(Body::ALONG > 0)
constexpr int ALONG<Body> = Body::ALONG;

// V columns of one row.
template <class Body, int V>
FG_DEVICE void apply_columns_of(const Body& body, i64 row, i64 at, const Pack<typename Body::T, V> (&raw)[Body::INPUTS],
                                const typename Body::Coef (&coefs)[V]) {
  if constexpr (ByRow<Body>) {
    typename Body::At here[V];
    body.at_row(row, coefs, here);
    apply_one<Body, V>(body, at, raw, [&](int j) { return here[j]; });
  } else {
    apply_one<Body, V>(body, at, raw, [&](int j) { return coefs[j]; });
  }
}

// ---------------------------------------------------------------------------------------------- apply

// Blocks start in the order of their index. A reduction with many groups (group norm) goes through the tensor from its
// beginning, so the L2 cache then holds the end of a larger tensor, and apply begins there. A reduction that goes
// through all of it at once (batch norm's splits) leaves a part of everything in the cache: there any order will do.
FG_DEVICE u32 last_first() { return gridDim.x - 1 - blockIdx.x; }

// Grid: blocks of THREADS * UNROLL vectors, over all of the tensor. V divides HW.
template <class Body, int V>
__global__ void __launch_bounds__(THREADS) apply_rows_kernel(Body body, Planes p) {
  constexpr int U = UNROLL<Body>;
  const u32 row_vectors = static_cast<u32>(p.pixels / V), channels = static_cast<u32>(p.channels);
  const i64 rows = p.groups * p.samples * p.channels, total = rows * row_vectors;
  // 64-bit divisions once a block, 32-bit ones a thread
  const i64 begin = static_cast<i64>(last_first()) * (THREADS * U), row0 = begin / row_vectors,
            sample0 = row0 / channels;
  const u32 offset0 = static_cast<u32>(begin - row0 * row_vectors);
  const u32 channel0 = static_cast<u32>(row0 - sample0 * channels);
  Pack<typename Body::T, V> raw[U][Body::INPUTS];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const i64 at = begin + u * THREADS + threadIdx.x;
    if (at < total) load_inputs<Body, V>(body, at * V, raw[u]);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const u32 local = u * THREADS + threadIdx.x;
    if (begin + local >= total) break;
    const u32 channel = channel0 + (offset0 + local) / row_vectors;
    const i64 sample = sample0 + channel / channels;
    const i64 group = p.groups == 1 ? 0 : sample / p.samples;
    typename Body::Coef coef[1];
    body.coefs(group, static_cast<int>(channel % channels), coef);
    apply_one<Body, V>(body, (begin + local) * V, raw[u], [&](int) { return coef[0]; });
  }
}

// The part of a channels_last tensor that a block has: columns [column, column + V) of rows [begin, end) of a group.
struct Slab {
  int column, lane_x, lane_y, lanes_y;
  i64 group, split, begin, end;
  bool inside;
};

template <int V>
FG_DEVICE Slab slab_of(const Planes& p, u32 block_index, int lanes_x, int splits, i64 rows_per_split) {
  const int tiles = (p.channels + lanes_x * V - 1) / (lanes_x * V);
  Slab t;
  t.lane_x = static_cast<int>(threadIdx.x) % lanes_x;
  t.lane_y = static_cast<int>(threadIdx.x) / lanes_x;
  t.lanes_y = THREADS / lanes_x;
  const i64 block = block_index, rest = block / tiles;
  t.column = (static_cast<int>(block - rest * tiles) * lanes_x + t.lane_x) * V;
  t.group = rest / splits;
  t.split = rest - t.group * splits;
  const i64 rows = p.samples * p.pixels;
  t.begin = t.split * rows_per_split;
  t.end = t.begin + rows_per_split < rows ? t.begin + rows_per_split : rows;
  t.inside = t.column < p.channels;
  return t;
}

// Grid: groups x splits x column tiles; lanes_x is a power of two up to COLUMN_LANES. V divides C.
template <class Body, int V>
__global__ void __launch_bounds__(THREADS, ByRow<Body> ? 1 : 0)
    apply_columns_kernel(Body body, Planes p, int lanes_x, int splits, i64 rows_per_split) {
  constexpr int U = UNROLL<Body>;
  const Slab t = slab_of<V>(p, last_first(), lanes_x, splits, rows_per_split);
  if (!t.inside) return;
  typename Body::Coef coefs[V];
  body.coefs(t.group, t.column, coefs);
  const i64 base = t.group * p.samples * p.pixels * p.channels + t.column;
  for (i64 row = t.begin + t.lane_y; row < t.end; row += static_cast<i64>(t.lanes_y) * U) {
    Pack<typename Body::T, V> raw[U][Body::INPUTS];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const i64 r = row + u * t.lanes_y;
      if (r < t.end) load_inputs<Body, V>(body, base + r * p.channels, raw[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const i64 r = row + u * t.lanes_y;
      if (r < t.end) apply_columns_of<Body, V>(body, r, base + r * p.channels, raw[u], coefs);
    }
  }
}

// ---------------------------------------------------------------------------------------------- reduce

FG_DEVICE float* partial_at(float* partials, i64 group, int splits, i64 split, int words, int word, int channels) {
  return partials + ((group * splits + split) * words + word) * channels;
}

// Grid: groups x channels x splits; a block, or where there is little to add a warp (LANES), has one channel of a group
// and one split of it. V divides HW. With vectors along the rows one load is in flight, and all registers are allowed
// (1 block a multiprocessor): left to itself ptxas took fewer on sm_90 to sm_120 and spilled some.
template <class Body, int V, int LANES>
__global__ void __launch_bounds__(THREADS, ALONG<Body> > 0 ? 1 : 0)
    reduce_rows_kernel(Body body, Planes p, float* partials, int splits, i64 vectors_per_split) {
  // two inputs of eight elements each: a second pair in flight spilled 8 bytes on sm_90
  constexpr int U = ALONG<Body> > 0 || V * Body::INPUTS > 8 ? 1 : UNROLL<Body>;
  using Acc = typename Body::Acc;
  const u32 lane = threadIdx.x % LANES;
  const i64 unit = static_cast<i64>(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  const i64 rest = unit / splits, split = unit - rest * splits;
  const i64 group = rest / p.channels;
  if (group >= p.groups) return;  // whole warps
  const int channel = static_cast<int>(rest - group * p.channels);
  const u32 row_vectors = static_cast<u32>(p.pixels / V);
  const i64 begin = split * vectors_per_split, all = p.samples * row_vectors - begin;
  const u32 share = static_cast<u32>(vectors_per_split < all ? vectors_per_split : all);
  const i64 sample0 = group * p.samples + begin / row_vectors;
  const u32 offset0 = static_cast<u32>(begin % row_vectors);
  typename Body::Coef coef[1];
  body.coefs(group, channel, coef);
  Acc acc;
  acc.clear();
  for (u32 first = lane; first < share; first += LANES * U) {
    Pack<typename Body::T, V> raw[U][Body::INPUTS];
    i64 at[U];
    u32 offsets[U];
    int valid = 0;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const u32 local = first + u * LANES;
      if (local >= share) break;
      const u32 row = (offset0 + local) / row_vectors, offset = offset0 + local - row * row_vectors;
      at[u] = ((sample0 + row) * p.channels + channel) * p.pixels + static_cast<i64>(offset) * V;
      offsets[u] = offset * V;
      load_inputs<Body, V>(body, at[u], raw[u]);
      valid = u + 1;
    }
    float in[Body::INPUTS + ALONG<Body>][U * V];
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int k = 0; k < Body::INPUTS; ++k)
#pragma unroll
        for (int j = 0; j < V; ++j) in[k][u * V + j] = u < valid ? to_float(raw[u][k].v[j]) : 0.0f;
    if constexpr (ALONG<Body> > 0)
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (u >= valid) continue;  // accumulate looks at valid elements only
        float along[ALONG<Body>][V];
        body.vectors(channel, offsets[u], along);
#pragma unroll
        for (int k = 0; k < ALONG<Body>; ++k)
#pragma unroll
          for (int j = 0; j < V; ++j) in[Body::INPUTS + k][u * V + j] = along[k][j];
      }
    body.accumulate(acc, coef[0], in, valid * V);
    if constexpr (Body::WRITES)
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (u < valid) apply_one<Body, V>(body, at[u], raw[u], [&](int) { return coef[0]; });
  }
  if constexpr (LANES == WARP)
    merge_lanes(acc, 1);
  else
    merge_block<THREADS>(acc);
  if (lane == 0)
#pragma unroll
    for (int k = 0; k < Acc::WORDS; ++k)
      store(partial_at(partials, group, splits, split, Acc::WORDS, k, p.channels) + channel, acc.word[k]);
}

// One row of V columns into their accumulators.
template <class Body, int V>
FG_DEVICE void accumulate_row(const Body& body, i64 row, const Pack<typename Body::T, V> (&raw)[Body::INPUTS],
                              const typename Body::Coef (&coefs)[V], typename Body::Acc (&acc)[V]) {
  typename Body::At here[V];
  body.at_row(row, coefs, here);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    float in[Body::INPUTS][1];
#pragma unroll
    for (int k = 0; k < Body::INPUTS; ++k) in[k][0] = to_float(raw[k].v[j]);
    body.accumulate(acc[j], here[j], in, 1);
  }
}

// This thread's columns of a tile into their accumulators; then visit(row, at, raw, coefs) of each of its rows.
template <class Body, int V, class Visit>
FG_DEVICE void accumulate_columns(const Body& body, const Planes& p, const Slab& t, typename Body::Acc (&acc)[V],
                                  const Visit& visit) {
  // with eight columns a thread half the rows are in flight: all of them spilled 8 to 16 bytes of registers
  constexpr int U = V == 8 ? (UNROLL<Body> + 1) / 2 : UNROLL<Body>;
#pragma unroll
  for (int j = 0; j < V; ++j) acc[j].clear();
  if (!t.inside) return;
  typename Body::Coef coefs[V];
  body.coefs(t.group, t.column, coefs);
  const i64 base = t.group * p.samples * p.pixels * p.channels + t.column;
  for (i64 row = t.begin + t.lane_y; row < t.end; row += static_cast<i64>(t.lanes_y) * U) {
    Pack<typename Body::T, V> raw[U][Body::INPUTS];
    int valid = 0;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const i64 r = row + u * t.lanes_y;
      if (r >= t.end) break;
      load_inputs<Body, V>(body, base + r * p.channels, raw[u]);
      valid = u + 1;
    }
    if constexpr (ByRow<Body>) {
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (u < valid) accumulate_row<Body, V>(body, row + u * t.lanes_y, raw[u], coefs, acc);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float in[Body::INPUTS][U];
#pragma unroll
        for (int k = 0; k < Body::INPUTS; ++k)
#pragma unroll
          for (int u = 0; u < U; ++u) in[k][u] = u < valid ? to_float(raw[u][k].v[j]) : 0.0f;
        body.accumulate(acc[j], coefs[j], in, valid);
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (u < valid) {
        const i64 r = row + u * t.lanes_y;
        visit(r, base + r * p.channels, raw[u], coefs);
      }
  }
}

// Grid: groups x splits x column tiles. V divides C.
template <class Body, int V>
__global__ void __launch_bounds__(THREADS)
    reduce_columns_kernel(Body body, Planes p, float* partials, int lanes_x, int splits, i64 rows_per_split) {
  constexpr int WARPS = THREADS / WARP, WORDS = Body::Acc::WORDS;
  constexpr int PITCH = COLUMN_LANES + WARP / V;  // the 32 columns that a warp reads below lie in 32 banks
  using Acc = typename Body::Acc;
  FG_SHARED(float, part, [WORDS][WARPS][V * PITCH]);
  const Slab t = slab_of<V>(p, blockIdx.x, lanes_x, splits, rows_per_split);
  Acc acc[V];
  accumulate_columns<Body, V>(
      body, p, t, acc,
      [&](i64 row, i64 at, const Pack<typename Body::T, V>(&raw)[Body::INPUTS], const typename Body::Coef(&coefs)[V]) {
        if constexpr (Body::WRITES) apply_columns_of<Body, V>(body, row, at, raw, coefs);
      });
  // rows of a warp by shuffles, then the warps through shared memory, a thread a column: in this order always
  const int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    merge_lanes(acc[j], lanes_x);
    if (lane < lanes_x)
#pragma unroll
      for (int k = 0; k < WORDS; ++k) part[k][warp][j * PITCH + lane] = acc[j].word[k];
  }
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  const int channel = t.column - t.lane_x * V + column;
  if (column >= lanes_x * V || channel >= p.channels) return;
  Acc total;
  total.clear();
  for (int w = 0; w < WARPS; ++w) {
    Acc other;
#pragma unroll
    for (int k = 0; k < WORDS; ++k) other.word[k] = part[k][w][column % V * PITCH + column / V];
    total.merge(other);
  }
#pragma unroll
  for (int k = 0; k < WORDS; ++k)
    store(partial_at(partials, t.group, splits, t.split, WORDS, k, p.channels) + channel, total.word[k]);
}

// ---------------------------------------------------------------------------------------------- finish

constexpr int FINISH_COLUMNS = 32, FINISH_ROWS = THREADS / FINISH_COLUMNS;

// The splits of one channel, merged, in the threads of row 0; the channel may be out of range.
template <class Acc>
FG_DEVICE Acc merge_splits(const float* partials, i64 group, int splits, int channel, int channels) {
  Acc acc;
  acc.clear();
  if (channel < channels)
    for (int split = static_cast<int>(threadIdx.x) / FINISH_COLUMNS; split < splits; split += FINISH_ROWS) {
      Acc other;
#pragma unroll
      for (int k = 0; k < Acc::WORDS; ++k)
        other.word[k] = load(partials + ((group * splits + split) * Acc::WORDS + k) * channels + channel);
      acc.merge(other);
    }
  merge_block<THREADS, FINISH_COLUMNS>(acc);
  return acc;
}

}  // namespace fg::cuda
