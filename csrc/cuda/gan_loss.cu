#include "cuda/gan_loss.cuh"

#include <algorithm>

#include "cuda/launch.hpp"

namespace fg::cuda {
namespace {

// A block for every 2048 logits, at most 256: the usual batch is one block, one launch.
int64_t blocks_for(const GanLossArgs& a) {
  return std::clamp<int64_t>(divide_up(std::max(a.n_fake, a.n_real), 8 * LOSS_THREADS), 1, 256);
}

template <class T>
GanLogits<T> logits_of(const GanLossArgs& a) {
  return {
      static_cast<const T*>(a.fake), static_cast<const T*>(a.real), a.n_fake, a.n_real, a.kind, a.side, a.smoothing};
}

}  // namespace

int64_t gan_loss_forward(const GanLossArgs& a, const Target& target) {
  constexpr auto op = "gan_loss_forward";
  const int64_t blocks = blocks_for(a);
  auto* partials = static_cast<float*>(target.workspace);
  if (blocks > 1 && !partials) return 8 * blocks * int64_t{sizeof(float)};
  by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    FG_LAUNCH(gan_loss_forward_kernel<T>, grid_of(op, blocks), LOSS_THREADS, 0, target.stream, logits_of<T>(a),
              partials, a.loss, a.statistics);
    check_launch(op);
    if (blocks == 1) return;
    FG_LAUNCH(gan_loss_finish_kernel<T>, 1, LOSS_THREADS, 0, target.stream, logits_of<T>(a), partials,
              static_cast<int>(blocks), a.loss, a.statistics);
    check_launch(op);
  });
  return 0;
}

int64_t gan_loss_backward(const GanLossArgs& a, const Target& target) {
  constexpr auto op = "gan_loss_backward";
  by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    FG_LAUNCH(gan_loss_backward_kernel<T>, grid_of(op, blocks_for(a)), LOSS_THREADS, 0, target.stream, logits_of<T>(a),
              a.dloss, static_cast<T*>(a.dfake), static_cast<T*>(a.dreal));
    check_launch(op);
  });
  return 0;
}

int64_t gan_loss_double_backward(const GanLossArgs& a, const Target& target) {
  constexpr auto op = "gan_loss_double_backward";
  const int64_t blocks = blocks_for(a);
  auto* partials = static_cast<float*>(target.workspace);
  if (blocks > 1 && !partials) return blocks * int64_t{sizeof(float)};
  by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    FG_LAUNCH(gan_loss_double_backward_kernel<T>, grid_of(op, blocks), LOSS_THREADS, 0, target.stream, logits_of<T>(a),
              static_cast<const T*>(a.ddfake), static_cast<const T*>(a.ddreal), a.dloss, partials, a.d_dloss,
              static_cast<T*>(a.dfake), static_cast<T*>(a.dreal));
    check_launch(op);
  });
  if (blocks > 1) {
    FG_LAUNCH(gan_loss_double_backward_finish_kernel, 1, LOSS_THREADS, 0, target.stream, partials,
              static_cast<int>(blocks), a.d_dloss);
    check_launch(op);
  }
  return 0;
}

}  // namespace fg::cuda
