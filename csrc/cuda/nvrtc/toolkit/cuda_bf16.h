// As cuda_fp16.h. Below sm_80 there is no instruction that rounds to bfloat16.
#pragma once

#ifndef __CUDACC_RTC__
#include "cuda/nvrtc/language.hpp"
#endif

struct alignas(2) __nv_bfloat16 {
  unsigned short bits;
};

#ifdef __CUDACC_RTC__
static __device__ __forceinline__ float __bfloat162float(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<unsigned>(v.bits) << 16);
}
static __device__ __forceinline__ __nv_bfloat16 __float2bfloat16_rn(float f) {
  __nv_bfloat16 v;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
#else
  const unsigned u = __float_as_uint(f);  // to nearest even; a NaN as the instruction gives it
  v.bits = static_cast<unsigned short>(f != f ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
#endif
  return v;
}
#else
float __bfloat162float(__nv_bfloat16);
__nv_bfloat16 __float2bfloat16_rn(float);
#endif
