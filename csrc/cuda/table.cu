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
      .gan_loss_forward = gan_loss_forward,
      .gan_loss_backward = gan_loss_backward,
      .gan_loss_double_backward = gan_loss_double_backward,
      .interpolate_forward = interpolate_forward,
      .sample_dot = sample_dot,
      .grad_norm_penalty_forward = grad_norm_penalty_forward,
      .grad_norm_penalty_backward = grad_norm_penalty_backward,
      .adam = adam,
      .conv2d = conv2d,
      .conv_transpose2d = conv_transpose2d,
      .conv2d_weight = conv2d_weight,
      .conv2d_statistics = conv2d_statistics,
      .conv_transpose2d_statistics = conv_transpose2d_statistics,
  };
  return all;
}

}  // namespace fg::cuda
