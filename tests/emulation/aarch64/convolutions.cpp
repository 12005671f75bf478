// The portable table's three convolutions against sums in double, for a CPU on which no torch runs: `make arm` compiles
// this and csrc/cpu for aarch64 and runs it under qemu. Prints a line a case; the status is the number of failures.
//
// Errors are judged one by one as in tests/test_native_conv.py: with A the same sum over absolute values, J products in
// float32 err by about sqrt(J) roundings of A, and a bfloat16 result adds half a unit in its last place.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "common/bf16.hpp"
#include "common/kernels.hpp"
#include "dispatch.hpp"

using namespace fg;
using portable::bf16;
using Numbers = std::vector<double>;

// x [N][H][W][C], w [K][C / groups][R][S], y [N][OH][OW][K]: the layouts of kernels.hpp, w dense.
struct Case {
  ConvShape s;
  int64_t x_size() const { return s.N * s.H * s.W * s.C; }
  int64_t y_size() const { return s.N * s.OH * s.OW * s.K; }
  int64_t w_size() const { return s.K * (s.C / s.groups) * s.R * s.S; }

  // visit(index in x, in w, in y) of every product.
  template <class Visit>
  void products(const Visit& visit) const {
    const int64_t C = s.C / s.groups, K = s.K / s.groups;
    for (int64_t n = 0; n < s.N; ++n)
      for (int64_t oh = 0; oh < s.OH; ++oh)
        for (int64_t ow = 0; ow < s.OW; ++ow)
          for (int64_t k = 0; k < s.K; ++k)
            for (int64_t c = 0; c < C; ++c)
              for (int64_t r = 0; r < s.R; ++r)
                for (int64_t q = 0; q < s.S; ++q) {
                  const int64_t h = oh * s.stride_h - s.pad_h + r * s.dil_h,
                                w = ow * s.stride_w - s.pad_w + q * s.dil_w;
                  if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
                  visit(((n * s.H + h) * s.W + w) * s.C + k / K * C + c, ((k * C + c) * s.R + r) * s.S + q,
                        ((n * s.OH + oh) * s.OW + ow) * s.K + k);
                }
  }
};

// Values that float32 and bfloat16 both hold, so that only the arithmetic differs.
static Numbers random_numbers(int64_t count, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  Numbers v(static_cast<size_t>(count));
  for (double& a : v) a = portable::to_float(portable::to_bf16(normal(generator)));
  return v;
}

template <class T>
static std::vector<T> stored(const Numbers& v) {
  std::vector<T> out;
  for (double a : v) out.push_back(portable::from_float<T>(static_cast<float>(a)));
  return out;
}

// The worst error over its bound; above 1 is a failure.
template <class T>
static double worst(const std::vector<T>& got, const Numbers& want, const Numbers& absolute, int64_t terms) {
  double excess = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    double bound = std::ldexp(4 + 2 * std::sqrt(double(terms)), -23) * absolute[i] + 2e-7 * (1 + std::fabs(want[i]));
    if (sizeof(T) == 2) bound += std::ldexp(0.501, -7) * std::fabs(want[i]);
    const double error = std::fabs(portable::to_float(got[i]) - want[i]) / bound;
    excess = error <= excess ? excess : error;  // a NaN is kept
  }
  return excess;
}

template <class T>
static int check(const char* op, const Case& c, const std::vector<T>& got, const Numbers& want, const Numbers& absolute,
                 int64_t terms) {
  const double excess = worst(got, want, absolute, terms);
  const bool failed = !(excess <= 1);
  std::printf("%s %-16s %s N%d C%d %dx%d K%d %dx%d groups %d: %.2f of the bound\n", failed ? "FAILED" : "ok", op,
              sizeof(T) == 2 ? "bf16" : "fp32", int(c.s.N), int(c.s.C), int(c.s.H), int(c.s.W), int(c.s.K), int(c.s.R),
              int(c.s.S), int(c.s.groups), excess);
  return failed;
}

template <class T>
static int run(const Case& c, const Table& table) {
  std::mt19937 generator(1);
  const Numbers x = random_numbers(c.x_size(), generator), w = random_numbers(c.w_size(), generator),
                y = random_numbers(c.y_size(), generator);
  Numbers want_y(y.size()), want_x(x.size()), want_w(w.size()), abs_y(y.size()), abs_x(x.size()), abs_w(w.size());
  c.products([&](int64_t i, int64_t j, int64_t k) {
    want_y[k] += x[i] * w[j], abs_y[k] += std::fabs(x[i] * w[j]);
    want_x[i] += y[k] * w[j], abs_x[i] += std::fabs(y[k] * w[j]);
    want_w[j] += x[i] * y[k], abs_w[j] += std::fabs(x[i] * y[k]);
  });
  const std::vector<T> tx = stored<T>(x), tw = stored<T>(w), ty = stored<T>(y);
  const T nan = portable::from_float<T>(NAN);
  std::vector<T> got_y(y.size(), nan), got_x(x.size(), nan), got_w(w.size(), nan);
  const DType dtype = sizeof(T) == 2 ? BF16 : F32;
  const int64_t per_group = c.s.C / c.s.groups, strides[4] = {per_group * c.s.R * c.s.S, c.s.R * c.s.S, c.s.S, 1};
  const int64_t taps = c.s.R * c.s.S;

  Conv2dArgs forward = {};
  forward.dtype = forward.w_dtype = dtype;
  forward.x = tx.data(), forward.w = tw.data(), forward.y = got_y.data(), forward.threads = 2;
  ConvTranspose2dArgs adjoint = {};
  adjoint.dtype = adjoint.w_dtype = dtype;
  adjoint.y = ty.data(), adjoint.w = tw.data(), adjoint.x = got_x.data(), adjoint.threads = 2;
  Conv2dWeightArgs weight = {};
  weight.dtype = weight.dw_dtype = dtype;
  weight.x = tx.data(), weight.dy = ty.data(), weight.dw = got_w.data(), weight.threads = 2;
  for (int i = 0; i < 4; ++i) forward.w_strides[i] = adjoint.w_strides[i] = weight.dw_strides[i] = strides[i];
  table.conv2d(c.s, forward);
  table.conv_transpose2d(c.s, adjoint);
  table.conv2d_weight(c.s, weight);
  return check("conv2d", c, got_y, want_y, abs_y, taps * per_group) +
         check("conv_transpose2d", c, got_x, want_x, abs_x, taps * c.s.K / c.s.groups) +
         check("conv2d_weight", c, got_w, want_w, abs_w, c.s.N * c.s.OH * c.s.OW);
}

int main() {
  // N, C, H, W, K, OH, OW, R, S, strides, paddings, dilations, groups.
  const Case cases[] = {
      {{2, 3, 16, 16, 20, 8, 8, 4, 4, 2, 2, 1, 1, 1, 1, 1}},     // an image
      {{3, 33, 4, 4, 7, 1, 1, 4, 4, 1, 1, 0, 0, 1, 1, 1}},       // odd channels, one output pixel
      {{9, 32, 17, 15, 48, 8, 7, 4, 4, 2, 2, 1, 1, 1, 1, 1}},    // minimal filtering in float32
      {{5, 48, 11, 12, 32, 11, 12, 3, 3, 1, 1, 1, 1, 1, 1, 1}},  // and of three taps
      {{3, 40, 5, 6, 1, 2, 3, 4, 4, 1, 1, 0, 0, 1, 1, 1}},       // logits: the dot-product form
      {{2, 17, 13, 12, 5, 6, 5, 3, 4, 2, 3, 2, 3, 2, 2, 1}},     // strides, paddings and dilation all different
      {{3, 15, 6, 5, 10, 3, 3, 3, 3, 2, 2, 1, 1, 1, 1, 5}},      // groups
  };
  const Table& table = *candidates()->table;
  int failures = 0;
  for (const Case& c : cases) failures += run<float>(c, table) + run<bf16>(c, table);
  std::printf("%s table: %d failures\n", table.name, failures);
  return failures;
}
