// The kernels as Python functions over raw addresses, for every core that has them: fastgan._C binds the CPU's and,
// where it was built with nvcc, CUDA's as fastgan._C.cuda; tests/emulation binds CUDA's compiled for the emulator.
//
// An address is what tensor.data_ptr() returns; 0 stands for "absent" where a function says so. Shapes, dtypes,
// strides and lifetimes are the caller's business (fastgan/ops checks them); here only what would crash or divide by
// zero is refused. Every kernel runs without the GIL.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/kernels.hpp"
#include "dispatch.hpp"
#ifdef FG_CUDA
#include "cuda/kernels.hpp"
#endif

namespace fg::binding {

namespace py = pybind11;

using Address = uintptr_t;
using Strides = std::array<int64_t, 4>;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

[[noreturn]] inline void refuse(const std::string& text) { throw py::value_error(text); }

template <class Core>
DType dtype_of(const char* op, int code) {
  if (code < 0 || code > Core::LAST_DTYPE)
    refuse(std::string(op) + ": dtype must be 0 (float32), 1 (bfloat16)" +
           (Core::LAST_DTYPE == F16 ? " or 2 (float16)" : "") + ", got " + std::to_string(code));
  return static_cast<DType>(code);
}

inline Act act_of(const char* op, int code, int last = ACT_SIGMOID) {
  if (code < 0 || code > last)
    refuse(std::string(op) + ": act must be in 0.." + std::to_string(last) + ", got " + std::to_string(code));
  return static_cast<Act>(code);
}

inline Strides strides_of(const char* op, const py::tuple& t) {
  if (t.size() != 4) refuse(std::string(op) + ": the weight needs 4 strides, got " + std::to_string(t.size()));
  return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

// What a function runs on: the last arguments that it takes, and the table that has its kernel.
struct Cpu {
  int count;  // of threads

  static constexpr DType LAST_DTYPE = BF16;
  static const Table& table() { return current(); }
  int threads(const char* op) const {
    if (count < 1) refuse(std::string(op) + ": threads must be at least 1, got " + std::to_string(count));
    return count;
  }
  template <class Kernel, class... Args>
  int64_t run(Kernel kernel, const Args&... args) const {
    py::gil_scoped_release release;
    kernel(args...);
    return 0;
  }
};

#ifdef FG_CUDA
// A kernel that needs device memory and gets a workspace of 0 launches nothing and returns the bytes: call it again.
struct Cuda {
  Address workspace, stream;

  static constexpr DType LAST_DTYPE = F16;
  static const cuda::Table& table() { return cuda::table(); }
  int threads(const char*) const { return 1; }  // its kernels do not ask
  template <class Kernel, class... Args>
  int64_t run(Kernel kernel, const Args&... args) const {
    if (!kernel) refuse("this function has no CUDA kernel; run it on another backend");
    py::gil_scoped_release release;
    return kernel(args..., cuda::Target{at(workspace), at(stream)});
  }
};
#endif

// ---------------------------------------------------------------------------------------------- convolution

// Convolutions know one type more: float in memory, multiplied in TF32.
template <class Core>
DType conv_dtype_of(const char* op, int code) {
  return Core::LAST_DTYPE == F16 && code == TF32 ? TF32 : dtype_of<Core>(op, code);
}

inline ConvShape make_conv(int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t OH, int64_t OW, int64_t R,
                           int64_t S, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h,
                           int64_t dil_w, int64_t groups) {
  const int64_t sizes[] = {N, C, H, W, K, OH, OW, R, S, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups};
  for (int64_t v : sizes)
    if (v < 0 || v > INT32_MAX) refuse("Conv: every number must be in 0..2^31-1, got " + std::to_string(v));
  for (int64_t v : {stride_h, stride_w, dil_h, dil_w, groups})
    if (v < 1) refuse("Conv: strides, dilations and groups must be at least 1, got " + std::to_string(v));
  if (C % groups || K % groups)
    refuse("Conv: groups must divide both channel counts, got C=" + std::to_string(C) + ", K=" + std::to_string(K) +
           ", groups=" + std::to_string(groups));
  return {N, C, H, W, K, OH, OW, R, S, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups};
}

// Conv2dArgs or ConvTranspose2dArgs, whose fields are the same but for who is x and who is y.
template <class Args, class Core>
Args conv_args(const char* op, int dtype, Address from, Address w, int w_dtype, const py::tuple& w_strides,
               Address bias, Address to, int act, float slope, const Core& core) {
  const Strides s = strides_of(op, w_strides);
  return {conv_dtype_of<Core>(op, dtype),
          at(from),
          at(w),
          conv_dtype_of<Core>(op, w_dtype),
          {s[0], s[1], s[2], s[3]},
          at<float>(bias),
          at(to),
          act_of(op, act),
          slope,
          core.threads(op)};
}

template <class Core, class... Tail>
int64_t conv2d(const ConvShape& conv, int dtype, Address x, Address w, int w_dtype, const py::tuple& w_strides,
               Address bias, Address y, int act, float slope, Tail... tail) {
  const Core core{tail...};
  const auto args = conv_args<Conv2dArgs>("conv2d", dtype, x, w, w_dtype, w_strides, bias, y, act, slope, core);
  return core.run(Core::table().conv2d, conv, args);
}

template <class Core, class... Tail>
int64_t conv_transpose2d(const ConvShape& conv, int dtype, Address y, Address w, int w_dtype,
                         const py::tuple& w_strides, Address bias, Address x, int act, float slope, Tail... tail) {
  const Core core{tail...};
  const auto args =
      conv_args<ConvTranspose2dArgs>("conv_transpose2d", dtype, y, w, w_dtype, w_strides, bias, x, act, slope, core);
  return core.run(Core::table().conv_transpose2d, conv, args);
}

#ifdef FG_CUDA
inline cuda::StatisticsArgs statistics_args(const char* op, const ConvShape& conv, int64_t groups, Address mean,
                                            Address var) {
  if (groups < 1 || conv.N % groups)
    refuse(std::string(op) + ": stat_groups must divide N, got " + std::to_string(groups) +
           " and N=" + std::to_string(conv.N));
  return {groups, at<float>(mean), at<float>(var)};
}

inline int64_t conv2d_statistics(const ConvShape& conv, int dtype, Address x, Address w, int w_dtype,
                                 const py::tuple& w_strides, Address bias, Address y, int64_t stat_groups, Address mean,
                                 Address var, Address workspace, Address stream) {
  constexpr auto op = "conv2d_statistics";
  const Cuda core{workspace, stream};
  const auto args = conv_args<Conv2dArgs>(op, dtype, x, w, w_dtype, w_strides, bias, y, ACT_IDENTITY, 0.0f, core);
  return core.run(Cuda::table().conv2d_statistics, conv, args, statistics_args(op, conv, stat_groups, mean, var));
}

inline int64_t conv_transpose2d_statistics(const ConvShape& conv, int dtype, Address y, Address w, int w_dtype,
                                           const py::tuple& w_strides, Address bias, Address x, int64_t stat_groups,
                                           Address mean, Address var, Address workspace, Address stream) {
  constexpr auto op = "conv_transpose2d_statistics";
  const Cuda core{workspace, stream};
  const auto args =
      conv_args<ConvTranspose2dArgs>(op, dtype, y, w, w_dtype, w_strides, bias, x, ACT_IDENTITY, 0.0f, core);
  return core.run(Cuda::table().conv_transpose2d_statistics, conv, args,
                  statistics_args(op, conv, stat_groups, mean, var));
}
#endif

template <class Core, class... Tail>
int64_t conv2d_weight(const ConvShape& conv, int dtype, Address x, Address dy, Address dw, int dw_dtype,
                      const py::tuple& dw_strides, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "conv2d_weight";
  const Strides s = strides_of(op, dw_strides);
  const Conv2dWeightArgs args{
      conv_dtype_of<Core>(op, dtype), at(x),           at(dy), at(dw), conv_dtype_of<Core>(op, dw_dtype),
      {s[0], s[1], s[2], s[3]},       core.threads(op)};
  return core.run(Core::table().conv2d_weight, conv, args);
}

// ---------------------------------------------------------------------------------------------- bn_act

template <class Core>
BnShape bn_shape(const char* op, int dtype, int64_t N, int64_t C, int64_t HW, int64_t G, bool channels_last,
                 bool training, float eps, int act, float slope, const Core& core) {
  if (N < 0 || C < 0 || HW < 0 || G < 1 || N % G)
    refuse(std::string(op) + ": N, C and HW must not be negative and G must divide N, got N=" + std::to_string(N) +
           ", C=" + std::to_string(C) + ", HW=" + std::to_string(HW) + ", G=" + std::to_string(G));
  return {dtype_of<Core>(op, dtype), N, C, HW, G, channels_last, training, eps, act_of(op, act, ACT_LEAKY_RELU), slope,
          core.threads(op)};
}

template <class Core, class... Tail>
int64_t bn_act_forward(int dtype, Address x, Address weight, Address bias, Address mean, Address var, Address y,
                       int64_t N, int64_t C, int64_t HW, int64_t G, bool channels_last, bool training, float eps,
                       int act, float slope, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "bn_act_forward";
  const BnShape shape = bn_shape<Core>(op, dtype, N, C, HW, G, channels_last, training, eps, act, slope, core);
  const BnActForwardArgs args{at(x), at<float>(weight), at<float>(bias), at<float>(mean), at<float>(var), at(y)};
  return core.run(Core::table().bn_act_forward, shape, args);
}

template <class Core, class... Tail>
int64_t bn_act_backward(int dtype, Address dy, Address x, Address weight, Address bias, Address mean, Address var,
                        Address dx, Address dweight, Address dbias, int64_t N, int64_t C, int64_t HW, int64_t G,
                        bool channels_last, bool training, float eps, int act, float slope, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "bn_act_backward";
  const BnShape shape = bn_shape<Core>(op, dtype, N, C, HW, G, channels_last, training, eps, act, slope, core);
  const BnActBackwardArgs args{at(dy),         at(x),  at<float>(weight),  at<float>(bias), at<float>(mean),
                               at<float>(var), at(dx), at<float>(dweight), at<float>(dbias)};
  return core.run(Core::table().bn_act_backward, shape, args);
}

template <class Core, class... Tail>
int64_t bn_act_double_backward(int dtype, Address ddx, Address ddweight, Address ddbias, Address dy, Address x,
                               Address weight, Address bias, Address mean, Address var, Address d_dy, Address d_x,
                               Address d_weight, int64_t N, int64_t C, int64_t HW, int64_t G, bool channels_last,
                               bool training, float eps, int act, float slope, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "bn_act_double_backward";
  const BnShape shape = bn_shape<Core>(op, dtype, N, C, HW, G, channels_last, training, eps, act, slope, core);
  const BnActDoubleBackwardArgs args{
      at(ddx),         at<float>(ddweight), at<float>(ddbias), at(dy),   at(x),   at<float>(weight),
      at<float>(bias), at<float>(mean),     at<float>(var),    at(d_dy), at(d_x), at<float>(d_weight)};
  return core.run(Core::table().bn_act_double_backward, shape, args);
}

// ---------------------------------------------------------------------------------------------- gn_act

template <class Core>
GnShape gn_shape(const char* op, int dtype, int64_t N, int64_t C, int64_t HW, int64_t groups, bool channels_last,
                 float eps, int act, float slope, const Core& core) {
  if (N < 0 || C < 0 || HW < 0 || groups < 1 || C % groups)
    refuse(std::string(op) + ": N, C and HW must not be negative and groups must divide C, got N=" + std::to_string(N) +
           ", C=" + std::to_string(C) + ", HW=" + std::to_string(HW) + ", groups=" + std::to_string(groups));
  return {dtype_of<Core>(op, dtype), N, C, HW, groups, channels_last, eps, act_of(op, act, ACT_LEAKY_RELU), slope,
          core.threads(op)};
}

template <class Core, class... Tail>
int64_t gn_act_forward(int dtype, Address x, Address weight, Address bias, Address mean, Address var, Address y,
                       int64_t N, int64_t C, int64_t HW, int64_t groups, bool channels_last, float eps, int act,
                       float slope, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "gn_act_forward";
  const GnShape shape = gn_shape<Core>(op, dtype, N, C, HW, groups, channels_last, eps, act, slope, core);
  const GnActForwardArgs args{at(x), at<float>(weight), at<float>(bias), at<float>(mean), at<float>(var), at(y)};
  return core.run(Core::table().gn_act_forward, shape, args);
}

template <class Core, class... Tail>
int64_t gn_act_backward(int dtype, Address dy, Address x, Address weight, Address bias, Address mean, Address var,
                        Address dx, Address dweight, Address dbias, int64_t N, int64_t C, int64_t HW, int64_t groups,
                        bool channels_last, float eps, int act, float slope, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "gn_act_backward";
  const GnShape shape = gn_shape<Core>(op, dtype, N, C, HW, groups, channels_last, eps, act, slope, core);
  const GnActBackwardArgs args{at(dy),         at(x),  at<float>(weight),  at<float>(bias), at<float>(mean),
                               at<float>(var), at(dx), at<float>(dweight), at<float>(dbias)};
  return core.run(Core::table().gn_act_backward, shape, args);
}

template <class Core, class... Tail>
int64_t gn_act_double_backward(int dtype, Address ddx, Address ddweight, Address ddbias, Address dy, Address x,
                               Address weight, Address bias, Address mean, Address var, Address d_dy, Address d_x,
                               Address d_weight, int64_t N, int64_t C, int64_t HW, int64_t groups, bool channels_last,
                               float eps, int act, float slope, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "gn_act_double_backward";
  const GnShape shape = gn_shape<Core>(op, dtype, N, C, HW, groups, channels_last, eps, act, slope, core);
  const GnActDoubleBackwardArgs args{
      at(ddx),         at<float>(ddweight), at<float>(ddbias), at(dy),   at(x),   at<float>(weight),
      at<float>(bias), at<float>(mean),     at<float>(var),    at(d_dy), at(d_x), at<float>(d_weight)};
  return core.run(Core::table().gn_act_double_backward, shape, args);
}

// ---------------------------------------------------------------------------------------------- bias_act

template <class Core>
BiasActShape bias_act_shape(const char* op, int dtype, int64_t N, int64_t C, int64_t HW, bool channels_last, int act,
                            float slope, const Core& core) {
  if (N < 0 || C < 0 || HW < 0)
    refuse(std::string(op) + ": N, C and HW must not be negative, got N=" + std::to_string(N) +
           ", C=" + std::to_string(C) + ", HW=" + std::to_string(HW));
  return {dtype_of<Core>(op, dtype), N, C, HW, channels_last, act_of(op, act), slope, core.threads(op)};
}

template <class Core, class... Tail>
int64_t bias_act_forward(int dtype, Address x, Address bias, Address y, int64_t N, int64_t C, int64_t HW,
                         bool channels_last, int act, float slope, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "bias_act_forward";
  const BiasActShape shape = bias_act_shape<Core>(op, dtype, N, C, HW, channels_last, act, slope, core);
  const BiasActForwardArgs args{at(x), at<float>(bias), at(y)};
  return core.run(Core::table().bias_act_forward, shape, args);
}

template <class Core, class... Tail>
int64_t bias_act_backward(int dtype, Address dy, Address y, Address dx, Address dbias, int64_t N, int64_t C, int64_t HW,
                          bool channels_last, int act, float slope, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "bias_act_backward";
  const BiasActShape shape = bias_act_shape<Core>(op, dtype, N, C, HW, channels_last, act, slope, core);
  const BiasActBackwardArgs args{at(dy), at(y), at(dx), at<float>(dbias)};
  return core.run(Core::table().bias_act_backward, shape, args);
}

// ---------------------------------------------------------------------------------------------- gan_loss

template <class Core>
GanLossArgs gan_loss_args(const char* op, int dtype, Address fake, int64_t n_fake, Address real, int64_t n_real,
                          int kind, int side, float smoothing, const Core& core) {
  if (kind < 0 || kind > LOSS_RELATIVISTIC)
    refuse(std::string(op) + ": kind must be in 0..5, got " + std::to_string(kind));
  if (side < 0 || side > SIDE_G) refuse(std::string(op) + ": side must be 0 (d) or 1 (g), got " + std::to_string(side));
  if (n_fake < 1 || n_real < 0)
    refuse(std::string(op) + ": n_fake must be at least 1 and n_real at least 0, got " + std::to_string(n_fake) +
           " and " + std::to_string(n_real));
  if (!n_real && (side == SIDE_D || kind == LOSS_RELATIVISTIC))
    refuse(std::string(op) + ": the d side and the relativistic loss need real logits, got none");
  if (kind == LOSS_RELATIVISTIC && n_real != n_fake)
    refuse(std::string(op) + ": the relativistic loss pairs the logits, got " + std::to_string(n_fake) + " fake and " +
           std::to_string(n_real) + " real");
  GanLossArgs a{};
  a.dtype = dtype_of<Core>(op, dtype);
  a.fake = at(fake);
  a.real = at(real);
  a.n_fake = n_fake;
  a.n_real = n_real;
  a.kind = static_cast<Loss>(kind);
  a.side = static_cast<Side>(side);
  a.smoothing = smoothing;
  a.threads = core.threads(op);
  return a;
}

template <class Core, class... Tail>
int64_t gan_loss_forward(int dtype, Address fake, int64_t n_fake, Address real, int64_t n_real, int kind, int side,
                         float smoothing, Address loss, Address statistics, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "gan_loss_forward";
  GanLossArgs args = gan_loss_args<Core>(op, dtype, fake, n_fake, real, n_real, kind, side, smoothing, core);
  args.loss = at<float>(loss);
  args.statistics = at<float>(statistics);
  return core.run(Core::table().gan_loss_forward, args);
}

template <class Core, class... Tail>
int64_t gan_loss_backward(int dtype, Address dloss, Address fake, int64_t n_fake, Address real, int64_t n_real,
                          int kind, int side, float smoothing, Address dfake, Address dreal, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "gan_loss_backward";
  GanLossArgs args = gan_loss_args<Core>(op, dtype, fake, n_fake, real, n_real, kind, side, smoothing, core);
  args.dloss = at<float>(dloss);
  args.dfake = at(dfake);
  args.dreal = at(dreal);
  return core.run(Core::table().gan_loss_backward, args);
}

template <class Core, class... Tail>
int64_t gan_loss_double_backward(int dtype, Address ddfake, Address ddreal, Address dloss, Address fake, int64_t n_fake,
                                 Address real, int64_t n_real, int kind, int side, float smoothing, Address d_dloss,
                                 Address d_fake, Address d_real, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "gan_loss_double_backward";
  GanLossArgs args = gan_loss_args<Core>(op, dtype, fake, n_fake, real, n_real, kind, side, smoothing, core);
  args.dloss = at<float>(dloss);
  args.ddfake = at(ddfake);
  args.ddreal = at(ddreal);
  args.d_dloss = at<float>(d_dloss);
  args.dfake = at(d_fake);
  args.dreal = at(d_real);
  return core.run(Core::table().gan_loss_double_backward, args);
}

// ---------------------------------------------------------------------------------------------- penalties

inline void samples_of(const char* op, int64_t N, int64_t E) {
  if (N < 1 || E < 1)
    refuse(std::string(op) + ": N and E must be at least 1, got " + std::to_string(N) + " and " + std::to_string(E));
}

template <class Core, class... Tail>
int64_t interpolate_forward(int dtype, Address real, Address fake, Address epsilon, Address rest, Address y, int64_t N,
                            int64_t E, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "interpolate_forward";
  samples_of(op, N, E);
  const InterpolateArgs args{dtype_of<Core>(op, dtype), at(real), at(fake), at<float>(epsilon),
                             at<float>(rest),           at(y),    N,        E,
                             core.threads(op)};
  return core.run(Core::table().interpolate_forward, args);
}

template <class Core, class... Tail>
int64_t sample_dot(int dtype, Address x, Address y, Address dot, int64_t N, int64_t E, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "sample_dot";
  samples_of(op, N, E);
  const SampleDotArgs args{dtype_of<Core>(op, dtype), at(x), at(y), at<float>(dot), N, E, core.threads(op)};
  return core.run(Core::table().sample_dot, args);
}

template <class Core>
GradNormPenaltyArgs grad_norm_penalty_args(const char* op, int dtype, Address gradient, Address norm, int64_t N,
                                           int64_t E, float target, const Core& core) {
  samples_of(op, N, E);
  GradNormPenaltyArgs a{};
  a.dtype = dtype_of<Core>(op, dtype);
  a.gradient = at(gradient);
  a.norm = at<float>(norm);
  a.N = N;
  a.E = E;
  a.target = target;
  a.threads = core.threads(op);
  return a;
}

template <class Core, class... Tail>
int64_t grad_norm_penalty_forward(int dtype, Address gradient, Address penalty, Address norm, int64_t N, int64_t E,
                                  float target, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "grad_norm_penalty_forward";
  GradNormPenaltyArgs args = grad_norm_penalty_args<Core>(op, dtype, gradient, norm, N, E, target, core);
  args.penalty = at<float>(penalty);
  return core.run(Core::table().grad_norm_penalty_forward, args);
}

template <class Core, class... Tail>
int64_t grad_norm_penalty_backward(int dtype, Address dpenalty, Address gradient, Address norm, Address dgradient,
                                   int64_t N, int64_t E, float target, Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "grad_norm_penalty_backward";
  GradNormPenaltyArgs args = grad_norm_penalty_args<Core>(op, dtype, gradient, norm, N, E, target, core);
  args.dpenalty = at<float>(dpenalty);
  args.dgradient = at(dgradient);
  return core.run(Core::table().grad_norm_penalty_backward, args);
}

// ---------------------------------------------------------------------------------------------- Adam

// tensors: (parameter, gradient, exp_avg, exp_avg_sq, average or 0, step, elements) each.
template <class Core, class... Tail>
int64_t adam(const py::list& tensors, Address lr_at, float lr, double beta1, double beta2, double ln_beta1,
             double ln_beta2, float eps, float weight_decay, bool decoupled, bool maximize, double weight,
             Tail... tail) {
  const Core core{tail...};
  constexpr auto op = "adam";
  std::vector<AdamTensor> all;
  for (const auto& item : tensors) {
    const auto t = item.cast<std::array<int64_t, 7>>();
    if (t[6] < 1) refuse("adam: a tensor must have at least 1 element, got " + std::to_string(t[6]));
    const auto floats = [&](int i) { return at<float>(static_cast<Address>(t[i])); };
    all.push_back({floats(0), floats(1), floats(2), floats(3), floats(4), floats(5), t[6]});
  }
  const AdamArgs args{all.data(),
                      static_cast<int64_t>(all.size()),
                      at<float>(lr_at),
                      lr,
                      beta1,
                      beta2,
                      ln_beta1,
                      ln_beta2,
                      eps,
                      weight_decay,
                      decoupled,
                      maximize,
                      weight,
                      core.threads(op)};
  return core.run(Core::table().adam, args);
}

// ---------------------------------------------------------------------------------------------- the module

inline void bind_conv_shape(py::module_& m) {
  using py::arg;
  py::class_<ConvShape>(m, "Conv", py::module_local(), "Geometry of a forward convolution x[N,C,H,W] -> y[N,K,OH,OW].")
      .def(py::init(&make_conv), arg("N"), arg("C"), arg("H"), arg("W"), arg("K"), arg("OH"), arg("OW"), arg("R"),
           arg("S"), arg("stride_h"), arg("stride_w"), arg("pad_h"), arg("pad_w"), arg("dil_h"), arg("dil_w"),
           arg("groups"));
}

// The functions of one core; `tail` names the arguments that it takes last.
template <class Core, class... Tail, class... Names>
void bind_kernels(py::module_& m, const Names&... tail) {
  using py::arg;
  m.def("conv2d", &conv2d<Core, Tail...>, arg("conv"), arg("dtype"), arg("x"), arg("w"), arg("w_dtype"),
        arg("w_strides"), arg("bias"), arg("y"), arg("act"), arg("slope"), tail...);
  m.def("conv_transpose2d", &conv_transpose2d<Core, Tail...>, arg("conv"), arg("dtype"), arg("y"), arg("w"),
        arg("w_dtype"), arg("w_strides"), arg("bias"), arg("x"), arg("act"), arg("slope"), tail...);
  m.def("conv2d_weight", &conv2d_weight<Core, Tail...>, arg("conv"), arg("dtype"), arg("x"), arg("dy"), arg("dw"),
        arg("dw_dtype"), arg("dw_strides"), tail...);

  m.def("bn_act_forward", &bn_act_forward<Core, Tail...>, arg("dtype"), arg("x"), arg("weight"), arg("bias"),
        arg("mean"), arg("var"), arg("y"), arg("N"), arg("C"), arg("HW"), arg("G"), arg("channels_last"),
        arg("training"), arg("eps"), arg("act"), arg("slope"), tail...);
  m.def("bn_act_backward", &bn_act_backward<Core, Tail...>, arg("dtype"), arg("dy"), arg("x"), arg("weight"),
        arg("bias"), arg("mean"), arg("var"), arg("dx"), arg("dweight"), arg("dbias"), arg("N"), arg("C"), arg("HW"),
        arg("G"), arg("channels_last"), arg("training"), arg("eps"), arg("act"), arg("slope"), tail...);
  m.def("bn_act_double_backward", &bn_act_double_backward<Core, Tail...>, arg("dtype"), arg("ddx"), arg("ddweight"),
        arg("ddbias"), arg("dy"), arg("x"), arg("weight"), arg("bias"), arg("mean"), arg("var"), arg("d_dy"),
        arg("d_x"), arg("d_weight"), arg("N"), arg("C"), arg("HW"), arg("G"), arg("channels_last"), arg("training"),
        arg("eps"), arg("act"), arg("slope"), tail...);

  m.def("gn_act_forward", &gn_act_forward<Core, Tail...>, arg("dtype"), arg("x"), arg("weight"), arg("bias"),
        arg("mean"), arg("var"), arg("y"), arg("N"), arg("C"), arg("HW"), arg("groups"), arg("channels_last"),
        arg("eps"), arg("act"), arg("slope"), tail...);
  m.def("gn_act_backward", &gn_act_backward<Core, Tail...>, arg("dtype"), arg("dy"), arg("x"), arg("weight"),
        arg("bias"), arg("mean"), arg("var"), arg("dx"), arg("dweight"), arg("dbias"), arg("N"), arg("C"), arg("HW"),
        arg("groups"), arg("channels_last"), arg("eps"), arg("act"), arg("slope"), tail...);
  m.def("gn_act_double_backward", &gn_act_double_backward<Core, Tail...>, arg("dtype"), arg("ddx"), arg("ddweight"),
        arg("ddbias"), arg("dy"), arg("x"), arg("weight"), arg("bias"), arg("mean"), arg("var"), arg("d_dy"),
        arg("d_x"), arg("d_weight"), arg("N"), arg("C"), arg("HW"), arg("groups"), arg("channels_last"), arg("eps"),
        arg("act"), arg("slope"), tail...);

  m.def("bias_act_forward", &bias_act_forward<Core, Tail...>, arg("dtype"), arg("x"), arg("bias"), arg("y"), arg("N"),
        arg("C"), arg("HW"), arg("channels_last"), arg("act"), arg("slope"), tail...);
  m.def("bias_act_backward", &bias_act_backward<Core, Tail...>, arg("dtype"), arg("dy"), arg("y"), arg("dx"),
        arg("dbias"), arg("N"), arg("C"), arg("HW"), arg("channels_last"), arg("act"), arg("slope"), tail...);

  m.def("gan_loss_forward", &gan_loss_forward<Core, Tail...>, arg("dtype"), arg("fake"), arg("n_fake"), arg("real"),
        arg("n_real"), arg("kind"), arg("side"), arg("smoothing"), arg("loss"), arg("statistics"), tail...);
  m.def("gan_loss_backward", &gan_loss_backward<Core, Tail...>, arg("dtype"), arg("dloss"), arg("fake"), arg("n_fake"),
        arg("real"), arg("n_real"), arg("kind"), arg("side"), arg("smoothing"), arg("dfake"), arg("dreal"), tail...);
  m.def("gan_loss_double_backward", &gan_loss_double_backward<Core, Tail...>, arg("dtype"), arg("ddfake"),
        arg("ddreal"), arg("dloss"), arg("fake"), arg("n_fake"), arg("real"), arg("n_real"), arg("kind"), arg("side"),
        arg("smoothing"), arg("d_dloss"), arg("d_fake"), arg("d_real"), tail...);

  m.def("interpolate_forward", &interpolate_forward<Core, Tail...>, arg("dtype"), arg("real"), arg("fake"),
        arg("epsilon"), arg("rest"), arg("y"), arg("N"), arg("E"), tail...);
  m.def("sample_dot", &sample_dot<Core, Tail...>, arg("dtype"), arg("x"), arg("y"), arg("dot"), arg("N"), arg("E"),
        tail...);
  m.def("grad_norm_penalty_forward", &grad_norm_penalty_forward<Core, Tail...>, arg("dtype"), arg("gradient"),
        arg("penalty"), arg("norm"), arg("N"), arg("E"), arg("target"), tail...);
  m.def("grad_norm_penalty_backward", &grad_norm_penalty_backward<Core, Tail...>, arg("dtype"), arg("dpenalty"),
        arg("gradient"), arg("norm"), arg("dgradient"), arg("N"), arg("E"), arg("target"), tail...);
  m.def("adam", &adam<Core, Tail...>, arg("tensors"), arg("lr_at"), arg("lr"), arg("beta1"), arg("beta2"),
        arg("ln_beta1"), arg("ln_beta2"), arg("eps"), arg("weight_decay"), arg("decoupled"), arg("maximize"),
        arg("weight"), tail...);
}

#ifdef FG_CUDA
inline void bind_cuda(py::module_& m) {
  using py::arg;
  bind_kernels<Cuda, Address, Address>(m, arg("workspace"), arg("stream"));
  m.def("conv2d_statistics", &conv2d_statistics, arg("conv"), arg("dtype"), arg("x"), arg("w"), arg("w_dtype"),
        arg("w_strides"), arg("bias"), arg("y"), arg("stat_groups"), arg("mean"), arg("var"), arg("workspace"),
        arg("stream"));
  m.def("conv_transpose2d_statistics", &conv_transpose2d_statistics, arg("conv"), arg("dtype"), arg("y"), arg("w"),
        arg("w_dtype"), arg("w_strides"), arg("bias"), arg("x"), arg("stat_groups"), arg("mean"), arg("var"),
        arg("workspace"), arg("stream"));
}
#endif

}  // namespace fg::binding
