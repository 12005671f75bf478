#include "cuda/kernels.hpp"

namespace fg::cuda {

const Table& table() {
  static const Table all{
      .bias_act_forward = bias_act_forward,
      .bias_act_backward = bias_act_backward,
      .bn_act_forward = bn_act_forward,
      .bn_act_backward = bn_act_backward,
      .bn_act_double_backward = bn_act_double_backward,
      .gn_act_forward = gn_act_forward,
      .gn_act_backward = gn_act_backward,
      .gn_act_double_backward = gn_act_double_backward,
      .gan_loss_forward = nullptr,
      .gan_loss_backward = nullptr,
      .conv2d = nullptr,
      .conv_transpose2d = nullptr,
      .conv2d_weight = nullptr,
  };
  return all;
}

}  // namespace fg::cuda
