// The one main loop of the three convolutions: a matrix product whose operands are gathered (conv_tile.cuh), with a
// pipeline of three slabs in shared memory, an epilogue, and a second stage where the reduction was split.
//
// A slab is 64 bytes of the reduction: 32 steps of 16-bit values, 16 of floats. A stage of 128 x 128 outputs is 16 KiB
// then, and three stages 48 KiB: the most that needs no opt-in, and two blocks an SM on every card from sm_80 on
// (sm_86, sm_89 and sm_120 have 100 KiB). Two slabs are in flight while one is multiplied.
#pragma once

#include "cuda/conv_moments.cuh"

namespace fg::cuda {

constexpr int STAGES = 3;

// ---------------------------------------------------------------------------------------------- blocks

// Outputs a block computes. FAST blocks need whole aligned chunks of both operands; the others ask at run time.
struct Large {
  static constexpr int ROWS = 128, COLUMNS = 128, WARPS_M = 2, WARPS_N = 4, THREADS = WARPS_M * WARPS_N * WARP;
  static constexpr bool FAST = true;
};
struct Small {
  static constexpr int ROWS = 64, COLUMNS = 64, WARPS_M = 2, WARPS_N = 2, THREADS = WARPS_M * WARPS_N * WARP;
  static constexpr bool FAST = false;
};
struct Narrow {  // images of a few channels, single logits
  static constexpr int ROWS = 128, COLUMNS = 16, WARPS_M = 4, WARPS_N = 1, THREADS = WARPS_M * WARPS_N * WARP;
  static constexpr bool FAST = false;
};

// How many blocks an SM must have registers for. Two large ones may have 128 registers a thread: enough for 16-bit
// operands (124 to 128), while floats want up to 254 (FMA: 8 x 8 sums beside 16 chunks; tf32: words instead of
// ldmatrix) and would spill. sm_75 has shared memory for one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int LARGE_BLOCKS = 1;
#else
constexpr int LARGE_BLOCKS = 2;
#endif
template <class Operand, class Block>
constexpr int BLOCKS_PER_SM = Block::THREADS < 256                          ? 2
                              : sizeof(typename Stored<Operand>::Type) == 4 ? 1
                                                                            : LARGE_BLOCKS;

// The types of one kernel: A_ALONG, B_ALONG say whether the reduction runs along that operand's columns.
template <class Operand_, class Block_, bool A_ALONG, bool B_ALONG>
struct Gemm {
  using Operand = Operand_;
  using Block = Block_;
  using T = typename Stored<Operand>::Type;
  static constexpr int SLAB = 64 / sizeof(T), THREADS = Block::THREADS;
  using TileA = Tile<T, A_ALONG ? Block::ROWS : SLAB, A_ALONG ? SLAB : Block::ROWS, A_ALONG>;
  using TileB = Tile<T, B_ALONG ? Block::COLUMNS : SLAB, B_ALONG ? SLAB : Block::COLUMNS, B_ALONG>;
  using Compute = typename ComputeFor<Operand, TileA, TileB, Block>::Type;
  static constexpr int STAGE = (TileA::BYTES + TileB::BYTES) / sizeof(T);
  static constexpr int SHARED_BYTES = STAGES * STAGE * sizeof(T);
};

// Where a block works. Blocks are numbered with the column fastest: neighbours share the gathered rows in L2.
struct Place {
  int column, row, split, group, phase;

  FG_MEMBER static Place of(u32 block, u32 tiles_n, u32 tiles_m, u32 splits, u32 groups) {
    Place p;
    p.column = block % tiles_n, block /= tiles_n;
    p.row = block % tiles_m, block /= tiles_m;
    p.split = block % splits, block /= splits;
    p.group = block % groups;
    p.phase = block / groups;
    return p;
  }
};

// Slabs [first, first + count) of `total` for one of `splits`: sizes differ by at most one.
FG_DEVICE int first_slab(int total, int split, int splits) {
  return total / splits * split + min(split, total % splits);
}

// ---------------------------------------------------------------------------------------------- main loop

// One barrier a slab: behind it the slab has arrived for everybody, and everybody has done with the stage that the next
// copies overwrite.
template <class G, class A, class B>
FG_DEVICE void accumulate(typename G::Compute& compute, A& a, B& b, int slabs) {
  using T = typename G::T;
  FG_DYN_SHARED(T, stages);
  const auto tile_a = [&](int stage) { return stages + stage * G::STAGE; };
  const auto tile_b = [&](int stage) { return tile_a(stage) + G::TileA::BYTES / static_cast<int>(sizeof(T)); };
  const auto fetch = [&](int slab) {
    if (slab < slabs) {
      a.template load_tile<G::Block::FAST>(tile_a(slab % STAGES));
      b.template load_tile<G::Block::FAST>(tile_b(slab % STAGES));
      a.advance();
      b.advance();
    }
    cp_async_commit();  // an empty group too: the wait counts groups
  };
  // The first rounds only fill the pipeline: one copy of the code that gathers halves the kernel.
#pragma unroll 1
  for (int slab = 1 - STAGES; slab < slabs; ++slab) {
    if (slab >= 0) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
    }
    fetch(slab + STAGES - 1);
    if (slab >= 0) compute.slab(tile_a(slab % STAGES), tile_b(slab % STAGES));
  }
}

// ---------------------------------------------------------------------------------------------- epilogue

// What becomes of the sums. With `partial`, a split writes them raw to its own copy of the output, in float.
struct Output {
  void* data;
  const float* bias;  // of every output column, or null
  float* partial;
  i64 size;  // elements of the output: the distance of two splits' copies
  Act act;
  float slope;
  bool vectors;  // 4 columns side by side are one aligned access
};

// Takes a block's sums: rows from `first_row` of `rows`, columns from `first_column` of `columns`; offset(row) is where
// a row begins in the output, `bias` belongs to column 0.
template <class T, class Offset>
struct Sink {
  const Output& output;
  const Offset& offset;
  const float* bias;
  i64 copy;
  int first_row, rows, first_column, columns;
  i64 begin;
  bool live;

  FG_MEMBER void row(int r) {
    live = first_row + r < rows;
    begin = live ? copy + offset(first_row + r) : 0;
  }

  template <int COUNT>
  FG_MEMBER void put(int c, const float (&sum)[COUNT]) {
    const int column = first_column + c;
    if (!live || column >= columns) return;
    if (output.partial) {
      write(output.partial + begin + column, sum, column);
      return;
    }
    float value[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      value[i] =
          activate(sum[i] + (column + i < columns ? load_or(bias, column + i, 0.0f) : 0.0f), output.act, output.slope);
    write(static_cast<T*>(output.data) + begin + column, value, column);
  }

  template <class U, int COUNT>
  FG_MEMBER void write(U* to, const float (&value)[COUNT], int column) {
    if (COUNT > 1 && output.vectors) {
      Pack<U, COUNT> pack;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) pack.v[i] = from_float<U>(value[i]);
      store<COUNT>(to, pack);
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        if (column + i < columns) store(to + i, from_float<U>(value[i]));
    }
  }
};

template <class G, class Offset>
FG_DEVICE void finish(const typename G::Compute& compute, const Output& output, const Place& place, const Span& rows,
                      int columns, const Offset& offset) {
  const int first_column = place.column * G::Block::COLUMNS;
  Sink<typename G::T, Offset> sink = {output,
                                      offset,
                                      output.bias ? output.bias + static_cast<i64>(place.group) * columns : nullptr,
                                      output.partial ? place.split * output.size : 0,
                                      rows.first,
                                      rows.end,
                                      first_column,
                                      columns,
                                      0,
                                      false};
  compute.hand_out(sink);
}

// finish without activation, and the moments of what it has written.
template <class G, class Offset>
FG_DEVICE void finish_with_moments(typename G::Compute& compute, const Output& output, const MomentParts& parts,
                                   const Place& place, const Span& rows, int columns, const Offset& offset) {
  const int first_column = place.column * G::Block::COLUMNS, first_channel = place.group * columns;
  round_outputs<G>(compute, output.bias ? output.bias + first_channel : nullptr, first_column, columns);
  Output rounded = output;
  rounded.bias = nullptr, rounded.partial = nullptr, rounded.act = ACT_IDENTITY;
  finish<G>(compute, rounded, place, rows, columns, offset);
  leave_moments<G>(compute, parts, parts.part(place.row, place.phase), rows, first_column, columns, first_channel);
}

constexpr int REDUCE_THREADS = 256;

// Second stage of a split: the copies are added in the order of the splits, so the sum has the same bits every time;
// then bias, activation, rounding. Bytes: 4 splits read and sizeof(T) written an output, coalesced; memory-bound by
// far. taps > 1: the copies are [k][tap][channels] (channels_last), the output [k][channels][tap]: a warp's reads are
// spread over the taps then, and the block's REDUCE_THREADS / taps channels use up their sectors in L1.
template <class T>
__global__ void __launch_bounds__(REDUCE_THREADS)
    conv_reduce_kernel(Output output, int splits, int channels, int taps) {
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 at = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; at < output.size; at += step) {
    i64 from = at;
    if (taps > 1) {
      const i64 tap = at % taps, channel = at / taps % channels, k = at / taps / channels;
      from = (k * taps + tap) * channels + channel;
    }
    float sum = 0.0f;
    for (int split = 0; split < splits; ++split) sum += load(output.partial + split * output.size + from);
    sum = activate(sum + load_or(output.bias, at % channels, 0.0f), output.act, output.slope);
    store(static_cast<T*>(output.data) + at, from_float<T>(sum));
  }
}

constexpr int REDUCE_ROWS = 64;  // 8 values a thread

// The second stage with statistics, without activation: a block has REDUCE_ROWS of the `rows` of a group of samples by
// 32 channels, and leaves their moments as a part. Grid: row tiles of all groups x channel tiles, these fastest.
template <class T>
__global__ void __launch_bounds__(REDUCE_THREADS)
    conv_reduce_moments_kernel(Output output, MomentParts parts, int splits, int rows) {
  constexpr int STEP = REDUCE_THREADS / WARP, HELD = REDUCE_ROWS / STEP;
  const int tiles = (parts.channels + WARP - 1) / WARP, tile = blockIdx.x / tiles;
  const int channel = blockIdx.x % tiles * WARP + threadIdx.x % WARP;
  const Span span = rows_of<REDUCE_ROWS, true>(parts, tile, rows);
  float value[HELD];
  int held = 0;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int row = span.first + static_cast<int>(threadIdx.x) / WARP + i * STEP;
    value[i] = 0.0f;
    if (row >= span.end || channel >= parts.channels) continue;
    const i64 at = static_cast<i64>(row) * parts.channels + channel;
    float sum = 0.0f;
    for (int split = 0; split < splits; ++split) sum += load(output.partial + split * output.size + at);
    const T rounded = from_float<T>(sum + load_or(output.bias, channel, 0.0f));
    store(static_cast<T*>(output.data) + at, rounded);
    value[i] = to_float(rounded);
    held = i + 1;
  }
  Moments moments;
  moments.clear();
  moments.add(value, held);
  merge_block<REDUCE_THREADS, WARP>(moments);
  if (threadIdx.x < WARP && channel < parts.channels) parts.leave(parts.part(tile, 0), channel, moments);
}

}  // namespace fg::cuda
