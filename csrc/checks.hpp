// What the binding refuses before a kernel sees it: what would crash or divide by zero. A check for each struct that
// needs one, and for structs that depend on each other.
#pragma once

#include <stdexcept>
#include <string>

#include "common/kernels.hpp"
#ifdef FG_CUDA
#include "cuda/kernels.hpp"
#endif

namespace fg::binding {

[[noreturn]] inline void refuse(const std::string& text) { throw std::invalid_argument(text); }

inline std::string text(int64_t value) { return std::to_string(value); }

inline void within(const char* op, const char* name, int64_t value, int64_t first, int64_t last) {
  if (value < first || value > last)
    refuse(std::string(op) + ": " + name + " must be in " + text(first) + ".." + text(last) + ", got " + text(value));
}

inline void check(const char* op, const ConvShape& s) {
  for (int64_t v : {s.N, s.C, s.H, s.W, s.K, s.OH, s.OW, s.R, s.S, s.pad_h, s.pad_w})
    within(op, "every size and padding", v, 0, INT32_MAX);
  for (int64_t v : {s.stride_h, s.stride_w, s.dil_h, s.dil_w, s.groups})
    within(op, "strides, dilations and groups", v, 1, INT32_MAX);
  if (s.C % s.groups || s.K % s.groups)
    refuse(std::string(op) + ": groups must divide both channel counts, got C=" + text(s.C) + ", K=" + text(s.K) +
           ", groups=" + text(s.groups));
}

// x [N, C, HW], whose `whole` (named) is cut into groups.
inline void check_norm(const char* op, int64_t N, int64_t C, int64_t HW, const char* groups_name, int64_t groups,
                       const char* whole_name, int64_t whole, Act act) {
  if (N < 0 || C < 0 || HW < 0 || groups < 1 || whole % groups)
    refuse(std::string(op) + ": N, C and HW must not be negative and " + groups_name + " must divide " + whole_name +
           ", got N=" + text(N) + ", C=" + text(C) + ", HW=" + text(HW) + ", " + groups_name + "=" + text(groups));
  within(op, "act", act, ACT_IDENTITY, ACT_LEAKY_RELU);
}

inline void check(const char* op, const BnShape& s) { check_norm(op, s.N, s.C, s.HW, "G", s.G, "N", s.N, s.act); }
inline void check(const char* op, const GnShape& s) {
  check_norm(op, s.N, s.C, s.HW, "groups", s.groups, "C", s.C, s.act);
}

inline void check(const char* op, const BiasActShape& s) {
  if (s.N < 0 || s.C < 0 || s.HW < 0)
    refuse(std::string(op) + ": N, C and HW must not be negative, got N=" + text(s.N) + ", C=" + text(s.C) +
           ", HW=" + text(s.HW));
  if (s.gain == 0) refuse(std::string(op) + ": gain must not be 0: the output would not tell its derivative");
}

// Convolutions fuse the activations up to sigmoid.
template <class Conv>
  requires requires(const Conv& a) { a.w_strides, a.act; }
void check(const char* op, const Conv& a) {
  within(op, "act", a.act, ACT_IDENTITY, ACT_SIGMOID);
}

inline void check(const char* op, const AttentionShape& s) {
  for (int64_t v : {s.N, s.heads, s.rows, s.keys, s.d, s.dv}) within(op, "every size", v, 1, INT32_MAX);
}

inline void check(const char* op, const GanLossShape& s) {
  if (s.n_fake < 1 || s.n_real < 0)
    refuse(std::string(op) + ": n_fake must be at least 1 and n_real at least 0, got " + text(s.n_fake) + " and " +
           text(s.n_real));
  if (!s.n_real && (s.side == SIDE_D || s.kind == LOSS_RELATIVISTIC))
    refuse(std::string(op) + ": the d side and the relativistic loss need real logits, got none");
  if (s.kind == LOSS_RELATIVISTIC && s.n_real != s.n_fake)
    refuse(std::string(op) + ": the relativistic loss pairs the logits, got " + text(s.n_fake) + " fake and " +
           text(s.n_real) + " real");
}

template <class Samples>
  requires requires(const Samples& s) { s.N, s.E; }
void check(const char* op, const Samples& s) {
  if (s.N < 1 || s.E < 1)
    refuse(std::string(op) + ": N and E must be at least 1, got " + text(s.N) + " and " + text(s.E));
}

inline void check(const char* op, const Upfirdn2dArgs& a) {
  for (int64_t v : {a.N, a.C, a.H, a.W, a.OH, a.OW, a.KH, a.KW, a.up_y, a.up_x, a.down_y, a.down_x})
    within(op, "every size and factor", v, 1, INT32_MAX);
  for (int64_t v : {a.pad_y, a.pad_x}) within(op, "every padding", v, -INT32_MAX, INT32_MAX);
  if (a.separable && a.KH != a.KW)
    refuse(std::string(op) + ": a separable filter has one length, got " + text(a.KH) + " and " + text(a.KW));
}

inline void check(const char* op, const FilteredLreluShape& s) {
  for (int64_t v : {s.N, s.C, s.H, s.W, s.MH, s.MW, s.OH, s.OW, s.KH_up, s.KW_up, s.KH_down, s.KW_down, s.up, s.down})
    within(op, "every size and factor", v, 1, INT32_MAX);
  for (int64_t v : {s.pad_y, s.pad_x, s.pad_out_y, s.pad_out_x}) within(op, "every padding", v, -INT32_MAX, INT32_MAX);
  if ((s.separable_up && s.KH_up != s.KW_up) || (s.separable_down && s.KH_down != s.KW_down))
    refuse(std::string(op) + ": a separable filter has one length, got " + text(s.KH_up) + " and " + text(s.KW_up) +
           ", " + text(s.KH_down) + " and " + text(s.KW_down));
}

inline void check(const char* op, const AdamArgs& a) {
  for (int64_t i = 0; i < a.tensors.count; ++i)
    if (a.tensors.first[i].count < 1)
      refuse(std::string(op) + ": a tensor must have at least 1 element, got " + text(a.tensors.first[i].count));
}

// Every other struct, by way of the dots: only pointers, or what the list of fields checks itself.
inline void check(const char*, ...) {}

template <class... Structs>
void check_call(const char* op, const Structs&... structs) {
  (check(op, structs), ...);
}

#ifdef FG_CUDA
template <class Args>
void check_call(const char* op, const ConvShape& conv, const Args&, const cuda::StatisticsArgs& statistics,
                const cuda::Target&) {
  check(op, conv);
  if (statistics.groups < 1 || conv.N % statistics.groups)
    refuse(std::string(op) + ": stat_groups must divide N, got " + text(statistics.groups) + " and N=" + text(conv.N));
}
#endif

}  // namespace fg::binding
