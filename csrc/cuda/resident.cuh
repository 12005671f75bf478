// One pass over a channels_last tensor whose sums decide what becomes of its elements: they wait in shared memory.
//
// A block has a slice of up to 32 channels of some rows of a group. Its threads load the rows, add them up as
// reduce_columns_kernel does (Op::Reduce) and keep them in shared memory; then each maps what it has kept itself, as
// apply_columns_kernel does (Op::Map). In between the blocks that need each other's sums, a team, leave them as
// partials [G][parts][WORDS][C], meet at a barrier, and merge all of them in one order, each block for itself. A team
// of one needs neither memory nor barrier. Whether and how a tensor is so spread: resident.hpp.
//
// An Op has
//   Reduce, Map                              bodies of sweep.cuh over the same inputs
//   reduce(), map                            one of each
//   JOINT                                    a team spans the groups: something is summed over them
//   Total                                    what publish wants to know; zero at first
//   finish(acc, group, channel, total)       a channel's sums -> Map::Coef, all of floats
//   publish(total, group, channel)           called once a team and channel, after finish of its group (JOINT: of all)
#pragma once

#include "cuda/sweep.cuh"

namespace fg::cuda {

constexpr int RESIDENT_BLOCKS = 2;  // a multiprocessor: at most 128 registers a thread

struct Residence {
  int lanes, parts;  // vectors side by side in a block; blocks that share the rows of a group
  i64 rows;          // of a block, at most
  float* partials;   // null: teams of one
  u32* arrived;      // blocks of each team, zero before the launch
};

// Every block of a team waits for all of them, once a launch; all are resident, or the launch was refused. The counter
// is zeroed by the launcher: scratch memory holds anything, and no block can tell a stale count from a true one. An
// atomic reads past the L1 cache; what the others stored before their fence is seen behind this one's.
FG_DEVICE void meet_team(u32* arrived, u32 blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (atomicAdd(arrived, 0u) < blocks) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

// Lane x of every warp gets the warp's sum of column x of the block's, from V a thread in lanes_x lanes.
template <int V, class Acc>
FG_DEVICE Acc column_of_lane(Acc (&acc)[V], int lanes_x) {
  const int column = static_cast<int>(threadIdx.x) % WARP;
  Acc mine;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    merge_lanes(acc[j], lanes_x);
#pragma unroll
    for (int k = 0; k < Acc::WORDS; ++k) {
      const float word = __shfl_sync(ALL_LANES, acc[j].word[k], column / V % lanes_x);
      if (column % V == j) mine.word[k] = word;
    }
  }
  return mine;
}

template <class Coef>
union CoefWords {
  Coef coef;
  float word[sizeof(Coef) / sizeof(float)];
};
template <class Coef>
constexpr int COEF_WORDS = sizeof(Coef) / sizeof(float);

// The coefficients of column x of the block from its own sums (row 0 of threads has them) and the team's, into
// coefs[][x].
template <class Op, class Store>
FG_DEVICE void finish_columns(const Op& op, const Planes& p, const Residence& r, const Slab& t, int first, int width,
                              typename Op::Reduce::Acc acc, const Store& store_coefs) {
  using Acc = typename Op::Reduce::Acc;
  const int x = static_cast<int>(threadIdx.x) % FINISH_COLUMNS;
  const int channel = x < width ? first + x : p.channels;
  const bool mine = threadIdx.x < FINISH_COLUMNS && channel < p.channels;
  const bool publishes = t.split == 0 && (t.group == 0 || !Op::JOINT);
  typename Op::Total total{};
  if (!r.partials) {
    if (mine) store_coefs(x, op.finish(acc, t.group, channel, total));
  } else {
    if (mine)
#pragma unroll
      for (int k = 0; k < Acc::WORDS; ++k)
        store(partial_at(r.partials, t.group, r.parts, t.split, Acc::WORDS, k, p.channels) + channel, acc.word[k]);
    const int slices = (p.channels + width - 1) / width, slice = first / width;
    meet_team(r.arrived + (Op::JOINT ? slice : t.group * slices + slice), r.parts * (Op::JOINT ? p.groups : 1));
    const bool all = publishes && Op::JOINT;
    for (i64 group = all ? 0 : t.group; group < (all ? p.groups : t.group + 1); ++group) {
      acc = merge_splits<Acc>(r.partials, group, r.parts, channel, p.channels);
      if (!mine) continue;
      const typename Op::Map::Coef coef = op.finish(acc, group, channel, total);
      if (group == t.group) store_coefs(x, coef);
    }
  }
  if (mine && publishes) op.publish(total, t.group, channel);
}

// Grid: groups x parts x slices of lanes V channels, at most 32. V divides C. Shared memory: the rows of every input.
template <class Op, int V>
__global__ void __launch_bounds__(THREADS, RESIDENT_BLOCKS) resident_kernel(Op op, Planes p, Residence r) {
  using Reduce = typename Op::Reduce;
  using Map = typename Op::Map;
  using T = typename Map::T;
  using Raw = Pack<T, V>;
  FG_DYN_SHARED(T, kept);
  FG_SHARED(float, shared_coefs, [COEF_WORDS<typename Map::Coef>][FINISH_COLUMNS]);
  const Slab t = slab_of<V>(p, blockIdx.x, r.lanes, r.parts, r.rows);
  // a warp's vectors of 16 bytes lie side by side, so that no two of them want the same banks at a time
  const auto place = [&](i64 row, int k) {
    return kept + ((static_cast<int>(row - t.begin) + k * static_cast<int>(r.rows)) * r.lanes + t.lane_x) * V;
  };

  typename Reduce::Acc acc[V];
  accumulate_columns<Reduce, V>(op.reduce(), p, t, acc,
                                [&](i64 row, i64, const Raw(&raw)[Map::INPUTS], const typename Reduce::Coef(&)[V]) {
#pragma unroll
                                  for (int k = 0; k < Map::INPUTS; ++k) store_shared(place(row, k), raw[k]);
                                });
  typename Reduce::Acc column = column_of_lane<V>(acc, r.lanes);
  merge_block<THREADS, FINISH_COLUMNS>(column);
  finish_columns(op, p, r, t, t.column - t.lane_x * V, r.lanes * V, column, [&](int x, const typename Map::Coef& coef) {
    CoefWords<typename Map::Coef> words;
    words.coef = coef;
#pragma unroll
    for (int w = 0; w < COEF_WORDS<typename Map::Coef>; ++w) shared_coefs[w][x] = words.word[w];
  });
  __syncthreads();

  if (!t.inside) return;
  typename Map::Coef coefs[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    CoefWords<typename Map::Coef> words;
#pragma unroll
    for (int w = 0; w < COEF_WORDS<typename Map::Coef>; ++w) words.word[w] = shared_coefs[w][t.lane_x * V + j];
    coefs[j] = words.coef;
  }
  const i64 base = t.group * p.samples * p.pixels * p.channels + t.column;
  for (i64 row = t.begin + t.lane_y; row < t.end; row += t.lanes_y) {
    Raw raw[Map::INPUTS];
#pragma unroll
    for (int k = 0; k < Map::INPUTS; ++k) raw[k] = load_shared<Raw>(place(row, k));
    apply_columns_of<Map, V>(op.map, row, base + row * p.channels, raw, coefs);
  }
}

}  // namespace fg::cuda
