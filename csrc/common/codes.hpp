// The numbers by which the binding names dtypes, activations and losses. No include: NVRTC reads this file too.
#pragma once

namespace fg {

enum DType : int { F32 = 0, BF16 = 1, F16 = 2, TF32 = 3 };  // F16: CUDA kernels only; TF32: its convolutions
enum Act : int {
  ACT_IDENTITY = 0,
  ACT_RELU = 1,
  ACT_LEAKY_RELU = 2,
  ACT_TANH = 3,
  ACT_SIGMOID = 4,  // the last one that a convolution fuses
  ACT_ELU = 5,
  ACT_SELU = 6,
  ACT_SOFTPLUS = 7,
  ACT_SWISH = 8,  // from here on the derivative is read from the input
  ACT_GELU = 9,
  ACT_GELU_TANH = 10
};
enum Loss : int { LOSS_BCE = 0, LOSS_MINIMAX, LOSS_LSGAN, LOSS_HINGE, LOSS_WASSERSTEIN, LOSS_RELATIVISTIC };
enum Side : int { SIDE_D = 0, SIDE_G = 1 };

}  // namespace fg
