#include "cuda/upfirdn2d.cuh"

#include <algorithm>
#include <cstdlib>

#include "cuda/kernels.hpp"
#include "cuda/launch.hpp"

namespace fg::cuda {

int64_t upfirdn2d(const Upfirdn2dArgs& a, const Target& target) {
  constexpr auto op = "upfirdn2d";
  const int64_t reach = std::max({a.OH * a.down_y, a.OW * a.down_x, a.H * a.up_y, a.W * a.up_x});
  if (reach + std::max({std::abs(a.pad_y), std::abs(a.pad_x), a.KH, a.KW}) > INT32_MAX / 2)
    throw std::invalid_argument(std::string(op) + ": an axis with its zeros and padding must be below 2^30 long, got " +
                                std::to_string(reach));
  const auto axis = [](auto... v) { return FirAxis{static_cast<int>(v)...}; };
  const Upfirdn u{axis(a.H, a.OH, a.KH, a.up_y, a.down_y, a.pad_y),
                  axis(a.W, a.OW, a.KW, a.up_x, a.down_x, a.pad_x),
                  static_cast<int>(a.C),
                  a.N * a.C * a.OH * a.OW,
                  a.separable,
                  a.flip,
                  a.channels_last,
                  a.gain};
  by_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    FG_LAUNCH(FG_KERNEL(upfirdn2d_kernel, T), grid_of(op, divide_up(u.outputs, UPFIRDN_THREADS)), UPFIRDN_THREADS, 0,
              target.stream, u, static_cast<const T*>(a.x), a.f, static_cast<T*>(a.y));
  });
  check_launch(op);
  return 0;
}

}  // namespace fg::cuda
