// How large a grid each walk of sweep.cuh gets, and its launch.
#pragma once

#include <algorithm>

#include "cuda/launch.hpp"
#include "cuda/sweep.cuh"

namespace fg::cuda {

// [N][C][HW] or [N][HW][C]. One pixel a sample is the same either way, and then rows of channels are the long ones.
struct Walk {
  Planes planes;
  bool columns;
  int vector_bytes;  // 16, or 0: one element at a time

  Walk(const char* op, int64_t N, int64_t C, int64_t HW, int64_t G, bool channels_last) : columns(channels_last) {
    if (std::max({C, HW, G}) > INT32_MAX / 2)
      throw std::invalid_argument(std::string(op) + ": C, HW and groups must be below 2^30, got " + std::to_string(C) +
                                  ", " + std::to_string(HW) + " and " + std::to_string(G));
    planes = {static_cast<int>(G), static_cast<int>(C), N / G, HW};
    columns = columns || HW == 1;
  }
  int64_t rows() const { return planes.samples * planes.pixels; }  // of a group, channels_last
  int64_t elements() const { return planes.groups * rows() * planes.channels; }
};

constexpr int64_t BLOCKS_WANTED = 1024;  // about 8 a multiprocessor on a large card; fixed, so that sums are too

struct Split {
  int count;
  int64_t share;

  // At most `most` parts of at least `least` of n, all of them non-empty.
  Split(int64_t n, int64_t least, int64_t most) : share(divide_up(n, std::max<int64_t>(1, std::min(most, n / least)))) {
    count = static_cast<int>(divide_up(n, share));
  }
};

template <int V>
struct Columns {
  int lanes = 1;
  int64_t tiles;
  Split split;

  // A thread of a reduction sees at least 16 rows, one of apply at least 4: that pays for its constants.
  Columns(const Walk& walk, int64_t least) : tiles(0), split(walk.rows(), 1, 1) {
    while (lanes < COLUMN_LANES && lanes * V < walk.planes.channels) lanes *= 2;
    tiles = divide_up(walk.planes.channels, lanes * V);
    split = Split(walk.rows(), least * (THREADS / lanes), divide_up(BLOCKS_WANTED, tiles * walk.planes.groups));
  }
};

template <class Body>
bool all_aligned(const Body& body) {
  for (const void* p : body.in)
    if (!aligned(p)) return false;
  if constexpr (requires { body.out; })
    for (const void* p : body.out)
      if (!aligned(p)) return false;
  return true;
}

template <class Body, int V>
void apply_by(const char* op, const Walk& walk, const Body& body, void* stream) {
  const Planes& p = walk.planes;
  if (ByRow<Body> || walk.columns) {
    Columns<V> c(walk, 4);
    // no partials to keep: as many blocks as there is work for
    c.split = Split(walk.rows(), 16 * (THREADS / c.lanes), INT32_MAX);
    const unsigned grid = grid_of(op, p.groups * c.tiles * c.split.count);
    FG_LAUNCH(FG_KERNEL(apply_columns_kernel, Body, V), grid, THREADS, 0, stream, body, p, c.lanes, c.split.count,
              c.split.share);
  } else if constexpr (!ByRow<Body>) {
    const int64_t vectors = walk.elements() / V;
    FG_LAUNCH(FG_KERNEL(apply_rows_kernel, Body, V), grid_of(op, divide_up(vectors, THREADS * UNROLL<Body>)), THREADS,
              0, stream, body, p);
  }
  check_launch(op);
}

// body.apply on every element.
template <class Body>
void apply(const char* op, const Walk& walk, const Body& body, void* stream) {
  constexpr int V = VECTOR<typename Body::T>;
  const bool whole = (walk.columns ? walk.planes.channels : walk.planes.pixels) % V == 0;
  whole&& all_aligned(body) ? apply_by<Body, V>(op, walk, body, stream) : apply_by<Body, 1>(op, walk, body, stream);
}

// Where a reduction leaves its partials, known before it is launched.
struct Reduction {
  int splits;
  int64_t share;
  int vector;

  int64_t floats(const Walk& walk, int words) const {
    return static_cast<int64_t>(walk.planes.groups) * splits * words * walk.planes.channels;
  }
};

template <class Body>
Reduction plan_reduce(const Walk& walk, const Body& body) {
  constexpr int V = VECTOR<typename Body::T>;
  const Planes& p = walk.planes;
  const bool whole = (walk.columns ? p.channels : p.pixels) % V == 0 && all_aligned(body);
  if (walk.columns) {
    const Split split = whole ? Columns<V>(walk, 16).split : Columns<1>(walk, 16).split;
    return {split.count, split.share, whole ? V : 1};
  }
  const int64_t vectors = p.samples * (p.pixels / (whole ? V : 1));
  const Split split(vectors, THREADS * 4, divide_up(BLOCKS_WANTED, int64_t{p.groups} * p.channels));
  return {split.count, split.share, whole ? V : 1};
}

template <class Body, int V>
void reduce_rows_by(const char* op, const Walk& walk, const Body& body, const Reduction& plan, float* partials,
                    void* stream) {
  const Planes& p = walk.planes;
  // up to four rounds of a warp are not worth a block's barrier
  const bool short_rows = plan.splits == 1 && plan.share <= 4 * WARP * UNROLL<Body>;
  const int64_t units = int64_t{p.groups} * p.channels * plan.splits;
  if (short_rows)
    FG_LAUNCH(FG_KERNEL(reduce_rows_kernel, Body, V, WARP), grid_of(op, divide_up(units, THREADS / WARP)), THREADS, 0,
              stream, body, p, partials, plan.splits, plan.share);
  else
    FG_LAUNCH(FG_KERNEL(reduce_rows_kernel, Body, V, THREADS), grid_of(op, units), THREADS, 0, stream, body, p,
              partials, plan.splits, plan.share);
}

template <class Body, int V>
void reduce_columns_by(const char* op, const Walk& walk, const Body& body, const Reduction& plan, float* partials,
                       void* stream) {
  const Planes& p = walk.planes;
  const Columns<V> c(walk, 16);
  FG_LAUNCH(FG_KERNEL(reduce_columns_kernel, Body, V), grid_of(op, p.groups * c.tiles * plan.splits), THREADS, 0,
            stream, body, p, partials, c.lanes, plan.splits, plan.share);
}

// A Body that knows of both axes has one walk only.
template <class Body, int V>
void reduce_by(const char* op, const Walk& walk, const Body& body, const Reduction& plan, float* partials,
               void* stream) {
  if constexpr (ALONG<Body> > 0)
    reduce_rows_by<Body, V>(op, walk, body, plan, partials, stream);
  else if constexpr (ByRow<Body>)
    reduce_columns_by<Body, V>(op, walk, body, plan, partials, stream);
  else if (walk.columns)
    reduce_columns_by<Body, V>(op, walk, body, plan, partials, stream);
  else
    reduce_rows_by<Body, V>(op, walk, body, plan, partials, stream);
  check_launch(op);
}

// Partials [G][splits][WORDS][C] of body.accumulate.
template <class Body>
void reduce(const char* op, const Walk& walk, const Body& body, const Reduction& plan, float* partials, void* stream) {
  constexpr int V = VECTOR<typename Body::T>;
  plan.vector == V&& V > 1 ? reduce_by<Body, V>(op, walk, body, plan, partials, stream)
                           : reduce_by<Body, 1>(op, walk, body, plan, partials, stream);
}

}  // namespace fg::cuda
