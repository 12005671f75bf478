// The arithmetic of a block of the convolutions: accumulators in registers, fed from two tiles in shared memory.
//
//   TensorCores  mma.sync on fp16, bf16 or tf32, fp32 accumulators
//   Fma          fp32 products and sums, IEEE: what float32 gets unless torch allows tf32
//
// Both hand out their sums row by row to a sink: row(i) begins a row, put(column, values) gives values that lie side by
// side in it. Both also show them as they lie: value(i, j) is a thread's output in row(i) and column(j). Lanes whose
// numbers agree modulo LANES hold other rows of the same columns, and so do the warps of SHARES different share();
// LANES neighbours hold other columns of the same rows, and so do the warps of ROW_SHARES different row_share().
#pragma once

#include "cuda/conv_tile.cuh"

namespace fg::cuda {

// What an operand type is stored as.
template <class Operand>
struct Stored {
  using Type = Operand;
};
template <>
struct Stored<Tf32> {
  using Type = float;
};

// Each of WARPS_M x WARPS_N warps owns (ROWS / WARPS_M) x (COLUMNS / WARPS_N) outputs. With 64 x 32 outputs a warp
// reads 192 chunks a step for 16 mma: 24 cycles of shared memory (128 bytes a cycle) beside 32 of tensor core (sm_80:
// 1024 multiply-adds a cycle), and holds 64 accumulators a thread, which leaves two blocks of 256 threads an SM.
template <class Operand, class TileA, class TileB, int WARPS_M, int WARPS_N>
struct TensorCores {
  using T = typename Stored<Operand>::Type;
  static constexpr int ROWS = TileA::ALONG_COLUMNS ? TileA::ROWS : TileA::COLS;
  static constexpr int COLUMNS = TileB::ALONG_COLUMNS ? TileB::ROWS : TileB::COLS;
  static constexpr int WARP_ROWS = ROWS / WARPS_M, WARP_COLUMNS = COLUMNS / WARPS_N;
  static constexpr int TILES_M = WARP_ROWS / 16, TILES_N = WARP_COLUMNS / 8;
  static constexpr int PER_CHUNK = TileA::PER_CHUNK, STEP = 2 * PER_CHUNK;  // of the reduction, an mma
  static constexpr int HELD_ROWS = 2 * TILES_M, HELD_COLUMNS = 2 * TILES_N, LANES = 4, SHARES = WARPS_M;
  static constexpr int ROW_SHARES = WARPS_N;
  static constexpr bool PAIRS = true;  // columns 2 j and 2 j + 1 of a thread lie side by side
  static_assert(TileA::SLAB == TileB::SLAB && TileA::SLAB % STEP == 0 && TILES_N % 2 == 0);

  float sum[TILES_M][TILES_N][4];
  int lane, row0, column0;

  FG_MEMBER TensorCores() {
    const int warp = threadIdx.x / WARP;
    lane = threadIdx.x % WARP;
    row0 = warp / WARPS_N * WARP_ROWS;
    column0 = warp % WARPS_N * WARP_COLUMNS;
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
      for (int n = 0; n < TILES_N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] = 0.0f;
  }

  FG_MEMBER float& value(int i, int j) { return sum[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  FG_MEMBER float value(int i, int j) const { return sum[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  FG_MEMBER int row(int i) const { return row0 + 8 * i + lane / 4; }
  FG_MEMBER int column(int j) const { return column0 + 8 * (j / 2) + lane % 4 * 2 + j % 2; }
  FG_MEMBER int share() const { return row0 / WARP_ROWS; }
  FG_MEMBER int row_share() const { return column0 / WARP_COLUMNS; }

  // 16 outputs x one step. The order of the four matrices is that of a fragment of a (a[0..3]),
  // or with PAIRS that of two fragments of b: b[0], b[1] of the first 8 outputs, then of the next 8.
  template <class Tile, bool PAIRS>
  FG_MEMBER void fetch(u32 (&word)[4], T* tile, int output, int step) const {
    const int low = lane % 8, first = lane / 8 % 2, second = lane / 16;  // the lane names row `low` of a matrix
    const int outputs = PAIRS ? second : first, chunks = PAIRS ? first : second;
    if constexpr (Tile::ALONG_COLUMNS) {
      ldmatrix_x4<false>(word, Tile::at(tile, output + 8 * outputs + low, 2 * step + chunks));
    } else if constexpr (sizeof(T) == 2) {
      ldmatrix_x4<true>(word, Tile::at(tile, step * STEP + 8 * chunks + low, output / PER_CHUNK + outputs));
    } else {
      // ldmatrix transposes 16-bit values only
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = step * STEP + lane % 4 + 4 * (PAIRS ? i % 2 : i / 2);
        const int column = output + lane / 4 + 8 * (PAIRS ? i / 2 : i % 2);
        word[i] = load_shared<u32>(Tile::at(tile, row, column / PER_CHUNK) + column % PER_CHUNK);
      }
    }
    if constexpr (sizeof(T) == 4)
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = to_tf32(word[i]);
  }

  FG_MEMBER void slab(T* a, T* b) {
#pragma unroll 2  // all of a convolution's slab; attention's has 4, and no registers for their fragments
    for (int step = 0; step < TileA::SLAB / STEP; ++step) {
      u32 rows[TILES_M][4], columns[TILES_N / 2][4];
#pragma unroll
      for (int m = 0; m < TILES_M; ++m) fetch<TileA, false>(rows[m], a, row0 + 16 * m, step);
#pragma unroll
      for (int n = 0; n < TILES_N / 2; ++n) fetch<TileB, true>(columns[n], b, column0 + 16 * n, step);
#pragma unroll
      for (int m = 0; m < TILES_M; ++m)
#pragma unroll
        for (int n = 0; n < TILES_N; ++n)
          mma<Operand>(sum[m][n], rows[m], {columns[n / 2][n % 2 * 2], columns[n / 2][n % 2 * 2 + 1]});
    }
  }

  // Two neighbouring lanes trade halves of two mma tiles, so that each holds 4 columns side by side: four lanes then
  // write 16 columns of a row, a full 32-byte sector even in 16 bits.
  template <class Sink>
  FG_MEMBER void hand_out(Sink& sink) const {
    const bool odd = lane % 2;
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sink.row(row(2 * m + half));
#pragma unroll
        for (int n = 0; n < TILES_N; n += 2) {
          const float* left = &sum[m][n][2 * half];
          const float* right = &sum[m][n + 1][2 * half];
          const float got0 = __shfl_xor_sync(ALL_LANES, odd ? left[0] : right[0], 1);
          const float got1 = __shfl_xor_sync(ALL_LANES, odd ? left[1] : right[1], 1);
          const float four[4] = {odd ? got0 : left[0], odd ? got1 : left[1], odd ? right[0] : got0,
                                 odd ? right[1] : got1};
          sink.put(column0 + 8 * n + (odd ? 8 : 0) + lane % 4 / 2 * 4, four);
        }
      }
  }
};

// Outer products in registers: thread (ty, tx) of TY x TX owns PER_M x PER_N outputs, and per 4 reduction steps reads
// PER_M + PER_N chunks for 4 PER_M PER_N multiply-adds (8 x 8: 16 reads of 16 bytes for 256 FMA: those bind).
template <class TileA, class TileB, int THREADS>
struct Fma {
  using T = float;
  static constexpr int ROWS = TileA::ALONG_COLUMNS ? TileA::ROWS : TileA::COLS;
  static constexpr int COLUMNS = TileB::ALONG_COLUMNS ? TileB::ROWS : TileB::COLS;
  static constexpr int PER_N = COLUMNS >= 128 ? 8 : 4, TX = COLUMNS / PER_N, TY = THREADS / TX, PER_M = ROWS / TY;
  static constexpr int HELD_ROWS = PER_M, HELD_COLUMNS = PER_N, LANES = TX, SHARES = THREADS / WARP;
  static constexpr int ROW_SHARES = 1;
  static constexpr bool PAIRS = false;
  static_assert(PER_M % 4 == 0 && TileA::SLAB == TileB::SLAB && TX <= WARP);

  float sum[PER_M][PER_N];
  int tx, ty;

  FG_MEMBER Fma() : tx(threadIdx.x % TX), ty(threadIdx.x / TX) {
#pragma unroll
    for (int i = 0; i < PER_M; ++i)
#pragma unroll
      for (int j = 0; j < PER_N; ++j) sum[i][j] = 0.0f;
  }

  // Output i of this thread: neighbours in fours where the tile's columns are outputs, else TX (or TY) apart.
  template <class Tile>
  static FG_MEMBER int output(int thread, int i, int threads) {
    return Tile::ALONG_COLUMNS ? thread + i * threads : (thread + i / 4 * threads) * 4 + i % 4;
  }

  FG_MEMBER float& value(int i, int j) { return sum[i][j]; }
  FG_MEMBER float value(int i, int j) const { return sum[i][j]; }
  FG_MEMBER int row(int i) const { return output<TileA>(ty, i, TY); }
  FG_MEMBER int column(int j) const { return output<TileB>(tx, j, TX); }
  FG_MEMBER int share() const { return static_cast<int>(threadIdx.x) / WARP; }
  FG_MEMBER int row_share() const { return 0; }

  // value[i][k]: output i at reduction step 4 quarter + k.
  template <class Tile, int COUNT>
  static FG_MEMBER void fetch(float (&value)[COUNT][4], float* tile, int thread, int threads, int quarter) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      // along columns read i is output i at 4 steps; else it is step i % 4 of 4 outputs
      const int row = Tile::ALONG_COLUMNS ? thread + i * threads : 4 * quarter + i % 4;
      const int chunk = Tile::ALONG_COLUMNS ? quarter : thread + i / 4 * threads;
      const float4 four = load_shared<float4>(Tile::at(tile, row, chunk));
      const float part[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) (Tile::ALONG_COLUMNS ? value[i][k] : value[i / 4 * 4 + k][i % 4]) = part[k];
    }
  }

  FG_MEMBER void slab(float* a, float* b) {
#pragma unroll 4  // all of a convolution's slab; attention's has 16
    for (int quarter = 0; quarter < TileA::SLAB / 4; ++quarter) {
      float rows[PER_M][4], columns[PER_N][4];
      fetch<TileA>(rows, a, ty, TY, quarter);
      fetch<TileB>(columns, b, tx, TX, quarter);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < PER_M; ++i)
#pragma unroll
          for (int j = 0; j < PER_N; ++j) sum[i][j] = fmaf(rows[i][k], columns[j][k], sum[i][j]);
    }
  }

  template <class Sink>
  FG_MEMBER void hand_out(Sink& sink) const {
#pragma unroll
    for (int i = 0; i < PER_M; ++i) {
      sink.row(row(i));
      if constexpr (TileB::ALONG_COLUMNS) {
#pragma unroll
        for (int j = 0; j < PER_N; ++j) {
          const float one[1] = {sum[i][j]};
          sink.put(output<TileB>(tx, j, TX), one);
        }
      } else {
#pragma unroll
        for (int j = 0; j < PER_N; j += 4) {
          const float four[4] = {sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]};
          sink.put(output<TileB>(tx, j, TX), four);
        }
      }
    }
  }
};

template <class Operand, class TileA, class TileB, class Block>
struct ComputeFor {
  using Type = TensorCores<Operand, TileA, TileB, Block::WARPS_M, Block::WARPS_N>;
};
template <class TileA, class TileB, class Block>
struct ComputeFor<float, TileA, TileB, Block> {
  using Type = Fma<TileA, TileB, Block::THREADS>;
};

}  // namespace fg::cuda
