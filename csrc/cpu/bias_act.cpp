// y = gain act(x + bias) within ±clamp, and its gradient from the output: dx = dy gain act'(y / gain), 0 where the
// clamp holds y, dbias = Σ dx per channel.
#include <limits>
#include <type_traits>

#include "common/kernels.hpp"
#include "common/scratch.hpp"
#include "cpu/activation.hpp"
#include "cpu/sweep.hpp"

namespace fg::ISA {
namespace {

// The gain 1 and no clamp of most calls.
template <Act ACT>
struct Plain {
  float slope;
  explicit Plain(const BiasActShape& s) : slope(s.slope) {}
  FG_INLINE_MEMBER vf value(vf v) const { return activate<ACT>(v, slope); }
  FG_INLINE_MEMBER vf gradient(vf g, vf y) const { return activate_gradient<ACT>(g, y, slope); }
};

// Any activation, by one call for each vector. An instance for each activation would double this file's compile time,
// and the call costs a tenth of an exp.
__attribute__((noinline)) vf any_value(vf v, Act act, float slope) {
  vf y = v;
  by_act(act, [&]<Act ACT>() { y = activate<ACT>(v, slope); });
  return y;
}
__attribute__((noinline)) vf any_gradient(vf g, vf y, Act act, float slope) {
  vf dx = g;
  by_act(act, [&]<Act ACT>() { dx = activate_gradient<ACT>(g, y, slope); });
  return dx;
}

// With gain and clamp. StyleGAN's leaky_relu is inlined.
template <bool LEAKY>
struct Scaled {
  Act act;
  float slope, gain, limit, inverse_gain;
  explicit Scaled(const BiasActShape& s)
      : act(LEAKY ? ACT_LEAKY_RELU : s.act),
        slope(s.slope),
        gain(s.gain),
        limit(s.clamp < 0.0f ? std::numeric_limits<float>::quiet_NaN() : s.clamp),  // NaN: no clamp
        inverse_gain(1.0f / s.gain) {}

  FG_INLINE_MEMBER vf phi(vf v) const {
    if constexpr (LEAKY) return activate<ACT_LEAKY_RELU>(v, slope);
    return any_value(v, act, slope);
  }
  FG_INLINE_MEMBER vf value(vf v) const {
    v = phi(v) * set1(gain);
    v = select(gt(v, set1(limit)), set1(limit), v);
    return select(gt(set1(-limit), v), set1(-limit), v);
  }
  FG_INLINE_MEMBER vf gradient(vf g, vf y) const {
    const bool input = !LEAKY && act >= ACT_SWISH;  // those whose backward reads x + bias
    const vf out = input ? phi(y) * set1(gain) : y, u = input ? y : y * set1(inverse_gain);
    g = g * set1(gain);
    const vf dx = LEAKY ? activate_gradient<ACT_LEAKY_RELU>(g, u, slope) : any_gradient(g, u, act, slope);
    return select(le(set1(limit), abs(out)), zero(), dx);
  }
};

template <class T, class Form>
struct ForwardBody {
  static constexpr int COEFS = 1, SUMS = 0;
  const T* x;
  T* y;
  Form form;
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf*) const {
    lane.store(y, form.value(lane.load(x) + k[0]));
  }
};

template <class T, class Form, bool READS, bool SUM>
struct BackwardBody {
  static constexpr int COEFS = 0, SUMS = SUM ? 1 : 0;
  const T *dy, *y;
  T* dx;
  Form form;
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf*, vf* s) const {
    vf g = lane.load(dy);
    if constexpr (READS) g = form.gradient(g, lane.load(y));
    if (dx) lane.store(dx, g);
    if constexpr (SUM) s[0] = s[0] + g;
  }
};

template <class T, class Form>
void forward(const BiasActShape& shape, const BiasActForwardArgs& args) {
  const Grid grid(shape.N, shape.C, shape.HW, 1, shape.channels_last);
  if (grid.empty()) return;
  const ForwardBody<T, Form> body{static_cast<const T*>(args.x), static_cast<T*>(args.y), Form(shape)};
  const int threads = team_for(grid.elements(), shape.threads);
  const Scratch<float> memory(grid.padded);
  float* coef = memory.data;
  for (int64_t j = 0; j < grid.padded; ++j) coef[j] = 0.0f;
  // -0 is what leaves every x, -0 included, as it is.
  for (int64_t c = 0; c < grid.C; ++c) put(grid, coef, 0, c, args.bias ? args.bias[c] : -0.0f);
#pragma omp parallel num_threads(threads)
  sweep_elementwise(grid, Share(grid, thread_index(), team_size()), 0, body, coef, false);
}

template <class T, class Form>
void backward(const BiasActShape& shape, const BiasActBackwardArgs& args) {
  const Grid grid(shape.N, shape.C, shape.HW, 1, shape.channels_last);
  if (grid.empty()) {
    if (args.dbias)
      for (int64_t c = 0; c < shape.C; ++c) args.dbias[c] = 0.0f;
    return;
  }
  const T *dy = static_cast<const T*>(args.dy), *y = static_cast<const T*>(args.y);
  T* dx = static_cast<T*>(args.dx);
  constexpr bool READS = !std::is_same_v<Form, Plain<ACT_IDENTITY>>;
  const int threads = team_for(grid.elements(), shape.threads);
  if (!args.dbias) {
    const BackwardBody<T, Form, READS, false> body{dy, y, dx, Form(shape)};
    const int64_t elements = grid.elements();
#pragma omp parallel num_threads(threads)
    sweep_flat(part_begin(elements, thread_index(), team_size()), part_begin(elements, thread_index() + 1, team_size()),
               body);
    return;
  }
  const BackwardBody<T, Form, READS, true> body{dy, y, dx, Form(shape)};
  float* own;
  double* sums;
  const ScratchArrays memory(Array(own, threads * grid.padded), Array(sums, Partials<1>::count(grid, threads)));
#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size();
    const Share share(grid, thread, team);
    const Partials<1> partials{sums, grid.padded, share.slots};
    sweep_sums(grid, share, 0, body, nullptr, own + thread * grid.padded, partials);
#pragma omp barrier
    for (int64_t c = part_begin(grid.C, thread, team); c < part_begin(grid.C, thread + 1, team); ++c) {
      double total[1];
      partials.total(grid, 0, c, total);
      args.dbias[c] = static_cast<float>(total[0]);
    }
  }
}

// f<Form>() of the shape. Identity is leaky_relu with slope 1, to the bit.
template <class F>
void by_form(BiasActShape shape, const F& f) {
  if (shape.act == ACT_IDENTITY) {
    shape.act = ACT_LEAKY_RELU;
    shape.slope = 1.0f;
  }
  if (shape.gain == 1.0f && shape.clamp < 0.0f) {
    switch (shape.act) {
      case ACT_LEAKY_RELU:
        return f.template operator()<Plain<ACT_LEAKY_RELU>>(shape);
      case ACT_RELU:
        return f.template operator()<Plain<ACT_RELU>>(shape);
      case ACT_TANH:
        return f.template operator()<Plain<ACT_TANH>>(shape);
      case ACT_SIGMOID:
        return f.template operator()<Plain<ACT_SIGMOID>>(shape);
      case ACT_SWISH:
        return f.template operator()<Plain<ACT_SWISH>>(shape);
      default:
        break;
    }
  }
  shape.act == ACT_LEAKY_RELU ? f.template operator()<Scaled<true>>(shape)
                              : f.template operator()<Scaled<false>>(shape);
}

}  // namespace

void bias_act_forward(const BiasActShape& shape, const BiasActForwardArgs& args) {
  by_form(shape, [&]<class Form>(const BiasActShape& s) {
    s.dtype == BF16 ? forward<bf16, Form>(s, args) : forward<float, Form>(s, args);
  });
}

void bias_act_backward(const BiasActShape& shape, const BiasActBackwardArgs& args) {
  const auto run = [&]<class Form>(const BiasActShape& s) {
    s.dtype == BF16 ? backward<bf16, Form>(s, args) : backward<float, Form>(s, args);
  };
  if (shape.act == ACT_IDENTITY && shape.gain == 1.0f && shape.clamp < 0.0f)
    return run.template operator()<Plain<ACT_IDENTITY>>(shape);  // does not read y
  by_form(shape, run);
}

}  // namespace fg::ISA
