// Scalar activations on fp32, in the namespace of the instruction set that is being compiled.
#pragma once

#include <cmath>

#include "common/kernels.hpp"

namespace fg::ISA {

// relu and leaky_relu let NaN through, as torch does: the comparison is written so that NaN takes the x branch.
static inline float act_forward(float x, Act act, float slope) {
  switch (act) {
    case ACT_RELU:
      return x <= 0.0f ? 0.0f : x;
    case ACT_LEAKY_RELU:
      return x > 0.0f ? x : x * slope;
    case ACT_TANH:
      return std::tanh(x);
    case ACT_SIGMOID:
      return 1.0f / (1.0f + std::exp(-x));
    default:
      return x;
  }
}

}  // namespace fg::ISA
