#include "cuda/kernels.hpp"

namespace fg::cuda {

const Table& table() {
#define FG_TABLE_ENTRY(kernel, ...) kernel,
  static const Table all{FG_CUDA_KERNELS(FG_TABLE_ENTRY)};
  return all;
}

}  // namespace fg::cuda
