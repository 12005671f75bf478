// Work on [N][M] samples, each by itself: cut into blocks that threads share whatever N is.
#pragma once

#include "common/parallel.hpp"

namespace fg::ISA {

// Elements of a block: float32 partial sums of 4096 terms lose at most 2^-12 of their rounding, and their blocks add up
// in float64; 16 KB of float32 also stays in the first-level cache.
constexpr int64_t SAMPLE_BLOCK = 4096;

static inline int64_t blocks_of(int64_t M) { return (M + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK; }

// Calls f(n, begin, end, block) for the blocks of this thread: elements [begin, end) of sample n; block counts from 0
// over all samples, so that a sum by blocks does not depend on the number of threads.
template <class F>
static inline void each_block(int64_t N, int64_t M, int thread, int team, const F& f) {
  const int64_t per_sample = blocks_of(M), blocks = N * per_sample;
  for (int64_t b = part_begin(blocks, thread, team); b < part_begin(blocks, thread + 1, team); ++b) {
    const int64_t n = b / per_sample, begin = (b - n * per_sample) * SAMPLE_BLOCK;
    f(n, begin, begin + SAMPLE_BLOCK < M ? begin + SAMPLE_BLOCK : M, b);
  }
}

}  // namespace fg::ISA
