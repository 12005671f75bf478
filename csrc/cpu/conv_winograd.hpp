// Fewer multiplications in fp32: minimal filtering (Winograd 1980; Lavin and Gray 2015) of 2 x 2 output tiles.
//
// Per axis, two neighbouring outputs of T neighbouring taps, y_i = sum_j d_{i+j} g_j, take P = T + 1 products instead
// of 2 T, y = A^T [(G g) * (B^T d)] with
//
// clang-format off
//   T  B^T d                                G g                                           A^T m
//   2  (d0 - d1, d1, d1 - d2)               (g0, g0 + g1, g1)                             (m0 + m1, m1 - m2)
//   3  (d0 - d2, d1 + d2, d2 - d1, d1 - d3) (g0, (g0+g1+g2) / 2, (g0-g1+g2) / 2, g2)      (m0 + m1 + m2, m1 - m2 - m3)
// clang-format on
//
// and the gradient of g is G^T [(B^T d) * (A dy)]. A stride-2 convolution is a sum of "strands", the taps that read
// even and odd source positions, each of stride 1; a phase of its adjoint is one strand. So DCGAN's 4x4 stride-2
// layers, both ways, need 36 products where the direct form needs 64 (0.56), 3x3 layers 16 of 36 (0.44), 5x5 stride-2
// layers 64 of 100 forward and 49 of 100 in the adjoint.
//
// Every coefficient is 0, 1, -1 or 1/2, so the transforms round like sums of two to four terms: beside float64 the
// error is 0.6 to 1.2 times the direct form's on the layers above. What it does differently: an infinite source makes
// NaN of its tile's other outputs too. The price is traffic: a tile's transformed source is 2.25 times its pixels (T =
// 2), kept in cache by working on chunks of tiles. One thread, CPU time, batch 64: 4x4 stride-2 layers 1.3 to 1.45
// times, 3x3 layers 1.7 times as fast as the direct form forward and in the adjoint, weight gradients 1.15 to 1.7.
#pragma once

#include "cpu/activation.hpp"
#include "cpu/conv_geometry.hpp"
#include "cpu/conv_micro.hpp"
#include "cpu/conv_pack.hpp"

namespace fg::ISA {
namespace {

using Product = BroadcastKernel<false>;

// Column blocks that share one reading of what was transformed: 64 columns in every table. With AVX2, whose blocks have
// 16, one block at a time would read the source four times as often, and repeat the transforms of the weight gradient.
constexpr int64_t SHARED_COLUMNS = 64;
constexpr int64_t SHARED_BLOCKS = SHARED_COLUMNS / Product::COLUMNS;

struct Strand {
  int64_t first;     // source position of tap 0 at q = 0
  int64_t index[3];  // of the taps along R or S; -1: no such tap, its weight is 0
};

// One phase of an axis as minimal filtering.
struct Strands {
  int points;  // 2, 3 or 4
  int count;   // strands
  Strand strand[2];
};

// False where a strand's taps are not neighbours or too many.
inline bool find_strands(const AxisPhase& phase, int64_t step, Strands& s) {
  if (phase.taps < 1 || phase.count < 2 || step > 2) return false;
  int64_t length[2] = {};
  s.count = 0;
  for (int64_t residue = 0; residue < step; ++residue) {
    Strand& strand = s.strand[s.count];
    int64_t taps = 0, last = 0;
    for (int64_t t = 0; t < phase.taps; ++t) {
      const AxisTap& tap = phase.tap[t];
      if (((tap.offset % step) + step) % step != residue) continue;
      if (taps == 3 || (taps && tap.offset != last + step)) return false;
      if (!taps) strand.first = tap.offset;
      strand.index[taps++] = tap.index;
      last = tap.offset;
    }
    if (!taps) continue;
    for (int64_t t = taps; t < 3; ++t) strand.index[t] = -1;
    length[s.count++] = taps;
  }
  s.points = static_cast<int>(most(length[0], length[1])) + 1;
  return true;
}

// ------------------------------------------------------------------------------------------------ the transforms

// In one dimension: element i of a vector of them is at v[i * S].

template <int P, int S>
inline void source_points(vf* v) {  // B^T
  if constexpr (P == 3) {
    v[0] = v[0] - v[S];
    v[2 * S] = v[S] - v[2 * S];
  } else if constexpr (P == 4) {
    const vf d1 = v[S], d2 = v[2 * S];
    v[0] = v[0] - d2;
    v[S] = d1 + d2;
    v[2 * S] = d2 - d1;
    v[3 * S] = d1 - v[3 * S];
  }
}

template <int P, int S>
inline void weight_points(vf* v) {  // G: P - 1 taps to P points
  if constexpr (P == 2) {
    v[S] = v[0];
  } else if constexpr (P == 3) {
    v[2 * S] = v[S];
    v[S] = v[0] + v[S];
  } else {
    const vf half = set1(0.5f), ends = (v[0] + v[2 * S]) * half, middle = v[S] * half;
    v[3 * S] = v[2 * S];
    v[S] = ends + middle;
    v[2 * S] = ends - middle;
  }
}

template <int P, int S>
inline void outputs_of(vf* v) {  // A^T: P points to 2 outputs
  if constexpr (P == 3) {
    v[0] = v[0] + v[S];
    v[S] = v[S] - v[2 * S];
  } else if constexpr (P == 4) {
    v[0] = v[0] + (v[S] + v[2 * S]);
    v[S] = (v[S] - v[2 * S]) - v[3 * S];
  }
}

template <int P, int S>
inline void cotangent_points(vf* v) {  // A: 2 outputs to P points
  const vf first = v[0], second = v[S];
  if constexpr (P == 3) {
    v[S] = first + second;
    v[2 * S] = zero() - second;
  } else if constexpr (P == 4) {
    v[S] = first + second;
    v[2 * S] = first - second;
    v[3 * S] = zero() - second;
  }
}

template <int P, int S>
inline void weight_cotangents(vf* v) {  // G^T: P points to P - 1 taps
  if constexpr (P == 2) {
    v[0] = v[0] + v[S];
  } else if constexpr (P == 3) {
    v[0] = v[0] + v[S];
    v[S] = v[S] + v[2 * S];
  } else {
    const vf half = set1(0.5f), sum = (v[S] + v[2 * S]) * half;
    v[0] = v[0] + sum;
    v[S] = (v[S] - v[2 * S]) * half;
    v[2 * S] = sum + v[3 * S];
  }
}

// Calls f.template operator()<PH, PW>() for a pair's numbers of points.
template <class F>
inline void with_points(int ph, int pw, const F& f) {
  const auto columns = [&]<int PH>() {
    if (pw == 2) return f.template operator()<PH, 2>();
    if (pw == 3) return f.template operator()<PH, 3>();
    return f.template operator()<PH, 4>();
  };
  if (ph == 2) return columns.template operator()<2>();
  if (ph == 3) return columns.template operator()<3>();
  return columns.template operator()<4>();
}

// ------------------------------------------------------------------------------------------------ geometry

// A phase pair: an independent product per point, its strands' channels side by side.
struct TilePair {
  const AxisPhase *h, *w;
  Strands sh, sw;
  int64_t tiles_h, tiles_w, tiles;
  int64_t depth;   // strands * C: length of a product
  int64_t offset;  // of its packed weights, in floats

  int points() const { return sh.points * sw.points; }
};

inline bool find_tile_pair(const Problem& p, int64_t index, TilePair& t) {
  t.h = &p.h.phase[index / p.w.phases];
  t.w = &p.w.phase[index % p.w.phases];
  if (!find_strands(*t.h, p.h.step, t.sh) || !find_strands(*t.w, p.w.step, t.sw)) return false;
  t.tiles_h = ceil_div(t.h->count, 2), t.tiles_w = ceil_div(t.w->count, 2);
  t.tiles = p.N * t.tiles_h * t.tiles_w;
  t.depth = t.sh.count * t.sw.count * p.C;
  return true;
}

constexpr int MAX_TILE_PAIRS = 4;     // stride 2 both ways
constexpr int64_t MIN_TILES = 128;    // fewer do not pay for transforming the weights: break-even at about 33 a thread
constexpr int64_t MIN_CHANNELS = 17;  // fewer were not measured

// What the transforms cost beside the products: OVERHEAD / columns for the source's, which all columns share, and
// OVERHEAD / depth for the outputs'. Fitted to layers of 17 to 48 channels (one thread of an Intel Xeon, family 6 model
// 207): at 32 channels the transforms of 3x3 and of the adjoint of 4x4 stride 2 took as long as the products with
// AVX-512, and half as long held to AVX2. So that adjoint stays direct below 41 channels with AVX-512 and 23 with AVX2.
constexpr double OVERHEAD = VF == 16 ? 16.0 : 9.0;

// Columns of the packed weights and the products; those past M are zero.
inline int64_t columns_of(const Problem& p) { return round_up(p.M, Product::GRAIN); }

// Whether the form serves the problem, saves at least 30 % of the products and more than its transforms cost; fills in
// the pairs.
inline bool plan_tiles(const Problem& p, TilePair* pair) {
  const int64_t pairs = p.h.phases * p.w.phases;
  if (p.source_dtype != F32 || p.weight_dtype != F32 || p.out_dtype != F32 || p.groups != 1) return false;
  if (pairs > MAX_TILE_PAIRS || p.C < MIN_CHANNELS || p.M < MIN_CHANNELS) return false;
  double ours = 0, direct = 0;
  int64_t offset = 0, depth = INT64_MAX;
  for (int64_t i = 0; i < pairs; ++i) {
    if (!find_tile_pair(p, i, pair[i]) || pair[i].tiles < MIN_TILES) return false;
    ours += static_cast<double>(pair[i].tiles * pair[i].points() * pair[i].sh.count * pair[i].sw.count);
    direct += static_cast<double>(p.N * pair[i].h->count * pair[i].w->count * pair[i].h->taps * pair[i].w->taps);
    depth = least(depth, pair[i].depth);
    pair[i].offset = offset;
    offset += pair[i].points() * pair[i].depth * columns_of(p);
  }
  const double overhead = OVERHEAD / static_cast<double>(columns_of(p)) + OVERHEAD / static_cast<double>(depth);
  return ours < 0.7 * direct && ours * (1.0 + overhead) < direct;
}

struct TileAt {
  int64_t n, h, w;
};

inline TileAt tile_at(const TilePair& t, int64_t index) {
  return {index / t.tiles_w / t.tiles_h, index / t.tiles_w % t.tiles_h, index % t.tiles_w};
}

// The PH x PW source pixels of a tile in one strand pair, zeros outside the image; `channel` is the first wanted.
template <int PH, int PW>
inline void find_pixels(const Problem& p, const TileAt& at, const Strand& sh, const Strand& sw, int64_t channel,
                        const float* zeros, const float** pixel) {
  const float* image = static_cast<const float*>(p.source) + at.n * p.SH * p.SW * p.C + channel;
  for (int i = 0; i < PH; ++i) {
    const int64_t h = (2 * at.h + i) * p.h.step + sh.first;
    for (int j = 0; j < PW; ++j) {
      const int64_t w = (2 * at.w + j) * p.w.step + sw.first;
      const bool inside = h >= 0 && h < p.SH && w >= 0 && w < p.SW;
      pixel[i * PW + j] = inside ? image + (h * p.SW + w) * p.C : zeros;
    }
  }
}

// to[point][c] = B^T d B for `channels` channels of a tile, from channel `first` of its pixels on. It writes whole
// vectors: what lies behind a point's channels is written later, or is the cache line between points.
template <int PH, int PW>
inline void transform_pixels(const float* const* pixel, int64_t first, int64_t channels, float* to,
                             int64_t point_step) {
  for (int64_t c = 0; c < channels; c += VF) {
    const int lanes = static_cast<int>(least(VF, channels - c));
    vf v[PH * PW];
    if (lanes == VF) {
#pragma GCC unroll 16
      for (int i = 0; i < PH * PW; ++i) v[i] = load(pixel[i] + first + c);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < PH * PW; ++i) v[i] = load_tail(pixel[i] + first + c, lanes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < PH; ++i) source_points<PW, 1>(v + i * PW);
#pragma GCC unroll 4
    for (int j = 0; j < PW; ++j) source_points<PH, PW>(v + j);
#pragma GCC unroll 16
    for (int i = 0; i < PH * PW; ++i) store(to + i * point_step + c, v[i]);
  }
}

// ------------------------------------------------------------------------------------------------ weights

// Packed weights of a pair: [point][column block][strand, channel][column].
FG_NOINLINE void emit_points(const Problem& p, const TilePair& t, const Panels<Product>& panels, const PackPiece& piece,
                             const float* stage, float* packed) {
  const int64_t depth = piece.c1 - piece.c0;
  int64_t block = 0;
  while (panels.first_column(block + 1) <= piece.column) ++block;
  const int64_t first = panels.first_column(block), width = panels.width(block);
  with_points(t.sh.points, t.sw.points, [&]<int PH, int PW>() {
    for (int a = 0; a < t.sh.count; ++a)
      for (int b = 0; b < t.sw.count; ++b)
        for (int64_t c = piece.c0; c < piece.c1; ++c) {
          vf v[PH * PW];
          for (int i = 0; i < PH - 1; ++i)
            for (int j = 0; j < PW - 1; ++j) {
              const int64_t r = t.sh.strand[a].index[i], s = t.sw.strand[b].index[j];
              const bool there = r >= 0 && s >= 0;
              v[i * PW + j] = there ? load(stage + ((r * p.S + s) * depth + c - piece.c0) * VF) : zero();
            }
          for (int i = 0; i < PH - 1; ++i) weight_points<PW, 1>(v + i * PW);
          for (int j = 0; j < PW; ++j) weight_points<PH, PW>(v + j);
          const int64_t row = (a * t.sw.count + b) * p.C + c;
          float* to = packed + t.offset + first * t.depth + row * width + piece.column - first;
          for (int i = 0; i < PH * PW; ++i) store(to + i * t.depth * columns_of(p), v[i]);
        }
  });
}

// ------------------------------------------------------------------------------------------------ computing

struct TileWork {
  const Problem* p;
  Panels<Product> panels;
  const float* packed;
  const float* zeros;
  int64_t chunk;  // tiles whose transformed source is held together; a multiple of the kernel's rows
};

// Floats from a point to the next: a cache line more than the rows, or all points would fall into the same cache sets.
inline int64_t point_step(int64_t rows, int64_t width) { return rows * width + 16; }

inline int64_t source_floats(const TilePair& t, int64_t chunk) { return t.points() * point_step(chunk, t.depth); }
inline int64_t product_floats(const TilePair& t, int64_t chunk) {
  return t.points() * point_step(chunk, SHARED_COLUMNS);
}

// Two outputs per axis of each tile of a column block, with bias and activation.
template <int PH, int PW>
inline void store_tiles(const TileWork& work, const TilePair& t, int64_t first, int64_t count, int64_t column,
                        int64_t width, const float* product) {
  const Problem& p = *work.p;
  const int64_t step = point_step(work.chunk, width);
  for (int64_t i = 0; i < count; ++i, product += width) {
    const TileAt at = tile_at(t, first + i);
    float* to[4];
    for (int k = 0; k < 4; ++k) {
      const int64_t qh = 2 * at.h + k / 2, qw = 2 * at.w + k % 2;
      const int64_t oh = t.h->first_out + qh * p.h.out_step, ow = t.w->first_out + qw * p.w.out_step;
      const bool inside = qh < t.h->count && qw < t.w->count;
      to[k] = inside ? static_cast<float*>(p.out) + ((at.n * p.OH + oh) * p.OW + ow) * p.M + column : nullptr;
    }
    for (int64_t j = 0; j < width; j += VF) {
      vf v[PH * PW];
#pragma GCC unroll 16
      for (int k = 0; k < PH * PW; ++k) v[k] = load(product + k * step + j);
#pragma GCC unroll 4
      for (int k = 0; k < PH; ++k) outputs_of<PW, 1>(v + k * PW);
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) outputs_of<PH, PW>(v + k);
      const int lanes = static_cast<int>(least(VF, p.M - column - j));
      const vf bias = p.bias ? load_some(p.bias + column + j, lanes) : zero();
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        if (to[k]) store_some(to[k] + j, activate(v[k / 2 * PW + k % 2] + bias, p.act, p.slope), lanes);
    }
  }
}

template <int PH, int PW>
inline void compute_tiles(const TileWork& work, const TilePair& t, int64_t chunk, float* source, float* product) {
  constexpr int ROWS = Product::ROWS;
  const Problem& p = *work.p;
  const int64_t first = chunk * work.chunk, count = least(work.chunk, t.tiles - first);
  const int64_t source_step = point_step(work.chunk, t.depth);
  for (int64_t i = 0; i < count; ++i) {
    const TileAt at = tile_at(t, first + i);
    for (int a = 0; a < t.sh.count; ++a)
      for (int b = 0; b < t.sw.count; ++b) {
        const float* pixel[PH * PW];
        find_pixels<PH, PW>(p, at, t.sh.strand[a], t.sw.strand[b], 0, work.zeros, pixel);
        transform_pixels<PH, PW>(pixel, 0, p.C, source + i * t.depth + (a * t.sw.count + b) * p.C, source_step);
      }
  }
  const Run run = {0, t.depth};
  for (int64_t block0 = 0; block0 < work.panels.blocks; block0 += SHARED_BLOCKS) {
    const int64_t block1 = least(work.panels.blocks, block0 + SHARED_BLOCKS);
    const int64_t column = work.panels.first_column(block0), width = work.panels.first_column(block1) - column;
    const int64_t product_step = point_step(work.chunk, width);
    for (int point = 0; point < PH * PW; ++point)
      for (int64_t block = block0; block < block1; ++block) {
        const int64_t at = work.panels.first_column(block);
        const float* panel = work.packed + t.offset + (point * work.panels.columns + at) * t.depth;
        for (int64_t i = 0; i < count; i += ROWS) {
          const char* left[ROWS];
          for (int r = 0; r < ROWS; ++r) {
            const int64_t row = i + r < count ? i + r : i;
            left[r] = reinterpret_cast<const char*>(source + point * source_step + row * t.depth);
          }
          Product::tile(&run, 1, left, 4, ROWS, reinterpret_cast<const char*>(panel), t.depth,
                        static_cast<int>(work.panels.width(block)),
                        product + point * product_step + i * width + at - column, width, false);
        }
      }
    store_tiles<PH, PW>(work, t, first, count, column, width, product);
  }
}

// Tiles of a chunk. Half a megabyte of transformed source stays in the second-level cache; never fewer than 96 tiles,
// because they share each panel that they read: 48 FLOP for a byte of weights, 5 GB/s a core from the third level.
// Chunks are a multiple of the threads.
inline int64_t chunk_tiles(const TilePair* pair, int64_t pairs, int threads) {
  constexpr int64_t ROWS = Product::ROWS;
  int64_t tiles = 0, bytes = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    tiles = most(tiles, pair[i].tiles);
    bytes = most(bytes, pair[i].points() * pair[i].depth * 4);
  }
  const int64_t fit = most(16 * ROWS, (int64_t{1} << 19) / bytes);
  const int64_t chunks = pairs % threads ? round_up(ceil_div(tiles, fit), threads) : ceil_div(tiles, fit);
  return round_up(ceil_div(tiles, chunks), ROWS);
}

inline void compute_minimal(const Problem& p, const TilePair* pair) {
  const int64_t pairs = p.h.phases * p.w.phases;
  TileWork work;
  work.p = &p;
  work.panels.columns = columns_of(p);
  work.panels.blocks = ceil_div(work.panels.columns, Product::COLUMNS);
  work.panels.merged = false;
  work.chunk = chunk_tiles(pair, pairs, p.threads);
  int64_t packed_floats = 0, source = 0, product = 0, chunks = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    packed_floats += pair[i].points() * pair[i].depth * work.panels.columns;
    source = most(source, source_floats(pair[i], work.chunk));
    product = most(product, product_floats(pair[i], work.chunk));
    chunks = most(chunks, ceil_div(pair[i].tiles, work.chunk));
  }
  const int64_t own = round_up(source, 16) + round_up(product, 16) + pack_stage_floats(p, work.panels);
  Packed<float> packed(packed_floats);
  const Scratch<float> memory(p.threads * round_up(own, 16)), zeros(p.C);
  const Scratch<TapSlot> slot(p.R * p.S);
  for (int64_t i = 0; i < p.R * p.S; ++i) slot.data[i] = {0, 0};
  std::memset(zeros.data, 0, sizeof(float) * static_cast<size_t>(p.C));
  work.packed = packed.data;
  work.zeros = zeros.data;
  const int64_t depth = pack_depth(p, work.panels), ranges = ceil_div(p.C, depth);
  const int64_t pieces = packed.made() ? 0 : work.panels.columns / VF * ranges;
#pragma omp parallel num_threads(p.threads)
  {
    float* mine = memory.data + thread_index() * round_up(own, 16);
    float *products = mine + round_up(source, 16), *stage = products + round_up(product, 16);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < pieces; ++i) {
      const PackPiece piece = {0, i / ranges * VF, i % ranges * depth, least(p.C, (i % ranges + 1) * depth)};
      stage_weights<float>(p, slot.data, piece, stage);
      for (int64_t k = 0; k < pairs; ++k) emit_points(p, pair[k], work.panels, piece, stage, packed.data);
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t j = 0; j < chunks * pairs; ++j) {  // the pairs of the same pixels after each other
      const TilePair& t = pair[j % pairs];
      if (j / pairs * work.chunk >= t.tiles) continue;
      with_points(t.sh.points, t.sw.points,
                  [&]<int PH, int PW>() { compute_tiles<PH, PW>(work, t, j / pairs, mine, products); });
    }
  }
  packed.keep();
}

}  // namespace
}  // namespace fg::ISA
