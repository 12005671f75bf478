// Device facts from the CUDA runtime. Every error becomes text: a machine without a driver is an ordinary case.
#include <cuda_runtime.h>

#include "cuda/device.hpp"

namespace fg::cuda {

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

static std::string text(cudaError_t error) {
  cudaGetLastError();  // clears it: the next launch must not report this one
  return cudaGetErrorString(error);
}

std::string devices(std::vector<Device>* found) {
  found->clear();
  int count = 0;
  if (cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) return text(error);
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p;
    if (cudaError_t error = cudaGetDeviceProperties(&p, i); error != cudaSuccess) return text(error);
    found->push_back({p.name, p.major, p.minor, p.multiProcessorCount, p.totalGlobalMem, p.sharedMemPerBlockOptin,
                      static_cast<size_t>(p.l2CacheSize)});
  }
  return count ? "" : "the CUDA runtime sees no device";
}

}  // namespace fg::cuda
