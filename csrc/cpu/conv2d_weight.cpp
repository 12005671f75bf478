// conv2d_weight: dw[k,c,r,s] = sum over n, oh, ow of dy[n,oh,ow,k] * x[n, oh*stride - pad + r*dil, ...][c].
//
// One product dw[k][j] = sum over pixels dy[p][k] * X[p][j] with columns j = (tap, channel), on the micro-kernels of
// the other two directions: dy transposed once gives their left rows, and X, gathered a few hundred pixels at a time,
// their panels. Column blocks are shared out among the threads; where there are too few, the pixels are split too, and
// the parts are added in a fixed order.
#include "cpu/conv_compute.hpp"

namespace fg::ISA {

void conv2d_weight(const ConvShape& s, const Conv2dWeightArgs& a);

namespace {

struct Gradient {
  const ConvShape* s;
  const Conv2dWeightArgs* a;
  int64_t C, K;             // per group
  int64_t pixels;           // N * OH * OW
  bool batch_fastest;       // pixels ordered (position, image)
  int64_t chunk, chunks;    // pixels of a panel
  int64_t columns, blocks;  // R * S * C rounded up to the kernel's grain
  int64_t rows;             // K rounded up to the kernel's rows
  int64_t splits;           // of the pixels
};

struct Pixel {
  int64_t n, oh, ow;
};

inline Pixel pixel_at(const Gradient& g, int64_t p) {
  const ConvShape& s = *g.s;
  if (g.batch_fastest) return {p % s.N, p / s.N / s.OW, p / s.N % s.OW};
  return {p / s.OW / s.OH, p / s.OW % s.OH, p % s.OW};
}

inline void advance(const Gradient& g, Pixel& p) {
  const ConvShape& s = *g.s;
  if (g.batch_fastest) {
    if (++p.n < s.N) return;
    p.n = 0;
    if (++p.ow < s.OW) return;
    p.ow = 0;
    ++p.oh;
  } else {
    if (++p.ow < s.OW) return;
    p.ow = 0;
    if (++p.oh < s.OH) return;
    p.oh = 0;
    ++p.n;
  }
}

// VF lanes of one unit: a widened or plain fp32 row, or two bf16 rows interleaved. Null rows are zero.
template <bool PAIRS, class T>
inline vec unit_lanes(const T* first, const T* second, int lanes) {
  const vec zero = vset(0.0f);
  if constexpr (PAIRS) {
    vech low = {}, high = {};
    const size_t bytes = sizeof(bf16) * static_cast<size_t>(lanes);
    if (lanes == VF) {
      if (first) std::memcpy(&low, first, sizeof low);
      if (second) std::memcpy(&high, second, sizeof high);
    } else {
      if (first) std::memcpy(&low, first, bytes);
      if (second) std::memcpy(&high, second, bytes);
    }
    return as_floats(__builtin_convertvector(low, vecu) | (__builtin_convertvector(high, vecu) << 16));
  } else {
    if (!first) return zero;
    return lanes == VF ? vload(first) : vload_n(first, lanes);
  }
}

// transposed[chunk][k of all groups][unit]: the piece of one chunk.
template <class K, class T>
inline void transpose_chunk(const Gradient& g, int64_t chunk, char* transposed) {
  constexpr bool PAIRS = K::PER_UNIT == 2;
  const ConvShape& s = *g.s;
  const T* dy = static_cast<const T*>(g.a->dy);
  const int64_t units = g.chunk / K::PER_UNIT, first = chunk * g.chunk, end = least(g.pixels, first + g.chunk);
  char* to = transposed + chunk * s.K * units * 4;
  Pixel at = pixel_at(g, first);
  for (int64_t u = 0; u < units; u += VF) {
    const T* row[VF * K::PER_UNIT];
    for (int64_t i = 0; i < VF * K::PER_UNIT; ++i) {
      const bool inside = first + u * K::PER_UNIT + i < end;
      row[i] = inside ? dy + ((at.n * s.OH + at.oh) * s.OW + at.ow) * s.K : nullptr;
      if (inside) advance(g, at);
    }
    const int wide = static_cast<int>(least(VF, units - u));
    for (int64_t k = 0; k < s.K; k += VF) {
      const int lanes = static_cast<int>(least(VF, s.K - k));
      vec v[VF];
      for (int i = 0; i < VF; ++i) {
        const T* a = row[i * K::PER_UNIT];
        const T* b = PAIRS ? row[i * K::PER_UNIT + 1] : nullptr;
        v[i] = unit_lanes<PAIRS>(a ? a + k : nullptr, b ? b + k : nullptr, lanes);
      }
      transpose(v);
      for (int i = 0; i < lanes; ++i) {
        char* out = to + ((k + i) * units + u) * 4;
        if (wide == VF)
          vstore(static_cast<void*>(out), v[i]);
        else
          vstore_n(static_cast<void*>(out), v[i], wide);
      }
    }
  }
}

// The columns of one block at one pixel: in place where they are one stretch of x, else copied into `copy`.
template <class T>
inline const T* gathered_row(const Gradient& g, int64_t group, const Pixel& at, int64_t j0, int64_t width, T* copy,
                             const T* zeros) {
  const ConvShape& s = *g.s;
  const T* x = static_cast<const T*>(g.a->x) + at.n * s.H * s.W * s.C + group * g.C;
  const int64_t all = s.R * s.S * g.C, j1 = least(all, j0 + width);
  for (int64_t j = j0; j < j1;) {
    const int64_t rs = j / g.C, c = j - rs * g.C, count = least(g.C - c, j1 - j);
    const int64_t ih = at.oh * s.stride_h - s.pad_h + rs / s.S * s.dil_h;
    const int64_t iw = at.ow * s.stride_w - s.pad_w + rs % s.S * s.dil_w;
    const bool inside = ih >= 0 && ih < s.H && iw >= 0 && iw < s.W;
    const T* from = inside ? x + (ih * s.W + iw) * s.C + c : zeros;
    if (count == width) return from;
    if (inside)
      std::memcpy(static_cast<void*>(copy + (j - j0)), from, sizeof(T) * static_cast<size_t>(count));
    else
      std::memset(static_cast<void*>(copy + (j - j0)), 0, sizeof(T) * static_cast<size_t>(count));
    j += count;
  }
  if (j1 < j0 + width)
    std::memset(static_cast<void*>(copy + (j1 - j0)), 0, sizeof(T) * static_cast<size_t>(j0 + width - j1));
  return copy;
}

// panel[unit][column] of one chunk.
template <class K, class T>
inline void gather_panel(const Gradient& g, int64_t group, int64_t chunk, int64_t j0, int64_t width, const T* zeros,
                         float* panel) {
  constexpr bool PAIRS = K::PER_UNIT == 2;
  const int64_t units = g.chunk / K::PER_UNIT, first = chunk * g.chunk, end = least(g.pixels, first + g.chunk);
  T copy[2][K::COLUMNS];
  Pixel at = pixel_at(g, first);
  for (int64_t u = 0; u < units; ++u, panel += width) {
    const T* row[2] = {zeros, zeros};
    for (int64_t i = 0; i < K::PER_UNIT; ++i)
      if (first + u * K::PER_UNIT + i < end) {
        row[i] = gathered_row(g, group, at, j0, width, copy[i], zeros);
        advance(g, at);
      }
    for (int64_t j = 0; j < width; j += VF) vstore(panel + j, unit_lanes<PAIRS>(row[0] + j, row[1] + j, VF));
  }
}

template <class K>
inline int64_t first_column(const Gradient& g, int64_t block) {
  const int64_t grains = g.columns / K::GRAIN;
  return (grains / g.blocks * block + least(block, grains % g.blocks)) * K::GRAIN;
}

// sums[split][group][block][row][column of the block]
template <class K>
inline float* sums_of(const Gradient& g, float* sums, int64_t split, int64_t group, int64_t block) {
  return sums + (split * g.s->groups + group) * g.rows * g.columns + g.rows * first_column<K>(g, block);
}

template <class K, class T>
inline void add_up(const Gradient& g, int64_t split, int64_t group, int64_t block, const char* transposed,
                   const char* zeros, float* panel, float* sums) {
  const int64_t units = g.chunk / K::PER_UNIT, j0 = first_column<K>(g, block);
  const int64_t width = first_column<K>(g, block + 1) - j0;
  const Run run = {0, units};
  float* out = sums_of<K>(g, sums, split, group, block);
  const int64_t from = g.chunks * split / g.splits, to = g.chunks * (split + 1) / g.splits;
  for (int64_t chunk = from; chunk < to; ++chunk) {
    gather_panel<K, T>(g, group, chunk, j0, width, reinterpret_cast<const T*>(zeros), panel);
    for (int64_t k = 0; k < g.K; k += K::ROWS) {
      const char* left[K::ROWS];
      const int count = static_cast<int>(least(K::ROWS, g.K - k));
      for (int i = 0; i < K::ROWS; ++i)
        left[i] = i < count ? transposed + ((chunk * g.s->K + group * g.K + k + i) * units) * 4 : zeros;
      K::tile(&run, 1, left, 4, count, reinterpret_cast<const char*>(panel), units, static_cast<int>(width),
              out + k * width, width, chunk > from);
    }
  }
}

// One row k of dw: the parts summed in order, written by the caller's strides.
template <class K, class T>
inline void write_row(const Gradient& g, int64_t group, int64_t k, float* sums, float* row) {
  const ConvShape& s = *g.s;
  const int64_t all = s.R * s.S * g.C, part = s.groups * g.rows * g.columns;
  for (int64_t block = 0; block < g.blocks; ++block) {
    const int64_t j0 = first_column<K>(g, block), width = first_column<K>(g, block + 1) - j0;
    const float* from = sums_of<K>(g, sums, 0, group, block) + k * width;
    for (int64_t j = 0; j < least(width, all - j0); ++j) {
      float sum = from[j];
      for (int64_t i = 1; i < g.splits; ++i) sum += from[i * part + j];
      row[j0 + j] = sum;
    }
  }
  const int64_t* stride = g.a->dw_strides;
  T* to = static_cast<T*>(g.a->dw) + (group * g.K + k) * stride[0];
  const auto put = [&](int64_t c, int64_t r, int64_t q) {
    const float v = row[(r * s.S + q) * g.C + c];
    T* at = to + c * stride[1] + r * stride[2] + q * stride[3];
    if constexpr (sizeof(T) == 4)
      *at = v;
    else
      *at = to_bf16(v);
  };
  if (stride[1] <= stride[3]) {
    for (int64_t r = 0; r < s.R; ++r)
      for (int64_t q = 0; q < s.S; ++q)
        for (int64_t c = 0; c < g.C; ++c) put(c, r, q);
  } else {
    for (int64_t c = 0; c < g.C; ++c)
      for (int64_t r = 0; r < s.R; ++r)
        for (int64_t q = 0; q < s.S; ++q) put(c, r, q);
  }
}

template <class K, class T>
inline void gradient_with(const ConvShape& s, const Conv2dWeightArgs& a) {
  constexpr int64_t RUN = K::PER_UNIT * K::RUN_UNITS;
  Gradient g;
  g.s = &s;
  g.a = &a;
  g.C = s.C / s.groups;
  g.K = s.K / s.groups;
  g.pixels = s.N * s.OH * s.OW;
  g.batch_fastest = false;
  g.chunk = least(256, round_up(g.pixels, RUN));
  g.chunks = ceil_div(g.pixels, g.chunk);
  g.columns = round_up(s.R * s.S * g.C, K::GRAIN);
  g.blocks = ceil_div(g.columns, K::COLUMNS);
  g.rows = round_up(g.K, K::ROWS);
  // Four jobs a thread keep the threads level; a split costs one more copy of dw to add up.
  g.splits = most(1, least(g.chunks, ceil_div(4 * a.threads, g.blocks * s.groups)));

  const int64_t units = g.chunk / K::PER_UNIT, panel = units * K::COLUMNS, row = s.R * s.S * g.C;
  const int64_t own = round_up(most(panel, row), 16), zero_bytes = most(units, K::COLUMNS) * 4;
  const Scratch<char> transposed(g.chunks * s.K * units * 4), zeros(zero_bytes);
  const Scratch<float> sums(g.splits * s.groups * g.rows * g.columns), panels(a.threads * own);
  std::memset(zeros.data, 0, static_cast<size_t>(zero_bytes));
#pragma omp parallel num_threads(a.threads)
  {
    float* mine = panels.data + thread_index() * own;
    K::enter();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < g.chunks; ++i) transpose_chunk<K, T>(g, i, transposed.data);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < g.splits * s.groups * g.blocks; ++i)
      add_up<K, T>(g, i / g.blocks / s.groups, i / g.blocks % s.groups, i % g.blocks, transposed.data, zeros.data, mine,
                   sums.data);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < s.K; ++i) {
      if (a.dw_dtype == BF16)
        write_row<K, bf16>(g, i / g.K, i % g.K, sums.data, mine);
      else
        write_row<K, float>(g, i / g.K, i % g.K, sums.data, mine);
    }
    K::leave();
  }
}

inline void clear_gradient(const ConvShape& s, const Conv2dWeightArgs& a) {
  const int64_t size = a.dw_dtype == BF16 ? 2 : 4;
  for (int64_t k = 0; k < s.K; ++k)
    for (int64_t c = 0; c < s.C / s.groups; ++c)
      for (int64_t r = 0; r < s.R; ++r)
        for (int64_t q = 0; q < s.S; ++q)
          std::memset(
              static_cast<char*>(a.dw) +
                  (k * a.dw_strides[0] + c * a.dw_strides[1] + r * a.dw_strides[2] + q * a.dw_strides[3]) * size,
              0, static_cast<size_t>(size));
}

}  // namespace

void conv2d_weight(const ConvShape& s, const Conv2dWeightArgs& a) {
  if (s.K == 0 || s.C == 0 || s.R == 0 || s.S == 0) return;
  if (s.N == 0 || s.OH == 0 || s.OW == 0) return clear_gradient(s, a);
  if (a.dtype == F32) return gradient_with<BroadcastKernel<false>, float>(s, a);
#if defined(FG_AMX)
  return gradient_with<TileKernel, bf16>(s, a);
#elif defined(__AVX512BF16__)
  return gradient_with<BroadcastKernel<true>, bf16>(s, a);
#else
  return gradient_with<BroadcastKernel<false>, bf16>(s, a);
#endif
}

}  // namespace fg::ISA
