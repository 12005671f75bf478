// A program for the thread sanitizer: attention and the norms of csrc/cpu on small tensors, three threads each. The
// shapes are those that threads share: heads cut into parts, a bias gradient of several heads, rows, and samples whose
// columns all threads sweep. Exit status 0: nothing was reported, and every output was written.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "common/kernels.hpp"

namespace fg {

void* scratch_acquire(size_t bytes) { return ::operator new(bytes, std::align_val_t{64}); }
void scratch_release(void* block) noexcept { ::operator delete(block, std::align_val_t{64}); }

#define FG_DECLARE(kernel, ...) Kernel<__VA_ARGS__> kernel;
namespace ISA {
FG_ELEMENTWISE_KERNELS(FG_DECLARE)
FG_ATTENTION_KERNELS(FG_DECLARE)
}  // namespace ISA

namespace {

constexpr int THREADS = 3;
int failures = 0;

using Tensor = std::vector<float>;

Tensor noise(int64_t count) {
  Tensor t(static_cast<size_t>(count));
  for (size_t i = 0; i < t.size(); ++i) t[i] = static_cast<float>((i * 7919 + 13) % 211) / 64.0f - 1.5f;
  return t;
}
Tensor output(int64_t count) { return Tensor(static_cast<size_t>(count), NAN); }

void written(const char* kernel, const Tensor& t) {
  for (const float v : t)
    if (!std::isfinite(v)) {
      std::printf("%s left an element unwritten\n", kernel);
      ++failures;
      return;
    }
}

// [N, heads, rows, width], dense.
struct Dense {
  Strides to;
  Dense(const AttentionShape& s, int64_t rows, int64_t width) : to{s.heads * rows * width, rows * width, width, 1} {}
};

template <size_t N>
void set(Strides& to, const int64_t (&from)[N]) {
  std::memcpy(to, from, sizeof to);
}

// with_bias: a bias that all samples and heads share, and its gradient.
void attention(const AttentionShape& s, bool with_bias) {
  const int64_t heads = s.N * s.heads, of_q = heads * s.rows * s.d, of_k = heads * s.keys * s.d;
  const Dense q_strides(s, s.rows, s.d), k_strides(s, s.keys, s.d);  // dv is d here
  const Strides shared = {0, 0, s.keys, 1};
  const Tensor q = noise(of_q), k = noise(of_k), v = noise(of_k), dy = noise(of_q);
  const Tensor bias = noise(s.rows * s.keys);
  const float* bias_at = with_bias ? bias.data() : nullptr;
  Tensor y = output(of_q), lse = output(heads * s.rows), dq = output(of_q), dk = output(of_k), dv = output(of_k);
  Tensor dbias(bias.size(), 0.0f);  // added to

  AttentionForwardArgs f{q.data(), k.data(), v.data(), bias_at, y.data(), lse.data()};
  for (Strides* to : {&f.q_strides, &f.y_strides}) set(*to, q_strides.to);
  for (Strides* to : {&f.k_strides, &f.v_strides}) set(*to, k_strides.to);
  set(f.bias_strides, shared);
  ISA::attention_forward(s, f);
  written("attention_forward", y);
  written("attention_forward", lse);

  AttentionBackwardArgs b{dy.data(),
                          q.data(),
                          k.data(),
                          v.data(),
                          bias_at,
                          y.data(),
                          lse.data(),
                          dq.data(),
                          dk.data(),
                          dv.data(),
                          with_bias ? dbias.data() : nullptr};
  for (Strides* to : {&b.dy_strides, &b.q_strides, &b.y_strides, &b.dq_strides}) set(*to, q_strides.to);
  for (Strides* to : {&b.k_strides, &b.v_strides, &b.dk_strides, &b.dv_strides}) set(*to, k_strides.to);
  for (Strides* to : {&b.bias_strides, &b.dbias_strides}) set(*to, shared);
  ISA::attention_backward(s, b);
  for (const Tensor* t : {&dq, &dk, &dv, &dbias}) written("attention_backward", *t);

  Tensor d_dy = output(of_q), d_q = output(of_q), d_k = output(of_k), d_v = output(of_k);
  AttentionDoubleBackwardArgs d{dy.data(),   q.data(),   k.data(),   v.data(),   bias_at,
                                q.data(),    k.data(),   v.data(),   bias_at,    lse.data(),
                                d_dy.data(), d_q.data(), d_k.data(), d_v.data(), with_bias ? dbias.data() : nullptr};
  for (Strides* to : {&d.dy_strides, &d.ddq_strides, &d.q_strides, &d.d_dy_strides, &d.d_q_strides})
    set(*to, q_strides.to);
  for (Strides* to : {&d.ddk_strides, &d.ddv_strides, &d.k_strides, &d.v_strides, &d.d_k_strides, &d.d_v_strides})
    set(*to, k_strides.to);
  for (Strides* to : {&d.ddbias_strides, &d.bias_strides, &d.d_bias_strides}) set(*to, shared);
  ISA::attention_double_backward(s, d);
  for (const Tensor* t : {&d_dy, &d_q, &d_k, &d_v, &dbias}) written("attention_double_backward", *t);
}

void norm(const GnShape& s) {
  const int64_t count = s.N * s.C * s.HW, groups = s.N * s.groups;
  const Tensor x = noise(count), dy = noise(count), ddx = noise(count), weight = noise(s.C), bias = noise(s.C);
  Tensor mean = output(groups), var = output(groups), y = output(count), dx = output(count), d_x = output(count),
         d_dy = output(count), dweight = output(s.C), dbias = output(s.C), d_weight = output(s.C);
  ISA::gn_act_forward(s, {x.data(), weight.data(), bias.data(), mean.data(), var.data(), y.data()});
  ISA::gn_act_backward(s, {dy.data(), x.data(), weight.data(), bias.data(), mean.data(), var.data(), dx.data(),
                           dweight.data(), dbias.data()});
  ISA::gn_act_double_backward(s, {ddx.data(), weight.data(), bias.data(), dy.data(), x.data(), weight.data(),
                                  bias.data(), mean.data(), var.data(), d_dy.data(), d_x.data(), d_weight.data()});
  for (const Tensor* t : {&mean, &var, &y, &dx, &dweight, &dbias, &d_dy, &d_x, &d_weight}) written("gn_act", *t);
}

}  // namespace
}  // namespace fg

int main() {
  using namespace fg;
  // N, heads, rows, keys, d, dv
  attention({F32, 1, 1, 250, 70, 5, 5, false, 0.3f, THREADS}, false);  // one head in parts
  attention({F32, 1, 2, 130, 130, 8, 8, true, 0.3f, THREADS}, false);
  attention({F32, 2, 2, 130, 20, 5, 5, false, 0.3f, THREADS}, true);  // one job of all heads, in parts
  attention({F32, 2, 3, 20, 30, 8, 8, false, 0.3f, THREADS}, false);  // heads alone
  // N, C, HW, groups, channels_last
  norm({F32, 400, 128, 1, 1, false, 1e-5f, ACT_IDENTITY, 1.0f, THREADS});  // rows
  norm({F32, 4, 64, 200, 4, true, 1e-5f, ACT_LEAKY_RELU, 0.2f, THREADS});  // a sample's columns, by all threads
  norm({F32, 6, 32, 300, 4, false, 1e-5f, ACT_RELU, 0.0f, THREADS});       // planes
  return failures ? 1 : 0;
}
