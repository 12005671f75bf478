// conv_transpose2d: the adjoint of conv2d, by output phase: for stride s the outputs h = f + s q of phase f use only
// the taps r with d r = f + p modulo s, on sources i = (f + p - d r)/s + q. Each phase is a dense stride-1 convolution
// with its own few taps (k4 s2: 4 phases of 2x2), and the phases are a dimension of the grid. Zero insertion would
// multiply s^2 times as much. A phase without taps (kernel < stride) has an empty main loop and gives the bias alone.
//
// Bytes    y once for every 128 output channels and phase (from L2: phases read the same pixels), x once; each phase
//          its own part of the weight, once for every row of its blocks
// FLOPs    2 N OH OW K (C/groups) R S at most (taps outside the image multiply zeros in a block that has others)
// Bound    as conv2d. A source of one pixel (the first layer of a DCGAN generator) is given to the kernel with a stride
//          longer than its output, so that every output pixel is a phase with at most one tap: the plain product
//          [N, K] x [K, C] a pixel, instead of R S taps of which all but one are zeros.
// Weight   [k][r][s][c]: rows (tap, k) with c side by side, read in place with the reduction down the rows
#pragma once

#include "cuda/conv_gemm.cuh"

namespace fg::cuda {

// One axis of the adjoint: `size` outputs from `source` pixels.
struct PhaseAxis {
  int size, source, kernel, stride, pad, dilation;
  int common;  // greatest common divisor of stride and dilation
};

struct ConvTranspose2dParams {
  Image y;             // the source; its axes are the phase's
  PhaseWeight weight;  // of all groups; its taps are the phase's
  Output x;
  MomentParts parts;
  PhaseAxis vertical, horizontal;
  int columns, pitch;  // channels of x in a group, in all
  int groups, phases_w;
  u32 tiles_m, tiles_n;
};

// The outputs phase + stride q of an axis as a gather with step 1; *first, *every: which taps of the kernel are used.
FG_DEVICE Axis phase_axis(const PhaseAxis& a, int phase, int* first, int* every) {
  Axis axis;
  axis.outputs = (a.size - phase + a.stride - 1) / a.stride;
  *every = a.stride / a.common;
  *first = 0;
  while (*first < a.kernel && (phase + a.pad - a.dilation * *first) % a.stride != 0) ++*first;
  axis.taps = (a.kernel - *first + *every - 1) / *every;
  axis.step = 1;
  axis.base = (phase + a.pad - a.dilation * *first) / a.stride;
  axis.tap_step = -(a.dilation / a.common);
  return axis;
}

template <class Operand, class Block, bool STATISTICS>
__global__ void __launch_bounds__(Block::THREADS, BLOCKS_PER_SM<Operand, Block>)
    conv_transpose2d_kernel(const ConvTranspose2dParams p) {
  using G = Gemm<Operand, Block, true, false>;
  using T = typename G::T;
  const Place place = Place::of(blockIdx.x, p.tiles_n, p.tiles_m, 1, p.groups);
  const int phase_h = place.phase / p.phases_w, phase_w = place.phase % p.phases_w;

  Image y = p.y;
  PhaseWeight weight = p.weight;
  y.vertical = phase_axis(p.vertical, phase_h, &weight.first_r, &weight.every_r);
  y.horizontal = phase_axis(p.horizontal, phase_w, &weight.first_s, &weight.every_s);
  y.first_channel = place.group * y.channels;
  weight.taps_r = y.vertical.taps, weight.taps_s = y.horizontal.taps;
  weight.data = static_cast<const T*>(weight.data) + place.group * weight.k * weight.pitch_k;

  // The grid has room for the largest phase: the block of a smaller one may have no outputs.
  const int pixels = (STATISTICS ? p.parts.samples : y.n) * y.vertical.outputs * y.horizontal.outputs;
  const Span rows = rows_of<Block::ROWS, STATISTICS>(p.parts, place.row, pixels);
  if (rows.first >= rows.end) {
    if (STATISTICS && place.column == 0 && place.group == 0 && threadIdx.x == 0)
      p.parts.leave_rows(p.parts.part(place.row, place.phase), 0.0f);
    return;
  }

  // Both operands' channels are y's, so that one step serves both.
  const Stride stride = Stride::of(G::SLAB, weight.taps_s, weight.k);
  Patches<typename G::TileA, G::THREADS> a(y, stride, rows.first, 0);
  TapRows<typename G::TileB, G::THREADS> b(weight, stride, place.column * Block::COLUMNS, 0);
  typename G::Compute compute;
  const int depth = weight.taps_r * weight.taps_s * weight.k;
  accumulate<G>(compute, a, b, (depth + G::SLAB - 1) / G::SLAB);

  const i64 first_channel = static_cast<i64>(place.group) * p.columns;
  const auto offset = [&](int pixel) {
    const Position at = Position::of(pixel, y.vertical.outputs, y.horizontal.outputs);
    const i64 row = static_cast<i64>(at.i0) * p.vertical.size + phase_h + at.i1 * p.vertical.stride;
    return (row * p.horizontal.size + phase_w + at.i2 * p.horizontal.stride) * p.pitch + first_channel;
  };
  if constexpr (STATISTICS)
    finish_with_moments<G>(compute, p.x, p.parts, place, rows, p.columns, offset);
  else
    finish<G>(compute, p.x, place, rows, p.columns, offset);
}

}  // namespace fg::cuda
