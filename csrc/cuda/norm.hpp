// The passes that bn_act and gn_act share, compiled once in norm.cu.
#pragma once

#include "cuda/norm.cuh"
#include "cuda/sweep.hpp"

namespace fg::cuda {

struct NormTensors {
  DType dtype;
  const void *x, *dy, *ddx;
  void *y, *dx, *d_dy, *d_x;
};

enum class NormSums { STATISTICS, BACKWARD, DOUBLE };

// Of the statistics: bn_act's and gn_act's finishing kernels add it to the means.
Pivot pivot_of(const Walk&, const NormTensors&, const Norm&);
Reduction plan_norm(const Walk&, const NormTensors&, NormSums);
void reduce_norm(const char* op, const Walk&, const NormTensors&, const Norm&, NormSums, const Reduction&,
                 float* partials, void* stream);
void apply_norm_forward(const char* op, const Walk&, const NormTensors&, const Norm&, void* stream);
// k: [2][G C] of NormBackward.
void apply_norm_backward(const char* op, const Walk&, const NormTensors&, const Norm&, const float* k, void* stream);
// k: [DOUBLE_COEFS][G C].
void apply_norm_double(const char* op, const Walk&, const NormTensors&, const Norm&, const float* k, void* stream);

}  // namespace fg::cuda
