// CUDA's device language for a C++ compiler that only has to parse it: the launchers (.cu) need the kernels' names and
// parameters, not their bodies. NVRTC compiles the code that runs (loader.hpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint4 {
  unsigned x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
struct FgIndex {
  unsigned x, y, z;
};
extern const FgIndex threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __threadfence();
void __nanosleep(unsigned);
void __trap();
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes);
template <class T>
T __shfl_sync(unsigned mask, T value, int lane);
unsigned __ballot_sync(unsigned mask, int predicate);
unsigned atomicAdd(unsigned*, unsigned);
unsigned atomicExch(unsigned*, unsigned);
size_t __cvta_generic_to_shared(const void*);
float __uint_as_float(unsigned);
float __fdividef(float, float);
float rsqrtf(float);
using std::max;
using std::min;
