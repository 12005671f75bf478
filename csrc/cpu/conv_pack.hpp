// Weights of any strides into panels that a micro-kernel reads from end to end.
//
// One panel for each (phase pair, group, column block): [unit row][column], rows tap by tap in the order of the phase's
// offsets. Each of a tap's channel rows is padded to whole runs, or, where a tap has so few channels that padding
// would dominate (images), the taps are merged into one run. Zeros fill every padding.
#pragma once

#include "cpu/conv_geometry.hpp"
#include "cpu/conv_simd.hpp"

namespace fg::ISA {
namespace {

struct PhasePair {
  const AxisPhase *h, *w;
  int64_t taps;    // h->taps * w->taps
  int64_t units;   // rows of a panel
  int64_t offset;  // bytes, of group 0's first panel
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
    panels.bytes += q.units * p.groups * panels.columns * 4;
    for (int64_t t = 0; t < q.taps; ++t)
      panels.slot[q.h->tap[t / q.w->taps].index * p.S + q.w->tap[t % q.w->taps].index] = {static_cast<int32_t>(i),
                                                                                          static_cast<int32_t>(t)};
  }
}

inline float rounded_weight(const float* p, bool round) { return round ? to_float(to_bf16(*p)) : *p; }
inline float rounded_weight(const bf16* p, bool) { return to_float(*p); }

// One piece of the packing: VF columns of a group, and a range of channels, of all taps.
struct PackPiece {
  int64_t group, column;  // first column
  int64_t c0, c1;
};

// stage[rs][c - c0][VF] = weight[column + lane][c][rs]; lanes past M are zero.
template <class W>
inline void stage_weights(const Problem& p, const TapSlot* slot, const PackPiece& piece, float* stage) {
  const W* w =
      static_cast<const W*>(p.weight) + piece.group * p.stride_g + piece.column * p.stride_m + piece.c0 * p.stride_c;
  const bool round = p.source_is_bf16;
  const int64_t lanes = least(VF, p.M - piece.column), depth = piece.c1 - piece.c0;
  for (int64_t r = 0; r < p.R; ++r)
    for (int64_t s = 0; s < p.S; ++s) {
      if (slot[r * p.S + s].pair < 0) continue;
      float* to = stage + (r * p.S + s) * depth * VF;
      const W* from = w + r * p.stride_r + s * p.stride_s;
      for (int64_t c = 0; c < depth; ++c)
        for (int64_t i = 0; i < VF; ++i)
          to[c * VF + i] = i < lanes ? rounded_weight(from + c * p.stride_c + i * p.stride_m, round) : 0.0f;
    }
}

// Channels a and b (fp32: a alone) of the VF columns that start at `column`, as one row of their panel.
template <class K>
inline void emit_row(const Panels<K>& panels, const PhasePair& pair, const PackPiece& piece, int64_t row, vec a, vec b,
                     char* packed) {
  if constexpr (K::ROWWISE) {
    float low[VF], high[VF];
    vstore(low, a);
    vstore(high, b);
    char* to = packed + pair.offset + piece.group * panels.columns * pair.units * 4 + row * 4;
    for (int64_t i = 0; i < panels.columns; ++i, to += pair.units * 4) {
      const bf16 two[2] = {to_bf16(low[i]), to_bf16(high[i])};
      std::memcpy(to, K::PER_UNIT == 2 ? static_cast<const void*>(two) : &low[i], 4);
    }
  } else {
    // The block that holds the column: widths differ by one grain at most.
    int64_t block = panels.blocks * piece.column / panels.columns;
    while (panels.first_column(block) > piece.column) --block;
    while (panels.first_column(block + 1) <= piece.column) ++block;
    char* to = packed + panels.panel(pair, piece.group, block) +
               (row * panels.width(block) + piece.column - panels.first_column(block)) * 4;
    if constexpr (K::PER_UNIT == 2) {
      const vecu two = interleave_bf16(a, b);
      std::memcpy(to, &two, sizeof two);
    } else {
      std::memcpy(to, &a, sizeof a);
    }
  }
}

template <class K>
inline void emit_weights(const Problem& p, const Panels<K>& panels, const PackPiece& piece, const float* stage,
                         char* packed) {
  const int64_t depth = piece.c1 - piece.c0;
  const vec zero = vset(0.0f);
  const auto channel = [&](int64_t rs, int64_t c) {
    return c < piece.c1 ? vload(stage + (rs * depth + c - piece.c0) * VF) : zero;
  };
  if (!panels.merged) {
    const int64_t end = piece.c1 == p.C ? panels.tap_units : piece.c1 / K::PER_UNIT;
    for (int64_t rs = 0; rs < p.R * p.S; ++rs) {
      if (panels.slot[rs].pair < 0) continue;
      const PhasePair& pair = panels.pair[panels.slot[rs].pair];
      const int64_t row = panels.slot[rs].tap * panels.tap_units;
      for (int64_t u = piece.c0 / K::PER_UNIT; u < end; ++u)
        emit_row(panels, pair, piece, row + u, channel(rs, u * K::PER_UNIT),
                 K::PER_UNIT == 2 ? channel(rs, u * 2 + 1) : zero, packed);
    }
    return;
  }
  for (int64_t i = 0; i < panels.pairs; ++i) {
    const PhasePair& pair = panels.pair[i];
    const auto element = [&](int64_t e) {
      const int64_t tap = e / p.C;
      if (tap >= pair.taps) return zero;
      return channel(pair.h->tap[tap / pair.w->taps].index * p.S + pair.w->tap[tap % pair.w->taps].index, e % p.C);
    };
    for (int64_t u = 0; u < pair.units; ++u)
      emit_row(panels, pair, piece, u, element(u * K::PER_UNIT), K::PER_UNIT == 2 ? element(u * 2 + 1) : zero, packed);
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
