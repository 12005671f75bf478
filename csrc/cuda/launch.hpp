// What a launcher (.cu) needs beside its device code: the launch macro, errors, and the choice of a dtype.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/kernels.hpp"
#include "cuda/prelude.cuh"

#if defined(FG_NVRTC)
#include "cuda/nvrtc/loader.hpp"
#elif !defined(FG_SIMT)
#define FG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace fg::cuda {

inline void check_launch(const char* op) {
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": the kernel must launch, got " + cudaGetErrorString(error));
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Grids are one-dimensional: 2^31 - 1 blocks.
inline unsigned grid_of(const char* op, int64_t blocks) {
  if (blocks < 1 || blocks > 2147483647)
    throw std::invalid_argument(std::string(op) + ": the grid must have 1..2^31-1 blocks, got " +
                                std::to_string(blocks));
  return static_cast<unsigned>(blocks);
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls f with a value of the dtype's C++ type: by_dtype(dtype, [&](auto zero) { using T = decltype(zero); ... }).
template <class F>
auto by_dtype(DType dtype, const F& f) {
  if (dtype == BF16) return f(__nv_bfloat16{});
  if (dtype == F16) return f(__half{});
  return f(0.0f);
}

}  // namespace fg::cuda
