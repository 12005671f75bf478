// Weights of any strides into panels that a micro-kernel reads from end to end.
//
// One panel for each (phase pair, group, column block): [unit row][column], rows tap by tap in the order of the phase's
// offsets. Each of a tap's channel rows is padded to whole runs, or, where a tap has so few channels that padding
// would dominate (images), the taps are merged into one run. Zeros fill every padding.
#pragma once

#include "cpu/conv_geometry.hpp"
#include "cpu/simd.hpp"

namespace fg::ISA {
namespace {

struct PhasePair {
  const AxisPhase *h, *w;
  int64_t taps;                 // h->taps * w->taps
  int64_t units;                // rows of a panel
  int64_t offset;               // bytes, of group 0's first panel
  int64_t w_inside, w_outside;  // between them, output columns of the phase use all of w's taps
};

struct TapSlot {
  int32_t pair;  // -1: no output uses the tap
  int32_t tap;
};

// Where everything lies in the packed weights, for one kernel K.
template <class K>
struct Panels {
  int64_t columns;    // M rounded up to the kernel's grain
  int64_t blocks;     // column blocks
  bool merged;        // taps merged into one run
  int64_t tap_units;  // units of one tap, if not merged
  int64_t pairs;
  int64_t bytes;
  PhasePair* pair;  // [pairs]
  TapSlot* slot;    // [R * S]

  int64_t first_column(int64_t block) const {
    const int64_t grains = columns / K::GRAIN;
    return (grains / blocks * block + least(block, grains % blocks)) * K::GRAIN;
  }
  int64_t width(int64_t block) const { return first_column(block + 1) - first_column(block); }
  int64_t panel(const PhasePair& p, int64_t group, int64_t block) const {
    return p.offset + (group * columns + first_column(block)) * p.units * 4;
  }
};

template <class K>
inline void plan_panels(const Problem& p, Panels<K>& panels) {
  constexpr int64_t RUN = K::PER_UNIT * K::RUN_UNITS;
  panels.columns = round_up(p.M, K::GRAIN);
  panels.blocks = ceil_div(panels.columns, K::COLUMNS);
  // 32: with AMX's runs of 32 channels a tap of an image would be nine tenths padding.
  panels.merged = p.C % RUN != 0 && p.C < 32;
  panels.tap_units = round_up(p.C, RUN) / K::PER_UNIT;
  panels.pairs = p.h.phases * p.w.phases;
  panels.bytes = 0;
  for (int64_t i = 0; i < p.R * p.S; ++i) panels.slot[i] = {-1, 0};
  for (int64_t i = 0; i < panels.pairs; ++i) {
    PhasePair& q = panels.pair[i];
    q.h = &p.h.phase[i / p.w.phases];
    q.w = &p.w.phase[i % p.w.phases];
    q.taps = q.h->taps * q.w->taps;
    q.units = panels.merged ? round_up(q.taps * p.C, RUN) / K::PER_UNIT : q.taps * panels.tap_units;
    q.offset = panels.bytes;
    q.w_inside = 0;
    while (q.w_inside < q.w->count && q.w->hi[q.w_inside] - q.w->lo[q.w_inside] < q.w->taps) ++q.w_inside;
    q.w_outside = q.w_inside;
    while (q.w_outside < q.w->count && q.w->hi[q.w_outside] - q.w->lo[q.w_outside] == q.w->taps) ++q.w_outside;
    panels.bytes += q.units * p.groups * panels.columns * 4;
    for (int64_t t = 0; t < q.taps; ++t)
      panels.slot[q.h->tap[t / q.w->taps].index * p.S + q.w->tap[t % q.w->taps].index] = {static_cast<int32_t>(i),
                                                                                          static_cast<int32_t>(t)};
  }
}

// One piece of the packing: VF columns of a group, and a range of channels, of all taps.
struct PackPiece {
  int64_t group, column;  // first column
  int64_t c0, c1;
};

// stage[rs][c - c0][VF] = weight[column + lane][c][rs]; lanes past M are zero. Reads run along whichever dimension is
// contiguous in memory, and tiles of VF x VF are transposed in registers where that is not the columns' own.
template <class W>
FG_NOINLINE void stage_weights(const Problem& p, const TapSlot* slot, const PackPiece& piece, float* stage) {
  const W* w =
      static_cast<const W*>(p.weight) + piece.group * p.stride_g + piece.column * p.stride_m + piece.c0 * p.stride_c;
  const int lanes = static_cast<int>(least(VF, p.M - piece.column));
  const int64_t depth = piece.c1 - piece.c0, taps = p.R * p.S;
  if (p.stride_m == 1) {
    for (int64_t rs = 0; rs < taps; ++rs) {
      if (slot[rs].pair < 0) continue;
      const W* from = w + rs / p.S * p.stride_r + rs % p.S * p.stride_s;
      float* to = stage + rs * depth * VF;
      if (lanes == VF)
        for (int64_t c = 0; c < depth; ++c) store(to + c * VF, load(from + c * p.stride_c));
      else
        for (int64_t c = 0; c < depth; ++c) store(to + c * VF, load_tail(from + c * p.stride_c, lanes));
    }
    return;
  }
  // Elements e of a column that follow each other in memory: channels of one tap, or all taps of one channel.
  const bool along_c = p.stride_c == 1, along_taps = p.stride_s == 1 && p.stride_r == p.S;
  const int64_t length = along_c ? depth : along_taps ? taps : 1, rows = taps * depth / length;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t rs = along_c ? row : along_taps ? 0 : row / depth, c = along_c ? 0 : along_taps ? row : row % depth;
    if (!along_taps && slot[rs].pair < 0) continue;
    const W* from = w + c * p.stride_c + rs / p.S * p.stride_r + rs % p.S * p.stride_s;
    float* to = stage + (rs * depth + c) * VF;
    const int64_t to_step = (along_c ? 1 : depth) * VF;
    for (int64_t e = 0; e < length; e += VF) {
      const int wide = static_cast<int>(least(VF, length - e));
      if (wide == 1) {
        for (int i = 0; i < VF; ++i) to[e * to_step + i] = i < lanes ? to_float(from[i * p.stride_m + e]) : 0.0f;
        continue;
      }
      vf v[VF];
      for (int i = 0; i < VF; ++i) {
        const W* at = from + i * p.stride_m + e;
        v[i] = i >= lanes ? zero() : wide == VF ? load(at) : load_tail(at, wide);
      }
      transpose(v);
      for (int i = 0; i < wide; ++i) store(to + (e + i) * to_step, v[i]);
    }
  }
}

template <class K>
FG_NOINLINE void emit_weights(const Problem& p, const Panels<K>& panels, const PackPiece& piece, const float* stage,
                              char* packed) {
  const int64_t depth = piece.c1 - piece.c0;
  const vf none = zero();
  // Rounding: pairs are rounded as they are interleaved; fp32 panels for bf16 sources, here.
  const bool round = K::PER_UNIT == 1 && p.source_dtype == BF16 && p.weight_dtype == F32;
  const auto channel = [&](int64_t rs, int64_t c) {
    return c < piece.c1 ? load(stage + (rs * depth + c - piece.c0) * VF) : none;
  };
  int64_t block = 0;
  while (panels.first_column(block + 1) <= piece.column) ++block;
  const int64_t column = piece.column - panels.first_column(block), width = panels.width(block);
  // Channels a and b (fp32: a alone) of the piece's columns, as one row of the panel.
  const auto emit = [&](const PhasePair& pair, char* panel, int64_t row, vf a, vf b) {
    if constexpr (K::ROWWISE) {
      float low[VF], high[VF];
      store(low, round ? round_bf16(a) : a);
      store(high, b);
      for (int64_t i = 0; i < panels.columns; ++i) {
        const bf16 two[2] = {to_bf16(low[i]), to_bf16(high[i])};
        std::memcpy(panel + (i * pair.units + row) * 4, K::PER_UNIT == 2 ? static_cast<const void*>(two) : &low[i], 4);
      }
    } else if constexpr (K::PER_UNIT == 2) {
      store(reinterpret_cast<float*>(panel + (row * width + column) * 4), interleave(a, b));
    } else {
      store(reinterpret_cast<float*>(panel + (row * width + column) * 4), round ? round_bf16(a) : a);
    }
  };
  if (!panels.merged) {
    const int64_t begin = piece.c0 / K::PER_UNIT;
    const int64_t end = piece.c1 == p.C ? panels.tap_units : piece.c1 / K::PER_UNIT;
    for (int64_t rs = 0; rs < p.R * p.S; ++rs) {
      if (panels.slot[rs].pair < 0) continue;
      const PhasePair& pair = panels.pair[panels.slot[rs].pair];
      const int64_t row = panels.slot[rs].tap * panels.tap_units;
      char* panel = packed + panels.panel(pair, piece.group, block);
      for (int64_t u = begin; u < end; ++u)
        emit(pair, panel, row + u, channel(rs, u * K::PER_UNIT), K::PER_UNIT == 2 ? channel(rs, u * 2 + 1) : none);
    }
    return;
  }
  for (int64_t i = 0; i < panels.pairs; ++i) {
    const PhasePair& pair = panels.pair[i];
    char* panel = packed + panels.panel(pair, piece.group, block);
    const auto element = [&](int64_t e) {
      const int64_t tap = e / p.C;
      if (tap >= pair.taps) return none;
      return channel(pair.h->tap[tap / pair.w->taps].index * p.S + pair.w->tap[tap % pair.w->taps].index, e % p.C);
    };
    for (int64_t u = 0; u < pair.units; ++u)
      emit(pair, panel, u, element(u * K::PER_UNIT), K::PER_UNIT == 2 ? element(u * 2 + 1) : none);
  }
}

// Channels of one piece: the stage stays in the first-level cache, and merged taps need all channels at once.
template <class K>
inline int64_t pack_depth(const Problem& p, const Panels<K>& panels) {
  if (panels.merged) return p.C;
  const int64_t fit = 32768 / (p.R * p.S * VF * 4);
  return least(p.C, most(16, fit / 16 * 16));
}

template <class K>
inline int64_t pack_stage_floats(const Problem& p, const Panels<K>& panels) {
  return p.R * p.S * pack_depth(p, panels) * VF;
}

template <class K>
inline int64_t pack_pieces(const Problem& p, const Panels<K>& panels) {
  const int64_t depth = pack_depth(p, panels);
  return depth > 0 ? p.groups * ceil_div(panels.columns, VF) * ceil_div(p.C, depth) : 0;
}

template <class K>
inline void pack_piece(const Problem& p, const Panels<K>& panels, int64_t index, float* stage, char* packed) {
  const int64_t depth = pack_depth(p, panels), ranges = ceil_div(p.C, depth);
  PackPiece piece;
  piece.c0 = index % ranges * depth;
  piece.c1 = least(p.C, piece.c0 + depth);
  index /= ranges;
  piece.column = index % ceil_div(panels.columns, VF) * VF;
  piece.group = index / ceil_div(panels.columns, VF);
  if (p.weight_dtype == BF16)
    stage_weights<bf16>(p, panels.slot, piece, stage);
  else
    stage_weights<float>(p, panels.slot, piece, stage);
  emit_weights(p, panels, piece, stage, packed);
}

}  // namespace
}  // namespace fg::ISA
