// What a launcher (.cu) needs beside its device code: the launch macro, errors, and the choice of a dtype.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/kernels.hpp"
#include "cuda/prelude.cuh"

// FG_KERNEL                a kernel by the name of its function (template) and its template arguments
// FG_LAUNCH                as kernel<<<grid, block, shared_bytes, stream>>>(...)
// FG_LAUNCH_COOPERATIVE    the same, but all blocks are resident at a time, or the launch is an error
// FG_ALLOW_SHARED          before either with more than 48 KiB: the most that the kernel will ask of this card
#if defined(FG_NVRTC)
#include "cuda/nvrtc/loader.hpp"
#elif !defined(FG_SIMT)
#include <tuple>

#define FG_KERNEL(name, ...) name __VA_OPT__(<__VA_ARGS__>)
#define FG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define FG_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  fg::cuda::launch_cooperative(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define FG_ALLOW_SHARED(kernel, bytes) \
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))

namespace fg::cuda {

template <class... P, class... A>
void launch_cooperative(void (*kernel)(P...), unsigned grid, unsigned block, size_t shared_bytes, void* stream,
                        const A&... arguments) {
  std::tuple<P...> parameters(arguments...);
  std::apply(
      [&](auto&... p) {
        void* addresses[] = {&p...};
        cudaLaunchCooperativeKernel(kernel, grid, block, addresses, shared_bytes, static_cast<cudaStream_t>(stream));
      },
      parameters);
}

}  // namespace fg::cuda
#endif

namespace fg::cuda {

inline void check_launch(const char* op) {
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": the kernel must launch, got " + cudaGetErrorString(error));
}

// Of the current device; 0 where the runtime does not say, and then the launch will.
inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, which, device) == cudaSuccess;
  return known ? value : 0;
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
