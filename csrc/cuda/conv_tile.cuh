// How the operands of the convolutions come into shared memory: tiles of chunks of 16 bytes, gathered without im2col.
//
// Every operand is a matrix whose columns lie side by side in global memory. Its tile is [ROWS][COLS]; either the
// reduction runs along the columns (rows are outputs), or along the rows (columns are outputs): the compute step reads
// either. A thread keeps one chunk column and steps down the rows, so what depends on the column is worked out once a
// slab, and what depends on the row once a kernel, or the other way round: there is no division in the main loop.
//
//   Patches   x as the convolution sees it: row = pixel of y, column = (tap r, tap s, channel); zeros outside the image
//   Matrix    a plain matrix: dy (row = pixel), or the weight of conv2d (row = k, column = (r, s, c))
//   TapRows   the weight of conv_transpose2d: row = (tap of this phase, k), column = c
#pragma once

#include "cuda/tensor_core.cuh"

namespace fg::cuda {

// ---------------------------------------------------------------------------------------------- shared memory

// A tile [ROWS][COLS] of T in shared memory, in chunks. The chunk's place is XORed with the row so that the 8 rows of
// an ldmatrix (one chunk column) and the 8 chunks of a 128-byte row segment each meet all 32 banks once. Rows of 4-byte
// values along the reduction are read word by word by 4 rows x 8 columns, which wants the steps of two chunks.
template <class T, int ROWS_, int COLS_, bool ALONG_COLUMNS_>
struct Tile {
  using Value = T;
  static constexpr int ROWS = ROWS_, COLS = COLS_;
  static constexpr bool ALONG_COLUMNS = ALONG_COLUMNS_;  // the direction of the reduction
  static constexpr int PER_CHUNK = CHUNK / sizeof(T), CHUNKS = COLS / PER_CHUNK, BYTES = ROWS * COLS * sizeof(T);
  static constexpr int SLAB = ALONG_COLUMNS ? COLS : ROWS;  // reduction steps a tile holds

  static FG_MEMBER int swizzle(int row) {
    constexpr int ROWS_A_LINE = CHUNKS < 8 ? 8 / CHUNKS : 1;  // of 128 bytes
    if constexpr (sizeof(T) == 4 && !ALONG_COLUMNS) return row % 4 / ROWS_A_LINE * 2;
    return row / ROWS_A_LINE % (CHUNKS < 8 ? CHUNKS : 8);
  }
  static FG_MEMBER T* at(T* tile, int row, int chunk) {
    return tile + (row * CHUNKS + (chunk ^ swizzle(row))) * PER_CHUNK;
  }
};

// ---------------------------------------------------------------------------------------------- positions

// A position in a box [][size1][size2] that advances by a fixed distance: additions with carry instead of divisions.
struct Stride {
  int size1, size2;
  int step0, step1, step2;

  __host__ FG_MEMBER static Stride of(int distance, int size1, int size2) {
    size1 = size1 > 0 ? size1 : 1;
    return {size1, size2, distance / size2 / size1, distance / size2 % size1, distance % size2};
  }
};

struct Position {
  int i0, i1, i2;

  FG_MEMBER static Position of(int flat, int size1, int size2) {
    size1 = size1 > 0 ? size1 : 1;
    return {flat / size2 / size1, flat / size2 % size1, flat % size2};
  }
  FG_MEMBER void advance(const Stride& s) {
    i2 += s.step2;
    const int carry2 = i2 >= s.size2;
    i2 -= carry2 ? s.size2 : 0;
    i1 += s.step1 + carry2;
    const int carry1 = i1 >= s.size1;
    i1 -= carry1 ? s.size1 : 0;
    i0 += s.step0 + carry1;
  }
};

// One axis of a gather: output q in [0, outputs) takes tap t in [0, taps) from source q step + base + t tap_step.
struct Axis {
  int outputs, taps, step, base, tap_step;
};

// What Patches read: channels [first_channel, + channels) of an image [n][h][w][pitch].
struct Image {
  const void* data;
  int n, h, w, pitch;
  int first_channel, channels;
  Axis vertical, horizontal;
  bool vectors;  // chunks are whole and aligned: channels, pitch and the address are multiples of one
};

constexpr int OUTSIDE = -(1 << 30);  // a coordinate no tap brings back into an image of less than 2^30 pixels an axis

// ---------------------------------------------------------------------------------------------- loaders

// The rows that one thread fills: `row` + i STEP for i in [0, PASSES), in chunk column `chunk`.
template <class Tile, int THREADS>
struct Rows {
  static constexpr int STEP = THREADS / Tile::CHUNKS, PASSES = (Tile::ROWS + STEP - 1) / STEP;
  static_assert(THREADS % Tile::CHUNKS == 0, "a thread keeps its chunk column");
  int row, chunk;

  FG_MEMBER Rows() : row(threadIdx.x / Tile::CHUNKS), chunk(threadIdx.x % Tile::CHUNKS) {}
  FG_MEMBER bool has(int pass) const { return Tile::ROWS % STEP == 0 || row + pass * STEP < Tile::ROWS; }
};

// Fills one chunk value by value: element(i, &value) says whether value i exists.
template <class T, class F>
FG_DEVICE void fill_chunk(T* shared, const F& element) {
  Pack<T, CHUNK / sizeof(T)> chunk;
#pragma unroll
  for (int i = 0; i < CHUNK / static_cast<int>(sizeof(T)); ++i) {
    const T* from = nullptr;
    chunk.v[i] = element(i, from) ? load(from) : from_float<T>(0.0f);
  }
  store_shared(shared, chunk);
}

// Where tap (0, 0) of an output pixel reads: it may lie outside the image.
struct Pixel {
  i64 offset;
  int top, left;
};

// `stride` takes one slab's step: of (n, qh, qw) where rows move, of (r, s, channel) where columns do.
template <class Tile, int THREADS>
struct Patches : Rows<Tile, THREADS> {
  using T = typename Tile::Value;
  using Base = Rows<Tile, THREADS>;
  static constexpr bool ROWS_MOVE = !Tile::ALONG_COLUMNS;

  const Image& image;
  const Stride& stride;
  Position row_position[ROWS_MOVE ? Base::PASSES : 1];
  Pixel row_pixel[ROWS_MOVE ? 1 : Base::PASSES];  // moving rows work theirs out when they load: 4 registers a row less
  Position column;                                // (r, s, channel) of the thread's chunk

  // output: the tile's first one (a pixel, or a column where rows move); start: the first step of the reduction.
  FG_MEMBER Patches(const Image& image, const Stride& stride, int output, int start) : image(image), stride(stride) {
    column = Position::of((ROWS_MOVE ? output : start) + this->chunk * Tile::PER_CHUNK, image.horizontal.taps,
                          image.channels);
#pragma unroll
    for (int i = 0; i < Base::PASSES; ++i) {
      const Position pixel = Position::of((ROWS_MOVE ? start : output) + this->row + i * Base::STEP,
                                          image.vertical.outputs, image.horizontal.outputs);
      if constexpr (ROWS_MOVE)
        row_position[i] = pixel;
      else
        row_pixel[i] = locate(pixel);
    }
  }

  FG_MEMBER Pixel locate(const Position& output) const {
    const int h = output.i1 * image.vertical.step + image.vertical.base;
    const int w = output.i2 * image.horizontal.step + image.horizontal.base;
    return {((static_cast<i64>(output.i0) * image.h + h) * image.w + w) * image.pitch + image.first_channel,
            output.i0 < image.n ? h : OUTSIDE, w};
  }
  FG_MEMBER Pixel pixel(int i) const {
    if constexpr (ROWS_MOVE)
      return locate(row_position[i]);
    else
      return row_pixel[i];
  }

  FG_MEMBER bool inside(const Pixel& at, const Position& tap) const {
    const int h = at.top + tap.i0 * image.vertical.tap_step, w = at.left + tap.i1 * image.horizontal.tap_step;
    return tap.i0 < image.vertical.taps && static_cast<u32>(h) < static_cast<u32>(image.h) &&
           static_cast<u32>(w) < static_cast<u32>(image.w);
  }
  FG_MEMBER i64 offset(const Position& tap) const {
    const int h = tap.i0 * image.vertical.tap_step, w = tap.i1 * image.horizontal.tap_step;
    return (static_cast<i64>(h) * image.w + w) * image.pitch + tap.i2;
  }

  template <bool VECTORS>
  FG_MEMBER void load_tile(T* tile) {
    const T* data = static_cast<const T*>(image.data);
    const i64 tap = offset(column);
#pragma unroll
    for (int i = 0; i < Base::PASSES; ++i) {
      if (!this->has(i)) continue;
      T* to = Tile::at(tile, this->row + i * Base::STEP, this->chunk);
      const Pixel at = pixel(i);
      if (VECTORS || image.vectors) {
        const bool exists = inside(at, column);
        cp_async_16(to, exists ? data + at.offset + tap : data, exists);
      } else {
        Position value = column;
        const Stride one = {max(image.horizontal.taps, 1), image.channels, 0, 0, 1};
        fill_chunk(to, [&](int, const T*& from) {
          const bool exists = inside(at, value);
          if (exists) from = data + at.offset + offset(value);
          value.advance(one);
          return exists;
        });
      }
    }
  }

  FG_MEMBER void advance() {
    if constexpr (ROWS_MOVE) {
#pragma unroll
      for (int i = 0; i < Base::PASSES; ++i) row_position[i].advance(stride);
    } else {
      column.advance(stride);
    }
  }
};

// A matrix [rows][columns] with `pitch` elements from row to row.
struct Plane {
  const void* data;
  int rows, columns;
  i64 pitch;
  bool vectors;
};

template <class Tile, int THREADS>
struct Matrix : Rows<Tile, THREADS> {
  using T = typename Tile::Value;
  using Base = Rows<Tile, THREADS>;
  const Plane& plane;
  int first_row, first_column;

  // output: the tile's first one; start: the first step of the reduction.
  FG_MEMBER Matrix(const Plane& plane, int output, int start)
      : plane(plane),
        first_row((Tile::ALONG_COLUMNS ? output : start) + this->row),
        first_column((Tile::ALONG_COLUMNS ? start : output) + this->chunk * Tile::PER_CHUNK) {}

  template <bool VECTORS>
  FG_MEMBER void load_tile(T* tile) {
    const T* data = static_cast<const T*>(plane.data);
#pragma unroll
    for (int i = 0; i < Base::PASSES; ++i) {
      if (!this->has(i)) continue;
      const int row = first_row + i * Base::STEP;
      const i64 at = row * plane.pitch + first_column;
      T* to = Tile::at(tile, this->row + i * Base::STEP, this->chunk);
      if (VECTORS || plane.vectors) {
        const bool exists = row < plane.rows && first_column < plane.columns;
        cp_async_16(to, exists ? data + at : data, exists);
      } else {
        fill_chunk(to, [&](int j, const T*& from) {
          from = data + at + j;
          return row < plane.rows && first_column + j < plane.columns;
        });
      }
    }
  }

  FG_MEMBER void advance() {
    if constexpr (Tile::ALONG_COLUMNS)
      first_column += Tile::SLAB;
    else
      first_row += Tile::SLAB;
  }
};

// The weight [k][r][s][c] of one group as the transposed convolution's phase uses it: tap t of an axis is
// first + t every. Pitches are in elements.
struct PhaseWeight {
  const void* data;
  int k, columns;  // channels of the reduction, of the output
  i64 pitch_k, pitch_r, pitch_s;
  int first_r, every_r, first_s, every_s, taps_r, taps_s;
  bool vectors;
};

template <class Tile, int THREADS>
struct TapRows : Rows<Tile, THREADS> {
  using T = typename Tile::Value;
  using Base = Rows<Tile, THREADS>;
  static_assert(!Tile::ALONG_COLUMNS, "the reduction runs down the rows");
  const PhaseWeight& weight;
  int first_column;
  Position moving[Base::PASSES];  // (tap r, tap s, k)
  const Stride& stride;           // a slab's step of it

  FG_MEMBER TapRows(const PhaseWeight& weight, const Stride& stride, int output, int start)
      : weight(weight), first_column(output + this->chunk * Tile::PER_CHUNK), stride(stride) {
#pragma unroll
    for (int i = 0; i < Base::PASSES; ++i)
      moving[i] = Position::of(start + this->row + i * Base::STEP, weight.taps_s, weight.k);
  }

  template <bool VECTORS>
  FG_MEMBER void load_tile(T* tile) {
    const T* data = static_cast<const T*>(weight.data);
#pragma unroll
    for (int i = 0; i < Base::PASSES; ++i) {
      if (!this->has(i)) continue;
      const Position& p = moving[i];
      const bool row = p.i0 < weight.taps_r;
      const i64 at = p.i2 * weight.pitch_k + (weight.first_r + p.i0 * weight.every_r) * weight.pitch_r +
                     (weight.first_s + p.i1 * weight.every_s) * weight.pitch_s + first_column;
      T* to = Tile::at(tile, this->row + i * Base::STEP, this->chunk);
      if (VECTORS || weight.vectors) {
        const bool exists = row && first_column < weight.columns;
        cp_async_16(to, exists ? data + at : data, exists);
      } else {
        fill_chunk(to, [&](int j, const T*& from) {
          from = data + at + j;
          return row && first_column + j < weight.columns;
        });
      }
    }
  }

  FG_MEMBER void advance() {
#pragma unroll
    for (int i = 0; i < Base::PASSES; ++i) moving[i].advance(stride);
  }
};

}  // namespace fg::cuda
