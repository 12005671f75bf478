// The interface between the binding (binding.hpp) and the CUDA launchers (cuda/<op>.cu). A launcher takes the CPU's
// structs, ignores their `threads`, and takes a Target. It returns the bytes of workspace that it needs, or 0 when it
// has launched.
#pragma once

#include "common/kernels.hpp"

namespace fg::cuda {

// Where a launcher runs and the device memory that it may use. A launcher whose `workspace` is null and that needs some
// launches nothing and returns the bytes; any other call returns 0. The memory needs no initial value.
FG_STRUCT(Target, (void*, workspace), (void*, stream));

// Statistics of a convolution's output: mean and biased var, float32 [groups][channels]; group g of `groups` is the
// samples [g N/groups, (g+1) N/groups), and groups divides N.
FG_STRUCT(StatisticsArgs, (int64_t, groups), (float*, mean), (float*, var));

// The kernels under the names of the CPU's, and convolutions with statistics, which leave the activation aside.
#define FG_STATISTICS_KERNELS(f)                              \
  f(conv2d_statistics, ConvShape, Conv2dArgs, StatisticsArgs) \
      f(conv_transpose2d_statistics, ConvShape, ConvTranspose2dArgs, StatisticsArgs)
#define FG_CUDA_KERNELS(f) \
  FG_KERNELS(f)            \
  FG_STATISTICS_KERNELS(f)

template <class... Structs>
using Launcher = int64_t(const Structs&..., const Target&);

#define FG_LAUNCHER(kernel, ...) Launcher<__VA_ARGS__> kernel;
FG_CUDA_KERNELS(FG_LAUNCHER)

// The functions that binding.hpp binds.
struct Table {
#define FG_TABLE_LAUNCHER(kernel, ...) Launcher<__VA_ARGS__>* kernel;
  FG_CUDA_KERNELS(FG_TABLE_LAUNCHER)
};
const Table& table();

}  // namespace fg::cuda
