// y = gain act(x + bias) within ±clamp, and its gradient from the output: dx = dy gain act'(y / gain), 0 where the
// clamp holds y, dbias = Σ dx per channel.
#include <limits>

#include "common/kernels.hpp"
#include "common/scratch.hpp"
#include "cpu/activation.hpp"
#include "cpu/sweep.hpp"

namespace fg::ISA {
namespace {

// What gain and clamp make of an activation. PLAIN: gain 1, no clamp, and no instruction for them.
template <Act ACT, bool PLAIN>
struct Phi {
  float slope, gain, limit, inverse_gain;
  explicit Phi(const BiasActShape& s)
      : slope(s.slope),
        gain(s.gain),
        limit(s.clamp < 0.0f ? std::numeric_limits<float>::quiet_NaN() : s.clamp),  // exceeded by nothing
        inverse_gain(1.0f / s.gain) {}

  FG_INLINE_MEMBER vf value(vf v) const {
    v = activate<ACT>(v, slope);
    if constexpr (PLAIN) return v;
    v = v * set1(gain);
    v = select(gt(v, set1(limit)), set1(limit), v);
    return select(gt(set1(-limit), v), set1(-limit), v);
  }
  FG_INLINE_MEMBER vf gradient(vf g, vf y) const {
    if constexpr (PLAIN) return activate_gradient<ACT>(g, y, slope);
    const vf out = ACT == ACT_SWISH ? activate<ACT>(y, slope) * set1(gain) : y;
    const vf u = ACT == ACT_SWISH ? y : y * set1(inverse_gain);
    const vf dx = activate_gradient<ACT>(g * set1(gain), u, slope);
    return select(le(set1(limit), abs(out)), zero(), dx);
  }
};

template <class T, class Act>
struct ForwardBody {
  static constexpr int COEFS = 1, SUMS = 0;
  const T* x;
  T* y;
  Act act;
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf*) const {
    lane.store(y, act.value(lane.load(x) + k[0]));
  }
};

template <class T, class Act, bool READS, bool SUM>
struct BackwardBody {
  static constexpr int COEFS = 0, SUMS = SUM ? 1 : 0;
  const T *dy, *y;
  T* dx;
  Act act;
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf*, vf* s) const {
    vf g = lane.load(dy);
    if constexpr (READS) g = act.gradient(g, lane.load(y));
    if (dx) lane.store(dx, g);
    if constexpr (SUM) s[0] = s[0] + g;
  }
};

template <class T, Act ACT, bool PLAIN>
void forward(const BiasActShape& shape, const BiasActForwardArgs& args) {
  const Grid grid(shape.N, shape.C, shape.HW, 1, shape.channels_last);
  if (grid.empty()) return;
  using Form = Phi<ACT, PLAIN>;
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

template <class T, Act ACT, bool PLAIN>
void backward(const BiasActShape& shape, const BiasActBackwardArgs& args) {
  const Grid grid(shape.N, shape.C, shape.HW, 1, shape.channels_last);
  if (grid.empty()) {
    if (args.dbias)
      for (int64_t c = 0; c < shape.C; ++c) args.dbias[c] = 0.0f;
    return;
  }
  const T *dy = static_cast<const T*>(args.dy), *y = static_cast<const T*>(args.y);
  T* dx = static_cast<T*>(args.dx);
  using Form = Phi<ACT, PLAIN>;
  constexpr bool READS = ACT != ACT_IDENTITY;
  const int threads = team_for(grid.elements(), shape.threads);
  if (!args.dbias) {
    const BackwardBody<T, Form, READS, false> body{dy, y, dx, Form(shape)};
#pragma omp parallel num_threads(threads)
    sweep_elementwise(grid, Share(grid, thread_index(), team_size()), 0, body, nullptr, false);
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

bool is_plain(const BiasActShape& s) { return s.gain == 1.0f && s.clamp < 0.0f; }

// f<ACT>() of the activation at run time. Identity is leaky_relu with slope 1, to the bit.
template <class F>
void by_act(const BiasActShape& shape, const F& f) {
  switch (shape.act) {
    case ACT_RELU:
      return f.template operator()<ACT_RELU>(shape);
    case ACT_TANH:
      return f.template operator()<ACT_TANH>(shape);
    case ACT_SIGMOID:
      return f.template operator()<ACT_SIGMOID>(shape);
    case ACT_ELU:
      return f.template operator()<ACT_ELU>(shape);
    case ACT_SELU:
      return f.template operator()<ACT_SELU>(shape);
    case ACT_SOFTPLUS:
      return f.template operator()<ACT_SOFTPLUS>(shape);
    case ACT_SWISH:
      return f.template operator()<ACT_SWISH>(shape);
    case ACT_LEAKY_RELU:
      return f.template operator()<ACT_LEAKY_RELU>(shape);
    case ACT_IDENTITY:
      BiasActShape as_leaky = shape;
      as_leaky.slope = 1.0f;
      return f.template operator()<ACT_LEAKY_RELU>(as_leaky);
  }
}

template <class T>
void forward_by_act(const BiasActShape& shape, const BiasActForwardArgs& args) {
  by_act(shape, [&]<Act ACT>(const BiasActShape& s) {
    is_plain(s) ? forward<T, ACT, true>(s, args) : forward<T, ACT, false>(s, args);
  });
}

template <class T>
void backward_by_act(const BiasActShape& shape, const BiasActBackwardArgs& args) {
  // the plain identity does not read y
  if (shape.act == ACT_IDENTITY && is_plain(shape)) return backward<T, ACT_IDENTITY, true>(shape, args);
  by_act(shape, [&]<Act ACT>(const BiasActShape& s) {
    is_plain(s) ? backward<T, ACT, true>(s, args) : backward<T, ACT, false>(s, args);
  });
}

}  // namespace

void bias_act_forward(const BiasActShape& shape, const BiasActForwardArgs& args) {
  shape.dtype == BF16 ? forward_by_act<bf16>(shape, args) : forward_by_act<float>(shape, args);
}

void bias_act_backward(const BiasActShape& shape, const BiasActBackwardArgs& args) {
  shape.dtype == BF16 ? backward_by_act<bf16>(shape, args) : backward_by_act<float>(shape, args);
}

}  // namespace fg::ISA
