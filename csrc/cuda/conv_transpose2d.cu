// Launcher of conv_transpose2d: phases, block, statistics.
#include "cuda/conv_launch.hpp"
#include "cuda/conv_transpose2d.cuh"
#include "cuda/kernels.hpp"

namespace fg::cuda {

namespace {

template <class Operand, class Block, bool STATISTICS>
void launch(const char* op, const ConvTranspose2dParams& p, int64_t phases, void* stream) {
  using G = Gemm<Operand, Block, true, false>;
  const unsigned grid = grid_of(op, int64_t{p.tiles_m} * p.tiles_n * p.groups * phases);
  FG_LAUNCH(FG_KERNEL(conv_transpose2d_kernel, Operand, Block, STATISTICS), grid, G::THREADS, G::SHARED_BYTES, stream,
            p);
  check_launch(op);
}

template <class Operand, bool STATISTICS>
void launch_block(const char* op, const ConvTranspose2dParams& p, int64_t phases, int block, void* stream) {
  if (block == 0) launch<Operand, Large, STATISTICS>(op, p, phases, stream);
  if (block == 1) launch<Operand, Small, STATISTICS>(op, p, phases, stream);
  if (block == 2) launch<Operand, Narrow, STATISTICS>(op, p, phases, stream);
}

// A source of one pixel has only tap r = (h + p)/d for output h, whatever the stride: with a stride beyond every
// |h + p - d r| the phases are the single outputs.
PhaseAxis phase_axis(int64_t size, int64_t source, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  if (source == 1) stride = size + pad + dilation * kernel;
  return {static_cast<int>(size),
          static_cast<int>(source),
          static_cast<int>(kernel),
          static_cast<int>(stride),
          static_cast<int>(pad),
          static_cast<int>(dilation),
          static_cast<int>(std::gcd(stride, dilation))};
}

int64_t phases(const PhaseAxis& a) { return std::min(a.stride, a.size); }
int64_t most_outputs(const PhaseAxis& a) { return divide_up(a.size, a.stride); }  // those of phase 0
int64_t most_taps(const PhaseAxis& a) { return divide_up(a.kernel, a.stride / a.common); }

int64_t run(const char* op, const ConvShape& s, const ConvTranspose2dArgs& a, const StatisticsArgs* statistics,
            const Target& target) {
  const int64_t C = s.C / s.groups, K = s.K / s.groups;
  const int chunk = chunk_of(a.dtype);
  ConvTranspose2dParams p = {};
  p.vertical = phase_axis(s.H, s.OH, s.R, s.stride_h, s.pad_h, s.dil_h);
  p.horizontal = phase_axis(s.W, s.OW, s.S, s.stride_w, s.pad_w, s.dil_w);
  p.y = image_of(a.y, s.N, s.OH, s.OW, s.K, s.groups, chunk);
  p.weight.data = a.w;
  p.weight.k = static_cast<int>(K), p.weight.columns = static_cast<int>(C);
  p.weight.pitch_k = s.R * s.S * C, p.weight.pitch_r = s.S * C, p.weight.pitch_s = C;
  p.weight.vectors = C % chunk == 0 && aligned(a.w);
  const int64_t all = phases(p.vertical) * phases(p.horizontal);
  const Problem problem = {op,
                           s.N * most_outputs(p.vertical) * most_outputs(p.horizontal),
                           C,
                           most_taps(p.vertical) * most_taps(p.horizontal) * K,
                           s.groups * all,
                           p.y.vectors && p.weight.vectors,
                           0};
  check_counts(problem);
  const int64_t stat_groups = statistics ? statistics->groups : 1;
  const Choice choice = choose(of_groups(problem, stat_groups), 4 * chunk, multiprocessors());
  if (statistics) p.parts = parts_of(*statistics, s.N, s.C, choice.tiles_m, all);
  if (const int64_t bytes = part_bytes(p.parts); bytes && !target.workspace) return bytes;

  p.parts.data = static_cast<float*>(target.workspace);
  p.x = {a.x, a.bias, nullptr, s.N * s.H * s.W * s.C, a.act, a.slope, C % 4 == 0 && aligned(a.x)};
  p.columns = static_cast<int>(C), p.pitch = static_cast<int>(s.C);
  p.groups = static_cast<int>(s.groups), p.phases_w = static_cast<int>(phases(p.horizontal));
  p.tiles_m = static_cast<u32>(choice.tiles_m * stat_groups), p.tiles_n = static_cast<u32>(choice.tiles_n);
  by_operand(a.dtype, [&](auto zero) {
    using Operand = decltype(zero);
    if (statistics)
      launch_block<Operand, true>(op, p, all, choice.block, target.stream);
    else
      launch_block<Operand, false>(op, p, all, choice.block, target.stream);
  });
  if (statistics) launch_statistics(op, p.parts, *statistics, target.stream);
  return 0;
}

}  // namespace

int64_t conv_transpose2d(const ConvShape& s, const ConvTranspose2dArgs& a, const Target& target) {
  return run("conv_transpose2d", s, a, nullptr, target);
}

int64_t conv_transpose2d_statistics(const ConvShape& s, const ConvTranspose2dArgs& a, const StatisticsArgs& statistics,
                                    const Target& target) {
  return run("conv_transpose2d_statistics", s, a, &statistics, target);
}

}  // namespace fg::cuda
