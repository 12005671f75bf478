// conv2d_weight: dw[k,c,r,s] = sum over n, oh, ow of dy[n,oh,ow,k] * x[n, oh*stride - pad + r*dil, ...][c].
//
// One product dw[k][j] = sum over pixels dy[p][k] * X[p][j] with columns j = (tap, channel), on the micro-kernels of
// the other two directions: dy gives their left rows, a pixel to the next, and X, gathered 256 pixels at a time, their
// panels. Column blocks are shared out among the threads; where there are too few, the pixels are split too, and
// the parts are added in a fixed order.
#include "cpu/conv_amx.hpp"
#include "cpu/conv_geometry.hpp"
#include "cpu/conv_micro.hpp"
#include "cpu/conv_weight_rows.hpp"
#if !defined(FG_BELOW)
#include "cpu/conv_winograd_weight.hpp"
#endif

namespace fg::ISA {

void conv2d_weight(const ConvShape& s, const Conv2dWeightArgs& a);

namespace {

// A panel has 128 units: 32 KB with 64 columns, and long enough that loading and storing a tile's 24 accumulators costs
// only 6 % of its products. 64 and 256 units were slower.
constexpr int64_t CHUNK_UNITS = 128;
constexpr int64_t MAX_CHUNK = 2 * CHUNK_UNITS;  // pixels
constexpr int64_t MAX_TOGETHER = 16;            // column blocks

struct Gradient {
  const ConvShape* s;
  const Conv2dWeightArgs* a;
  int64_t C, K;             // per group
  int64_t pixels;           // N * OH * OW
  bool batch_fastest;       // pixels ordered (position, image) instead of (image, position)
  int64_t chunk, chunks;    // pixels of a panel
  int64_t units;            // of a panel
  int64_t columns, blocks;  // R * S * C rounded up to the kernel's grain
  int64_t rows;             // K rounded up to the kernel's rows
  int64_t together;         // column blocks of one job
  int64_t splits;           // of the pixels
  const char* left;         // dy, in place or rearranged; null: each job rearranges its chunks
};

// Share of the products whose x lies in the padding.
inline double padding_share(const ConvShape& s) {
  const auto inside = [](int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    int64_t used = 0;
    for (int64_t o = 0; o < out; ++o)
      for (int64_t r = 0; r < kernel; ++r) {
        const int64_t i = o * stride - pad + r * dilation;
        used += i >= 0 && i < size;
      }
    return static_cast<double>(used) / static_cast<double>(out * kernel);
  };
  return 1.0 -
         inside(s.H, s.OH, s.R, s.stride_h, s.pad_h, s.dil_h) * inside(s.W, s.OW, s.S, s.stride_w, s.pad_w, s.dil_w);
}

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

// VF lanes of one unit: a widened or plain fp32 row, or two bf16 rows interleaved.
template <bool PAIRS, class T>
inline vf unit_lanes(const T* first, const T* second) {
  if constexpr (PAIRS) return interleave(load_half(first), load_half(second));
  return load(first);
}

template <bool PAIRS, class T>
inline vf unit_lanes(const T* first, const T* second, int lanes) {
  if constexpr (PAIRS) return interleave(load_half_tail(first, lanes), load_half_tail(second, lanes));
  return load_tail(first, lanes);
}

// One chunk of dy as units: [unit][k of all groups], or for AMX, whose left rows run along pixels, [k][unit].
template <class K, class T>
FG_NOINLINE void rearrange_chunk(const Gradient& g, int64_t chunk, const T* zeros, float* to) {
  constexpr bool PAIRS = K::PER_UNIT == 2;
  const ConvShape& s = *g.s;
  const int64_t first = chunk * g.chunk, end = least(g.pixels, first + g.chunk);
  const T* row[MAX_CHUNK + 1];
  Pixel at = pixel_at(g, first);
  for (int64_t p = first; p < first + g.chunk; ++p) {
    row[p - first] = p < end ? static_cast<const T*>(g.a->dy) + ((at.n * s.OH + at.oh) * s.OW + at.ow) * s.K : zeros;
    if (p < end) advance(g, at);
  }
  if constexpr (K::RUN_UNITS == 1) {
    for (int64_t u = 0; u < g.units; ++u, to += s.K) {
      const T *a = row[u * K::PER_UNIT], *b = row[u * K::PER_UNIT + PAIRS];
      int64_t k = 0;
      for (; k + VF <= s.K; k += VF) store(to + k, unit_lanes<PAIRS>(a + k, b + k));
      const int rest = static_cast<int>(s.K - k);
      if (rest) store_tail(to + k, unit_lanes<PAIRS>(a + k, b + k, rest), rest);
    }
  } else {
    for (int64_t u = 0; u < g.units; u += VF)
      for (int64_t k = 0; k < s.K; k += VF) {
        const int lanes = static_cast<int>(least(VF, s.K - k));
        vf v[VF];
        for (int64_t i = 0; i < VF; ++i) {
          const T *a = row[(u + i) * K::PER_UNIT] + k, *b = row[(u + i) * K::PER_UNIT + PAIRS] + k;
          v[i] = lanes == VF ? unit_lanes<PAIRS>(a, b) : unit_lanes<PAIRS>(a, b, lanes);
        }
        transpose(v);
        for (int i = 0; i < lanes; ++i) store(to + (k + i) * g.units + u, v[i]);
      }
  }
}

// A stretch of a block's columns that is contiguous in x at every pixel: channels of one tap, or, where C is small and
// the taps of a row are neighbours in memory, several taps of that row.
struct Segment {
  int64_t column, count;
  int64_t dh, dw;  // of its first tap
  int64_t taps;    // touched
  int64_t offset;  // from pixel (oh * stride - pad, ow * stride - pad) to its first element
  int64_t in_tap;  // elements of the first tap before it
};

constexpr int MAX_SEGMENTS = 64;  // a block has at most 64 columns

inline int segments_of(const Gradient& g, int64_t group, int64_t j0, int64_t width, Segment* segment) {
  const ConvShape& s = *g.s;
  const bool join = s.groups == 1 && s.dil_w == 1 && g.C < 16;
  const int64_t j1 = least(s.R * s.S * g.C, j0 + width);
  int count = 0;
  for (int64_t j = j0; j < j1; j += segment[count++].count) {
    const int64_t tap = j / g.C, c = j % g.C, r = tap / s.S, q = tap % s.S;
    Segment& a = segment[count];
    a.column = j - j0;
    a.count = least(j1 - j, (join ? (s.S - q) * g.C : g.C) - c);
    a.dh = r * s.dil_h;
    a.dw = q * s.dil_w;
    a.taps = ceil_div(c + a.count, g.C);
    a.offset = (a.dh * s.W + a.dw) * s.C + group * g.C + c;
    a.in_tap = c;
  }
  return count;
}

// Where the pixels of a chunk lie in x.
struct ChunkPixels {
  int32_t ih[MAX_CHUNK], iw[MAX_CHUNK];  // may lie in the padding
  int64_t at[MAX_CHUNK];                 // element of (ih, iw), channel 0
};

inline void find_pixels(const Gradient& g, int64_t first, int64_t count, ChunkPixels& px) {
  const ConvShape& s = *g.s;
  Pixel p = pixel_at(g, first);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t ih = p.oh * s.stride_h - s.pad_h, iw = p.ow * s.stride_w - s.pad_w;
    px.ih[i] = static_cast<int32_t>(ih);
    px.iw[i] = static_cast<int32_t>(iw);
    px.at[i] = ((p.n * s.H + ih) * s.W + iw) * s.C;
    advance(g, p);
  }
}

// The pixels [0, count) of a chunk of which some tap of the block lies inside x, as runs of units. In (image,
// position) order that is all of them; in (position, image) order whole positions fall out.
template <class K>
inline int useful_runs(const Gradient& g, const Segment* segment, int segments, int64_t first, int64_t count,
                       Run* run) {
  const ConvShape& s = *g.s;
  const int64_t units = round_up(ceil_div(count, K::PER_UNIT), K::RUN_UNITS);
  if (!g.batch_fastest) {
    run[0] = {0, units};
    return 1;
  }
  int runs = 0;
  for (int64_t p = first, next; p < first + count; p = next) {
    next = least(first + count, (p / s.N + 1) * s.N);
    const int64_t oh = p / s.N / s.OW, ow = p / s.N % s.OW;
    bool used = false;
    for (int i = 0; i < segments && !used; ++i) {
      const int64_t ih = oh * s.stride_h - s.pad_h + segment[i].dh, iw = ow * s.stride_w - s.pad_w + segment[i].dw;
      used = ih >= 0 && ih < s.H && iw + segment[i].taps > 0 && iw < s.W;
    }
    if (!used) continue;
    const int64_t from = (p - first) / K::PER_UNIT, length = (next - p) / K::PER_UNIT;
    if (runs > 0 && run[runs - 1].row + run[runs - 1].units == from)
      run[runs - 1].units += length;
    else
      run[runs++] = {from, length};
  }
  return runs;
}

// panel[unit][column of the segment], for the units of the runs.
template <class K, class T>
FG_NOINLINE void gather_segment(const Gradient& g, const Segment& segment, const ChunkPixels& px, int64_t count,
                                const Run* run, int runs, int64_t width, const T* zeros, T* edges, float* panel) {
  constexpr bool PAIRS = K::PER_UNIT == 2;
  const ConvShape& s = *g.s;
  const T* x = static_cast<const T*>(g.a->x) + segment.offset;
  const int32_t dh = static_cast<int32_t>(segment.dh), dw = static_cast<int32_t>(segment.dw);
  const uint32_t H = static_cast<uint32_t>(s.H), W = static_cast<uint32_t>(s.W);
  const int32_t more = static_cast<int32_t>(segment.taps - 1);
  const T* from[CHUNK_UNITS * K::PER_UNIT];
  for (int t = 0; t < runs; ++t) {
    const int64_t begin = run[t].row * K::PER_UNIT, units = run[t].units;
    const int64_t stop = begin + units * K::PER_UNIT, real = least(stop, count);
    int32_t clipped = 0;  // rows of taps of which some lie in the padding
    for (int64_t i = begin; i < real; ++i) {
      const int32_t row = static_cast<uint32_t>(px.ih[i] + dh) < H;
      const int32_t whole =
          (static_cast<uint32_t>(px.iw[i] + dw) < W) & (static_cast<uint32_t>(px.iw[i] + dw + more) < W);
      from[i] = row & whole ? x + px.at[i] : zeros;
      clipped |= row & ~whole;
    }
    for (int64_t i = real; i < stop; ++i) from[i] = zeros;
    for (int64_t i = begin; more > 0 && (clipped & 1) && i < real; ++i) {
      if (from[i] != zeros || static_cast<uint32_t>(px.ih[i] + dh) >= H) continue;
      T* copy = edges + i * K::COLUMNS;
      const int64_t left = px.iw[i] + dw;  // column of the first tap
      const int64_t e0 = left < 0 ? least(segment.count, -left * g.C - segment.in_tap) : 0;
      const int64_t e1 = most(e0, least(segment.count, (s.W - left) * g.C - segment.in_tap));
      for (int64_t e = 0; e < e0; ++e) copy[e] = zeros[0];
      for (int64_t e = e0; e < e1; ++e) copy[e] = x[px.at[i] + e];
      for (int64_t e = e1; e < segment.count; ++e) copy[e] = zeros[0];
      from[i] = copy;
    }
    float* to = panel + run[t].row * width + segment.column;
    const int64_t whole = segment.count / VF * VF;
    const int rest = static_cast<int>(segment.count - whole);
    if (segment.count == 4 * VF) {
      for (int64_t u = 0; u < units; ++u, to += width) {
        const T* a = from[begin + u * K::PER_UNIT];
        const T* b = from[begin + u * K::PER_UNIT + PAIRS];
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4 * VF; j += VF) store(to + j, unit_lanes<PAIRS>(a + j, b + j));
      }
      continue;
    }
    for (int64_t u = 0; u < units; ++u, to += width) {
      const T* a = from[begin + u * K::PER_UNIT];
      const T* b = from[begin + u * K::PER_UNIT + PAIRS];
      for (int64_t j = 0; j < whole; j += VF) store(to + j, unit_lanes<PAIRS>(a + j, b + j));
      if (rest) store_tail(to + whole, unit_lanes<PAIRS>(a + whole, b + whole, rest), rest);
    }
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

// A thread's own memory.
template <class K, class T>
struct Own {
  ChunkPixels pixels;
  T edges[CHUNK_UNITS * K::PER_UNIT * K::COLUMNS];
  alignas(64) float panel[CHUNK_UNITS * K::COLUMNS];
};

// Fetches a contiguous stretch of memory into the second-level cache, a few lines at a time beside other work. The
// tiles read dy with a stride of K elements: from memory that runs at a quarter of its bandwidth (6 of 25 GB/s where
// this was measured), from the second-level cache at full speed.
struct Fetch {
  const char* at;
  const char* end;
  int64_t bytes;  // per call

  static Fetch spread(const char* from, const char* to, int64_t calls) { return {from, to, (to - from) / calls + 64}; }

  void some() {
    const char* stop = at + bytes < end ? at + bytes : end;
    for (; at < stop; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// The stretch of x that the columns j0 to j1 read at the pixels of a whole chunk in (image, position) order.
template <class T>
inline Fetch fetch_x(const Gradient& g, int64_t first, int64_t j0, int64_t j1, int64_t calls) {
  const ConvShape& s = *g.s;
  const auto element = [&](int64_t pixel, int64_t j) {
    const Pixel p = pixel_at(g, pixel);
    const int64_t ih = p.oh * s.stride_h - s.pad_h + j / g.C / s.S * s.dil_h, iw = p.ow * s.stride_w;
    return most(0, least(s.N * s.H * s.W, (p.n * s.H + ih) * s.W + iw)) * s.C;
  };
  const T* x = static_cast<const T*>(g.a->x);
  const int64_t from = element(first, j0), to = most(from, element(first + g.chunk - 1, j1));
  return Fetch::spread(reinterpret_cast<const char*>(x + from), reinterpret_cast<const char*>(x + to), calls);
}

// One block of columns, over one chunk of pixels.
template <class K, class T>
inline bool add_chunk(const Gradient& g, int64_t split, int64_t group, int64_t block, int64_t chunk, bool started,
                      const char* dy, const T* zeros, Own<K, T>& own, float* sums, Fetch& next_dy, Fetch& next_x) {
  const ConvShape& s = *g.s;
  const int64_t j0 = first_column<K>(g, block), width = first_column<K>(g, block + 1) - j0;
  const int64_t first = chunk * g.chunk, count = least(g.chunk, g.pixels - first);
  Segment segment[MAX_SEGMENTS];
  const int segments = segments_of(g, group, j0, width, segment);
  Run run[CHUNK_UNITS];
  const int runs = useful_runs<K>(g, segment, segments, first, count, run);
  if (runs == 0) return started;
  for (int i = 0; i < segments; ++i)
    gather_segment<K, T>(g, segment[i], own.pixels, count, run, runs, width, zeros, own.edges, own.panel);
  float* out = sums_of<K>(g, sums, split, group, block);
  const char* left[CHUNK_UNITS * K::ROWS];
  for (int64_t k = 0; k < g.K; k += K::ROWS) {
    const int64_t rows = least(K::ROWS, g.K - k);
    for (int t = 0; t < runs; ++t)
      for (int64_t i = 0; i < K::ROWS; ++i) {
        const int64_t row = group * g.K + k + (i < rows ? i : 0);
        left[t * K::ROWS + i] = dy + (K::RUN_UNITS > 1 ? row * g.units + run[t].row : run[t].row * s.K + row) * 4;
      }
    next_dy.some();
    next_x.some();
    K::tile(run, runs, left, s.K * 4, static_cast<int>(rows), reinterpret_cast<const char*>(own.panel), g.units,
            static_cast<int>(width), out + k * width, width, started);
  }
  return true;
}

template <class K, class T>
inline void add_up(const Gradient& g, int64_t split, int64_t group, int64_t part, const T* zeros, Own<K, T>& own,
                   float* units, float* sums) {
  const ConvShape& s = *g.s;
  const int64_t block0 = part * g.together, block1 = least(g.blocks, block0 + g.together);
  const int64_t j_first = first_column<K>(g, block0), j_last = least(first_column<K>(g, block1), s.R * s.S * g.C) - 1;
  bool started[MAX_TOGETHER] = {};
  std::memset(own.panel, 0, sizeof own.panel);  // columns past the last are never written, but must not be denormals
  const int64_t from = g.chunks * split / g.splits, to = g.chunks * (split + 1) / g.splits;
  for (int64_t chunk = from; chunk < to; ++chunk) {
    const int64_t first = chunk * g.chunk, chunk_bytes = g.units * s.K * 4;
    const char* dy = g.left ? g.left + chunk * chunk_bytes : reinterpret_cast<const char*>(units);
    if (!g.left) rearrange_chunk<K, T>(g, chunk, zeros, units);
    const int64_t tiles = (block1 - block0) * ceil_div(g.K, K::ROWS);
    Fetch next_dy = {dy, dy, 0}, next_x = {dy, dy, 0};
    if (chunk + 2 < g.chunks) {
      if (g.left) next_dy = Fetch::spread(dy + chunk_bytes, dy + 2 * chunk_bytes, tiles);
      if (!g.batch_fastest) next_x = fetch_x<T>(g, first + g.chunk, j_first, j_last, tiles);
    }
    find_pixels(g, first, least(g.chunk, g.pixels - first), own.pixels);
    for (int64_t b = block0; b < block1; ++b)
      started[b - block0] =
          add_chunk<K, T>(g, split, group, b, chunk, started[b - block0], dy, zeros, own, sums, next_dy, next_x);
  }
  for (int64_t b = block0; b < block1; ++b) {
    const int64_t width = first_column<K>(g, b + 1) - first_column<K>(g, b);
    if (!started[b - block0])
      std::memset(sums_of<K>(g, sums, split, group, b), 0, sizeof(float) * static_cast<size_t>(g.rows * width));
  }
}

// The parts of row k summed in order.
template <class K>
FG_NOINLINE void sum_row(const Gradient& g, int64_t group, int64_t k, float* sums, float* row) {
  const int64_t part = g.s->groups * g.rows * g.columns;
  for (int64_t block = 0; block < g.blocks; ++block) {
    const int64_t j0 = first_column<K>(g, block), width = first_column<K>(g, block + 1) - j0;
    const float* from = sums_of<K>(g, sums, 0, group, block) + k * width;
    for (int64_t j = 0; j < width; j += VF) {
      vf sum = load(from + j);
      for (int64_t i = 1; i < g.splits; ++i) sum += load(from + i * part + j);
      store(row + j0 + j, sum);
    }
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
  // Whole positions in the padding are left out, where a position's images are whole runs.
  g.batch_fastest = s.N % RUN == 0 && s.N >= 16 && padding_share(s) > 0.05;
  g.chunk = least(CHUNK_UNITS * K::PER_UNIT, round_up(g.pixels, RUN));
  g.chunks = ceil_div(g.pixels, g.chunk);
  g.units = g.chunk / K::PER_UNIT;
  g.columns = round_up(s.R * s.S * g.C, K::GRAIN);
  g.blocks = ceil_div(g.columns, K::COLUMNS);
  g.rows = round_up(g.K, K::ROWS);
  // A job takes several column blocks over a chunk before the next chunk, so that x and dy come from memory once for
  // all of them; their sums, 256 KB at most, stay in the second-level cache.
  g.together = most(1, least(MAX_TOGETHER, 262144 / (g.rows * K::COLUMNS * 4)));
  g.together = least(g.together, g.blocks);
  const int64_t parts = ceil_div(g.blocks, g.together);
  // Four jobs a thread keep the threads level; a split costs one more copy of dw to add up.
  g.splits = a.threads == 1 ? 1 : most(1, least(g.chunks, ceil_div(4 * a.threads, parts * s.groups)));

  // fp32 gradients in memory order are read in place.
  const bool in_place = K::PER_UNIT == 1 && sizeof(T) == 4 && !g.batch_fastest;
  const int64_t zero_bytes = most(s.K, K::COLUMNS) * 4;
  // Rearranged once for all jobs, or by every job for itself where no more than two read the same chunk: then the
  // copy never leaves the second-level cache.
  const bool by_job = !in_place && parts * s.groups <= 2;
  const int64_t chunk_floats = s.K * g.units;
  const Scratch<float> units(in_place ? 0 : (by_job ? a.threads : g.chunks) * chunk_floats);
  const Scratch<char> zero_scratch(zero_bytes);
  const Scratch<float> sums(g.splits * s.groups * g.rows * g.columns), rows(a.threads * g.columns);
  const Scratch<Own<K, T>> own(a.threads);
  std::memset(zero_scratch.data, 0, static_cast<size_t>(zero_bytes));
  const T* zeros = reinterpret_cast<const T*>(zero_scratch.data);
  g.left = in_place ? static_cast<const char*>(a.dy) : by_job ? nullptr : reinterpret_cast<const char*>(units.data);
#pragma omp parallel num_threads(a.threads)
  {
    K::enter();
    if (!in_place && !by_job) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < g.chunks; ++i) rearrange_chunk<K, T>(g, i, zeros, units.data + i * chunk_floats);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < g.splits * s.groups * parts; ++i)
      add_up<K, T>(g, i / parts / s.groups, i / parts % s.groups, i % parts, zeros, own.data[thread_index()],
                   units.data + (by_job ? thread_index() * chunk_floats : 0), sums.data);
    float* row = rows.data + thread_index() * g.columns;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < s.K; ++i) {
      sum_row<K>(g, i / g.K, i % g.K, sums.data, row);
      a.dw_dtype == BF16 ? write_row<bf16>(s, a, i, row, g.C) : write_row<float>(s, a, i, row, g.C);
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
#if defined(FG_BELOW)
  if (a.dtype == F32) return FG_BELOW::conv2d_weight(s, a);
#if defined(FG_AMX)
  gradient_with<TileKernel, bf16>(s, a);
#else
  gradient_with<BroadcastKernel<true>, bf16>(s, a);
#endif
#else
  if (gradient_if_minimal(s, a)) return;
  if (a.dtype == F32) return gradient_with<BroadcastKernel<false>, float>(s, a);
  gradient_with<BroadcastKernel<false>, bf16>(s, a);
#endif
}

}  // namespace fg::ISA
