// The interface between the binding (module.cpp), the choice of a table (dispatch.cpp) and the kernels (cpu/*.cpp).
// Plain data only: this header is compiled with different instruction-set flags in every object, so an inline
// function here could be kept by the linker in its AVX-512 version for the portable path.
//
// A kernel takes what its tensors look like (a shape) and where they lie (its arguments), or both in one struct. The
// binding, the programs and the tables know a kernel by the lists of fields below and by FG_KERNELS alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/codes.hpp"
#include "common/fields.hpp"

namespace fg {

using Threads = int;         // of this call, >= 1, for num_threads(): the caller's last argument
using Strides = int64_t[4];  // of a weight in [K, C/groups, R, S] order, in elements

// Geometry of a forward convolution x[N,C,H,W] -> y[N,K,OH,OW] with weight [K, C/groups, R, S].
// OH and OW are given, not derived: output_padding of a transposed convolution makes them ambiguous.
// Validated by the binding: sizes >= 0, strides and dilations >= 1, paddings >= 0, groups divides C and K,
// and every size is below 2^31, so that a product of two of them fits in int64.
FG_STRUCT(ConvShape, (int64_t, N), (int64_t, C), (int64_t, H), (int64_t, W), (int64_t, K), (int64_t, OH), (int64_t, OW),
          (int64_t, R), (int64_t, S), (int64_t, stride_h), (int64_t, stride_w), (int64_t, pad_h), (int64_t, pad_w),
          (int64_t, dil_h), (int64_t, dil_w), (int64_t, groups));

// Activations are dense channels_last: x [N][H][W][C], y [N][OH][OW][K]. No pointer is assumed to be aligned
// beyond its element.
FG_STRUCT(Conv2dArgs,            //
          (DType, dtype),        // of x and y
          (const void*, x),      // [N][H][W][C]
          (const void*, w),      // [K, C/groups, R, S] by w_strides
          (DType, w_dtype),      // F32 with dtype BF16: packing rounds to nearest even
          (Strides, w_strides),  //
          (const float*, bias),  // [K] or null
          (void*, y),            // [N][OH][OW][K], written in full
          (Act, act), (float, slope), (Threads, threads));

FG_STRUCT(ConvTranspose2dArgs,   //
          (DType, dtype),        // of y and x
          (const void*, y),      // [N][OH][OW][K], read
          (const void*, w),      // w, w_dtype, w_strides: as in Conv2dArgs
          (DType, w_dtype),      //
          (Strides, w_strides),  //
          (const float*, bias),  // [C] or null
          (void*, x),            // [N][H][W][C], written in full
          (Act, act), (float, slope), (Threads, threads));

FG_STRUCT(Conv2dWeightArgs,   //
          (DType, dtype),     // of x and dy
          (const void*, x),   // [N][H][W][C]
          (const void*, dy),  // [N][OH][OW][K]
          (void*, dw),        // [K, C/groups, R, S] by dw_strides, every element written
          (DType, dw_dtype), (Strides, dw_strides), (Threads, threads));

// What bn_act's three directions share. x is [N][HW][C] (channels_last) or [N][C][HW]; group g of G holds the samples
// [g N/G, (g+1) N/G). mean and var are float32 [G][C]; var is biased. Without training both are constants, so that
// every 1/n of the derivatives is 0. act is identity, relu or leaky_relu.
FG_STRUCT(BnShape, (DType, dtype), (int64_t, N), (int64_t, C), (int64_t, HW), (int64_t, G), (bool, channels_last),
          (bool, training), (float, eps), (Act, act), (float, slope), (Threads, threads));

// What gn_act's three directions share. x as for bn_act; mean and var are float32 [N][groups], always computed from x.
FG_STRUCT(GnShape, (DType, dtype), (int64_t, N), (int64_t, C), (int64_t, HW), (int64_t, groups), (bool, channels_last),
          (float, eps), (Act, act), (float, slope), (Threads, threads));

// The arguments of both norms. weight and bias are [C] or null (1 and 0). The forward pass writes mean and var; in
// bn_act's eval mode it reads them.
FG_STRUCT(NormForwardArgs, (const void*, x), (const float*, weight), (const float*, bias), (float*, mean),
          (float*, var), (void*, y));

// Any output may be null: not wanted. dweight and dbias are [C], summed over samples or groups.
FG_STRUCT(NormBackwardArgs, (const void*, dy), (const void*, x), (const float*, weight), (const float*, bias),
          (const float*, mean), (const float*, var), (void*, dx), (float*, dweight), (float*, dbias));

// ddx, ddweight and ddbias may be null (zero), and any output: not wanted.
FG_STRUCT(NormDoubleBackwardArgs, (const void*, ddx), (const float*, ddweight), (const float*, ddbias),
          (const void*, dy), (const void*, x), (const float*, weight), (const float*, bias), (const float*, mean),
          (const float*, var), (void*, d_dy), (void*, d_x), (float*, d_weight));

FG_STRUCT(BiasActShape, (DType, dtype), (int64_t, N), (int64_t, C), (int64_t, HW), (bool, channels_last), (Act, act),
          (float, slope), (float, gain), (float, clamp), (Threads, threads));

// y = gain act(x + bias), kept within ±clamp where clamp >= 0. bias and dbias are [C] or null. The derivative is taken
// from the output y; swish and gelu, which have no inverse, take it from x + bias in the place of y.
FG_STRUCT(BiasActForwardArgs, (const void*, x), (const float*, bias), (void*, y));

FG_STRUCT(BiasActBackwardArgs, (const void*, dy), (const void*, y), (void*, dx), (float*, dbias));

// fake, dfake, d_fake, ddfake are [n_fake], their kin of real [n_real], null where n_real is 0. loss, dloss and d_dloss
// are one value, statistics are 6. Statistics and gradients of the logits may be null: not wanted.
FG_STRUCT(GanLossShape, (DType, dtype), (int64_t, n_fake), (int64_t, n_real), (Loss, kind), (Side, side),
          (float, smoothing), (Threads, threads));

FG_STRUCT(GanLossForwardArgs, (const void*, fake), (const void*, real), (float*, loss), (float*, statistics));

FG_STRUCT(GanLossBackwardArgs, (const float*, dloss), (const void*, fake), (const void*, real), (void*, dfake),
          (void*, dreal));

FG_STRUCT(GanLossDoubleBackwardArgs, (const void*, ddfake), (const void*, ddreal), (const float*, dloss),
          (const void*, fake), (const void*, real), (float*, d_dloss), (void*, d_fake), (void*, d_real));

// N samples of E elements each, dense, all in one layout. fake is null where it is absent; epsilon and rest are [N],
// rest null: 1 - epsilon.
FG_STRUCT(InterpolateArgs, (DType, dtype), (const void*, real), (const void*, fake), (const float*, epsilon),
          (const float*, rest), (void*, y), (int64_t, N), (int64_t, E), (Threads, threads));

// x, y [N][E], dot [N].
FG_STRUCT(SampleDotArgs, (DType, dtype), (const void*, x), (const void*, y), (float*, dot), (int64_t, N), (int64_t, E),
          (Threads, threads));

// gradient and dgradient [N][E], penalty, dpenalty and norm [N].
FG_STRUCT(GradNormPenaltyShape, (DType, dtype), (int64_t, N), (int64_t, E), (float, target), (Threads, threads));

FG_STRUCT(GradNormPenaltyForwardArgs, (const void*, gradient), (float*, penalty), (float*, norm));

FG_STRUCT(GradNormPenaltyBackwardArgs, (const float*, dpenalty), (const void*, gradient), (const float*, norm),
          (void*, dgradient));

// y [N, C, OH, OW] = every down-th sample of gain f * x, x with up - 1 zeros behind each sample and pad zeros before
// it. f is [KH][KW], or with `separable` one [K], K = KH = KW, for both axes; `flip`: correlation, else convolution. A
// negative pad crops. Samples behind x count as zero, so OH and OW alone say how far the padding there reaches.
FG_STRUCT(Upfirdn2dArgs, (DType, dtype), (const void*, x), (const float*, f), (void*, y), (int64_t, N), (int64_t, C),
          (int64_t, H), (int64_t, W), (int64_t, OH), (int64_t, OW), (int64_t, KH), (int64_t, KW), (int64_t, up_y),
          (int64_t, up_x), (int64_t, down_y), (int64_t, down_x), (int64_t, pad_y), (int64_t, pad_x), (bool, separable),
          (bool, flip), (bool, channels_last), (float, gain), (Threads, threads));

// y [N, C, OH, OW] = every down-th sample of f_down * phi(u), u [N, C, MH, MW] = f_up * (x + bias), x with up - 1 zeros
// behind each sample; pads before, filters, flip and channels_last as in Upfirdn2dArgs. signs are words of 32 samples
// of a row of u, [1 or 2][N][C][MH][words]: u > 0 does not hold; and where clamp >= 0: the clamp holds phi(u). Forward
// phi is a leaky ReLU with gain and clamp and u has the gain up^2; backward phi is a product with gain, gain slope or
// 0, as the signs say.
FG_STRUCT(FilteredLreluShape, (DType, dtype), (int64_t, N), (int64_t, C), (int64_t, H), (int64_t, W), (int64_t, MH),
          (int64_t, MW), (int64_t, OH), (int64_t, OW), (int64_t, KH_up), (int64_t, KW_up), (int64_t, KH_down),
          (int64_t, KW_down), (int64_t, up), (int64_t, down), (int64_t, pad_y), (int64_t, pad_x), (int64_t, pad_out_y),
          (int64_t, pad_out_x), (bool, separable_up), (bool, separable_down), (bool, flip), (bool, channels_last),
          (float, gain), (float, slope), (float, clamp), (Threads, threads));

FG_STRUCT(FilteredLreluForwardArgs, (const void*, x), (const float*, bias), (const float*, f_up),
          (const float*, f_down), (void*, y), (void*, signs));

FG_STRUCT(FilteredLreluBackwardArgs, (const void*, x), (const void*, signs), (const float*, f_up),
          (const float*, f_down), (void*, y));

// A parameter with its gradient, Adam's state and the moving average that follows it (null: none), all dense, in one
// layout; step: a count, this update's included.
FG_STRUCT(AdamTensor, (float*, parameter), (const float*, gradient), (float*, exp_avg), (float*, exp_avg_sq),
          (float*, average), (const float*, step), (int64_t, count));

struct AdamTensors {
  const AdamTensor* first;
  int64_t count;
};

// lr_at null: lr. weight: of the parameter in the average, 1 - decay.
FG_STRUCT(AdamArgs, (AdamTensors, tensors), (const float*, lr_at), (float, lr), (double, beta1), (double, beta2),
          (double, ln_beta1), (double, ln_beta2), (float, eps), (float, weight_decay), (bool, decoupled),
          (bool, maximize), (double, weight), (Threads, threads));

// y[n][c][r] = x[n][r][c], and the type may change.
FG_STRUCT(RelayoutArgs, (DType, x_dtype), (DType, y_dtype), (const void*, x), (void*, y), (int64_t, N), (int64_t, rows),
          (int64_t, columns), (Threads, threads));

// A convolution's weight [outer][K][inner] and bias with a batch norm of constant statistics folded in.
FG_STRUCT(BnFoldArgs, (const float*, weight), (const float*, bias),  // [K] or null, as gamma and beta
          (const float*, gamma), (const float*, beta), (const float*, mean), (const float*, var),
          (float*, folded),  // as weight
          (float*, shift),   // [K]
          (int64_t, outer), (int64_t, K), (int64_t, inner), (float, eps), (Threads, threads));

// Running statistics [C] after G batches with statistics [G][C] of `count` values each; batches: their number, or null.
FG_STRUCT(BnUpdateArgs, (const float*, mean), (const float*, var), (float*, running_mean), (float*, running_var),
          (int64_t*, batches), (int64_t, G), (int64_t, C), (int64_t, count), (float, momentum), (Threads, threads));

// y [N] = value with probability p, else 0, by the next N draws of the generator, whose state
// torch.Generator.get_state() gives: the draws of Tensor.bernoulli_(p) where torch draws one number after another.
FG_STRUCT(BernoulliArgs, (DType, dtype), (void*, y), (void*, generator), (int64_t, N), (double, p), (float, value),
          (Threads, threads));

// Attention of every head, in base e: P = exp(scale q k^T + bias - lse), y = P v. q [N,heads,rows,d], k
// [N,heads,keys,d], v [N,heads,keys,dv] and what has their shapes lie by their strides, whose last is 1. bias is
// float32 [N,heads,rows,keys] by its strides (0: shared). causal: row i sees the keys up to i.
FG_STRUCT(AttentionShape, (DType, dtype), (int64_t, N), (int64_t, heads), (int64_t, rows), (int64_t, keys),
          (int64_t, d), (int64_t, dv), (bool, causal), (float, scale), (Threads, threads));

// lse [N,heads,rows]: the logarithm of each row's sum of exponentials, 0 for a row that sees no key.
FG_STRUCT(AttentionForwardArgs, (const void*, q), (const void*, k), (const void*, v), (const float*, bias), (void*, y),
          (float*, lse), (Strides, q_strides), (Strides, k_strides), (Strides, v_strides), (Strides, bias_strides),
          (Strides, y_strides));

// dbias is float32 [1 or N, 1 or heads, rows, keys] by its strides, summed over the heads that share it, or null.
FG_STRUCT(AttentionBackwardArgs, (const void*, dy), (const void*, q), (const void*, k), (const void*, v),
          (const float*, bias), (const void*, y), (const float*, lse), (void*, dq), (void*, dk), (void*, dv_out),
          (float*, dbias), (Strides, dy_strides), (Strides, q_strides), (Strides, k_strides), (Strides, v_strides),
          (Strides, bias_strides), (Strides, y_strides), (Strides, dq_strides), (Strides, dk_strides),
          (Strides, dv_strides), (Strides, dbias_strides));

// ddq, ddk, ddv and ddbias (laid out as dbias) may be null: zero. d_dy, d_q, d_k, d_v, d_bias: as y, dq, dk, dv, dbias.
FG_STRUCT(AttentionDoubleBackwardArgs, (const void*, dy), (const void*, ddq), (const void*, ddk), (const void*, ddv),
          (const float*, ddbias), (const void*, q), (const void*, k), (const void*, v), (const float*, bias),
          (const float*, lse), (void*, d_dy), (void*, d_q), (void*, d_k), (void*, d_v), (float*, d_bias),
          (Strides, dy_strides), (Strides, ddq_strides), (Strides, ddk_strides), (Strides, ddv_strides),
          (Strides, ddbias_strides), (Strides, q_strides), (Strides, k_strides), (Strides, v_strides),
          (Strides, bias_strides), (Strides, d_dy_strides), (Strides, d_q_strides), (Strides, d_k_strides),
          (Strides, d_v_strides), (Strides, d_bias_strides));

// Every kernel with its structs, a shape first. The first list holds those that use each table's instructions to the
// full; the second those that gain nothing from AVX512_BF16 or AMX, so that setup.py compiles them for fewer tables.
// clang-format off: a line each
#define FG_PRODUCT_KERNELS(f)                         \
  f(conv2d, ConvShape, Conv2dArgs)                    \
  f(conv_transpose2d, ConvShape, ConvTranspose2dArgs) \
  f(conv2d_weight, ConvShape, Conv2dWeightArgs)
#define FG_ELEMENTWISE_KERNELS(f)                                                  \
  f(bn_act_forward, BnShape, NormForwardArgs)                                      \
  f(bn_act_backward, BnShape, NormBackwardArgs)                                    \
  f(bn_act_double_backward, BnShape, NormDoubleBackwardArgs)                       \
  f(gn_act_forward, GnShape, NormForwardArgs)                                      \
  f(gn_act_backward, GnShape, NormBackwardArgs)                                    \
  f(gn_act_double_backward, GnShape, NormDoubleBackwardArgs)                       \
  f(bias_act_forward, BiasActShape, BiasActForwardArgs)                            \
  f(bias_act_backward, BiasActShape, BiasActBackwardArgs)                          \
  f(gan_loss_forward, GanLossShape, GanLossForwardArgs)                            \
  f(gan_loss_backward, GanLossShape, GanLossBackwardArgs)                          \
  f(gan_loss_double_backward, GanLossShape, GanLossDoubleBackwardArgs)             \
  f(interpolate_forward, InterpolateArgs)                                          \
  f(sample_dot, SampleDotArgs)                                                     \
  f(grad_norm_penalty_forward, GradNormPenaltyShape, GradNormPenaltyForwardArgs)   \
  f(grad_norm_penalty_backward, GradNormPenaltyShape, GradNormPenaltyBackwardArgs) \
  f(adam, AdamArgs)                                                                \
  f(upfirdn2d, Upfirdn2dArgs)                                                      \
  f(filtered_lrelu_forward, FilteredLreluShape, FilteredLreluForwardArgs)          \
  f(filtered_lrelu_backward, FilteredLreluShape, FilteredLreluBackwardArgs)
// clang-format on
// Kernels of products of bf16 pairs: they use AVX512_BF16 and no AMX.
// clang-format off: a line each
#define FG_ATTENTION_KERNELS(f)                                \
  f(attention_forward, AttentionShape, AttentionForwardArgs)   \
  f(attention_backward, AttentionShape, AttentionBackwardArgs) \
  f(attention_double_backward, AttentionShape, AttentionDoubleBackwardArgs)
// clang-format on
// Kernels that only a CPU has: steps of a program, and draws.
// clang-format off: a line each
#define FG_HOST_KERNELS(f)   \
  f(relayout, RelayoutArgs)  \
  f(bn_fold, BnFoldArgs)     \
  f(bn_update, BnUpdateArgs) \
  f(bernoulli, BernoulliArgs)
// clang-format on
#define FG_KERNELS(f)       \
  FG_PRODUCT_KERNELS(f)     \
  FG_ELEMENTWISE_KERNELS(f) \
  FG_ATTENTION_KERNELS(f)
#define FG_CPU_KERNELS(f) \
  FG_KERNELS(f)           \
  FG_HOST_KERNELS(f)

template <class... Structs>
using Kernel = void(const Structs&...);

// One instruction set's kernels. cpu/table.cpp is compiled once per set and fills one of these.
struct Table {
  const char* name;
#define FG_TABLE_MEMBER(kernel, ...) Kernel<__VA_ARGS__>* kernel;
  FG_CPU_KERNELS(FG_TABLE_MEMBER)
};

// Scratch memory, 64-byte aligned, uninitialised, recycled between calls: a fresh 16 MB malloc costs more in page
// faults than many a kernel. Thread-safe; throws std::bad_alloc, so call it outside parallel regions.
// Compiled once, in dispatch.cpp, with the base instruction set.
void* scratch_acquire(size_t bytes);
void scratch_release(void* block) noexcept;
size_t scratch_highest(bool restart) noexcept;  // most bytes held at once, in use or kept, since the last restart

// What a step of a program that keeps its weights (csrc/program.hpp) has packed, in its first run for all later ones.
struct Kept {
  void* block = nullptr;  // of scratch_acquire
  bool made = false;
};
Kept*& kept_of_step() noexcept;  // of the step that this thread runs, else null

// Asks the system for huge pages, before a block's first use; does nothing where there are none. The system clears 100
// MB in 7 ms as pages of 2 MB and in 35 to 40 ms as pages of 4 KB (AMD EPYC Zen 5, Linux). Compiled once, as scratch.
void prefer_huge_pages(void* block, size_t bytes) noexcept;

// Whether the CPU translates 2,048 pages of 4 KB or more at once. No instruction tells; CPUs with AVX-512 BF16 (Zen 4,
// Sapphire Rapids and later) do, those before them mostly keep 1,536. Compiled once, as scratch.
bool translates_many_pages() noexcept;

}  // namespace fg
