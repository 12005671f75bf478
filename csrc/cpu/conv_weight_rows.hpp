// Where both forms of conv2d_weight end: a finished row of dw goes to the caller's layout.
#pragma once

#include "cpu/conv_geometry.hpp"
#include "cpu/simd.hpp"

namespace fg::ISA {
namespace {

// One row k of dw, [tap][pitch] with its channels first, written by the caller's strides.
template <class T>
FG_NOINLINE void write_row(const ConvShape& s, const Conv2dWeightArgs& a, int64_t k, const float* row, int64_t pitch) {
  const int64_t C = s.C / s.groups, taps = s.R * s.S;
  const int64_t* stride = a.dw_strides;
  T* to = static_cast<T*>(a.dw) + k * stride[0];
  if (stride[1] == 1) {  // channels together
    for (int64_t tap = 0; tap < taps; ++tap) {
      T* at = to + tap / s.S * stride[2] + tap % s.S * stride[3];
      const float* from = row + tap * pitch;
      int64_t c = 0;
      for (; c + VF <= C; c += VF) store(at + c, load(from + c));
      for (; c < C; ++c) store_tail(at + c, set1(from[c]), 1);
    }
  } else if (stride[3] == 1 && stride[2] == s.S && taps > 1) {  // taps together: transposed in registers
    for (int64_t c = 0; c < C; c += VF)
      for (int64_t tap = 0; tap < taps; tap += VF) {
        const int lanes = static_cast<int>(least(VF, C - c)), wide = static_cast<int>(least(VF, taps - tap));
        vf v[VF];
        for (int i = 0; i < VF; ++i) {
          const float* from = row + (tap + i) * pitch + c;
          v[i] = i >= wide ? zero() : lanes == VF ? load(from) : load_tail(from, lanes);
        }
        transpose(v);
        for (int i = 0; i < lanes; ++i) {
          T* at = to + (c + i) * stride[1] + tap;
          if (wide == VF)
            store(at, v[i]);
          else
            store_tail(at, v[i], wide);
        }
      }
  } else {
    for (int64_t c = 0; c < C; ++c)
      for (int64_t tap = 0; tap < taps; ++tap)
        store_tail(to + c * stride[1] + tap / s.S * stride[2] + tap % s.S * stride[3], set1(row[tap * pitch + c]), 1);
  }
}

}  // namespace
}  // namespace fg::ISA
