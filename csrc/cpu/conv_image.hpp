// The adjoint convolution with few output channels: images at the end of a generator, their gradients at the entry of a
// discriminator. By phases each product would fill 3 of 16 lanes. Here one product makes all R * S * C values that a
// source pixel contributes, with every lane in use and no multiplication that the phases would not make, and they are
// added up where they overlap, in fp32 and in a fixed order.
#pragma once

#include "cpu/activation.hpp"
#include "cpu/conv_amx.hpp"
#include "cpu/conv_geometry.hpp"
#include "cpu/conv_micro.hpp"

namespace fg::ISA {
namespace {

struct ImageWork {
  const ConvShape* s;
  const ConvTranspose2dArgs* a;
  int64_t columns;     // R * S * C rounded up to the kernel's grain
  int64_t blocks;      // of columns
  int64_t band;        // output rows of a job
  int64_t bands;       // of an image
  int64_t band_rows;   // source rows that a job multiplies, at most
  int64_t slots;       // of a line
  int64_t slot;        // floats: stride_w pixels
  const char* panels;  // [block][unit][column]
  const float* bias;   // [slot rounded up to vectors]
};

// The source columns that reach a slot are j = slot - back, each with the taps of one Term: a slot holds the stride_w
// output pixels between two source pixels, counted from the left padding.
struct Term {
  const float* products;  // of source column 0 and the term's first tap
  int64_t back;
  int64_t count;  // floats, at most a slot
};
constexpr int64_t MAX_TERMS = 64;

template <class K>
inline int64_t image_column(const ImageWork& w, int64_t block) {
  const int64_t grains = w.columns / K::GRAIN;
  return (grains / w.blocks * block + least(block, grains % w.blocks)) * K::GRAIN;
}

// One unit of all panels.
template <class K>
inline void pack_image_unit(const ImageWork& w, int64_t unit, int64_t units, char* panels) {
  const ConvShape& s = *w.s;
  const ConvTranspose2dArgs& a = *w.a;
  for (int64_t block = 0; block < w.blocks; ++block) {
    const int64_t j0 = image_column<K>(w, block), width = image_column<K>(w, block + 1) - j0;
    char* to = panels + (j0 * units + unit * width) * 4;
    for (int64_t j = j0; j < j0 + width; ++j, to += 4) {
      float v[2] = {0.0f, 0.0f};
      const int64_t tap = j / s.C, r = tap / s.S;
      for (int64_t i = 0; i < K::PER_UNIT && r < s.R; ++i) {
        const int64_t at = (unit * K::PER_UNIT + i) * a.w_strides[0] + j % s.C * a.w_strides[1] + r * a.w_strides[2] +
                           tap % s.S * a.w_strides[3];
        v[i] = a.w_dtype == BF16 ? to_float(static_cast<const bf16*>(a.w)[at]) : static_cast<const float*>(a.w)[at];
        if (a.dtype == BF16) v[i] = to_float(to_bf16(v[i]));
      }
      const bf16 two[2] = {to_bf16(v[0]), to_bf16(v[1])};
      std::memcpy(to, K::PER_UNIT == 2 ? static_cast<const void*>(two) : v, 4);
    }
  }
}

// products[pixel][column] of `count` consecutive source pixels.
template <class K>
inline void multiply_pixels(const ImageWork& w, const char* source, int64_t count, float* products) {
  const int64_t pixel = w.s->K * (K::PER_UNIT == 2 ? 2 : 4), units = w.s->K / K::PER_UNIT;
  const Run run = {0, units};
  for (int64_t p = 0; p < count; p += K::ROWS) {
    const int rows = static_cast<int>(least(K::ROWS, count - p));
    const char* left[K::ROWS];
    for (int i = 0; i < K::ROWS; ++i) left[i] = source + (p + (i < rows ? i : 0)) * pixel;
    for (int64_t block = 0; block < w.blocks; ++block) {
      const int64_t j0 = image_column<K>(w, block), width = image_column<K>(w, block + 1) - j0;
      K::tile(&run, 1, left, 4, rows, w.panels + j0 * units * 4, units, static_cast<int>(width),
              products + p * w.columns + j0, w.columns, false);
    }
  }
}

// Everything that reaches one output row.
inline int terms_of_row(const ImageWork& w, int64_t o, int64_t i0, const float* products, Term* term) {
  const ConvShape& s = *w.s;
  int count = 0;
  for (int64_t r = 0; r < s.R; ++r) {
    const int64_t up = o + s.pad_h - r * s.dil_h, i = up / s.stride_h;
    if (up < 0 || up % s.stride_h != 0 || i >= s.OH) continue;
    for (int64_t q = 0; q < s.S; q += s.stride_w)
      term[count++] = {products + (i - i0) * s.OW * w.columns + (r * s.S + q) * s.C, q / s.stride_w,
                       least(s.stride_w, s.S - q) * s.C};
  }
  return count;
}

// line[slot] = bias + terms. Vectors past the end of a slot are overwritten by the next one.
FG_NOINLINE void add_terms(const ImageWork& w, const Term* term, int terms, float* line) {
  const int64_t SW = w.s->OW, ld = w.columns, back = (w.s->S - 1) / w.s->stride_w;
  bool whole = true;
  for (int i = 0; i < terms; ++i) whole &= term[i].count == w.slot;
  for (int64_t t = 0; t < w.slots; ++t)
    for (int64_t e = 0; e < w.slot; e += VF) {
      vf sum = load(w.bias + e);
      if (t >= back && t < SW && whole) {
        for (int i = 0; i < terms; ++i) sum += load(term[i].products + (t - term[i].back) * ld + e);
      } else {
        for (int i = 0; i < terms; ++i) {
          const int64_t j = t - term[i].back, n = least(VF, term[i].count - e);
          if (j >= 0 && j < SW && n > 0) sum += load_tail(term[i].products + j * ld + e, static_cast<int>(n));
        }
      }
      store(line + t * w.slot + e, sum);
    }
}

template <class T>
FG_NOINLINE void finish_line(const ImageWork& w, const float* line, T* out) {
  const int64_t count = w.s->W * w.s->C;
  const float* from = line + w.s->pad_w * w.s->C;
  int64_t j = 0;
  for (; j + VF <= count; j += VF) store(out + j, activate(load(from + j), w.a->act, w.a->slope));
  const int rest = static_cast<int>(count - j);
  if (rest) store_tail(out + j, activate(load_tail(from + j, rest), w.a->act, w.a->slope), rest);
}

template <class K>
inline void compute_band(const ImageWork& w, int64_t n, int64_t band, float* line, float* products) {
  const ConvShape& s = *w.s;
  const int64_t o0 = band * w.band, o1 = least(s.H, o0 + w.band);
  // Source rows i with o0 <= i * stride - pad + r * dilation < o1 for some r.
  const int64_t lowest = o0 + s.pad_h - (s.R - 1) * s.dil_h;
  const int64_t i0 = lowest > 0 ? ceil_div(lowest, s.stride_h) : 0;
  const int64_t i1 = least(s.OH, (o1 - 1 + s.pad_h) / s.stride_h + 1);
  const int64_t row_bytes = s.OW * s.K * (K::PER_UNIT == 2 ? 2 : 4);
  if (i1 > i0)
    multiply_pixels<K>(w, static_cast<const char*>(w.a->y) + (n * s.OH + i0) * row_bytes, (i1 - i0) * s.OW, products);
  for (int64_t o = o0; o < o1; ++o) {
    Term term[MAX_TERMS];
    add_terms(w, term, terms_of_row(w, o, i0, products, term), line);
    const int64_t at = (n * s.H + o) * s.W * s.C;
    if (w.a->dtype == BF16)
      finish_line(w, line, static_cast<bf16*>(w.a->x) + at);
    else
      finish_line(w, line, static_cast<float*>(w.a->x) + at);
  }
}

template <class K>
inline void compute_image(const ConvShape& s, const ConvTranspose2dArgs& a) {
  ImageWork w;
  w.s = &s;
  w.a = &a;
  w.columns = round_up(s.R * s.S * s.C, K::GRAIN);
  w.blocks = ceil_div(w.columns, K::COLUMNS);
  w.slot = s.stride_w * s.C;
  w.slots = ceil_div(s.pad_w + s.W, s.stride_w);
  // Whole images, unless their products outgrow the second-level cache or there are fewer than four jobs a thread.
  const int64_t halo = (s.R - 1) * s.dil_h;
  const int64_t fit = 262144 / (s.OW * w.columns * 4) * s.stride_h - halo;
  const int64_t wanted = ceil_div(a.threads > 1 ? 4 * a.threads : 1, s.N);
  w.band = least(s.H, most(halo + s.stride_h, least(fit, ceil_div(s.H, wanted))));
  w.bands = ceil_div(s.H, w.band);
  w.band_rows = least(s.OH, (w.band + halo) / s.stride_h + 2);
  const int64_t units = s.K / K::PER_UNIT;
  // VF floats behind each: whole vectors are read and written where a part is wanted.
  const int64_t line = round_up((w.slots * w.slot) + VF, 16);
  const int64_t products = round_up(round_up(w.band_rows * s.OW, K::ROWS) * w.columns + 2 * VF, 16);
  Packed<char> panels(w.columns * units * 4);
  const Scratch<float> bias(round_up(w.slot, VF)), own(a.threads * (line + products));
  for (int64_t j = 0; j < round_up(w.slot, VF); ++j) bias.data[j] = a.bias ? a.bias[j % s.C] : 0.0f;
  w.panels = panels.data;
  w.bias = bias.data;
#pragma omp parallel num_threads(a.threads)
  {
    float* mine = own.data + thread_index() * (line + products);
    K::enter();
#pragma omp for schedule(static)
    for (int64_t u = panels.made() ? units : 0; u < units; ++u) pack_image_unit<K>(w, u, units, panels.data);
#pragma omp for schedule(dynamic) nowait
    for (int64_t job = 0; job < s.N * w.bands; ++job)
      compute_band<K>(w, job / w.bands, job % w.bands, mine, mine + line);
    K::leave();
  }
  panels.keep();
}

// Half a vector of channels or less, and enough products per pixel to fill one.
inline bool is_image(const ConvShape& s, int64_t run) {
  return s.groups == 1 && s.dil_w == 1 && s.R * ceil_div(s.S, s.stride_w) <= MAX_TERMS && 2 * s.C <= VF &&
         s.R * s.S * s.C >= VF && s.K >= 16 && s.K % run == 0 && s.N > 0 && s.C > 0 && s.H > 0 && s.W > 0 && s.OH > 0 &&
         s.OW > 0;
}

// True if the convolution was one for this file and is done.
inline bool compute_if_image(const ConvShape& s, const ConvTranspose2dArgs& a) {
#if defined(FG_AMX)
  if (!is_image(s, 32)) return false;
  compute_image<TileKernel>(s, a);
#elif defined(FG_BELOW)
  if (!is_image(s, 2)) return false;
  compute_image<BroadcastKernel<true> >(s, a);
#else
  if (!is_image(s, 1)) return false;
  if (a.dtype == F32) {
    compute_image<BroadcastKernel<false> >(s, a);
    return true;
  }
  const int64_t count = s.N * s.OH * s.OW * s.K;
  const Scratch<float> wide(count);
  widen(static_cast<const bf16*>(a.y), wide.data, count, a.threads);
  ConvTranspose2dArgs b = a;
  b.y = wide.data;
  compute_image<BroadcastKernel<false> >(s, b);
#endif
  return true;
}

}  // namespace
}  // namespace fg::ISA
