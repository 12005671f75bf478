// The interface between the binding (module.cpp), the choice of a table (dispatch.cpp) and the kernels (cpu/*.cpp).
// Plain data only: this header is compiled with different instruction-set flags in every object, so an inline
// function here could be kept by the linker in its AVX-512 version for the portable path.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/codes.hpp"

namespace fg {

// Geometry of a forward convolution x[N,C,H,W] -> y[N,K,OH,OW] with weight [K, C/groups, R, S].
// OH and OW are given, not derived: output_padding of a transposed convolution makes them ambiguous.
// Validated by the binding: sizes >= 0, strides and dilations >= 1, paddings >= 0, groups divides C and K,
// and every size is below 2^31, so that a product of two of them fits in int64.
struct ConvShape {
  int64_t N, C, H, W;
  int64_t K, OH, OW;
  int64_t R, S;
  int64_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int64_t groups;
};

// Activations are dense channels_last: x [N][H][W][C], y [N][OH][OW][K]. No pointer is assumed to be aligned
// beyond its element. w_strides are the element strides of the weight in [K, C/groups, R, S] order.
struct Conv2dArgs {
  DType dtype;    // of x and y
  const void* x;  // [N][H][W][C]
  const void* w;  // [K, C/groups, R, S] by w_strides
  DType w_dtype;  // F32 with dtype BF16: packing rounds to nearest even
  int64_t w_strides[4];
  const float* bias;  // [K] or null
  void* y;            // [N][OH][OW][K], written in full
  Act act;
  float slope;
  int threads;  // >= 1, for num_threads()
};

struct ConvTranspose2dArgs {
  DType dtype;    // of y and x
  const void* y;  // [N][OH][OW][K], read
  const void* w;
  DType w_dtype;
  int64_t w_strides[4];
  const float* bias;  // [C] or null
  void* x;            // [N][H][W][C], written in full
  Act act;
  float slope;
  int threads;
};

struct Conv2dWeightArgs {
  DType dtype;     // of x and dy
  const void* x;   // [N][H][W][C]
  const void* dy;  // [N][OH][OW][K]
  void* dw;        // [K, C/groups, R, S] by dw_strides, every element written
  DType dw_dtype;
  int64_t dw_strides[4];
  int threads;
};

// What bn_act's three directions share. x is [N][HW][C] (channels_last) or [N][C][HW]; group g of G holds the samples
// [g N/G, (g+1) N/G). mean and var are float32 [G][C]; var is biased.
struct BnShape {
  DType dtype;
  int64_t N, C, HW, G;
  bool channels_last;
  bool training;  // false: mean and var are constants, so every 1/n of the derivatives is 0
  float eps;
  Act act;  // identity, relu or leaky_relu
  float slope;
  int threads;
};

struct BnActForwardArgs {
  const void* x;
  const float *weight, *bias;  // [C] or null (1 and 0)
  float *mean, *var;           // [G][C]: written in training, read in eval
  void* y;
};

struct BnActBackwardArgs {
  const void *dy, *x;
  const float *weight, *bias, *mean, *var;
  void* dx;
  float *dweight, *dbias;  // [C], summed over the groups; null: not wanted
};

struct BnActDoubleBackwardArgs {
  const void* ddx;                 // null: zero
  const float *ddweight, *ddbias;  // [C] or null (zero)
  const void *dy, *x;
  const float *weight, *bias, *mean, *var;
  void *d_dy, *d_x;  // null: not wanted
  float* d_weight;   // [C]; null: not wanted
};

// What gn_act's three directions share. x as for bn_act; mean and var are float32 [N][groups], always of x itself.
struct GnShape {
  DType dtype;
  int64_t N, C, HW, groups;
  bool channels_last;
  float eps;
  Act act;  // identity, relu or leaky_relu
  float slope;
  int threads;
};

using GnActForwardArgs = BnActForwardArgs;  // but mean and var are [N][groups] and always written
using GnActBackwardArgs = BnActBackwardArgs;
using GnActDoubleBackwardArgs = BnActDoubleBackwardArgs;

struct BiasActShape {
  DType dtype;
  int64_t N, C, HW;
  bool channels_last;
  Act act;
  float slope;
  int threads;
};

struct BiasActForwardArgs {
  const void* x;
  const float* bias;  // [C] or null
  void* y;
};

struct BiasActBackwardArgs {
  const void *dy, *y;  // the derivative is taken from the output y
  void* dx;            // null: not wanted
  float* dbias;        // [C] or null
};

struct GanLossArgs {
  DType dtype;
  const void *fake, *real;  // [n_fake], [n_real]; real null with n_real 0: absent
  int64_t n_fake, n_real;
  Loss kind;
  Side side;
  float smoothing;
  float *loss, *statistics;     // forward: one value, [6]
  float* d_dloss;               // double backward: one value
  const float* dloss;           // backward: one value
  void *dfake, *dreal;          // backward; null: not wanted
  const void *ddfake, *ddreal;  // double backward: cotangents of dfake and dreal, whose place the results take
  int threads;
};

// N samples of E elements each, dense, all in one layout.
struct InterpolateArgs {
  DType dtype;
  const void *real, *fake;      // fake null: absent
  const float *epsilon, *rest;  // [N]; rest null: 1 - epsilon
  void* y;
  int64_t N, E;
  int threads;
};

struct SampleDotArgs {
  DType dtype;
  const void *x, *y;  // [N][E]
  float* dot;         // [N]
  int64_t N, E;
  int threads;
};

struct GradNormPenaltyArgs {
  DType dtype;
  const void* gradient;   // [N][E]
  const float* dpenalty;  // [N], backward
  float *penalty, *norm;  // [N]: written forward; backward reads norm
  void* dgradient;        // [N][E], backward
  int64_t N, E;
  float target;
  int threads;
};

// A parameter with its gradient, Adam's state and the moving average that follows it (null: none), all dense, in one
// layout; step: a count, this update's included.
struct AdamTensor {
  float* parameter;
  const float* gradient;
  float *exp_avg, *exp_avg_sq, *average;
  const float* step;
  int64_t count;
};

struct AdamArgs {
  const AdamTensor* tensors;
  int64_t N;
  const float* lr_at;  // null: lr
  float lr;
  double beta1, beta2, ln_beta1, ln_beta2;
  float eps, weight_decay;
  bool decoupled, maximize;
  double weight;  // of the parameter in the average: 1 - decay
  int threads;
};

// One instruction set's kernels. cpu/table.cpp is compiled once per set and fills one of these.
struct Table {
  const char* name;
  void (*conv2d)(const ConvShape&, const Conv2dArgs&);
  void (*conv_transpose2d)(const ConvShape&, const ConvTranspose2dArgs&);
  void (*conv2d_weight)(const ConvShape&, const Conv2dWeightArgs&);
  void (*bn_act_forward)(const BnShape&, const BnActForwardArgs&);
  void (*bn_act_backward)(const BnShape&, const BnActBackwardArgs&);
  void (*bn_act_double_backward)(const BnShape&, const BnActDoubleBackwardArgs&);
  void (*gn_act_forward)(const GnShape&, const GnActForwardArgs&);
  void (*gn_act_backward)(const GnShape&, const GnActBackwardArgs&);
  void (*gn_act_double_backward)(const GnShape&, const GnActDoubleBackwardArgs&);
  void (*bias_act_forward)(const BiasActShape&, const BiasActForwardArgs&);
  void (*bias_act_backward)(const BiasActShape&, const BiasActBackwardArgs&);
  void (*gan_loss_forward)(const GanLossArgs&);
  void (*gan_loss_backward)(const GanLossArgs&);
  void (*gan_loss_double_backward)(const GanLossArgs&);
  void (*interpolate_forward)(const InterpolateArgs&);
  void (*sample_dot)(const SampleDotArgs&);
  void (*grad_norm_penalty_forward)(const GradNormPenaltyArgs&);
  void (*grad_norm_penalty_backward)(const GradNormPenaltyArgs&);
  void (*adam)(const AdamArgs&);
};

// Scratch memory, 64-byte aligned, uninitialised, recycled between calls: a fresh 16 MB malloc costs more in page
// faults than many a kernel. Thread-safe; throws std::bad_alloc, so call it outside parallel regions.
// Compiled once, in dispatch.cpp, with the base instruction set.
void* scratch_acquire(size_t bytes);
void scratch_release(void* block) noexcept;
size_t scratch_highest(bool restart) noexcept;  // most bytes held at once, in use or kept, since the last restart

}  // namespace fg
