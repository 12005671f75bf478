// Whether a tensor fits the device's shared memory, how it is spread there, and the launch (resident.cuh).
#pragma once

#include <algorithm>
#include <optional>

#include "cuda/resident.cuh"
#include "cuda/sweep.hpp"

namespace fg::cuda {

// What the plan asks of a card. Bytes of shared memory: of a multiprocessor, of a block at most, and what the runtime
// adds to a block's.
struct Card {
  int multiprocessors;
  int64_t shared, shared_block, reserved;
  bool cooperative;
};

inline Card current_card() {
  return {
      device_attribute(cudaDevAttrMultiProcessorCount), device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      device_attribute(cudaDevAttrReservedSharedMemoryPerBlock), device_attribute(cudaDevAttrCooperativeLaunch) > 0};
}

// Dynamic shared memory that a block of Op may have where RESIDENT_BLOCKS of them share a multiprocessor: on an H100
// 228 / 2 - 1 KiB less 3 to 6 KiB of static memory. Registers allow as many by __launch_bounds__, threads anyway.
template <class Op>
int64_t resident_bytes(const Card& card) {
  constexpr int words = Op::Reduce::Acc::WORDS * FINISH_ROWS + COEF_WORDS<typename Op::Map::Coef>;
  constexpr int64_t fixed = words * FINISH_COLUMNS * int64_t{sizeof(float)};
  return std::min(card.shared_block, card.shared / RESIDENT_BLOCKS - card.reserved) - fixed;
}

// Rows are not split into parts of fewer bytes: it is what a block's 256 threads have in flight at a time, 64 each.
constexpr int64_t LEAST_RESIDENT = THREADS * 64;

// Blocks: groups x parts x slices.
struct Spread {
  int lanes, parts;      // as in Residence; 0 parts: the tensor does not fit
  int64_t slices, rows;  // of channels; of a block
  int64_t bytes;         // that a block keeps
  bool alone;            // every team is one block, which waits for nobody
};

// By shape and card alone. Slices are as narrow as whole sectors allow, 32 bytes of a row (64 to 128 where rows are not
// aligned): with B blocks on C channels in slices of S a block reads the partials of B S / C blocks. They grow to 32
// channels where there are more of them than places, two a multiprocessor; else the places are shared out among them.
template <class Op, int V>
Spread spread(const Walk& walk, const Card& card) {
  const Planes& p = walk.planes;
  const int64_t places = int64_t{RESIDENT_BLOCKS} * card.multiprocessors;
  Spread s{};
  s.lanes = 1;
  const auto slices = [&] { return divide_up(p.channels, s.lanes * V); };
  while (s.lanes < (V == 1 ? WARP : 2) && s.lanes * V < p.channels) s.lanes *= 2;
  while (s.lanes * V < FINISH_COLUMNS && p.groups * slices() > places) s.lanes *= 2;
  s.slices = slices();
  const int64_t row_bytes = int64_t{Op::Map::INPUTS} * s.lanes * V * int64_t{sizeof(typename Op::Map::T)};
  const Split split(walk.rows(), std::max<int64_t>(1, LEAST_RESIDENT / row_bytes),
                    std::max<int64_t>(1, places / (p.groups * s.slices)));
  s.rows = split.share;
  s.bytes = split.share * row_bytes;
  s.alone = split.count == 1 && (p.groups == 1 || !Op::JOINT);
  const bool together = card.cooperative && p.groups * s.slices * split.count <= places;
  if (s.bytes <= resident_bytes<Op>(card) && (s.alone || together)) s.parts = split.count;
  return s;
}

// As a launcher's return value, or nothing where the tensor does not fit.
template <class Op, int V>
std::optional<int64_t> run_resident_by(const char* op, const Walk& walk, const Op& body, const Target& target) {
  const Planes& p = walk.planes;
  const Card card = current_card();
  const Spread s = spread<Op, V>(walk, card);
  if (s.parts == 0) return std::nullopt;
  static_assert(sizeof(float) == sizeof(u32));
  const int64_t partials = s.alone ? 0 : int64_t{p.groups} * s.parts * Op::Reduce::Acc::WORDS * p.channels;
  const int64_t counters = s.alone ? 0 : s.slices * (Op::JOINT ? 1 : p.groups);
  if (!s.alone && !target.workspace) return (partials + counters) * int64_t{sizeof(float)};

  const unsigned grid = grid_of(op, p.groups * s.parts * s.slices);
  if (s.bytes > 48 << 10) FG_ALLOW_SHARED(FG_KERNEL(resident_kernel, Op, V), resident_bytes<Op>(card));
  Residence r{s.lanes, s.parts, s.rows, nullptr, nullptr};
  if (s.alone) {
    FG_LAUNCH(FG_KERNEL(resident_kernel, Op, V), grid, THREADS, s.bytes, target.stream, body, p, r);
  } else {
    r.partials = static_cast<float*>(target.workspace);
    r.arrived = reinterpret_cast<u32*>(r.partials + partials);
    cudaMemsetAsync(r.arrived, 0, counters * sizeof(u32), static_cast<cudaStream_t>(target.stream));
    check_launch(op);  // with other counters blocks might wait for ever
    FG_LAUNCH_COOPERATIVE(FG_KERNEL(resident_kernel, Op, V), grid, THREADS, s.bytes, target.stream, body, p, r);
  }
  check_launch(op);
  return 0;
}

template <class Op>
std::optional<int64_t> run_resident(const char* op, const Walk& walk, const Op& body, const Target& target) {
  constexpr int V = VECTOR<typename Op::Map::T>;
  if (!walk.columns) return std::nullopt;
  const bool whole = walk.planes.channels % V == 0 && all_aligned(body.map);
  return whole ? run_resident_by<Op, V>(op, walk, body, target) : run_resident_by<Op, 1>(op, walk, body, target);
}

}  // namespace fg::cuda
