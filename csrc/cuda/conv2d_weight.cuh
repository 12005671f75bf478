// conv2d_weight: dweight[k][(r, s, c)] = sum over pixels of dy[pixel][k] patches[pixel][(r, s, c)].
//
// Bytes    dy once for every 128 columns (r, s, c), the patches once for every 128 rows k, dweight once; 8 bytes an
//          output and split for the partial sums, written and read once
// FLOPs    2 N K OH OW (C/groups) R S
// Bound    as conv2d. Outputs are few and the reduction long (DCGAN: 64 x 48 to 512 x 4,096 outputs, 2,048 to 131,072
//          pixels at batch 128), so the pixels are split until every SM has two blocks; a second kernel adds the parts
//          in a fixed order. No atomics: the same bits every time.
// Tiles    both operands are read with the reduction down the rows, as they lie: ldmatrix transposes 16-bit values on
//          the way to the registers.
#pragma once

#include "cuda/conv_gemm.cuh"

namespace fg::cuda {

struct Conv2dWeightParams {
  Image x;
  Stride stride;  // a slab of pixels (n, oh, ow)
  Plane dy;       // [pixel][K], of all groups
  Output dweight;
  int rows, columns;  // channels of dy in a group; R S C/groups
  int slabs, splits, groups;
  u32 tiles_m, tiles_n;
};

template <class Operand, class Block>
__global__ void __launch_bounds__(Block::THREADS, BLOCKS_PER_SM<Operand, Block>)
    conv2d_weight_kernel(const Conv2dWeightParams p) {
  using G = Gemm<Operand, Block, false, false>;
  const Place place = Place::of(blockIdx.x, p.tiles_n, p.tiles_m, p.splits, p.groups);
  const int begin = first_slab(p.slabs, place.split, p.splits), end = first_slab(p.slabs, place.split + 1, p.splits);

  Image x = p.x;
  x.first_channel = place.group * x.channels;
  Plane dy = p.dy;
  dy.columns = p.rows;
  dy.data = static_cast<const typename G::T*>(dy.data) + static_cast<i64>(place.group) * p.rows;

  Matrix<typename G::TileA, G::THREADS> a(dy, place.row * Block::ROWS, begin * G::SLAB);
  Patches<typename G::TileB, G::THREADS> b(x, p.stride, place.column * Block::COLUMNS, begin * G::SLAB);
  typename G::Compute compute;
  accumulate<G>(compute, a, b, end - begin);

  const i64 first_row = static_cast<i64>(place.group) * p.rows;
  finish<G>(compute, p.dweight, place, {place.row * Block::ROWS, p.rows}, p.columns,
            [&](int row) { return (first_row + row) * p.columns; });
}

}  // namespace fg::cuda
