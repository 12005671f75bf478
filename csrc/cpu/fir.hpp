// What upfirdn2d and filtered_lrelu share: which taps of a filter meet which samples, and filters that are products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

namespace fg::ISA {

// Outputs r, r + phases, r + 2 phases, ... use the same taps: output m of them is the sum over j < count of
// taps[tap + j up] sample[first + m step + j]. Taps that would meet the zeros of upsampling are left out.
struct Phase {
  int64_t first, count, outputs, tap;
};

// One axis of y = every down-th of f * x, x with up - 1 zeros behind each sample and pad zeros before it.
struct Axis {
  int64_t in, out, taps, up, down, pad, phases, step;
  Phase* table;             // [phases], found once: a row's divisions took as long as 32 outputs of it
  int64_t lowest, highest;  // the samples that outputs read, those outside [0, in) included

  Axis(int64_t in_, int64_t out_, int64_t taps_, int64_t up_, int64_t down_, int64_t pad_, Phase* memory)
      : in(in_), out(out_), taps(taps_), up(up_), down(down_), pad(pad_), table(memory) {
    const int64_t common = std::gcd(up, down);
    phases = up / common;
    step = down / common;
    lowest = INT64_MAX;
    highest = INT64_MIN;
    for (int64_t r = 0; r < phases; ++r) {
      const Phase& p = table[r] = found(r);
      if (p.outputs < 1) continue;
      lowest = std::min(lowest, p.first);
      highest = std::max(highest, p.first + (p.outputs - 1) * step + std::max<int64_t>(p.count, 1) - 1);
    }
  }
  const Phase& phase(int64_t r) const { return table[r]; }
  // The first sample that output o reads.
  int64_t first(int64_t o) const { return table[o % phases].first + o / phases * step; }

 private:
  Phase found(int64_t r) const {
    const int64_t start = r * down - pad, tap = ((-start) % up + up) % up;
    return {(start + tap) / up, tap < taps ? (taps - 1 - tap) / up + 1 : 0, (out - r + phases - 1) / phases, tap};
  }
};

// A filter f [KH][KW], or [K] of a product f f^T.
struct Taps {
  const float* f;
  int64_t KH, KW;
  bool separable;

  size_t floats() const { return size_t(KH + KW + (separable ? 0 : KH * KW)); }
};

// The filter as it is slid over the samples: turned as `flip` says, with its gain.
struct Filter {
  bool product;
  const float* column;  // [KH], of a product
  const float* rows;    // [KW], or [KH][KW]

  // into: [taps.floats()].
  Filter(const Taps& taps, bool flip, float gain, float* into) {
    float *c = into, *r = into + taps.KH;
    if (taps.separable) {
      product = true;
      std::copy_n(taps.f, taps.KH, c);
      std::copy_n(taps.f, taps.KW, r);
    } else {
      product = factor(taps, c, r);
      if (!product) std::copy_n(taps.f, taps.KH * taps.KW, r);
    }
    const int64_t width = product ? taps.KW : taps.KH * taps.KW;
    if (!flip) {  // a convolution: what is slid over the samples is the filter turned by 180 degrees
      std::reverse(c, c + taps.KH);
      std::reverse(r, r + width);
    }
    for (int64_t i = 0; i < width; ++i) r[i] *= gain;
    column = c;
    rows = r;
  }

 private:
  // f = column row^T where that is so to a rounding of the largest tap.
  static bool factor(const Taps& t, float* column, float* row) {
    int64_t p = 0;
    for (int64_t i = 1; i < t.KH * t.KW; ++i)
      if (std::abs(t.f[i]) > std::abs(t.f[p])) p = i;
    const float pivot = t.f[p];
    const int64_t pi = p / t.KW, pj = p % t.KW;
    for (int64_t i = 0; i < t.KH; ++i) column[i] = t.f[i * t.KW + pj];
    for (int64_t j = 0; j < t.KW; ++j) row[j] = pivot == 0.0f ? 0.0f : t.f[pi * t.KW + j] / pivot;
    for (int64_t i = 0; i < t.KH; ++i)
      for (int64_t j = 0; j < t.KW; ++j)
        if (!(std::abs(t.f[i * t.KW + j] - column[i] * row[j]) <= 0x1p-22f * std::abs(pivot))) return false;
    return true;
  }
};

}  // namespace fg::ISA
