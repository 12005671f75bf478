// y = every down-th sample of gain f * x, x with up - 1 zeros behind each sample, padded: one pass, a thread an output.
// Neighbouring threads make neighbouring outputs of y's memory, so that what they read is shared by the cache.
#pragma once

#include "cuda/prelude.cuh"

namespace fg::cuda {

constexpr int UPFIRDN_THREADS = 256;

// One axis: output o meets taps tap, tap + up, ... of the filter as it is slid, with samples first, first + 1, ...
struct FirAxis {
  int in, out, taps, up, down, pad;
};

struct FirTaps {
  int first, tap;
};

FG_DEVICE FirTaps taps_at(const FirAxis& a, int o) {
  const int start = o * a.down - a.pad;
  const int past = start > 0 ? start % a.up : (a.up - -start % a.up) % a.up;  // beyond the last sample before `start`
  const int tap = past == 0 ? 0 : a.up - past;
  return {(start + tap) / a.up, tap};
}

struct Upfirdn {
  FirAxis y, x;
  int channels;
  i64 outputs;
  bool separable, flip, channels_last;
  float gain;
};

// Tap k of `taps` as it is slid lies at k in a correlation, else at the other end.
FG_DEVICE int place(const FirAxis& a, int k, bool flip) { return flip ? k : a.taps - 1 - k; }

// Grid: 256 outputs a block.
template <class T>
__global__ void __launch_bounds__(UPFIRDN_THREADS)
    upfirdn2d_kernel(Upfirdn u, const T* __restrict__ x, const float* __restrict__ f, T* __restrict__ y) {
  const i64 at = static_cast<i64>(blockIdx.x) * UPFIRDN_THREADS + threadIdx.x;
  if (at >= u.outputs) return;
  const int inner = u.channels_last ? u.channels : 1;
  const i64 pixel = at / inner;
  const int ox = static_cast<int>(pixel % u.x.out), oy = static_cast<int>(pixel / u.x.out % u.y.out);
  const i64 image = pixel / u.x.out / u.y.out * u.y.in * u.x.in * inner + at % inner;
  const FirTaps ty = taps_at(u.y, oy), tx = taps_at(u.x, ox);
  float sum = 0.0f;
  for (int ky = ty.tap, iy = ty.first; ky < u.y.taps; ky += u.y.up, ++iy) {
    if (iy < 0 || iy >= u.y.in) continue;
    const int row = place(u.y, ky, u.flip);
    float along = 0.0f;
    for (int kx = tx.tap, ix = tx.first; kx < u.x.taps; kx += u.x.up, ++ix) {
      if (ix < 0 || ix >= u.x.in) continue;
      const int column = place(u.x, kx, u.flip);
      const float weight = load(f + (u.separable ? column : row * u.x.taps + column));
      along += weight * to_float(load(x + image + (static_cast<i64>(iy) * u.x.in + ix) * inner));
    }
    sum += u.separable ? load(f + row) * along : along;
  }
  store(y + at, from_float<T>(u.gain * sum));
}

}  // namespace fg::cuda
