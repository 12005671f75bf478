// The two functions of OpenMP that kernels ask, also for builds without OpenMP (Apple's clang without libomp).
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fg::ISA {

static inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// The runtime may grant fewer threads than num_threads() asked for.
static inline int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Threads worth waking for this many elements: fork and join cost about as much as sweeping 16,000 elements.
static inline int team_for(int64_t elements, int threads) {
  const int64_t useful = elements / 16384;
  return useful < 1 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
}

// Part `index` of `parts` of [0, n): contiguous, sizes differ by at most one.
static inline int64_t part_begin(int64_t n, int64_t index, int64_t parts) {
  return n / parts * index + (index < n % parts ? index : n % parts);
}

}  // namespace fg::ISA
