// fastgan._C: the kernels as Python functions over raw addresses. No torch header, no torch library.
//
// An address is what tensor.data_ptr() returns; 0 stands for "absent" where a function says so. Shapes, dtypes,
// strides and lifetimes are the caller's business (fastgan/ops checks them); here only what would crash or divide by
// zero is refused. Every kernel runs without the GIL. Import torch first: it brings the OpenMP runtime.
#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>

#include "build_config.hpp"  // written by setup.py
#include "common/kernels.hpp"
#include "dispatch.hpp"
#ifdef FG_CUDA
#include "cuda/device.hpp"
#endif

namespace py = pybind11;
using namespace fg;

namespace {

using Address = uintptr_t;
using Strides = std::array<int64_t, 4>;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

[[noreturn]] void refuse(const std::string& text) { throw py::value_error(text); }

DType dtype_of(const char* op, int code) {
  if (code != F32 && code != BF16)
    refuse(std::string(op) + ": dtype must be 0 (float32) or 1 (bfloat16), got " + std::to_string(code));
  return static_cast<DType>(code);
}

Act act_of(const char* op, int code, int last = ACT_SIGMOID) {
  if (code < 0 || code > last)
    refuse(std::string(op) + ": act must be in 0.." + std::to_string(last) + ", got " + std::to_string(code));
  return static_cast<Act>(code);
}

int threads_of(const char* op, int threads) {
  if (threads < 1) refuse(std::string(op) + ": threads must be at least 1, got " + std::to_string(threads));
  return threads;
}

Strides strides_of(const char* op, const py::tuple& t) {
  if (t.size() != 4) refuse(std::string(op) + ": the weight needs 4 strides, got " + std::to_string(t.size()));
  return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

// ---------------------------------------------------------------------------------------------- convolution

ConvShape make_conv(int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t OH, int64_t OW, int64_t R, int64_t S,
                    int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w,
                    int64_t groups) {
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

void conv2d(const ConvShape& conv, int dtype, Address x, Address w, int w_dtype, const py::tuple& w_strides,
            Address bias, Address y, int act, float slope, int threads) {
  constexpr auto op = "conv2d";
  const Strides s = strides_of(op, w_strides);
  const Conv2dArgs args{dtype_of(op, dtype),
                        at(x),
                        at(w),
                        dtype_of(op, w_dtype),
                        {s[0], s[1], s[2], s[3]},
                        at<float>(bias),
                        at(y),
                        act_of(op, act),
                        slope,
                        threads_of(op, threads)};
  const auto kernel = current().conv2d;
  py::gil_scoped_release release;
  kernel(conv, args);
}

void conv_transpose2d(const ConvShape& conv, int dtype, Address y, Address w, int w_dtype, const py::tuple& w_strides,
                      Address bias, Address x, int act, float slope, int threads) {
  constexpr auto op = "conv_transpose2d";
  const Strides s = strides_of(op, w_strides);
  const ConvTranspose2dArgs args{dtype_of(op, dtype),
                                 at(y),
                                 at(w),
                                 dtype_of(op, w_dtype),
                                 {s[0], s[1], s[2], s[3]},
                                 at<float>(bias),
                                 at(x),
                                 act_of(op, act),
                                 slope,
                                 threads_of(op, threads)};
  const auto kernel = current().conv_transpose2d;
  py::gil_scoped_release release;
  kernel(conv, args);
}

void conv2d_weight(const ConvShape& conv, int dtype, Address x, Address dy, Address dw, int dw_dtype,
                   const py::tuple& dw_strides, int threads) {
  constexpr auto op = "conv2d_weight";
  const Strides s = strides_of(op, dw_strides);
  const Conv2dWeightArgs args{
      dtype_of(op, dtype),    at(x), at(dy), at(dw), dtype_of(op, dw_dtype), {s[0], s[1], s[2], s[3]},
      threads_of(op, threads)};
  const auto kernel = current().conv2d_weight;
  py::gil_scoped_release release;
  kernel(conv, args);
}

// ---------------------------------------------------------------------------------------------- bn_act

BnShape bn_shape(const char* op, int dtype, int64_t N, int64_t C, int64_t HW, int64_t G, bool channels_last,
                 bool training, float eps, int act, float slope, int threads) {
  if (N < 0 || C < 0 || HW < 0 || G < 1 || N % G)
    refuse(std::string(op) + ": N, C and HW must not be negative and G must divide N, got N=" + std::to_string(N) +
           ", C=" + std::to_string(C) + ", HW=" + std::to_string(HW) + ", G=" + std::to_string(G));
  return {dtype_of(op, dtype),    N, C, HW, G, channels_last, training, eps, act_of(op, act, ACT_LEAKY_RELU), slope,
          threads_of(op, threads)};
}

void bn_act_forward(int dtype, Address x, Address weight, Address bias, Address mean, Address var, Address y, int64_t N,
                    int64_t C, int64_t HW, int64_t G, bool channels_last, bool training, float eps, int act,
                    float slope, int threads) {
  constexpr auto op = "bn_act_forward";
  const BnShape shape = bn_shape(op, dtype, N, C, HW, G, channels_last, training, eps, act, slope, threads);
  const BnActForwardArgs args{at(x), at<float>(weight), at<float>(bias), at<float>(mean), at<float>(var), at(y)};
  const auto kernel = current().bn_act_forward;
  py::gil_scoped_release release;
  kernel(shape, args);
}

void bn_act_backward(int dtype, Address dy, Address x, Address weight, Address bias, Address mean, Address var,
                     Address dx, Address dweight, Address dbias, int64_t N, int64_t C, int64_t HW, int64_t G,
                     bool channels_last, bool training, float eps, int act, float slope, int threads) {
  constexpr auto op = "bn_act_backward";
  const BnShape shape = bn_shape(op, dtype, N, C, HW, G, channels_last, training, eps, act, slope, threads);
  const BnActBackwardArgs args{at(dy),         at(x),  at<float>(weight),  at<float>(bias), at<float>(mean),
                               at<float>(var), at(dx), at<float>(dweight), at<float>(dbias)};
  const auto kernel = current().bn_act_backward;
  py::gil_scoped_release release;
  kernel(shape, args);
}

void bn_act_double_backward(int dtype, Address ddx, Address ddweight, Address ddbias, Address dy, Address x,
                            Address weight, Address bias, Address mean, Address var, Address d_dy, Address d_x,
                            Address d_weight, int64_t N, int64_t C, int64_t HW, int64_t G, bool channels_last,
                            bool training, float eps, int act, float slope, int threads) {
  constexpr auto op = "bn_act_double_backward";
  const BnShape shape = bn_shape(op, dtype, N, C, HW, G, channels_last, training, eps, act, slope, threads);
  const BnActDoubleBackwardArgs args{
      at(ddx),         at<float>(ddweight), at<float>(ddbias), at(dy),   at(x),   at<float>(weight),
      at<float>(bias), at<float>(mean),     at<float>(var),    at(d_dy), at(d_x), at<float>(d_weight)};
  const auto kernel = current().bn_act_double_backward;
  py::gil_scoped_release release;
  kernel(shape, args);
}

// ---------------------------------------------------------------------------------------------- gn_act

GnShape gn_shape(const char* op, int dtype, int64_t N, int64_t C, int64_t HW, int64_t groups, bool channels_last,
                 float eps, int act, float slope, int threads) {
  if (N < 0 || C < 0 || HW < 0 || groups < 1 || C % groups)
    refuse(std::string(op) + ": N, C and HW must not be negative and groups must divide C, got N=" + std::to_string(N) +
           ", C=" + std::to_string(C) + ", HW=" + std::to_string(HW) + ", groups=" + std::to_string(groups));
  return {dtype_of(op, dtype),    N, C, HW, groups, channels_last, eps, act_of(op, act, ACT_LEAKY_RELU), slope,
          threads_of(op, threads)};
}

void gn_act_forward(int dtype, Address x, Address weight, Address bias, Address mean, Address var, Address y, int64_t N,
                    int64_t C, int64_t HW, int64_t groups, bool channels_last, float eps, int act, float slope,
                    int threads) {
  constexpr auto op = "gn_act_forward";
  const GnShape shape = gn_shape(op, dtype, N, C, HW, groups, channels_last, eps, act, slope, threads);
  const GnActForwardArgs args{at(x), at<float>(weight), at<float>(bias), at<float>(mean), at<float>(var), at(y)};
  const auto kernel = current().gn_act_forward;
  py::gil_scoped_release release;
  kernel(shape, args);
}

void gn_act_backward(int dtype, Address dy, Address x, Address weight, Address bias, Address mean, Address var,
                     Address dx, Address dweight, Address dbias, int64_t N, int64_t C, int64_t HW, int64_t groups,
                     bool channels_last, float eps, int act, float slope, int threads) {
  constexpr auto op = "gn_act_backward";
  const GnShape shape = gn_shape(op, dtype, N, C, HW, groups, channels_last, eps, act, slope, threads);
  const GnActBackwardArgs args{at(dy),         at(x),  at<float>(weight),  at<float>(bias), at<float>(mean),
                               at<float>(var), at(dx), at<float>(dweight), at<float>(dbias)};
  const auto kernel = current().gn_act_backward;
  py::gil_scoped_release release;
  kernel(shape, args);
}

void gn_act_double_backward(int dtype, Address ddx, Address ddweight, Address ddbias, Address dy, Address x,
                            Address weight, Address bias, Address mean, Address var, Address d_dy, Address d_x,
                            Address d_weight, int64_t N, int64_t C, int64_t HW, int64_t groups, bool channels_last,
                            float eps, int act, float slope, int threads) {
  constexpr auto op = "gn_act_double_backward";
  const GnShape shape = gn_shape(op, dtype, N, C, HW, groups, channels_last, eps, act, slope, threads);
  const GnActDoubleBackwardArgs args{
      at(ddx),         at<float>(ddweight), at<float>(ddbias), at(dy),   at(x),   at<float>(weight),
      at<float>(bias), at<float>(mean),     at<float>(var),    at(d_dy), at(d_x), at<float>(d_weight)};
  const auto kernel = current().gn_act_double_backward;
  py::gil_scoped_release release;
  kernel(shape, args);
}

// ---------------------------------------------------------------------------------------------- bias_act

BiasActShape bias_act_shape(const char* op, int dtype, int64_t N, int64_t C, int64_t HW, bool channels_last, int act,
                            float slope, int threads) {
  if (N < 0 || C < 0 || HW < 0)
    refuse(std::string(op) + ": N, C and HW must not be negative, got N=" + std::to_string(N) +
           ", C=" + std::to_string(C) + ", HW=" + std::to_string(HW));
  return {dtype_of(op, dtype), N, C, HW, channels_last, act_of(op, act), slope, threads_of(op, threads)};
}

void bias_act_forward(int dtype, Address x, Address bias, Address y, int64_t N, int64_t C, int64_t HW,
                      bool channels_last, int act, float slope, int threads) {
  constexpr auto op = "bias_act_forward";
  const BiasActShape shape = bias_act_shape(op, dtype, N, C, HW, channels_last, act, slope, threads);
  const BiasActForwardArgs args{at(x), at<float>(bias), at(y)};
  const auto kernel = current().bias_act_forward;
  py::gil_scoped_release release;
  kernel(shape, args);
}

void bias_act_backward(int dtype, Address dy, Address y, Address dx, Address dbias, int64_t N, int64_t C, int64_t HW,
                       bool channels_last, int act, float slope, int threads) {
  constexpr auto op = "bias_act_backward";
  const BiasActShape shape = bias_act_shape(op, dtype, N, C, HW, channels_last, act, slope, threads);
  const BiasActBackwardArgs args{at(dy), at(y), at(dx), at<float>(dbias)};
  const auto kernel = current().bias_act_backward;
  py::gil_scoped_release release;
  kernel(shape, args);
}

// ---------------------------------------------------------------------------------------------- gan_loss

GanLossArgs gan_loss_args(const char* op, int dtype, Address fake, int64_t n_fake, Address real, int64_t n_real,
                          int kind, int side, float smoothing, int threads) {
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
  a.dtype = dtype_of(op, dtype);
  a.fake = at(fake);
  a.real = at(real);
  a.n_fake = n_fake;
  a.n_real = n_real;
  a.kind = static_cast<Loss>(kind);
  a.side = static_cast<Side>(side);
  a.smoothing = smoothing;
  a.threads = threads_of(op, threads);
  return a;
}

void gan_loss_forward(int dtype, Address fake, int64_t n_fake, Address real, int64_t n_real, int kind, int side,
                      float smoothing, Address out, int threads) {
  constexpr auto op = "gan_loss_forward";
  GanLossArgs args = gan_loss_args(op, dtype, fake, n_fake, real, n_real, kind, side, smoothing, threads);
  args.out = at<float>(out);
  const auto kernel = current().gan_loss_forward;
  py::gil_scoped_release release;
  kernel(args);
}

void gan_loss_backward(int dtype, Address dloss, Address fake, int64_t n_fake, Address real, int64_t n_real, int kind,
                       int side, float smoothing, Address dfake, Address dreal, int threads) {
  constexpr auto op = "gan_loss_backward";
  GanLossArgs args = gan_loss_args(op, dtype, fake, n_fake, real, n_real, kind, side, smoothing, threads);
  args.dloss = at<float>(dloss);
  args.dfake = at(dfake);
  args.dreal = at(dreal);
  const auto kernel = current().gan_loss_backward;
  py::gil_scoped_release release;
  kernel(args);
}

// ---------------------------------------------------------------------------------------------- penalties

void check_samples(const char* op, int64_t N, int64_t M) {
  if (N < 0 || M < 1)
    refuse(std::string(op) + ": N must be at least 0 and M at least 1, got N=" + std::to_string(N) +
           ", M=" + std::to_string(M));
}

void interpolate(int dtype, Address real, Address fake, Address epsilon, Address y, int64_t N, int64_t M, int threads) {
  constexpr auto op = "interpolate";
  check_samples(op, N, M);
  const InterpolateArgs args{dtype_of(op, dtype),    at(real), at(fake), at<float>(epsilon), at(y), N, M,
                             threads_of(op, threads)};
  const auto kernel = current().interpolate;
  py::gil_scoped_release release;
  kernel(args);
}

void grad_norm_penalty_forward(int dtype, Address gradient, float target, Address penalty, Address norm, int64_t N,
                               int64_t M, int threads) {
  constexpr auto op = "grad_norm_penalty_forward";
  check_samples(op, N, M);
  const GradNormPenaltyArgs args{
      dtype_of(op, dtype),    at(gradient), target, at<float>(penalty), at<float>(norm), nullptr, nullptr, N, M,
      threads_of(op, threads)};
  const auto kernel = current().grad_norm_penalty_forward;
  py::gil_scoped_release release;
  kernel(args);
}

void grad_norm_penalty_backward(int dtype, Address dpenalty, Address gradient, Address norm, float target,
                                Address dgradient, int64_t N, int64_t M, int threads) {
  constexpr auto op = "grad_norm_penalty_backward";
  check_samples(op, N, M);
  const GradNormPenaltyArgs args{dtype_of(op, dtype), at(gradient),  target, nullptr, at<float>(norm),
                                 at<float>(dpenalty), at(dgradient), N,      M,       threads_of(op, threads)};
  const auto kernel = current().grad_norm_penalty_backward;
  py::gil_scoped_release release;
  kernel(args);
}

// ---------------------------------------------------------------------------------------------- what was built

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["standard"] = static_cast<int64_t>(__cplusplus);
  py::list names;
  for (const Candidate* c = candidates(); c->table; ++c) names.append(c->table->name);
  info["tables"] = names;
#ifdef FG_CUDA
  py::dict cuda;
  cuda["version"] = FG_CUDA_VERSION;
  cuda["archs"] = py::str(FG_CUDA_ARCHS).attr("split")();
  info["cuda"] = cuda;
  info["cuda_absent"] = "";
#else
  info["cuda"] = py::none();
  info["cuda_absent"] = FG_CUDA_ABSENT;
#endif
  return info;
}

py::dict tables() {
  py::dict usable;
  for (const Candidate* c = candidates(); c->table; ++c) usable[c->table->name] = c->refusal();
  return usable;
}

void use_table(const py::object& name) {
  if (name.is_none()) {
    select(nullptr);
    return;
  }
  const auto wanted = name.cast<std::string>();
  if (const std::string why = select(wanted.c_str()); !why.empty())
    refuse("use_table: the table must be usable on this machine, got '" + wanted + "': " + why);
}

#ifdef FG_CUDA
py::dict cuda_devices() {
  std::vector<cuda::Device> found;
  py::dict answer;
  answer["runtime"] = cuda::runtime_version();
  answer["driver"] = cuda::driver_version();
  answer["reason"] = cuda::devices(&found);
  py::list list;
  for (const auto& d : found) {
    py::dict one;
    one["name"] = d.name;
    one["capability"] = py::make_tuple(d.major, d.minor);
    one["multiprocessors"] = d.multiprocessors;
    one["global_bytes"] = d.global_bytes;
    one["shared_bytes_optin"] = d.shared_bytes_optin;
    one["l2_bytes"] = d.l2_bytes;
    list.append(one);
  }
  answer["devices"] = list;
  return answer;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastgan's native kernels over raw addresses; fastgan.ops is the interface for people.";
  using py::arg;

  m.def("build_info", &build_info, "Compiler, C++ standard, tables, and CUDA or why it is absent.");
  m.def("tables", &tables, "Every table of this build: '' if this machine can run it, else the reason.");
  m.def("table", [] { return current().name; }, "The table in use.");
  m.def("use_table", &use_table, arg("name"), "Force a table by name; None goes back to the best one.");
#ifdef FG_CUDA
  m.def("cuda_devices", &cuda_devices, "Runtime and driver version, and the devices or why there are none.");
#endif

  py::class_<ConvShape>(m, "Conv", "Geometry of a forward convolution x[N,C,H,W] -> y[N,K,OH,OW].")
      .def(py::init(&make_conv), arg("N"), arg("C"), arg("H"), arg("W"), arg("K"), arg("OH"), arg("OW"), arg("R"),
           arg("S"), arg("stride_h"), arg("stride_w"), arg("pad_h"), arg("pad_w"), arg("dil_h"), arg("dil_w"),
           arg("groups"));
  m.def("conv2d", &conv2d, arg("conv"), arg("dtype"), arg("x"), arg("w"), arg("w_dtype"), arg("w_strides"), arg("bias"),
        arg("y"), arg("act"), arg("slope"), arg("threads"));
  m.def("conv_transpose2d", &conv_transpose2d, arg("conv"), arg("dtype"), arg("y"), arg("w"), arg("w_dtype"),
        arg("w_strides"), arg("bias"), arg("x"), arg("act"), arg("slope"), arg("threads"));
  m.def("conv2d_weight", &conv2d_weight, arg("conv"), arg("dtype"), arg("x"), arg("dy"), arg("dw"), arg("dw_dtype"),
        arg("dw_strides"), arg("threads"));

  m.def("bn_act_forward", &bn_act_forward, arg("dtype"), arg("x"), arg("weight"), arg("bias"), arg("mean"), arg("var"),
        arg("y"), arg("N"), arg("C"), arg("HW"), arg("G"), arg("channels_last"), arg("training"), arg("eps"),
        arg("act"), arg("slope"), arg("threads"));
  m.def("bn_act_backward", &bn_act_backward, arg("dtype"), arg("dy"), arg("x"), arg("weight"), arg("bias"), arg("mean"),
        arg("var"), arg("dx"), arg("dweight"), arg("dbias"), arg("N"), arg("C"), arg("HW"), arg("G"),
        arg("channels_last"), arg("training"), arg("eps"), arg("act"), arg("slope"), arg("threads"));
  m.def("bn_act_double_backward", &bn_act_double_backward, arg("dtype"), arg("ddx"), arg("ddweight"), arg("ddbias"),
        arg("dy"), arg("x"), arg("weight"), arg("bias"), arg("mean"), arg("var"), arg("d_dy"), arg("d_x"),
        arg("d_weight"), arg("N"), arg("C"), arg("HW"), arg("G"), arg("channels_last"), arg("training"), arg("eps"),
        arg("act"), arg("slope"), arg("threads"));

  m.def("gn_act_forward", &gn_act_forward, arg("dtype"), arg("x"), arg("weight"), arg("bias"), arg("mean"), arg("var"),
        arg("y"), arg("N"), arg("C"), arg("HW"), arg("groups"), arg("channels_last"), arg("eps"), arg("act"),
        arg("slope"), arg("threads"));
  m.def("gn_act_backward", &gn_act_backward, arg("dtype"), arg("dy"), arg("x"), arg("weight"), arg("bias"), arg("mean"),
        arg("var"), arg("dx"), arg("dweight"), arg("dbias"), arg("N"), arg("C"), arg("HW"), arg("groups"),
        arg("channels_last"), arg("eps"), arg("act"), arg("slope"), arg("threads"));
  m.def("gn_act_double_backward", &gn_act_double_backward, arg("dtype"), arg("ddx"), arg("ddweight"), arg("ddbias"),
        arg("dy"), arg("x"), arg("weight"), arg("bias"), arg("mean"), arg("var"), arg("d_dy"), arg("d_x"),
        arg("d_weight"), arg("N"), arg("C"), arg("HW"), arg("groups"), arg("channels_last"), arg("eps"), arg("act"),
        arg("slope"), arg("threads"));

  m.def("bias_act_forward", &bias_act_forward, arg("dtype"), arg("x"), arg("bias"), arg("y"), arg("N"), arg("C"),
        arg("HW"), arg("channels_last"), arg("act"), arg("slope"), arg("threads"));
  m.def("bias_act_backward", &bias_act_backward, arg("dtype"), arg("dy"), arg("y"), arg("dx"), arg("dbias"), arg("N"),
        arg("C"), arg("HW"), arg("channels_last"), arg("act"), arg("slope"), arg("threads"));

  m.def("gan_loss_forward", &gan_loss_forward, arg("dtype"), arg("fake"), arg("n_fake"), arg("real"), arg("n_real"),
        arg("kind"), arg("side"), arg("smoothing"), arg("out"), arg("threads"));
  m.def("gan_loss_backward", &gan_loss_backward, arg("dtype"), arg("dloss"), arg("fake"), arg("n_fake"), arg("real"),
        arg("n_real"), arg("kind"), arg("side"), arg("smoothing"), arg("dfake"), arg("dreal"), arg("threads"));

  m.def("interpolate", &interpolate, arg("dtype"), arg("real"), arg("fake"), arg("epsilon"), arg("y"), arg("N"),
        arg("M"), arg("threads"));
  m.def("grad_norm_penalty_forward", &grad_norm_penalty_forward, arg("dtype"), arg("gradient"), arg("target"),
        arg("penalty"), arg("norm"), arg("N"), arg("M"), arg("threads"));
  m.def("grad_norm_penalty_backward", &grad_norm_penalty_backward, arg("dtype"), arg("dpenalty"), arg("gradient"),
        arg("norm"), arg("target"), arg("dgradient"), arg("N"), arg("M"), arg("threads"));
}
