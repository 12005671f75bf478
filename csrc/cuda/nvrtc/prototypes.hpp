// The functions of libcuda.so.1 and libnvrtc.so that loader.cpp calls, as the two libraries export them. Their
// interfaces are stable; written out here, no toolkit is needed to build.
#pragma once

#include <cstddef>

namespace fg::cuda::nvrtc {

using Context = void*;
using Module = void*;
using Function = void*;
using Program = void*;
using U = unsigned;

enum : int {
  SUCCESS = 0,
  MULTIPROCESSORS = 16,  // CU_DEVICE_ATTRIBUTE_...
  L2_BYTES = 38,
  CAPABILITY_MAJOR = 75,
  CAPABILITY_MINOR = 76,
  SHARED_BYTES_OPTIN = 97,
  MAX_DYNAMIC_SHARED_BYTES = 8,  // CU_FUNC_ATTRIBUTE_...
  CAPTURE_RELAXED = 2,           // CU_STREAM_CAPTURE_MODE_...
};

// clang-format off: a line each
#define FG_DRIVER(f)                                                             \
  f(int, cuInit, (unsigned))                                                     \
  f(int, cuGetErrorString, (int, const char**))                                  \
  f(int, cuDriverGetVersion, (int*))                                             \
  f(int, cuDeviceGetCount, (int*))                                               \
  f(int, cuDeviceGet, (int*, int))                                               \
  f(int, cuDeviceGetName, (char*, int, int))                                     \
  f(int, cuDeviceTotalMem_v2, (size_t*, int))                                    \
  f(int, cuDeviceGetAttribute, (int*, int, int))                                 \
  f(int, cuDevicePrimaryCtxRetain, (Context*, int))                              \
  f(int, cuCtxGetCurrent, (Context*))                                            \
  f(int, cuCtxSetCurrent, (Context))                                             \
  f(int, cuCtxGetDevice, (int*))                                                 \
  f(int, cuThreadExchangeStreamCaptureMode, (int*))                              \
  f(int, cuModuleLoadData, (Module*, const void*))                               \
  f(int, cuModuleGetFunction, (Function*, Module, const char*))                  \
  f(int, cuFuncSetAttribute, (Function, int, int))                               \
  f(int, cuMemsetD8Async, (unsigned long long, unsigned char, size_t, void*))    \
  f(int, cuLaunchKernel, (Function, U, U, U, U, U, U, U, void*, void**, void**)) \
  f(int, cuLaunchCooperativeKernel, (Function, U, U, U, U, U, U, U, void*, void**))

#define FG_COMPILER(f)                                                                                          \
  f(const char*, nvrtcGetErrorString, (int))                                                                    \
  f(int, nvrtcVersion, (int*, int*))                                                                            \
  f(int, nvrtcGetNumSupportedArchs, (int*))                                                                     \
  f(int, nvrtcGetSupportedArchs, (int*))                                                                        \
  f(int, nvrtcCreateProgram, (Program*, const char*, const char*, int, const char* const*, const char* const*)) \
  f(int, nvrtcDestroyProgram, (Program*))                                                                       \
  f(int, nvrtcAddNameExpression, (Program, const char*))                                                        \
  f(int, nvrtcCompileProgram, (Program, int, const char* const*))                                               \
  f(int, nvrtcGetLoweredName, (Program, const char*, const char**))                                             \
  f(int, nvrtcGetProgramLogSize, (Program, size_t*))                                                            \
  f(int, nvrtcGetProgramLog, (Program, char*))                                                                  \
  f(int, nvrtcGetCUBINSize, (Program, size_t*))                                                                 \
  f(int, nvrtcGetCUBIN, (Program, char*))                                                                       \
  f(int, nvrtcGetPTXSize, (Program, size_t*))                                                                   \
  f(int, nvrtcGetPTX, (Program, char*))
// clang-format on

}  // namespace fg::cuda::nvrtc
