#include "cuda/kernels.hpp"

namespace fg::cuda {

const Table& table() {
  static const Table all{
      .bias_act_forward = bias_act_forward,
      .bias_act_backward = bias_act_backward,
      .bn_act_forward = nullptr,
      .bn_act_backward = nullptr,
      .bn_act_double_backward = nullptr,
      .gn_act_forward = nullptr,
      .gn_act_backward = nullptr,
      .gn_act_double_backward = nullptr,
      .gan_loss_forward = nullptr,
      .gan_loss_backward = nullptr,
      .conv2d = conv2d,
      .conv_transpose2d = conv_transpose2d,
      .conv2d_weight = conv2d_weight,
  };
  return all;
}

}  // namespace fg::cuda
