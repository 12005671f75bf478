// Launcher of conv2d: geometry, block, split, statistics.
#include "cuda/conv2d.cuh"
#include "cuda/conv_launch.hpp"
#include "cuda/kernels.hpp"

namespace fg::cuda {

namespace {

template <class Operand, class Block, bool STATISTICS>
void launch(const char* op, const Conv2dParams& p, void* stream) {
  using G = Gemm<Operand, Block, true, true>;
  const unsigned grid = grid_of(op, int64_t{p.tiles_m} * p.tiles_n * p.splits * p.groups);
  FG_LAUNCH(FG_KERNEL(conv2d_kernel, Operand, Block, STATISTICS), grid, G::THREADS, G::SHARED_BYTES, stream, p);
  check_launch(op);
}

template <class Operand, bool STATISTICS>
void launch_block(const char* op, const Conv2dParams& p, int block, void* stream) {
  if (block == 0) launch<Operand, Large, STATISTICS>(op, p, stream);
  if (block == 1) launch<Operand, Small, STATISTICS>(op, p, stream);
  if (block == 2) launch<Operand, Narrow, STATISTICS>(op, p, stream);
}

// All of the launch but blocks, outputs and memory.
Conv2dParams params_of(const ConvShape& s, const Conv2dArgs& a) {
  const int64_t C = s.C / s.groups, K = s.K / s.groups, depth = s.R * s.S * C;
  const int chunk = chunk_of(a.dtype);
  Conv2dParams p = {};
  p.x = image_of(a.x, s.N, s.H, s.W, s.C, s.groups, chunk);
  p.x.vertical = forward_axis(s.OH, s.R, s.stride_h, s.pad_h, s.dil_h);
  p.x.horizontal = forward_axis(s.OW, s.S, s.stride_w, s.pad_w, s.dil_w);
  p.stride = Stride::of(4 * chunk, static_cast<int>(s.S), static_cast<int>(C));
  p.weight = {a.w, 0, static_cast<int>(depth), depth, depth % chunk == 0 && aligned(a.w)};
  p.columns = static_cast<int>(K), p.pitch = static_cast<int>(s.K), p.groups = static_cast<int>(s.groups);
  return p;
}

// Where the reduction is split, the second stage makes the moments of the whole sums, else the epilogue.
int64_t run(const char* op, const ConvShape& s, const Conv2dArgs& a, const StatisticsArgs* statistics,
            const Target& target) {
  const int64_t K = s.K / s.groups, pixels = s.N * s.OH * s.OW, stat_groups = statistics ? statistics->groups : 1;
  Conv2dParams p = params_of(s, a);
  const Problem problem = {op, pixels, K, p.weight.pitch, s.groups, p.x.vectors && p.weight.vectors, pixels * s.K};
  check_counts(problem);
  const int slab = 4 * chunk_of(a.dtype);
  Choice choice = choose(problem, slab, multiprocessors());
  const bool fused = statistics && choice.splits == 1;
  if (fused) choice = choose(of_groups(problem, stat_groups), slab, multiprocessors());
  if (statistics)
    p.parts = parts_of(*statistics, s.N, s.K, fused ? choice.tiles_m : divide_up(pixels / stat_groups, REDUCE_ROWS));
  const int64_t sums = partial_bytes(choice, problem.output_size), bytes = sums + part_bytes(p.parts);
  if (bytes && !target.workspace) return bytes;

  float* partial = choice.splits > 1 ? static_cast<float*>(target.workspace) : nullptr;
  p.parts.data = static_cast<float*>(target.workspace) + sums / static_cast<int64_t>(sizeof(float));
  p.y = {a.y, a.bias, partial, problem.output_size, a.act, a.slope, K % 4 == 0 && aligned(a.y)};
  p.pixels = static_cast<int>(fused ? pixels / stat_groups : pixels);
  p.slabs = choice.slabs, p.splits = choice.splits;
  p.tiles_m = static_cast<u32>(choice.tiles_m * (fused ? stat_groups : 1)),
  p.tiles_n = static_cast<u32>(choice.tiles_n);
  by_operand(a.dtype, [&](auto zero) {
    using Operand = decltype(zero);
    using T = typename Stored<Operand>::Type;
    if (fused)
      launch_block<Operand, true>(op, p, choice.block, target.stream);
    else
      launch_block<Operand, false>(op, p, choice.block, target.stream);
    if (partial && statistics)
      launch_reduce_moments<T>(op, p.y, p.parts, choice.splits, pixels / stat_groups, target.stream);
    else if (partial)
      launch_reduce<T>(op, p.y, choice.splits, s.K, 1, target.stream);
  });
  if (statistics) launch_statistics(op, p.parts, *statistics, target.stream);
  return 0;
}

}  // namespace

int64_t conv2d(const ConvShape& s, const Conv2dArgs& a, const Target& target) {
  return run("conv2d", s, a, nullptr, target);
}

int64_t conv2d_statistics(const ConvShape& s, const Conv2dArgs& a, const StatisticsArgs& statistics,
                          const Target& target) {
  return run("conv2d_statistics", s, a, &statistics, target);
}

}  // namespace fg::cuda
