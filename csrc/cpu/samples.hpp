// Work on [N][E] samples, each by itself: cut into blocks that threads share whatever N is.
#pragma once

#include "common/parallel.hpp"

namespace fg::ISA {

// Elements of a block: float32 sums run over 4096 terms at most, 256 a lane in AVX-512, and blocks add up in float64.
constexpr int64_t SAMPLE_BLOCK = 4096;

static inline int64_t blocks_of(int64_t E) { return (E + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK; }

// Calls f(n, begin, end, block) for the blocks of this thread: elements [begin, end) of sample n; block counts from 0
// over all samples, so that a sum by blocks does not depend on the number of threads.
template <class F>
static inline void each_block(int64_t N, int64_t E, int thread, int team, const F& f) {
  const int64_t per_sample = blocks_of(E), blocks = N * per_sample;
  for (int64_t b = part_begin(blocks, thread, team); b < part_begin(blocks, thread + 1, team); ++b) {
    const int64_t n = b / per_sample, begin = (b - n * per_sample) * SAMPLE_BLOCK;
    f(n, begin, begin + SAMPLE_BLOCK < E ? begin + SAMPLE_BLOCK : E, b);
  }
}

}  // namespace fg::ISA
