#include "cuda/gan_loss.cuh"

#include <algorithm>

#include "cuda/launch.hpp"

namespace fg::cuda {
namespace {

// A block for every 2048 logits, at most 256: the usual batch is one block, one launch.
int64_t blocks_for(const GanLossShape& s) {
  return std::clamp<int64_t>(divide_up(std::max(s.n_fake, s.n_real), 8 * LOSS_THREADS), 1, 256);
}

template <class T>
GanLogits<T> logits_of(const GanLossShape& s, const void* fake, const void* real) {
  return {static_cast<const T*>(fake), static_cast<const T*>(real), s.n_fake, s.n_real, s.kind, s.side, s.smoothing};
}

}  // namespace

int64_t gan_loss_forward(const GanLossShape& s, const GanLossForwardArgs& a, const Target& target) {
  constexpr auto op = "gan_loss_forward";
  const int64_t blocks = blocks_for(s);
  auto* partials = static_cast<float*>(target.workspace);
  if (blocks > 1 && !partials) return 8 * blocks * int64_t{sizeof(float)};
  by_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    FG_LAUNCH(FG_KERNEL(gan_loss_forward_kernel, T), grid_of(op, blocks), LOSS_THREADS, 0, target.stream,
              logits_of<T>(s, a.fake, a.real), partials, a.loss, a.statistics);
    check_launch(op);
    if (blocks == 1) return;
    FG_LAUNCH(FG_KERNEL(gan_loss_finish_kernel, T), 1, LOSS_THREADS, 0, target.stream, logits_of<T>(s, a.fake, a.real),
              partials, static_cast<int>(blocks), a.loss, a.statistics);
    check_launch(op);
  });
  return 0;
}

int64_t gan_loss_backward(const GanLossShape& s, const GanLossBackwardArgs& a, const Target& target) {
  constexpr auto op = "gan_loss_backward";
  by_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    FG_LAUNCH(FG_KERNEL(gan_loss_backward_kernel, T), grid_of(op, blocks_for(s)), LOSS_THREADS, 0, target.stream,
              logits_of<T>(s, a.fake, a.real), a.dloss, static_cast<T*>(a.dfake), static_cast<T*>(a.dreal));
    check_launch(op);
  });
  return 0;
}

int64_t gan_loss_double_backward(const GanLossShape& s, const GanLossDoubleBackwardArgs& a, const Target& target) {
  constexpr auto op = "gan_loss_double_backward";
  const int64_t blocks = blocks_for(s);
  auto* partials = static_cast<float*>(target.workspace);
  if (blocks > 1 && !partials) return blocks * int64_t{sizeof(float)};
  by_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    FG_LAUNCH(FG_KERNEL(gan_loss_double_backward_kernel, T), grid_of(op, blocks), LOSS_THREADS, 0, target.stream,
              logits_of<T>(s, a.fake, a.real), static_cast<const T*>(a.ddfake), static_cast<const T*>(a.ddreal),
              a.dloss, partials, a.d_dloss, static_cast<T*>(a.d_fake), static_cast<T*>(a.d_real));
    check_launch(op);
  });
  if (blocks > 1) {
    FG_LAUNCH(FG_KERNEL(gan_loss_double_backward_finish_kernel), 1, LOSS_THREADS, 0, target.stream, partials,
              static_cast<int>(blocks), a.d_dloss);
    check_launch(op);
  }
  return 0;
}

}  // namespace fg::cuda
