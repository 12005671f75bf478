#include "cuda/adam.cuh"

#include <algorithm>

#include "cuda/launch.hpp"

namespace fg::cuda {

namespace {

bool vectors(const AdamTensor& t) {
  for (const void* p : {static_cast<const void*>(t.parameter), static_cast<const void*>(t.gradient),
                        static_cast<const void*>(t.exp_avg), static_cast<const void*>(t.exp_avg_sq),
                        static_cast<const void*>(t.average)})
    if (!aligned(p)) return false;
  return true;
}

AdamLerp lerp_by(double weight) {
  const bool near_to = weight >= 0.5;
  return {static_cast<float>(near_to ? weight - 1.0 : weight), near_to};
}

}  // namespace

int64_t adam(const AdamArgs& args, const Target& target) {
  constexpr auto op = "adam";
  AdamLaunch a{};
  a.lr_at = args.lr_at;
  a.lr = args.lr;
  a.ln_beta1 = static_cast<float>(args.ln_beta1);
  a.ln_beta2 = static_cast<float>(args.ln_beta2);
  a.beta2 = static_cast<float>(args.beta2);
  a.rest2 = static_cast<float>(1.0 - args.beta2);
  a.eps = args.eps;
  a.l2 = args.decoupled ? 0.0f : args.weight_decay;
  a.decoupled = args.decoupled ? args.weight_decay : 0.0f;
  a.sign = args.maximize ? -1.0f : 1.0f;
  a.first_moment = lerp_by(1.0 - args.beta1);
  a.average = lerp_by(args.weight);
  for (int64_t from = 0; from < args.tensors.count; from += ADAM_TENSORS) {
    const int count = static_cast<int>(std::min<int64_t>(ADAM_TENSORS, args.tensors.count - from));
    bool whole = true;
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) {
      const AdamTensor& t = args.tensors.first[from + i];
      a.tensors[i] = {t.parameter, t.gradient, t.exp_avg, t.exp_avg_sq, t.average, t.step, t.count};
      blocks += divide_up(t.count, ADAM_BLOCK);
      a.first[i + 1] = static_cast<int>(grid_of(op, blocks));
      whole = whole && vectors(t);
    }
    if (whole)
      FG_LAUNCH(FG_KERNEL(adam_kernel, 4), a.first[count], ADAM_THREADS, 0, target.stream, a);
    else
      FG_LAUNCH(FG_KERNEL(adam_kernel, 1), a.first[count], ADAM_THREADS, 0, target.stream, a);
    check_launch(op);
  }
  return 0;
}

}  // namespace fg::cuda
