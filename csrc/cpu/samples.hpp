// Work on [N][E] samples, each by itself: cut into blocks that threads share whatever N is.
#pragma once

#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "cpu/simd.hpp"

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

// A sum over each sample: add(i, lanes, so_far) takes the terms of elements i.. in, finish(n, total) gets the sums.
template <class Add, class Finish>
static inline void sum_samples(int64_t N, int64_t E, int threads, const Add& add, const Finish& finish) {
  const int64_t blocks = blocks_of(E);
  const Scratch<double> memory(N * blocks);
  double* sums = memory.data;
#pragma omp parallel num_threads(team_for(N* E, threads))
  each_block(N, E, thread_index(), team_size(), [&](int64_t n, int64_t begin, int64_t end, int64_t block) {
    vf s[2] = {zero(), zero()};  // two chains: one would wait for the adder's latency
    int chain = 0;
    each(n * E + begin, n * E + end, [&](int64_t i, int lanes) {
      s[chain] = add(i, lanes, s[chain]);
      chain ^= 1;
    });
    sums[block] = static_cast<double>(sum(s[0] + s[1]));
  });
  for (int64_t n = 0; n < N; ++n) {
    double total = 0.0;
    for (int64_t b = 0; b < blocks; ++b) total += sums[n * blocks + b];
    finish(n, total);
  }
}

}  // namespace fg::ISA
