// y = act(x + bias) and its gradient from the output: dx = dy act'(y), dbias = Σ dx per channel.
#include "common/kernels.hpp"
#include "common/scratch.hpp"
#include "cpu/activation.hpp"
#include "cpu/sweep.hpp"

namespace fg::ISA {
namespace {

template <class T, Act ACT>
struct ForwardBody {
  static constexpr int COEFS = 1, SUMS = 0;
  const T* x;
  T* y;
  float slope;
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf* k, vf*) const {
    lane.store(y, activate<ACT>(lane.load(x) + k[0], slope));
  }
};

template <class T, Act ACT, bool SUM>
struct BackwardBody {
  static constexpr int COEFS = 0, SUMS = SUM ? 1 : 0;
  const T *dy, *y;
  T* dx;
  float slope;
  template <class Lane>
  FG_INLINE_MEMBER void operator()(Lane lane, const vf*, vf* s) const {
    const vf g = ACT == ACT_IDENTITY ? lane.load(dy) : activate_gradient<ACT>(lane.load(dy), lane.load(y), slope);
    if (dx) lane.store(dx, g);
    if constexpr (SUM) s[0] = s[0] + g;
  }
};

template <class T, Act ACT>
void forward(const BiasActShape& shape, const BiasActForwardArgs& args) {
  const Grid grid(shape.N, shape.C, shape.HW, 1, shape.channels_last);
  if (grid.empty()) return;
  const ForwardBody<T, ACT> body{static_cast<const T*>(args.x), static_cast<T*>(args.y), shape.slope};
  const int threads = team_for(grid.elements(), shape.threads);
  const Scratch<float> memory(grid.padded);
  float* coef = memory.data;
  for (int64_t j = 0; j < grid.padded; ++j) coef[j] = 0.0f;
  // -0 is what leaves every x, -0 included, as it is.
  for (int64_t c = 0; c < grid.C; ++c) put(grid, coef, 0, c, args.bias ? args.bias[c] : -0.0f);
#pragma omp parallel num_threads(threads)
  sweep_elementwise(grid, Share(grid, thread_index(), team_size()), 0, body, coef, false);
}

template <class T, Act ACT>
void backward(const BiasActShape& shape, const BiasActBackwardArgs& args) {
  const Grid grid(shape.N, shape.C, shape.HW, 1, shape.channels_last);
  if (grid.empty()) {
    if (args.dbias)
      for (int64_t c = 0; c < shape.C; ++c) args.dbias[c] = 0.0f;
    return;
  }
  const T *dy = static_cast<const T*>(args.dy), *y = static_cast<const T*>(args.y);
  T* dx = static_cast<T*>(args.dx);
  const int threads = team_for(grid.elements(), shape.threads);
  if (!args.dbias) {
    const BackwardBody<T, ACT, false> body{dy, y, dx, shape.slope};
#pragma omp parallel num_threads(threads)
    sweep_elementwise(grid, Share(grid, thread_index(), team_size()), 0, body, nullptr, false);
    return;
  }
  const BackwardBody<T, ACT, true> body{dy, y, dx, shape.slope};
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

template <class T>
void forward_by_act(const BiasActShape& shape, const BiasActForwardArgs& args) {
  BiasActShape as_leaky = shape;
  as_leaky.slope = 1.0f;
  switch (shape.act) {
    case ACT_RELU:
      return forward<T, ACT_RELU>(shape, args);
    case ACT_LEAKY_RELU:
      return forward<T, ACT_LEAKY_RELU>(shape, args);
    case ACT_TANH:
      return forward<T, ACT_TANH>(shape, args);
    case ACT_SIGMOID:
      return forward<T, ACT_SIGMOID>(shape, args);
    case ACT_IDENTITY:  // leaky_relu with slope 1, to the bit
      return forward<T, ACT_LEAKY_RELU>(as_leaky, args);
  }
}

template <class T>
void backward_by_act(const BiasActShape& shape, const BiasActBackwardArgs& args) {
  switch (shape.act) {
    case ACT_RELU:
      return backward<T, ACT_RELU>(shape, args);
    case ACT_LEAKY_RELU:
      return backward<T, ACT_LEAKY_RELU>(shape, args);
    case ACT_TANH:
      return backward<T, ACT_TANH>(shape, args);
    case ACT_SIGMOID:
      return backward<T, ACT_SIGMOID>(shape, args);
    case ACT_IDENTITY:  // does not read y
      return backward<T, ACT_IDENTITY>(shape, args);
  }
}

}  // namespace

void bias_act_forward(const BiasActShape& shape, const BiasActForwardArgs& args) {
  shape.dtype == BF16 ? forward_by_act<bf16>(shape, args) : forward_by_act<float>(shape, args);
}

void bias_act_backward(const BiasActShape& shape, const BiasActBackwardArgs& args) {
  shape.dtype == BF16 ? backward_by_act<bf16>(shape, args) : backward_by_act<float>(shape, args);
}

}  // namespace fg::ISA
