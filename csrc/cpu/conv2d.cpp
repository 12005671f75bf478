// conv2d: y[n,oh,ow,k] = act(bias[k] + sum over c, r, s of x[n, oh*stride - pad + r*dil, ...][c] * w[k,c,r,s]).
#include "cpu/conv_geometry.hpp"

namespace fg::ISA {

void conv2d(const ConvShape& s, const Conv2dArgs& a);

void conv2d(const ConvShape& s, const Conv2dArgs& a) {
  const int64_t h_bytes = axis_bytes(1, s.R, s.OH), w_bytes = axis_bytes(1, s.S, s.OW);
  const Scratch<char> axes(h_bytes + w_bytes);
  Problem p = {};
  p.source_dtype = p.out_dtype = a.dtype;
  p.source = a.x;
  p.N = s.N, p.SH = s.H, p.SW = s.W, p.C = s.C / s.groups;
  p.out = a.y;
  p.OH = s.OH, p.OW = s.OW, p.M = s.K / s.groups;
  p.groups = s.groups;
  p.R = s.R, p.S = s.S;
  p.h = forward_axis(axes.data, s.H, s.OH, s.R, s.stride_h, s.pad_h, s.dil_h);
  p.w = forward_axis(axes.data + h_bytes, s.W, s.OW, s.S, s.stride_w, s.pad_w, s.dil_w);
  p.weight = a.w;
  p.weight_dtype = a.w_dtype;
  p.stride_m = a.w_strides[0], p.stride_c = a.w_strides[1];
  p.stride_r = a.w_strides[2], p.stride_s = a.w_strides[3];
  p.stride_g = p.M * p.stride_m;
  p.bias = a.bias;
  p.act = a.act;
  p.slope = a.slope;
  p.threads = a.threads;
  compute(p);
}

}  // namespace fg::ISA
