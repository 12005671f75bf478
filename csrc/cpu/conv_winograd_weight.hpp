// The weight gradient in the form of conv_winograd.hpp: per point, dw^ = (A dy A^T)^T (B^T x B), summed over all tiles,
// and one transform G^T dw^ G at the end. As many products as the forward form: 36 for 64 in a 4x4 stride-2 layer.
#pragma once

#include "cpu/conv_weight_rows.hpp"
#include "cpu/conv_winograd.hpp"

namespace fg::ISA {
namespace {

// Tiles whose transformed x and dy a job holds: with 96 outputs and 64 channels 590 KB at 9 points. Both are made anew
// by every job that needs them, which costs about 2 and 5 % of its products; loading and storing the sums costs 4 %.
constexpr int64_t GRADIENT_TILES = 64;

// A job is a pair of strands, a block of channels and a range of outputs, over a split of the tiles.
struct MinimalGradient {
  const Problem* p;  // source: x; M: dy's channels
  TilePair t;
  const float* dy;  // [N][OH][OW][K]
  float* sums;      // [split][job][point][output of the range][channel of the blocks]
  float* taps;      // [K][R * S][C]: dw
  const float* zeros;
  int64_t blocks, ranges, range, jobs, splits;

  int64_t job_floats() const { return t.points() * range * SHARED_COLUMNS; }
  float* sums_of(int64_t split, int64_t job) const { return sums + (split * jobs + job) * job_floats(); }
};

struct GradientJob {
  int a, b;  // strands of the two axes
  int64_t c, width, k, outputs;
};

inline GradientJob gradient_job(const MinimalGradient& g, int64_t index) {
  GradientJob job;
  job.k = index % g.ranges * g.range, job.outputs = least(g.range, g.p->M - job.k);
  index /= g.ranges;
  job.c = index % g.blocks * SHARED_COLUMNS, job.width = least(SHARED_COLUMNS, g.p->C - job.c);
  index /= g.blocks;
  job.a = static_cast<int>(index / g.t.sw.count), job.b = static_cast<int>(index % g.t.sw.count);
  return job;
}

// to[point][k] = A dy A^T for the outputs of a job in one tile.
template <int PH, int PW>
inline void transform_cotangents(const MinimalGradient& g, const GradientJob& job, const TileAt& at, float* to,
                                 int64_t step) {
  const Problem& p = *g.p;
  const float* pixel[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t oh = 2 * at.h + i / 2, ow = 2 * at.w + i % 2;
    const bool inside = oh < g.t.h->count && ow < g.t.w->count;
    pixel[i] = inside ? g.dy + ((at.n * p.OH + oh) * p.OW + ow) * p.M + job.k : g.zeros;
  }
  for (int64_t k = 0; k < job.outputs; k += VF) {
    vf v[PH * PW];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i / 2 * PW + i % 2] = load(pixel[i] + k);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) cotangent_points<PW, 1>(v + i * PW);
#pragma GCC unroll 4
    for (int j = 0; j < PW; ++j) cotangent_points<PH, PW>(v + j);
#pragma GCC unroll 16
    for (int i = 0; i < PH * PW; ++i) store(to + i * step + k, v[i]);
  }
}

// The sums of one job over one split of the tiles.
template <int PH, int PW>
inline void add_tiles(const MinimalGradient& g, int64_t index, int64_t split, float* panel, float* left_rows) {
  constexpr int64_t ROWS = Product::ROWS, COLUMNS = Product::COLUMNS;
  const GradientJob job = gradient_job(g, index);
  float* sums = g.sums_of(split, index);
  const int64_t panel_step = point_step(GRADIENT_TILES, job.width), left_step = point_step(GRADIENT_TILES, g.range);
  const int64_t begin = g.t.tiles * split / g.splits, end = g.t.tiles * (split + 1) / g.splits;
  for (int64_t first = begin; first < end; first += GRADIENT_TILES) {
    const int64_t count = least(GRADIENT_TILES, end - first);
    for (int64_t i = 0; i < count; ++i) {
      const TileAt at = tile_at(g.t, first + i);
      const float* pixel[PH * PW];
      find_pixels<PH, PW>(*g.p, at, g.t.sh.strand[job.a], g.t.sw.strand[job.b], job.c, g.zeros, pixel);
      for (int64_t c = 0; c < job.width; c += COLUMNS) {
        const int64_t width = least(COLUMNS, job.width - c);
        transform_pixels<PH, PW>(pixel, c, width, panel + c * GRADIENT_TILES + i * width, panel_step);
      }
      transform_cotangents<PH, PW>(g, job, at, left_rows + i * g.range, left_step);
    }
    const Run run = {0, count};
    for (int point = 0; point < PH * PW; ++point)
      for (int64_t k = 0; k < job.outputs; k += ROWS) {
        const char* left[ROWS];
        for (int r = 0; r < ROWS; ++r)
          left[r] = reinterpret_cast<const char*>(left_rows + point * left_step + (k + r < job.outputs ? k + r : k));
        for (int64_t c = 0; c < job.width; c += COLUMNS)
          Product::tile(&run, 1, left, g.range * 4, ROWS,
                        reinterpret_cast<const char*>(panel + point * panel_step + c * GRADIENT_TILES), count,
                        static_cast<int>(least(COLUMNS, job.width - c)), sums + (point * g.range + k) * job.width + c,
                        job.width, first > begin);
      }
  }
}

// The splits of a job added in order, and its taps of dw.
template <int PH, int PW>
inline void finish_job(const MinimalGradient& g, int64_t index) {
  const Problem& p = *g.p;
  const GradientJob job = gradient_job(g, index);
  const Strand &sh = g.t.sh.strand[job.a], &sw = g.t.sw.strand[job.b];
  for (int64_t k = 0; k < job.outputs; ++k)
    for (int64_t j = 0; j < job.width; j += VF) {
      vf v[PH * PW];
      for (int i = 0; i < PH * PW; ++i) {
        const int64_t at = (i * g.range + k) * job.width + j;
        v[i] = load(g.sums_of(0, index) + at);
        for (int64_t split = 1; split < g.splits; ++split) v[i] += load(g.sums_of(split, index) + at);
      }
      for (int i = 0; i < PH; ++i) weight_cotangents<PW, 1>(v + i * PW);
      for (int i = 0; i < PW - 1; ++i) weight_cotangents<PH, PW>(v + i);
      for (int r = 0; r < PH - 1; ++r)
        for (int s = 0; s < PW - 1; ++s)
          if (sh.index[r] >= 0 && sw.index[s] >= 0)
            store(g.taps + ((job.k + k) * p.R * p.S + sh.index[r] * p.S + sw.index[s]) * p.C + job.c + j,
                  v[r * PW + s]);
    }
}

// Channels that fill no blocks of 16 are copied into some that do, where that adds at most a third to the products.
constexpr double MOST_PADDING = 1.35;

// `rows` pixels of `channels` as pixels of `wide`, zeros behind.
inline const float* widen_pixels(const void* from, int64_t rows, int64_t channels, int64_t wide, float* to,
                                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const float* pixel = static_cast<const float*>(from) + i * channels;
    for (int64_t c = 0; c < wide; c += VF) {
      const int64_t left = channels - c;
      store(to + i * wide + c, left >= VF ? load(pixel + c)
                               : left > 0 ? load_tail(pixel + c, static_cast<int>(left))
                                          : zero());
    }
  }
  return to;
}

// False where the form does not serve the shape.
inline bool gradient_if_minimal(const ConvShape& s, const Conv2dWeightArgs& a) {
  const int64_t h_bytes = axis_bytes(1, s.R, s.OH), w_bytes = axis_bytes(1, s.S, s.OW);
  const Scratch<char> axes(h_bytes + w_bytes);
  Problem p = {};
  p.source_dtype = p.out_dtype = a.dtype;
  p.weight_dtype = a.dw_dtype;
  p.source = a.x;
  p.N = s.N, p.SH = s.H, p.SW = s.W, p.C = round_up(s.C, 16);
  p.OH = s.OH, p.OW = s.OW, p.M = round_up(s.K, 16);
  p.groups = s.groups, p.R = s.R, p.S = s.S;
  p.h = forward_axis(axes.data, s.H, s.OH, s.R, s.stride_h, s.pad_h, s.dil_h);
  p.w = forward_axis(axes.data + h_bytes, s.W, s.OW, s.S, s.stride_w, s.pad_w, s.dil_w);
  MinimalGradient g;
  if (static_cast<double>(p.C * p.M) > MOST_PADDING * static_cast<double>(s.C * s.K)) return false;
  if (!plan_tiles(p, &g.t)) return false;
  if (g.t.h->taps != s.R || g.t.w->taps != s.S) return false;  // a tap that no output uses has the gradient 0

  constexpr int ROWS = Product::ROWS;
  g.p = &p;
  g.dy = static_cast<const float*>(a.dy);
  const int64_t inputs = s.N * s.H * s.W, outputs = s.N * s.OH * s.OW;
  const Scratch<float> x(p.C == s.C ? 0 : inputs * p.C), dy(p.M == s.K ? 0 : outputs * p.M);
  if (p.C != s.C) p.source = widen_pixels(a.x, inputs, s.C, p.C, x.data, a.threads);
  if (p.M != s.K) g.dy = widen_pixels(a.dy, outputs, s.K, p.M, dy.data, a.threads);
  g.range = least(round_up(p.M, 48), g.t.points() > 9 ? 144 : 288);  // whole vectors and whole rows
  g.blocks = ceil_div(p.C, SHARED_COLUMNS);
  g.ranges = ceil_div(p.M, g.range);
  g.jobs = g.t.sh.count * g.t.sw.count * g.blocks * g.ranges;
  g.splits = least(ceil_div(g.t.tiles, 4 * GRADIENT_TILES), ceil_div(a.threads == 1 ? 1 : 2 * a.threads, g.jobs));
  const int64_t panel = g.t.points() * point_step(GRADIENT_TILES, SHARED_COLUMNS);
  const int64_t left_rows = g.t.points() * point_step(GRADIENT_TILES, g.range) + ROWS;
  const Scratch<float> sums(g.splits * g.jobs * g.job_floats()), taps(p.M * p.R * p.S * p.C);
  const Scratch<float> zeros(most(p.C, p.M)), memory(a.threads * round_up(panel + left_rows, 16));
  std::memset(zeros.data, 0, sizeof(float) * static_cast<size_t>(most(p.C, p.M)));
  g.sums = sums.data, g.taps = taps.data, g.zeros = zeros.data;
#pragma omp parallel num_threads(a.threads)
  {
    float* mine = memory.data + thread_index() * round_up(panel + left_rows, 16);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < g.jobs * g.splits; ++i)
      with_points(g.t.sh.points, g.t.sw.points,
                  [&]<int PH, int PW>() { add_tiles<PH, PW>(g, i % g.jobs, i / g.jobs, mine, mine + panel); });
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < g.jobs; ++i)
      with_points(g.t.sh.points, g.t.sw.points, [&]<int PH, int PW>() { finish_job<PH, PW>(g, i); });
#pragma omp for schedule(static) nowait
    for (int64_t k = 0; k < s.K; ++k) write_row<float>(s, a, k, g.taps + k * p.R * p.S * p.C, p.C);
  }
  return true;
}

}  // namespace
}  // namespace fg::ISA
