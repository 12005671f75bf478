// A program for the sanitizers: every kernel of csrc/cuda on small tensors, in a thread order drawn from a seed.
//
//   sanitize SEED within|between [FUNCTION]
//
// Heap arrays have the sanitizer's red zones around them, and outputs start as NaN; exit status 0 means that nothing
// was reported and every output was written. The values are test_cuda_ops.py's business.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda/kernels.hpp"
#include "simt.hpp"

// A program may be linked with some of the kernels only: the others are null.
#define FG_WEAK(kernel, ...) Launcher<__VA_ARGS__> kernel __attribute__((weak));
namespace fg::cuda {
FG_CUDA_KERNELS(FG_WEAK)
}  // namespace fg::cuda

using namespace fg;

namespace {

int failures = 0;

// Memory of exactly `count` elements of a dtype; its content is noise, or NaN for outputs.
struct Array {
  std::unique_ptr<char[]> bytes;
  int64_t size;

  Array(DType dtype, int64_t count, bool output = false) : size(count * (dtype == F32 ? 4 : 2)) {
    // the kernels take a 16-byte path where addresses allow it: malloc's do
    bytes.reset(new char[static_cast<size_t>(size)]);
    for (int64_t i = 0; i < count; ++i) {
      const float v = output ? NAN : static_cast<float>((i * 7919 + 13) % 211) / 64.0f - 1.5f;
      if (dtype == F32)
        std::memcpy(bytes.get() + 4 * i, &v, 4);
      else if (dtype == BF16)
        put(i, __float2bfloat16_rn(v));
      else
        put(i, __float2half_rn(v));
    }
  }
  template <class T>
  void put(int64_t i, T v) {
    std::memcpy(bytes.get() + 2 * i, &v, 2);
  }
  void* get() const { return bytes.get(); }
  float* floats() const { return reinterpret_cast<float*>(bytes.get()); }
  void positive() {
    for (int64_t i = 0; i < size / 4; ++i) floats()[i] = std::fabs(floats()[i]) + 0.5f;
  }
};

void written(const char* op, DType dtype, const Array& a) {
  for (int64_t i = 0; i < a.size / (dtype == F32 ? 4 : 2); ++i) {
    float v = 0.0f;
    uint16_t half = 0;
    if (dtype == F32)
      v = a.floats()[i];
    else
      std::memcpy(&half, a.bytes.get() + 2 * i, 2);
    const bool nan = dtype == F32 ? v != v : (half & 0x7fff) > (dtype == BF16 ? 0x7f80 : 0x7c00);
    if (!nan) continue;
    std::fprintf(stderr, "%s: element %ld was not written, or is NaN\n", op, static_cast<long>(i));
    ++failures;
    return;
  }
}

// Calls a launcher as fastgan/_native.py does: once for the size of its workspace, once with it.
template <class F>
void call(const F& launcher) {
  const int64_t bytes = launcher(cuda::Target{nullptr, nullptr});
  if (!bytes) return;
  const Array workspace(F32, bytes / 4, true);
  launcher(cuda::Target{workspace.get(), nullptr});
}

struct Size {
  int64_t N, C, HW, G;
  bool channels_last;
  int64_t count() const { return N * C * HW; }
};

void bn_act(DType d, const Size& s) {
  const BnShape shape{d, s.N, s.C, s.HW, s.G, s.channels_last, true, 1e-5f, ACT_LEAKY_RELU, 0.2f, 1};
  const Array x(d, s.count()), dy(d, s.count()), ddx(d, s.count()), weight(F32, s.C), bias(F32, s.C);
  const Array y(d, s.count(), true), dx(d, s.count(), true), d_dy(d, s.count(), true), d_x(d, s.count(), true);
  const Array mean(F32, s.G * s.C, true), var(F32, s.G * s.C, true);
  const Array dweight(F32, s.C, true), dbias(F32, s.C, true), d_weight(F32, s.C, true);
  const auto &w = weight, &b = bias;
  call([&](const auto& t) {
    return cuda::bn_act_forward(shape, {x.get(), w.floats(), b.floats(), mean.floats(), var.floats(), y.get()}, t);
  });
  call([&](const auto& t) {
    return cuda::bn_act_backward(shape,
                                 {dy.get(), x.get(), w.floats(), b.floats(), mean.floats(), var.floats(), dx.get(),
                                  dweight.floats(), dbias.floats()},
                                 t);
  });
  call([&](const auto& t) {
    return cuda::bn_act_double_backward(shape,
                                        {ddx.get(), w.floats(), b.floats(), dy.get(), x.get(), w.floats(), b.floats(),
                                         mean.floats(), var.floats(), d_dy.get(), d_x.get(), d_weight.floats()},
                                        t);
  });
  for (const Array* a : {&y, &dx, &d_dy, &d_x}) written("bn_act", d, *a);
  for (const Array* a : {&mean, &var, &dweight, &dbias, &d_weight}) written("bn_act", F32, *a);
}

// In one pass where the layout has it, then on a card whose shared memory holds no tensor.
void bn_act_on_two_cards(DType d, const Size& s) {
  bn_act(d, s);
  simt::settings.card.shared = 3 << 10;
  bn_act(d, s);
  simt::settings.card = {};
}

void gn_act(DType d, const Size& s) {
  if (s.HW > 1 && s.channels_last && s.HW < 16) return;  // gn_act.py turns these
  const int64_t groups = s.C % 2 ? s.C : s.C / 2;
  const GnShape shape{d, s.N, s.C, s.HW, groups, s.channels_last, 1e-5f, ACT_RELU, 0.0f, 1};
  const Array x(d, s.count()), dy(d, s.count()), ddx(d, s.count()), weight(F32, s.C), bias(F32, s.C);
  const Array y(d, s.count(), true), dx(d, s.count(), true), d_dy(d, s.count(), true), d_x(d, s.count(), true);
  const Array mean(F32, s.N * groups, true), var(F32, s.N * groups, true);
  const Array dweight(F32, s.C, true), dbias(F32, s.C, true), d_weight(F32, s.C, true);
  const auto &w = weight, &b = bias;
  call([&](const auto& t) {
    return cuda::gn_act_forward(shape, {x.get(), w.floats(), b.floats(), mean.floats(), var.floats(), y.get()}, t);
  });
  call([&](const auto& t) {
    return cuda::gn_act_backward(shape,
                                 {dy.get(), x.get(), w.floats(), b.floats(), mean.floats(), var.floats(), dx.get(),
                                  dweight.floats(), dbias.floats()},
                                 t);
  });
  call([&](const auto& t) {
    return cuda::gn_act_double_backward(shape,
                                        {ddx.get(), w.floats(), b.floats(), dy.get(), x.get(), w.floats(), b.floats(),
                                         mean.floats(), var.floats(), d_dy.get(), d_x.get(), d_weight.floats()},
                                        t);
  });
  for (const Array* a : {&y, &dx, &d_dy, &d_x}) written("gn_act", d, *a);
  for (const Array* a : {&mean, &var, &dweight, &dbias, &d_weight}) written("gn_act", F32, *a);
}

void bias_act(DType d, const Size& s) {
  const BiasActShape shape{d, s.N, s.C, s.HW, s.channels_last, ACT_TANH, 0.0f, 1.5f, 0.9f, 1};
  const Array x(d, s.count()), dy(d, s.count()), bias(F32, s.C);
  const Array y(d, s.count(), true), dx(d, s.count(), true), dbias(F32, s.C, true);
  call([&](const auto& t) { return cuda::bias_act_forward(shape, {x.get(), bias.floats(), y.get()}, t); });
  call([&](const auto& t) { return cuda::bias_act_backward(shape, {dy.get(), y.get(), dx.get(), dbias.floats()}, t); });
  written("bias_act", d, y);
  written("bias_act", d, dx);
  written("bias_act", F32, dbias);
}

void gan_loss(DType d, const Size& s) {
  const int64_t n = s.count();
  const Array fake(d, n), real(d, n), dfake(d, n, true), dreal(d, n, true), dloss(F32, 1);
  const Array loss(F32, 1, true), statistics(F32, 6, true), d_dloss(F32, 1, true);
  for (const Loss kind : {LOSS_BCE, LOSS_HINGE, LOSS_RELATIVISTIC}) {
    const GanLossShape shape{d, n, n, kind, SIDE_D, 0.0f, 1};
    call([&](const auto& t) {
      return cuda::gan_loss_forward(shape, {fake.get(), real.get(), loss.floats(), statistics.floats()}, t);
    });
    call([&](const auto& t) {
      return cuda::gan_loss_backward(shape, {dloss.floats(), fake.get(), real.get(), dfake.get(), dreal.get()}, t);
    });
    call([&](const auto& t) {
      return cuda::gan_loss_double_backward(
          shape,
          {real.get(), fake.get(), dloss.floats(), fake.get(), real.get(), d_dloss.floats(), dfake.get(), dreal.get()},
          t);
    });
  }
  written("gan_loss", d, dfake);
  written("gan_loss", d, dreal);
  for (const Array* a : {&loss, &statistics, &d_dloss}) written("gan_loss", F32, *a);
}

void penalties(DType d, const Size& s) {
  const int64_t E = s.C * s.HW;
  const Array real(d, s.count()), fake(d, s.count()), epsilon(F32, s.N), y(d, s.count(), true);
  const Array penalty(F32, s.N, true), norm(F32, s.N, true), dot(F32, s.N, true), dgradient(d, s.count(), true);
  call([&](const auto& t) {
    return cuda::interpolate_forward({d, real.get(), fake.get(), epsilon.floats(), nullptr, y.get(), s.N, E, 1}, t);
  });
  const GradNormPenaltyShape shape{d, s.N, E, 1.0f, 1};
  call([&](const auto& t) {
    return cuda::grad_norm_penalty_forward(shape, {real.get(), penalty.floats(), norm.floats()}, t);
  });
  call([&](const auto& t) {
    return cuda::grad_norm_penalty_backward(shape, {epsilon.floats(), real.get(), norm.floats(), dgradient.get()}, t);
  });
  call([&](const auto& t) { return cuda::sample_dot({d, real.get(), fake.get(), dot.floats(), s.N, E, 1}, t); });
  for (const Array* p : {&y, &dgradient}) written("penalties", d, *p);
  for (const Array* p : {&penalty, &norm, &dot}) written("penalties", F32, *p);
}

// Three tensors, the last one of a single element; the first has no average.
void adam(DType, const Size& s) {
  const int64_t counts[] = {s.count(), s.N * s.C, 1};
  std::vector<Array> held;
  std::vector<AdamTensor> tensors;
  for (const int64_t count : counts) {
    for (int i = 0; i < 5; ++i) held.emplace_back(F32, count);
    held.emplace_back(F32, 1);
    float* of[6];
    for (int i = 0; i < 6; ++i) {
      Array& a = held[held.size() - 6 + static_cast<size_t>(i)];
      if (i == 3 || i == 5) a.positive();
      of[i] = a.floats();
    }
    tensors.push_back({of[0], of[1], of[2], of[3], tensors.empty() ? nullptr : of[4], of[5], count});
  }
  AdamArgs a{};
  a.tensors = {tensors.data(), 3};
  a.lr = 0.1f;
  a.beta1 = a.beta2 = 0.5;
  a.ln_beta1 = a.ln_beta2 = std::log(0.5);
  a.eps = 1e-8f;
  a.weight = 0.1f;
  call([&](const auto& t) { return cuda::adam(a, t); });
  for (const Array& array : held) written("adam", F32, array);
}

// Channels and batch are the size's; large sizes get an image whose weight gradient is split.
void convolutions(DType d, const Size& s) {
  const int64_t C = s.C, K = s.C % 8 ? 5 : 24, H = s.HW > 1000 ? 40 : 7, W = s.HW > 1000 ? 32 : 5, R = 4, S = 3;
  const int64_t OH = (H + 2 - R) / 2 + 1, OW = W + 2 - S + 1, stride[2] = {2, 1};
  const ConvShape shape{s.N, C, H, W, K, OH, OW, R, S, stride[0], stride[1], 1, 1, 1, 1, 1};
  const Array x(d, s.N * C * H * W), w(d, K * C * R * S), dy(d, s.N * K * OH * OW), bias(F32, K + C);
  const Array y(d, s.N * K * OH * OW, true), dx(d, s.N * C * H * W, true), dw(d, K * C * R * S, true);
  call([&](const auto& t) {
    return cuda::conv2d(shape, {d, x.get(), w.get(), d, {}, bias.floats(), y.get(), ACT_TANH, 0, 1}, t);
  });
  call([&](const auto& t) {
    return cuda::conv_transpose2d(shape, {d, dy.get(), w.get(), d, {}, bias.floats(), dx.get(), ACT_RELU, 0, 1}, t);
  });
  for (const int64_t channel_stride : {int64_t{1}, R * S})
    call([&](const auto& t) {
      return cuda::conv2d_weight(shape, {d, x.get(), dy.get(), dw.get(), d, {0, channel_stride, 0, 0}, 1}, t);
    });
  for (const Array* a : {&y, &dx, &dw}) written("convolutions", d, *a);
  const Array y_(d, s.N * K * OH * OW, true), x_(d, s.N * C * H * W, true);
  const Array y_mean(F32, s.G * K, true), y_var(F32, s.G * K, true);
  const Array x_mean(F32, s.G * C, true), x_var(F32, s.G * C, true);
  call([&](const auto& t) {
    return cuda::conv2d_statistics(shape, {d, x.get(), w.get(), d, {}, bias.floats(), y_.get(), ACT_IDENTITY, 0, 1},
                                   {s.G, y_mean.floats(), y_var.floats()}, t);
  });
  call([&](const auto& t) {
    return cuda::conv_transpose2d_statistics(shape,
                                             {d, dy.get(), w.get(), d, {}, bias.floats(), x_.get(), ACT_IDENTITY, 0, 1},
                                             {s.G, x_mean.floats(), x_var.floats()}, t);
  });
  for (const Array* a : {&y_, &x_}) written("convolutions with statistics", d, *a);
  for (const Array* a : {&y_mean, &y_var, &x_mean, &x_var}) written("convolutions with statistics", F32, *a);
}

void upfirdn2d(DType d, const Size& s) {
  const int64_t H = 3, W = s.HW, OH = 2 * H - 1, OW = (W + 3) / 2;
  const Array x(d, s.N * s.C * H * W), f(F32, 4 * 3), y(d, s.N * s.C * OH * OW, true);
  const Upfirdn2dArgs a{d, x.get(), f.floats(),      y.get(),         s.N,  s.C, H, W, OH, OW, 4, 3, 2, 1, 1, 2, 1,
                        2, false,   s.channels_last, s.channels_last, 1.5f, 1};
  call([&](const auto& t) { return cuda::upfirdn2d(a, t); });
  written("upfirdn2d", d, y);
}

// Up 2 and down 2 by 5 x 3 taps and a product of 3, forward, and its adjoint by the same filters exchanged. Rows are
// long enough for two strips where sizes are large.
void filtered_lrelu(DType d, const Size& s) {
  const int64_t H = 5, W = s.HW > 1000 ? 160 : s.HW, MH = 2 * H + 6 - 5 + 1, MW = 2 * W + 6 - 3 + 1;
  const int64_t OH = (MH - 3) / 2 + 1, OW = (MW - 3) / 2 + 1, C = std::min<int64_t>(s.C, 18), planes = 2 * C;
  const int64_t signs = 2 * planes * MH * ((MW + 31) / 32);
  const auto shape = [&](int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w, int64_t pad, int64_t pad_out,
                         bool forward) {
    const int64_t up_h = forward ? 5 : 3, down_h = forward ? 3 : 5;
    return FilteredLreluShape{
        d, 2,   C,   in_h,    in_w,    MH,       MW,      out_h,           out_w,           up_h, 3,    down_h, 3, 2,
        2, pad, pad, pad_out, pad_out, !forward, forward, s.channels_last, s.channels_last, 1.4f, 0.2f, 0.9f,   1};
  };
  const Array x(d, planes * H * W), bias(F32, C), plane(F32, 5 * 3), product(F32, 3), dy(d, planes * OH * OW);
  const Array y(d, planes * OH * OW, true), dx(d, planes * H * W, true), bits(F32, signs, true);
  call([&](const auto& t) {
    return cuda::filtered_lrelu_forward(shape(H, W, OH, OW, 3, 0, true),
                                        {x.get(), bias.floats(), plane.floats(), product.floats(), y.get(), bits.get()},
                                        t);
  });
  call([&](const auto& t) {
    return cuda::filtered_lrelu_backward(shape(OH, OW, H, W, 2, 1, false),
                                         {dy.get(), bits.get(), product.floats(), plane.floats(), dx.get()}, t);
  });
  written("filtered_lrelu", d, y);
  written("filtered_lrelu_backward", d, dx);
}

// Two heads, two tiles of keys, whose width is whole chunks or is not.
void attention(DType d, const Size& s) {
  if (s.HW > 64 || s.G > 1) return;  // a few sizes are enough
  const int64_t heads = 2, rows = 5, keys = 66, w = s.C % 8 ? 5 : 8;
  const AttentionShape shape{d, 1, heads, rows, keys, w, w, s.channels_last, 0.3f, 1};
  const auto array = [&](int64_t n, bool output) { return Array(d, heads * n * w, output); };
  const Array q = array(rows, false), k = array(keys, false), v = array(keys, false), dy = array(rows, false);
  const Array y = array(rows, true), dq = array(rows, true), dk = array(keys, true), dv = array(keys, true);
  const Array d_dy = array(rows, true), d_q = array(rows, true), d_k = array(keys, true), d_v = array(keys, true);
  const Array bias(F32, rows * keys), lse(F32, heads * rows, true);
#define FG_ROWS {heads * rows * w, rows * w, w, 1}
#define FG_KEYS {heads * keys * w, keys * w, w, 1}
  call([&](const auto& t) {
    return cuda::attention_forward(shape,
                                   {q.get(),
                                    k.get(),
                                    v.get(),
                                    bias.floats(),
                                    y.get(),
                                    lse.floats(),
                                    FG_ROWS,
                                    FG_KEYS,
                                    FG_KEYS,
                                    {0, 0, keys, 1},
                                    FG_ROWS},
                                   t);
  });
  AttentionBackwardArgs b{dy.get(), q.get(),         k.get(),  v.get(), bias.floats(), y.get(), lse.floats(),
                          dq.get(), dk.get(),        dv.get(), nullptr, FG_ROWS,       FG_ROWS, FG_KEYS,
                          FG_KEYS,  {0, 0, keys, 1}, FG_ROWS,  FG_ROWS, FG_KEYS,       FG_KEYS, {}};
  call([&](const auto& t) { return cuda::attention_backward(shape, b, t); });
  AttentionDoubleBackwardArgs w2{dy.get(),  q.get(),   k.get(),       nullptr,      nullptr,    q.get(),
                                 k.get(),   v.get(),   bias.floats(), lse.floats(), d_dy.get(), d_q.get(),
                                 d_k.get(), d_v.get(), nullptr,       FG_ROWS,      FG_ROWS,    FG_KEYS,
                                 {},        {},        FG_ROWS,       FG_KEYS,      FG_KEYS,    {0, 0, keys, 1},
                                 FG_ROWS,   FG_ROWS,   FG_KEYS,       FG_KEYS,      {}};
  call([&](const auto& t) { return cuda::attention_double_backward(shape, w2, t); });
#undef FG_ROWS
#undef FG_KEYS
  for (const Array* a : {&y, &dq, &dk, &dv, &d_dy, &d_q, &d_k, &d_v}) written("attention", d, *a);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) return 2;
  simt::settings.seed = static_cast<unsigned>(std::atoi(arguments[1]));
  simt::settings.race = std::string(arguments[2]) == "between" ? simt::Race::BETWEEN : simt::Race::WITHIN;
  const std::string only = count > 3 ? arguments[3] : "";
  const Size sizes[] = {{2, 3, 35, 1, false},   {2, 3, 35, 2, true},   {4, 16, 64, 2, false}, {4, 24, 36, 1, true},
                        {1, 2, 8200, 1, false}, {1, 8, 8200, 1, true}, {6, 40, 1, 2, false},  {4, 18, 3, 1, false}};
  struct {
    const char* name;
    void (*run)(DType, const Size&);
    bool linked;
  } const functions[] = {
      {"bn_act", bn_act_on_two_cards, cuda::bn_act_forward != nullptr},
      {"gn_act", gn_act, cuda::gn_act_forward != nullptr},
      {"bias_act", bias_act, cuda::bias_act_forward != nullptr},
      {"gan_loss", gan_loss, cuda::gan_loss_forward != nullptr},
      {"penalties", penalties, cuda::interpolate_forward && cuda::grad_norm_penalty_forward && cuda::sample_dot},
      {"adam", adam, cuda::adam != nullptr},
      {"upfirdn2d", upfirdn2d, cuda::upfirdn2d != nullptr},
      {"filtered_lrelu", filtered_lrelu, cuda::filtered_lrelu_forward != nullptr},
      {"attention", attention, cuda::attention_forward != nullptr},
      {"convolutions", convolutions, cuda::conv2d != nullptr}};
  try {
    for (const auto& f : functions)
      for (const Size& size : sizes)
        for (const DType d : {F32, BF16})
          if (f.linked && (only.empty() || only == f.name)) f.run(d, size);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return failures ? 4 : 0;
}
