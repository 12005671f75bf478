// The interface between the binding (binding.hpp) and the CUDA launchers (cuda/<op>.cu): CPU's structs, whose `threads`
// they leave aside, and a Target. Each returns the bytes of workspace that it needs, or 0 when it has launched.
#pragma once

#include "common/kernels.hpp"

namespace fg::cuda {

// Where a launcher runs and the device memory that it may use. A launcher whose `workspace` is null and that needs some
// launches nothing and returns the bytes; any other call returns 0. The memory needs no initial value.
struct Target {
  void *workspace, *stream;
};

// Statistics of a convolution's output: mean and biased var, float32 [groups][channels]; group g of `groups` is the
// samples [g N/groups, (g+1) N/groups), and groups divides N.
struct StatisticsArgs {
  int64_t groups;
  float *mean, *var;
};

int64_t bias_act_forward(const BiasActShape&, const BiasActForwardArgs&, const Target&);
int64_t bias_act_backward(const BiasActShape&, const BiasActBackwardArgs&, const Target&);
int64_t bn_act_forward(const BnShape&, const BnActForwardArgs&, const Target&);
int64_t bn_act_backward(const BnShape&, const BnActBackwardArgs&, const Target&);
int64_t bn_act_double_backward(const BnShape&, const BnActDoubleBackwardArgs&, const Target&);
int64_t gn_act_forward(const GnShape&, const GnActForwardArgs&, const Target&);
int64_t gn_act_backward(const GnShape&, const GnActBackwardArgs&, const Target&);
int64_t gn_act_double_backward(const GnShape&, const GnActDoubleBackwardArgs&, const Target&);
int64_t gan_loss_forward(const GanLossArgs&, const Target&);
int64_t gan_loss_backward(const GanLossArgs&, const Target&);
int64_t gan_loss_double_backward(const GanLossArgs&, const Target&);
int64_t interpolate_forward(const InterpolateArgs&, const Target&);
int64_t sample_dot(const SampleDotArgs&, const Target&);
int64_t grad_norm_penalty_forward(const GradNormPenaltyArgs&, const Target&);
int64_t grad_norm_penalty_backward(const GradNormPenaltyArgs&, const Target&);
int64_t adam(const AdamArgs&, const Target&);
int64_t conv2d(const ConvShape&, const Conv2dArgs&, const Target&);
int64_t conv_transpose2d(const ConvShape&, const ConvTranspose2dArgs&, const Target&);
int64_t conv2d_weight(const ConvShape&, const Conv2dWeightArgs&, const Target&);
// With statistics; the activation is left aside.
int64_t conv2d_statistics(const ConvShape&, const Conv2dArgs&, const StatisticsArgs&, const Target&);
int64_t conv_transpose2d_statistics(const ConvShape&, const ConvTranspose2dArgs&, const StatisticsArgs&, const Target&);

// The functions that binding.hpp binds, under the names of the CPU's fg::Table, which has no convolutions with
// statistics. A null one has no CUDA kernel.
struct Table {
  int64_t (*bias_act_forward)(const BiasActShape&, const BiasActForwardArgs&, const Target&);
  int64_t (*bias_act_backward)(const BiasActShape&, const BiasActBackwardArgs&, const Target&);
  int64_t (*bn_act_forward)(const BnShape&, const BnActForwardArgs&, const Target&);
  int64_t (*bn_act_backward)(const BnShape&, const BnActBackwardArgs&, const Target&);
  int64_t (*bn_act_double_backward)(const BnShape&, const BnActDoubleBackwardArgs&, const Target&);
  int64_t (*gn_act_forward)(const GnShape&, const GnActForwardArgs&, const Target&);
  int64_t (*gn_act_backward)(const GnShape&, const GnActBackwardArgs&, const Target&);
  int64_t (*gn_act_double_backward)(const GnShape&, const GnActDoubleBackwardArgs&, const Target&);
  int64_t (*gan_loss_forward)(const GanLossArgs&, const Target&);
  int64_t (*gan_loss_backward)(const GanLossArgs&, const Target&);
  int64_t (*gan_loss_double_backward)(const GanLossArgs&, const Target&);
  int64_t (*interpolate_forward)(const InterpolateArgs&, const Target&);
  int64_t (*sample_dot)(const SampleDotArgs&, const Target&);
  int64_t (*grad_norm_penalty_forward)(const GradNormPenaltyArgs&, const Target&);
  int64_t (*grad_norm_penalty_backward)(const GradNormPenaltyArgs&, const Target&);
  int64_t (*adam)(const AdamArgs&, const Target&);
  int64_t (*conv2d)(const ConvShape&, const Conv2dArgs&, const Target&);
  int64_t (*conv_transpose2d)(const ConvShape&, const ConvTranspose2dArgs&, const Target&);
  int64_t (*conv2d_weight)(const ConvShape&, const Conv2dWeightArgs&, const Target&);
  int64_t (*conv2d_statistics)(const ConvShape&, const Conv2dArgs&, const StatisticsArgs&, const Target&);
  int64_t (*conv_transpose2d_statistics)(const ConvShape&, const ConvTranspose2dArgs&, const StatisticsArgs&,
                                         const Target&);
};
const Table& table();

}  // namespace fg::cuda
