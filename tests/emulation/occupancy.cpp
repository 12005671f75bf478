// Occupancy of a kernel on cards that are not here: NVIDIA's cuda_occupancy.h is plain C++ and wants properties only.
// Reads lines "capability registers threads shared_bytes" and answers each with the share of a multiprocessor's
// threads.
#include <cuda_occupancy.h>

#include <cstdio>
#include <cstring>

struct Card {
  int capability, threads, shared, shared_optin, reserved;
};
// Per multiprocessor and block; tables of compute capabilities in the CUDA C++ Programming Guide. 65,536 registers on
// all.
static const Card cards[] = {{75, 1024, 65536, 65536, 0},      {80, 2048, 167936, 166912, 1024},
                             {86, 1536, 102400, 101376, 1024}, {89, 1536, 102400, 101376, 1024},
                             {90, 2048, 233472, 232448, 1024}, {100, 2048, 233472, 232448, 1024},
                             {120, 1536, 102400, 101376, 1024}};

int main() {
  int capability, registers, threads, shared;
  while (std::scanf("%d %d %d %d", &capability, &registers, &threads, &shared) == 4) {
    double share = -1.0;
    for (const Card& card : cards) {
      if (card.capability != capability) continue;
      cudaOccDeviceProp p;
      std::memset(&p, 0, sizeof p);
      p.computeMajor = capability / 10;
      p.computeMinor = capability % 10;
      p.maxThreadsPerBlock = 1024;
      p.maxThreadsPerMultiprocessor = card.threads;
      p.regsPerBlock = p.regsPerMultiprocessor = 65536;
      p.warpSize = 32;
      p.sharedMemPerBlock = 49152;
      p.sharedMemPerMultiprocessor = card.shared;
      p.sharedMemPerBlockOptin = card.shared_optin;
      p.reservedSharedMemPerBlock = card.reserved;
      p.numSms = 1;
      cudaOccFuncAttributes f;
      std::memset(&f, 0, sizeof f);
      f.maxThreadsPerBlock = 1024;
      f.numRegs = registers;
      f.sharedSizeBytes = shared;
      f.partitionedGCConfig = PARTITIONED_GC_OFF;
      f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
      f.maxDynamicSharedSizeBytes = card.shared_optin;
      f.numBlockBarriers = 1;
      cudaOccDeviceState s;
      std::memset(&s, 0, sizeof s);
      s.cacheConfig = CACHE_PREFER_NONE;
      s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
      cudaOccResult r;
      if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, threads, 0) == CUDA_OCC_SUCCESS)
        share = static_cast<double>(r.activeBlocksPerMultiprocessor) * threads / card.threads;
    }
    std::printf("%.4f\n", share);
  }
  return 0;
}
