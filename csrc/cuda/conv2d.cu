// Launcher of conv2d: geometry, block, split.
#include "cuda/conv2d.cuh"
#include "cuda/conv_launch.hpp"
#include "cuda/kernels.hpp"

namespace fg::cuda {

namespace {

template <class Operand, class Block>
void launch(const Conv2dParams& p, void* stream) {
  using G = Gemm<Operand, Block, true, true>;
  const unsigned grid = grid_of("conv2d", int64_t{p.tiles_m} * p.tiles_n * p.splits * p.groups);
  FG_LAUNCH((conv2d_kernel<Operand, Block>), grid, G::THREADS, G::SHARED_BYTES, stream, p);
  check_launch("conv2d");
}

}  // namespace

int64_t conv2d(const ConvShape& s, const Conv2dArgs& a, const Target& target) {
  const int64_t C = s.C / s.groups, K = s.K / s.groups, depth = s.R * s.S * C, pixels = s.N * s.OH * s.OW;
  const int chunk = chunk_of(a.dtype);
  Conv2dParams p = {};
  p.x = image_of(a.x, s.N, s.H, s.W, s.C, s.groups, chunk);
  p.x.vertical = forward_axis(s.OH, s.R, s.stride_h, s.pad_h, s.dil_h);
  p.x.horizontal = forward_axis(s.OW, s.S, s.stride_w, s.pad_w, s.dil_w);
  p.stride = Stride::of(4 * chunk, static_cast<int>(s.S), static_cast<int>(C));
  p.weight = {a.w, 0, static_cast<int>(depth), depth, depth % chunk == 0 && aligned(a.w)};
  const Problem problem = {"conv2d", pixels, K, depth, s.groups, p.x.vectors && p.weight.vectors, pixels * s.K};
  check_counts(problem);
  const Choice choice = choose(problem, 4 * chunk, multiprocessors());
  if (const int64_t bytes = partial_bytes(choice, problem.output_size); bytes && !target.workspace) return bytes;

  float* partial = choice.splits > 1 ? static_cast<float*>(target.workspace) : nullptr;
  p.y = {a.y, a.bias, partial, problem.output_size, a.act, a.slope, K % 4 == 0 && aligned(a.y)};
  p.pixels = static_cast<int>(pixels);
  p.columns = static_cast<int>(K), p.pitch = static_cast<int>(s.K);
  p.slabs = choice.slabs, p.splits = choice.splits, p.groups = static_cast<int>(s.groups);
  p.tiles_m = static_cast<u32>(choice.tiles_m), p.tiles_n = static_cast<u32>(choice.tiles_n);
  by_operand(a.dtype, [&](auto zero) {
    using Operand = decltype(zero);
    if (choice.block == 0) launch<Operand, Large>(p, target.stream);
    if (choice.block == 1) launch<Operand, Small>(p, target.stream);
    if (choice.block == 2) launch<Operand, Narrow>(p, target.stream);
    using T = typename Stored<Operand>::Type;
    if (partial) launch_reduce<T>("conv2d", p.y, choice.splits, s.K, 1, target.stream);
  });
  return 0;
}

}  // namespace fg::cuda
