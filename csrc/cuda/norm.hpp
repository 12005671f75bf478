// The passes that bn_act and gn_act share, compiled once in norm.cu.
#pragma once

#include "cuda/norm.cuh"
#include "cuda/sweep.hpp"

namespace fg::cuda {

struct NormTensors {
  DType dtype;
  const void *x, *dy = nullptr, *ddx = nullptr;
  void *y = nullptr, *dx = nullptr, *d_dy = nullptr, *d_x = nullptr;

  NormTensors(DType type, const NormForwardArgs& a) : dtype(type), x(a.x), y(a.y) {}
  NormTensors(DType type, const NormBackwardArgs& a) : dtype(type), x(a.x), dy(a.dy), dx(a.dx) {}
  NormTensors(DType type, const NormDoubleBackwardArgs& a)
      : dtype(type), x(a.x), dy(a.dy), ddx(a.ddx), d_dy(a.d_dy), d_x(a.d_x) {}

  // The elementwise passes; k as for apply_norm_*, null in a resident pass.
  template <class T>
  NormForward<T> forward(const Norm& norm) const {
    return {{static_cast<const T*>(x)}, {static_cast<T*>(y)}, norm};
  }
  template <class T>
  NormBackward<T> backward(const Norm& norm, const float* k, const Planes& p) const {
    return {{static_cast<const T*>(dy), static_cast<const T*>(x)},
            {static_cast<T*>(dx)},
            norm,
            k,
            i64{p.groups} * p.channels,
            p.channels};
  }
  template <class T>
  NormDouble<T> double_backward(const Norm& norm, const float* k, const Planes& p) const {
    return {{static_cast<const T*>(ddx), static_cast<const T*>(dy), static_cast<const T*>(x)},
            {static_cast<T*>(d_dy), static_cast<T*>(d_x)},
            norm,
            k,
            i64{p.groups} * p.channels,
            p.channels};
  }
};

// Floats of a workspace: partials, coefficients of the elementwise pass, and what a third kernel needs.
struct Workspace {
  int64_t partials, coefs, rest;
  int64_t bytes() const { return (partials + coefs + rest) * int64_t{sizeof(float)}; }
};

enum class NormSums { STATISTICS, BACKWARD, DOUBLE };

// The pivot that the moments are taken around: bn_act's and gn_act's finishing kernels add it to the means.
Pivot pivot_of(const Walk&, const NormTensors&, const Norm&);
Reduction plan_norm(const Walk&, const NormTensors&, NormSums);
void reduce_norm(const char* op, const Walk&, const NormTensors&, const Norm&, NormSums, const Reduction&,
                 float* partials, void* stream);
void apply_norm_forward(const char* op, const Walk&, const NormTensors&, const Norm&, void* stream);
// k: [2][G C] of NormBackward.
void apply_norm_backward(const char* op, const Walk&, const NormTensors&, const Norm&, const float* k, void* stream);
// k: [DOUBLE_COEFS][G C].
void apply_norm_double(const char* op, const Walk&, const NormTensors&, const Norm&, const float* k, void* stream);

}  // namespace fg::cuda
