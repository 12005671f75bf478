// conv_transpose2d: the adjoint of conv2d, by true output phases (conv_geometry.hpp), with the same epilogue.
#include "cpu/conv_geometry.hpp"
#include "cpu/conv_image.hpp"

namespace fg::ISA {

void conv_transpose2d(const ConvShape& s, const ConvTranspose2dArgs& a);

void conv_transpose2d(const ConvShape& s, const ConvTranspose2dArgs& a) {
#if defined(FG_BELOW)
  if (a.dtype == F32) return FG_BELOW::conv_transpose2d(s, a);
#endif
  if (compute_if_image(s, a)) return;
  const int64_t h_bytes = axis_bytes(least(s.stride_h, s.H), s.R, s.H);
  const int64_t w_bytes = axis_bytes(least(s.stride_w, s.W), s.S, s.W);
  const Scratch<char> axes(h_bytes + w_bytes);
  Problem p = {};
  p.source_dtype = p.out_dtype = a.dtype;
  p.source = a.y;
  p.N = s.N, p.SH = s.OH, p.SW = s.OW, p.C = s.K / s.groups;
  p.out = a.x;
  p.OH = s.H, p.OW = s.W, p.M = s.C / s.groups;
  p.groups = s.groups;
  p.R = s.R, p.S = s.S;
  p.h = adjoint_axis(axes.data, s.OH, s.H, s.R, s.stride_h, s.pad_h, s.dil_h);
  p.w = adjoint_axis(axes.data + h_bytes, s.OW, s.W, s.S, s.stride_w, s.pad_w, s.dil_w);
  p.weight = a.w;
  p.weight_dtype = a.w_dtype;
  p.stride_m = a.w_strides[1], p.stride_c = a.w_strides[0];
  p.stride_r = a.w_strides[2], p.stride_s = a.w_strides[3];
  p.stride_g = p.C * p.stride_c;
  p.bias = a.bias;
  p.act = a.act;
  p.slope = a.slope;
  p.threads = a.threads;
  compute(p);
}

}  // namespace fg::ISA
