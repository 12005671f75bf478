// conv2d: y[pixel][k] = phi(bias[k] + sum over (r, s, c) of patches[pixel][(r, s, c)] weight[k][(r, s, c)]).
//
// Bytes    x, y once; the weight once for every row of blocks, N OH OW / 128 times with 128 pixels a block, from L2;
//          x once for every 128 output channels, likewise
// FLOPs    2 N K OH OW (C/groups) R S
// Bound    128 x 128 outputs and a slab of 64 bytes: 2^20 FLOPs for 16 KiB in 16 bits, 64 a byte of L2. An A100 needs
//          43 at its peak (312 TFLOP/s over 5,120 bytes a cycle at 1.41 GHz), so the tensor cores bind there; 64 x 64
//          outputs give 32 a byte and are for shapes that would leave SMs idle. In fp32 the multiply-adds bind.
// Weight   read in place where it is [k][r][s][c] (channels_last), since the reduction then runs along its columns in
//          chunks of 16 bytes. In NCHW a chunk would be 8 values 2 R S bytes apart: 8 sectors of 32 bytes for 16 bytes,
//          16 times the traffic, once for every row of blocks. The launcher's caller makes it channels_last by one copy
//          instead: 2 weights of traffic, and none where the model is channels_last.
#pragma once

#include "cuda/conv_gemm.cuh"

namespace fg::cuda {

struct Conv2dParams {
  Image x;
  Stride stride;  // a slab of (r, s, channel)
  Plane weight;   // of all groups: [K][R S C/groups]
  Output y;
  MomentParts parts;
  int pixels;          // N OH OW; with statistics of one group of samples
  int columns, pitch;  // channels of y in a group, in all
  int slabs, splits, groups;
  u32 tiles_m, tiles_n;
};

template <class Operand, class Block, bool STATISTICS>
__global__ void __launch_bounds__(Block::THREADS, BLOCKS_PER_SM<Operand, Block>) conv2d_kernel(const Conv2dParams p) {
  using G = Gemm<Operand, Block, true, true>;
  const Place place = Place::of(blockIdx.x, p.tiles_n, p.tiles_m, p.splits, p.groups);
  const int begin = first_slab(p.slabs, place.split, p.splits), end = first_slab(p.slabs, place.split + 1, p.splits);

  Image x = p.x;
  x.first_channel = place.group * x.channels;
  Plane weight = p.weight;
  weight.rows = p.columns;
  weight.data = static_cast<const typename G::T*>(weight.data) + place.group * (weight.rows * weight.pitch);

  const Span rows = rows_of<Block::ROWS, STATISTICS>(p.parts, place.row, p.pixels);
  Patches<typename G::TileA, G::THREADS> a(x, p.stride, rows.first, begin * G::SLAB);
  Matrix<typename G::TileB, G::THREADS> b(weight, place.column * Block::COLUMNS, begin * G::SLAB);
  typename G::Compute compute;
  accumulate<G>(compute, a, b, end - begin);

  const i64 first_channel = static_cast<i64>(place.group) * p.columns;
  const auto offset = [&](int pixel) { return static_cast<i64>(pixel) * p.pitch + first_channel; };
  if constexpr (STATISTICS)
    finish_with_moments<G>(compute, p.y, p.parts, place, rows, p.columns, offset);
  else
    finish<G>(compute, p.y, place, rows, p.columns, offset);
}

}  // namespace fg::cuda
