// Launchers of attention and its derivatives: how many parts of 64 elements a head has, and the row sums' workspace.
#include "cuda/attention.cuh"

#include <algorithm>

#include "cuda/kernels.hpp"
#include "cuda/launch.hpp"

namespace fg::cuda {
namespace {

int element_size(DType dtype) { return dtype == F32 ? 4 : 2; }

// What the kernels' tensors have in common.
struct Layout {
  const AttentionShape& s;

  // `width` elements a row. An absent tensor's data is `any`: it is never read.
  Heads heads(const void* data, const Strides& strides, int64_t width, const void* any) const {
    const int chunk = 16 / element_size(s.dtype);
    const bool whole = width % chunk == 0 && strides[0] % chunk == 0 && strides[1] % chunk == 0 &&
                       strides[2] % chunk == 0 && aligned(data);
    return {const_cast<void*>(data ? data : any), strides[0], strides[1], strides[2], data && whole, data != nullptr};
  }
  Heads of_d(const void* data, const Strides& strides, const void* any = nullptr) const {
    return heads(data, strides, s.d, any);
  }
  Heads of_dv(const void* data, const Strides& strides, const void* any = nullptr) const {
    return heads(data, strides, s.dv, any);
  }
  static HeadSquares squares(const float* data, const Strides& strides) {
    return {const_cast<float*>(data), strides[0], strides[1], strides[2]};
  }
  AttentionSizes sizes() const {
    return {static_cast<int>(s.heads),
            static_cast<int>(s.rows),
            static_cast<int>(s.keys),
            static_cast<int>(s.d),
            static_cast<int>(s.dv),
            s.causal,
            s.scale};
  }
};

// longest: of heads. The double backward's four squares of scores leave no registers for the outputs of longer ones.
void check_shape(const char* op, const AttentionShape& s, int64_t longest = 4 * SIDE) {
  for (int64_t count : {s.rows, s.keys})
    if (count >= int64_t{1} << 30)
      throw std::invalid_argument(std::string(op) + ": rows and keys must be below 2^30, got " + std::to_string(count));
  if (std::max(s.d, s.dv) > longest)
    throw std::invalid_argument(std::string(op) + ": heads must have at most " + std::to_string(longest) +
                                " elements, got " + std::to_string(std::max(s.d, s.dv)));
}

// Calls f with a value of the dtype's type and the parts of the widest head as a type: 1, 2 or, but for the double
// backward, 4.
template <bool DOUBLE, class F>
void by_parts(const AttentionShape& s, const F& f) {
  const int parts = tiles_of(static_cast<int>(std::max(s.d, s.dv)));
  by_dtype(s.dtype, [&](auto zero) {
    constexpr int MOST = DOUBLE ? 2 : 4;
    if (parts == 1) return f(zero, std::integral_constant<int, 1>{});
    if (parts == 2) return f(zero, std::integral_constant<int, 2>{});
    return f(zero, std::integral_constant<int, MOST>{});
  });
}

int64_t row_floats(const AttentionShape& s) { return s.N * s.heads * s.rows; }

}  // namespace

// One launch over the tiles of `count` rows or keys of every head; own: tiles that a block keeps of its operands.
#define FG_LAUNCH_ATTENTION(op, kernel, count, own, is_double, arguments)                             \
  by_parts<is_double>(s, [&](auto zero, auto parts) {                                                 \
    using T = decltype(zero);                                                                         \
    constexpr int PARTS = decltype(parts)::value;                                                     \
    const size_t bytes = shared_tiles<T>(own) * SQUARE * sizeof(T);                                   \
    FG_ALLOW_SHARED(FG_KERNEL(kernel, T, PARTS), bytes);                                              \
    const unsigned grid = grid_of(op, s.N * s.heads * divide_up(count, SIDE));                        \
    FG_LAUNCH(FG_KERNEL(kernel, T, PARTS), grid, ATTENTION_THREADS, bytes, target.stream, arguments); \
    check_launch(op);                                                                                 \
  })

int64_t attention_forward(const AttentionShape& s, const AttentionForwardArgs& a, const Target& target) {
  constexpr auto op = "attention_forward";
  check_shape(op, s);
  const Layout l{s};
  const AttentionForward f{l.sizes(),
                           l.of_d(a.q, a.q_strides),
                           l.of_d(a.k, a.k_strides),
                           l.of_dv(a.v, a.v_strides),
                           l.of_dv(a.y, a.y_strides),
                           l.squares(a.bias, a.bias_strides),
                           a.lse};
  FG_LAUNCH_ATTENTION(op, attention_forward_kernel, s.rows, tiles_of(f.sizes.d), false, f);
  return 0;
}

int64_t attention_backward(const AttentionShape& s, const AttentionBackwardArgs& a, const Target& target) {
  constexpr auto op = "attention_backward";
  check_shape(op, s);
  if (!target.workspace) return row_floats(s) * static_cast<int64_t>(sizeof(float));
  const Layout l{s};
  const AttentionBackward f{l.sizes(),
                            l.of_dv(a.dy, a.dy_strides),
                            l.of_d(a.q, a.q_strides),
                            l.of_d(a.k, a.k_strides),
                            l.of_dv(a.v, a.v_strides),
                            l.of_dv(a.y, a.y_strides),
                            l.of_d(a.dq, a.dq_strides),
                            l.of_d(a.dk, a.dk_strides),
                            l.of_dv(a.dv_out, a.dv_strides),
                            l.squares(a.bias, a.bias_strides),
                            l.squares(a.dbias, a.dbias_strides),
                            a.lse,
                            static_cast<float*>(target.workspace)};
  const int of_d = tiles_of(f.sizes.d), of_dv = tiles_of(f.sizes.dv);
  FG_LAUNCH_ATTENTION(op, attention_rows_kernel, s.rows, of_d + of_dv, false, f);
  FG_LAUNCH_ATTENTION(op, attention_keys_kernel, s.keys, of_d + of_dv, false, f);
  return 0;
}

int64_t attention_double_backward(const AttentionShape& s, const AttentionDoubleBackwardArgs& a, const Target& target) {
  constexpr auto op = "attention_double_backward";
  check_shape(op, s, 2 * SIDE);
  if (!target.workspace) return 3 * row_floats(s) * static_cast<int64_t>(sizeof(float));
  const Layout l{s};
  const AttentionDoubleBackward f{l.sizes(),
                                  l.of_dv(a.dy, a.dy_strides),
                                  l.of_d(a.ddq, a.ddq_strides, a.q),
                                  l.of_d(a.ddk, a.ddk_strides, a.k),
                                  l.of_dv(a.ddv, a.ddv_strides, a.v),
                                  l.of_d(a.q, a.q_strides),
                                  l.of_d(a.k, a.k_strides),
                                  l.of_dv(a.v, a.v_strides),
                                  l.of_dv(a.d_dy, a.d_dy_strides),
                                  l.of_d(a.d_q, a.d_q_strides),
                                  l.of_d(a.d_k, a.d_k_strides),
                                  l.of_dv(a.d_v, a.d_v_strides),
                                  l.squares(a.bias, a.bias_strides),
                                  l.squares(a.ddbias, a.ddbias_strides),
                                  l.squares(a.d_bias, a.d_bias_strides),
                                  a.lse,
                                  static_cast<float*>(target.workspace)};
  const int of_d = tiles_of(f.sizes.d), of_dv = tiles_of(f.sizes.dv);
  FG_LAUNCH_ATTENTION(op, attention_double_rows_kernel, s.rows, 2 * of_d + of_dv, true, f);
  FG_LAUNCH_ATTENTION(op, attention_double_keys_kernel, s.keys, 2 * (of_d + of_dv), true, f);
  return 0;
}

#undef FG_LAUNCH_ATTENTION

}  // namespace fg::cuda
