// Launcher of conv2d_weight: geometry, block, split.
#include "cuda/conv2d_weight.cuh"
#include "cuda/conv_launch.hpp"
#include "cuda/kernels.hpp"

namespace fg::cuda {

namespace {

template <class Operand, class Block>
void launch(const Conv2dWeightParams& p, void* stream) {
  using G = Gemm<Operand, Block, false, false>;
  const unsigned grid = grid_of("conv2d_weight", int64_t{p.tiles_m} * p.tiles_n * p.splits * p.groups);
  FG_LAUNCH(FG_KERNEL(conv2d_weight_kernel, Operand, Block), grid, G::THREADS, G::SHARED_BYTES, stream, p);
  check_launch("conv2d_weight");
}

}  // namespace

int64_t conv2d_weight(const ConvShape& s, const Conv2dWeightArgs& a, const Target& target) {
  const int64_t C = s.C / s.groups, K = s.K / s.groups, taps = s.R * s.S, pixels = s.N * s.OH * s.OW;
  const int chunk = chunk_of(a.dtype);
  Conv2dWeightParams p = {};
  p.x = image_of(a.x, s.N, s.H, s.W, s.C, s.groups, chunk);
  p.x.vertical = forward_axis(s.OH, s.R, s.stride_h, s.pad_h, s.dil_h);
  p.x.horizontal = forward_axis(s.OW, s.S, s.stride_w, s.pad_w, s.dil_w);
  p.stride = Stride::of(4 * chunk, static_cast<int>(s.OH), static_cast<int>(s.OW));
  p.dy = {a.dy, static_cast<int>(pixels), 0, s.K, K % chunk == 0 && aligned(a.dy)};
  const int64_t size = s.K * taps * C;
  const Problem problem = {"conv2d_weight", K, taps * C, pixels, s.groups, p.x.vectors && p.dy.vectors, size, false};
  check_counts(problem);
  const Choice choice = choose(problem, 4 * chunk, multiprocessors());

  // The sums are [k][r][s][c]; a dweight in another order (NCHW) is written by the second stage.
  const bool reorder = taps > 1 && C > 1 && a.dw_strides[1] != 1;
  if (const int64_t bytes = partial_bytes(choice, size, reorder); bytes && !target.workspace) return bytes;
  float* partial = choice.splits > 1 || reorder ? static_cast<float*>(target.workspace) : nullptr;
  p.dweight = {a.dw, nullptr, partial, size, ACT_IDENTITY, 0.0f, taps * C % 4 == 0 && aligned(a.dw)};
  p.rows = static_cast<int>(K), p.columns = static_cast<int>(taps * C);
  p.slabs = choice.slabs, p.splits = choice.splits, p.groups = static_cast<int>(s.groups);
  p.tiles_m = static_cast<u32>(choice.tiles_m), p.tiles_n = static_cast<u32>(choice.tiles_n);
  by_operand(a.dtype, [&](auto zero) {
    using Operand = decltype(zero);
    if (choice.block == 0)
      launch<Operand, Large>(p, target.stream);
    else
      launch<Operand, Small>(p, target.stream);
    using T = typename Stored<Operand>::Type;
    if (partial) launch_reduce<T>("conv2d_weight", p.dweight, choice.splits, C, reorder ? taps : 1, target.stream);
  });
  return 0;
}

}  // namespace fg::cuda
