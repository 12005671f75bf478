// What attention's kernels are made of. Every operand is a 64 x 64 tile in shared memory: rows or keys of a head by 64
// of its elements, or scores. Every product is 64 x 64 x 64 on the convolutions' compute step, 8 warps of 16 x 32
// outputs: mma.sync for 16 bits, FMA for float32. A tile serves as either operand of either direction.
//
// A step of 16 bits reads 3 chunks by ldmatrix for 4 mma: 12 cycles of shared memory (128 bytes a cycle) beside 8 of
// tensor core on sm_80. Warps of 32 x 32 would balance that and hold twice the sums: the double backward, which keeps
// four squares of scores beside its outputs, would spill.
#pragma once

#include "cuda/conv_compute.cuh"
// Behind prelude.cuh, which makes FG_MEMBER a device function.
#include "common/attention_derivatives.hpp"

namespace fg::cuda {

constexpr int SIDE = 64, SQUARE = SIDE * SIDE;

struct AttentionBlock {
  static constexpr int WARPS_M = 4, WARPS_N = 2, THREADS = WARPS_M * WARPS_N * WARP;
};
constexpr int ATTENTION_THREADS = AttentionBlock::THREADS;

// A tile whose reduction runs along its columns, and the same memory with the reduction down its rows.
template <class T>
using Along = Tile<T, SIDE, SIDE, true>;
template <class T>
struct Down : Along<T> {
  static constexpr bool ALONG_COLUMNS = false;
};

template <class T, template <class> class A, template <class> class B>
using Product = typename ComputeFor<T, A<T>, B<T>, AttentionBlock>::Type;
template <class T>
using Scores = Product<T, Along, Along>;  // left right^T
template <class T>
using OfRows = Product<T, Along, Down>;  // scores right
template <class T>
using OfKeys = Product<T, Down, Down>;  // scores^T right

// ---------------------------------------------------------------------------------------------- heads

// A tensor [N, heads, rows, width] by its strides, the last of 1. vectors: its rows are whole aligned chunks. Where it
// is absent it stands for zeros, and data is any memory.
struct Heads {
  void* data;
  i64 n, h, row;
  bool vectors, present;
};

// Scores of one head, float32, or null.
struct HeadSquare {
  float* data;
  i64 row;

  FG_MEMBER float* at(int i, int j) const { return data + i * row + j; }
};

struct HeadSquares {
  float* data;
  i64 n, h, row;
};

struct AttentionSizes {
  int heads, rows, keys, d, dv;
  bool causal;
  float scale;

  FG_MEMBER bool seen(int row, int key) const { return row < rows && key < keys && (!causal || key <= row); }
};

__host__ FG_MEMBER int tiles_of(int count) { return (count + SIDE - 1) / SIDE; }

// The head and the tile of `count` rows or keys that a block owns.
struct Owner {
  int head, sample, of_sample, first;

  static FG_MEMBER Owner of(const AttentionSizes& s, int count) {
    const int tiles = tiles_of(count), head = static_cast<int>(blockIdx.x) / tiles;
    return {head, head / s.heads, head % s.heads, static_cast<int>(blockIdx.x) % tiles * SIDE};
  }
  template <class T>
  FG_MEMBER Plane plane(const Heads& t, int rows, int width) const {
    return {static_cast<T*>(t.data) + sample * t.n + of_sample * t.h, t.present ? rows : 0, width, t.row, t.vectors};
  }
  FG_MEMBER HeadSquare square(const HeadSquares& t) const {
    return {t.data ? t.data + sample * t.n + of_sample * t.h : nullptr, t.row};
  }
};

// Rows [first, first + 64) of a head and its part'th 64 elements; zeros beyond it.
template <class T>
FG_DEVICE void request_tile(const Plane& head, int first, int part, T* to) {
  Matrix<Along<T>, ATTENTION_THREADS>(head, first, part * SIDE).template load_tile<false>(to);
}

// One of two, by value: a reference to either would put both into local memory.
FG_DEVICE Heads second_if(bool second, const Heads& a, const Heads& b) {
  return {second ? b.data : a.data,
          second ? b.n : a.n,
          second ? b.h : a.h,
          second ? b.row : a.row,
          second ? b.vectors : a.vectors,
          second ? b.present : a.present};
}

// Tiles that pass through buffers in the order in which request(step, buffer) fills them. In 16 bits there are two: one
// tile comes while the one before it is read. float32 has one, so that the double backward of heads of 64 fits the 99
// KiB of smaller cards: its products take 2,048 cycles of an SM's FMA units, several times the way to the L2 cache.
template <class T>
constexpr int BUFFERS = sizeof(T) == 2 ? 2 : 1;

template <class T, class Request>
struct Stream {
  T* buffers;
  const Request& request;
  int steps, next;

  FG_MEMBER Stream(T* buffers, int steps, const Request& request)
      : buffers(buffers), request(request), steps(steps), next(0) {
    if constexpr (BUFFERS<T> == 2) fetch();
  }
  FG_MEMBER void fetch() {
    if (next < steps) request(next, buffers + next % BUFFERS<T> * SQUARE);
    ++next;
    cp_async_commit();
  }
  // The next tile, behind a barrier; the one before it is given up.
  FG_MEMBER T* take() {
    if constexpr (BUFFERS<T> == 1) {
      __syncthreads();
      fetch();
    }
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (BUFFERS<T> == 2) fetch();
    return buffers + next % BUFFERS<T> * SQUARE;
  }
};

// Writes factor times a block's sums as rows of a head.
template <class T>
struct HeadSink {
  const Plane& head;
  int first_row, first_column;
  float factor;
  T* at;
  bool live;

  FG_MEMBER HeadSink(const Plane& head, int first_row, int part, float factor)
      : head(head), first_row(first_row), first_column(part * SIDE), factor(factor), at(nullptr), live(false) {}

  FG_MEMBER void row(int r) {
    live = first_row + r < head.rows;
    at = static_cast<T*>(const_cast<void*>(head.data)) + (first_row + r) * head.pitch;
  }
  template <int COUNT>
  FG_MEMBER void put(int c, const float (&sum)[COUNT]) {
    const int column = first_column + c;
    if (!live || column >= head.columns) return;
    if (COUNT > 1 && head.vectors) {
      Pack<T, COUNT> pack;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) pack.v[i] = from_float<T>(factor * sum[i]);
      store<COUNT>(at + column, pack);
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        if (column + i < head.columns) store(at + column + i, from_float<T>(factor * sum[i]));
    }
  }
};

// Adds the products of a square of scores and the next `parts` tiles of a stream, a part of the outputs each.
template <class T, int PARTS, class Outputs, class Tiles>
FG_DEVICE void add_products(Outputs (&sums)[PARTS], T* square, Tiles& stream, int parts) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
    if (part < parts) sums[part].slab(square, stream.take());
}

template <class T, int PARTS, class Outputs>
FG_DEVICE void put_head(Outputs (&sums)[PARTS], const Plane& head, int first, float factor) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
    if (part < tiles_of(head.columns)) {
      HeadSink<T> sink(head, first, part, factor);
      sums[part].hand_out(sink);
    }
}

// ---------------------------------------------------------------------------------------------- scores

FG_DEVICE float lowest() { return __uint_as_float(0xff800000u); }  // -inf

// f(i, j, row, key) for the elements of a square of scores that a thread holds.
template <class S, class F>
FG_DEVICE void each_score(const S& s, int first_row, int first_key, const F& f) {
#pragma unroll
  for (int i = 0; i < S::HELD_ROWS; ++i)
#pragma unroll
    for (int j = 0; j < S::HELD_COLUMNS; ++j) f(i, j, first_row + s.row(i), first_key + s.column(j));
}

// scale s + bias; -inf where a row does not see a key.
template <class S>
FG_DEVICE void finish_scores(S& s, const AttentionSizes& sizes, const HeadSquare& bias, int first_row, int first_key) {
  each_score(s, first_row, first_key, [&](int i, int j, int row, int key) {
    const bool seen = sizes.seen(row, key);
    const float v = s.value(i, j) * sizes.scale + (bias.data && seen ? load(bias.at(row, key)) : 0.0f);
    s.value(i, j) = seen ? v : lowest();
  });
}

// Scores become probabilities, by a row's lse.
template <class S>
FG_DEVICE void to_probabilities(S& s, const float (&lse)[S::HELD_ROWS]) {
  each_score(s, 0, 0, [&](int i, int j, int, int) { s.value(i, j) = expf(s.value(i, j) - lse[i]); });
}

// A value of each row that a thread holds, 0 behind the last row.
template <class S>
FG_DEVICE void load_rows(const S& s, const float* of_head, int first, int rows, float (&v)[S::HELD_ROWS]) {
#pragma unroll
  for (int i = 0; i < S::HELD_ROWS; ++i) v[i] = first + s.row(i) < rows ? load(of_head + first + s.row(i)) : 0.0f;
}

// f(i, row) once in the block for each of its rows below `rows`.
template <class S, class F>
FG_DEVICE void once_a_row(const S& s, int first, int rows, const F& f) {
  if (s.row_share() != 0 || threadIdx.x % S::LANES != 0) return;
#pragma unroll
  for (int i = 0; i < S::HELD_ROWS; ++i)
    if (first + s.row(i) < rows) f(i, first + s.row(i));
}

// Each thread's value[k][i] of row i becomes combine() over all threads that hold the row, in a fixed order. Has a
// barrier; another must lie before the next call.
template <int COUNT, class S, class F>
FG_DEVICE void across_row(const S& s, float (&value)[COUNT][S::HELD_ROWS], const F& combine) {
#pragma unroll
  for (int k = 0; k < COUNT; ++k)
#pragma unroll
    for (int i = 0; i < S::HELD_ROWS; ++i)
      for (int lanes = 1; lanes < S::LANES; lanes *= 2)
        value[k][i] = combine(value[k][i], __shfl_xor_sync(ALL_LANES, value[k][i], lanes));
  if constexpr (S::ROW_SHARES > 1) {
    FG_SHARED(float, part, [COUNT][S::ROW_SHARES][SIDE]);
    if (threadIdx.x % S::LANES == 0)
#pragma unroll
      for (int k = 0; k < COUNT; ++k)
#pragma unroll
        for (int i = 0; i < S::HELD_ROWS; ++i) part[k][s.row_share()][s.row(i)] = value[k][i];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
#pragma unroll
      for (int i = 0; i < S::HELD_ROWS; ++i) {
        value[k][i] = part[k][0][s.row(i)];
        for (int share = 1; share < S::ROW_SHARES; ++share)
          value[k][i] = combine(value[k][i], part[k][share][s.row(i)]);
      }
  }
}

FG_DEVICE float added(float a, float b) { return a + b; }

// A square of scores as the operand of a product, rounded to T; replace_scores: where the one before it may still be
// read.
template <class T, class S>
FG_DEVICE void put_scores(const S& s, T* tile) {
  each_score(s, 0, 0, [&](int i, int j, int row, int column) {
    if constexpr (S::PAIRS) {
      if (j % 2) return;
      const Pack<T, 2> pair = {from_float<T>(s.value(i, j)), from_float<T>(s.value(i, j + 1))};
      store_shared(Along<T>::at(tile, row, column / Along<T>::PER_CHUNK) + column % Along<T>::PER_CHUNK, pair);
    } else {
      store_shared(Along<T>::at(tile, row, column / Along<T>::PER_CHUNK) + column % Along<T>::PER_CHUNK,
                   from_float<T>(s.value(i, j)));
    }
  });
}

template <class T, class S>
FG_DEVICE void replace_scores(const S& s, T* tile) {
  __syncthreads();
  put_scores(s, tile);
}

}  // namespace fg::cuda
