// What the three convolution launchers share: which block serves a shape, and how often its reduction is split.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "common/kernels.hpp"
#include "cuda/conv_gemm.cuh"
#include "cuda/launch.hpp"

namespace fg::cuda {

// A matrix product as the choice of a block sees it.
struct Problem {
  const char* op;
  int64_t rows, columns;  // of one group and phase
  int64_t depth;          // reduction steps
  int64_t copies;         // groups x phases
  bool vectors;           // both operands come in whole aligned chunks
  int64_t output_size;    // elements, all groups and phases; 0: the reduction cannot be split
  bool narrow = true;     // the kernel is compiled for blocks of 16 columns
};

// The rows of each group of samples have blocks of their own; their reduction is not split.
inline Problem of_groups(Problem p, int64_t groups) {
  p.rows /= groups;
  p.copies *= groups;
  p.output_size = 0;
  return p;
}

struct Choice {
  int block;  // 0 Large, 1 Small, 2 Narrow
  int64_t tiles_m, tiles_n;
  int slabs, splits;
};

// A table, not a model: 128 x 128 where the operands allow it and such blocks fill the device, 16 columns for images
// and logits, 64 x 64 for the rest. The reduction is split where the blocks would leave SMs idle: parts of at least 8
// slabs, whose sums cost 8 bytes an output each, and at most 64 of them.
inline Choice choose(const Problem& p, int slab, int multiprocessors) {
  Choice c;
  const auto blocks = [&](int64_t side) { return divide_up(p.rows, side) * divide_up(p.columns, side) * p.copies; };
  const int64_t slabs = divide_up(p.depth, slab);
  const int64_t parts = p.output_size ? std::clamp<int64_t>(slabs / 8, 1, 64) : 1;
  const bool large = p.vectors && p.rows >= 128 && p.columns >= 128 && blocks(128) * parts >= multiprocessors;
  c.block = p.columns <= 16 && p.narrow ? 2 : large ? 0 : 1;
  const int64_t rows = c.block == 1 ? 64 : 128, columns = c.block == 0 ? 128 : c.block == 1 ? 64 : 16;
  c.tiles_m = divide_up(p.rows, rows);
  c.tiles_n = divide_up(p.columns, columns);
  const int64_t each = c.tiles_m * c.tiles_n * p.copies;
  c.slabs = static_cast<int>(slabs);
  c.splits = static_cast<int>(each >= multiprocessors ? 1 : std::min(parts, divide_up(2 * multiprocessors, each)));
  return c;
}

// Positions and slabs are counted in int; only offsets are 64 bits wide.
inline void check_counts(const Problem& p) {
  for (int64_t count : {p.rows, p.columns, p.depth})
    if (count >= int64_t{1} << 30)
      throw std::invalid_argument(std::string(p.op) +
                                  ": rows, columns and depth of the product must be below 2^30, got " +
                                  std::to_string(count) + "; split the batch");
}

inline int multiprocessors() { return std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1); }

// by_dtype with TF32, which only convolutions know.
template <class F>
auto by_operand(DType dtype, const F& f) {
  if (dtype == TF32) return f(Tf32{});
  return by_dtype(dtype, f);
}

// Elements of a chunk of 16 bytes; a slab is four of them.
inline int chunk_of(DType dtype) { return dtype == F32 || dtype == TF32 ? 4 : 8; }

inline Image image_of(const void* data, int64_t n, int64_t h, int64_t w, int64_t pitch, int64_t groups, int chunk) {
  const int64_t channels = pitch / groups;
  return {data,
          static_cast<int>(n),
          static_cast<int>(h),
          static_cast<int>(w),
          static_cast<int>(pitch),
          0,
          static_cast<int>(channels),
          {},
          {},
          channels % chunk == 0 && aligned(data)};
}

inline Axis forward_axis(int64_t outputs, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  return {static_cast<int>(outputs), static_cast<int>(taps), static_cast<int>(stride), static_cast<int>(-pad),
          static_cast<int>(dilation)};
}

// Bytes of the partial sums, 0 where the output is written at once.
inline int64_t partial_bytes(const Choice& c, int64_t output_size, bool always = false) {
  return c.splits > 1 || always ? c.splits * output_size * static_cast<int64_t>(sizeof(float)) : 0;
}

// Room for the moments of row tiles, `tiles` a group of samples and phase; launchers set `data` where it is known.
inline MomentParts parts_of(const StatisticsArgs& s, int64_t samples, int64_t channels, int64_t tiles,
                            int64_t phases = 1) {
  MomentParts parts = {};
  parts.count = static_cast<int>(s.groups * tiles * phases), parts.channels = static_cast<int>(channels);
  parts.tiles = static_cast<int>(tiles), parts.phases = static_cast<int>(phases);
  parts.samples = static_cast<int>(samples / s.groups);
  return parts;
}

inline int64_t part_bytes(const MomentParts& p) {
  return int64_t{p.count} * (2 * int64_t{p.channels} + 1) * static_cast<int64_t>(sizeof(float));
}

inline void launch_statistics(const char* op, const MomentParts& parts, const StatisticsArgs& s, void* stream) {
  const unsigned grid = grid_of(op, s.groups * divide_up(parts.channels, FINISH_CHANNELS));
  FG_LAUNCH(FG_KERNEL(conv_statistics_kernel, FINISH_CHANNELS), grid, FINISH_THREADS, 0, stream, parts, s.mean, s.var);
  check_launch(op);
}

template <class T>
void launch_reduce_moments(const char* op, Output output, const MomentParts& parts, int splits, int64_t rows,
                           void* stream) {
  const unsigned grid = grid_of(op, int64_t{parts.count} * divide_up(parts.channels, WARP));
  FG_LAUNCH(FG_KERNEL(conv_reduce_moments_kernel, T), grid, REDUCE_THREADS, 0, stream, output, parts, splits,
            static_cast<int>(rows));
  check_launch(op);
}

template <class T>
void launch_reduce(const char* op, Output output, int splits, int64_t channels, int64_t taps, void* stream) {
  const unsigned grid = grid_of(op, std::min<int64_t>(divide_up(output.size, REDUCE_THREADS), 16384));
  FG_LAUNCH(FG_KERNEL(conv_reduce_kernel, T), grid, REDUCE_THREADS, 0, stream, output, splits,
            static_cast<int>(channels), static_cast<int>(taps));
  check_launch(op);
}

}  // namespace fg::cuda
