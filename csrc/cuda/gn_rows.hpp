// gn_act for samples of few pixels: gn_act.cu hands them over. NCHW, or one pixel.
#pragma once

#include "cuda/kernels.hpp"

namespace fg::cuda {

// Sums per sample and channel pay from here on: they are then 3/16 of x's elements at most, in float32.
constexpr int64_t FEW_PIXELS = 16;

int64_t gn_rows_forward(const GnShape&, const NormForwardArgs&, const Target&);
int64_t gn_rows_backward(const GnShape&, const NormBackwardArgs&, const Target&);
int64_t gn_rows_double_backward(const GnShape&, const NormDoubleBackwardArgs&, const Target&);

}  // namespace fg::cuda
