// Found before, or without, the toolkit's file of this name where kernels are compiled at first use (nvrtc/loader.hpp):
// NVRTC reads the conversions, the host compiler their declarations. As the toolkit's do it.
#pragma once

#ifndef __CUDACC_RTC__
#include "cuda/nvrtc/language.hpp"
#endif

struct alignas(2) __half {
  unsigned short bits;
};

#ifdef __CUDACC_RTC__
static __device__ __forceinline__ float __half2float(__half v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
static __device__ __forceinline__ __half __float2half_rn(float f) {
  __half v;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
  return v;
}
#else
float __half2float(__half);
__half __float2half_rn(float);
#endif
