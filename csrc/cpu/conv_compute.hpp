// Computes a Problem (conv_geometry.hpp): packs the weights, then walks blocks of output pixels.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/conv_amx.hpp"
#include "cpu/conv_geometry.hpp"
#include "cpu/conv_micro.hpp"
#include "cpu/conv_pack.hpp"

namespace fg::ISA {
namespace {

inline int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <class K>
struct Work {
  const Problem* problem;
  const Panels<K>* panels;
  const char* packed;
  const char* zeros;    // a row of zeros, for taps that lie in the padding
  bool batch_fastest;   // pixels ordered (position, image) instead of (image, position)
  bool gather;          // rows are copied, because their runs are no whole units
  int64_t chunk;        // blocks whose pointers are prepared together
  int64_t chunks;       // per phase pair and group, of the largest
  int64_t column_jobs;  // 1, or one per column block
  bool pairs_inner;     // consecutive jobs take the phase pairs of the same pixels
  int64_t source_size;  // bytes of an element
  int64_t pixel;        // bytes of a source pixel
};

// A thread's tables for the blocks of one chunk.
template <class K>
struct Tables {
  Run* run;           // [chunk][max_runs]
  int* runs;          // [chunk]
  const char** left;  // [chunk][max_runs][ROWS]
  int64_t* out;       // [chunk][ROWS]: first element of the output pixel
  int* rows;          // [chunk]
  char* gathered;     // [chunk][ROWS][row bytes]
  float* tile;        // [ROWS][COLUMNS]
  float* stage;       // for packing
  int64_t max_runs, row_bytes;
};

template <class K>
inline Tables<K> lay_out_tables(char* memory, const Work<K>& work, int64_t& bytes) {
  const Problem& p = *work.problem;
  Tables<K> t;
  t.max_runs = 1;
  int64_t units = 0;
  for (int64_t i = 0; i < work.panels->pairs; ++i) {
    t.max_runs = most(t.max_runs, work.panels->pair[i].taps);
    units = most(units, work.panels->pair[i].units);
  }
  if (work.panels->merged) t.max_runs = 1;
  t.row_bytes = work.gather ? units * 4 : 0;
  int64_t at = 0;
  const auto take = [&](auto*& field, int64_t count) {
    field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(memory + at);
    at += round_up(count * static_cast<int64_t>(sizeof *field), 64);
  };
  take(t.run, work.chunk * t.max_runs);
  take(t.runs, work.chunk);
  take(t.left, work.chunk * t.max_runs * K::ROWS);
  take(t.out, work.chunk * K::ROWS);
  take(t.rows, work.chunk);
  take(t.gathered, work.chunk * K::ROWS * t.row_bytes);
  take(t.tile, K::ROWS * most(K::COLUMNS, VF));
  take(t.stage, pack_stage_floats(p, *work.panels));
  bytes = at;
  return t;
}

// The rows of one block: their positions, and the taps that any of them uses.
template <class K>
struct BlockRows {
  int64_t qh[K::ROWS], qw[K::ROWS];
  const char* base[K::ROWS];  // source pixel of offset (0, 0); may lie outside the image
  int64_t h0, h1, w0, w1;     // union of the valid intervals
  int count;
};

template <class K>
inline BlockRows<K> block_rows(const Work<K>& work, const PhasePair& pair, int64_t group, int64_t first, int64_t* out) {
  const Problem& p = *work.problem;
  const int64_t ch = pair.h->count, cw = pair.w->count, total = p.N * ch * cw;
  BlockRows<K> b;
  b.count = static_cast<int>(least(K::ROWS, total - first));
  b.h0 = pair.h->taps, b.w0 = pair.w->taps, b.h1 = b.w1 = 0;
  int64_t n, qh, qw;
  if (work.batch_fastest) {
    n = first % p.N;
    qw = first / p.N % cw;
    qh = first / p.N / cw;
  } else {
    qw = first % cw;
    qh = first / cw % ch;
    n = first / cw / ch;
  }
  const int64_t bytes = p.C * work.source_size * group;
  for (int i = 0; i < b.count; ++i) {
    b.qh[i] = qh;
    b.qw[i] = qw;
    b.base[i] =
        static_cast<const char*>(p.source) + bytes + ((n * p.SH + qh * p.h.step) * p.SW + qw * p.w.step) * work.pixel;
    out[i] = (((n * p.OH + pair.h->first_out + qh * p.h.out_step) * p.OW + pair.w->first_out + qw * p.w.out_step) *
                  p.groups +
              group) *
             p.M;
    b.h0 = least(b.h0, pair.h->lo[qh]);
    b.h1 = most(b.h1, pair.h->hi[qh]);
    b.w0 = least(b.w0, pair.w->lo[qw]);
    b.w1 = most(b.w1, pair.w->hi[qw]);
    if (work.batch_fastest) {
      if (++n == p.N) {
        n = 0;
        if (++qw == cw) qw = 0, ++qh;
      }
    } else if (++qw == cw) {
      qw = 0;
      if (++qh == ch) qh = 0, ++n;
    }
  }
  return b;
}

template <class K>
inline bool uses(const PhasePair& pair, const BlockRows<K>& b, int i, int64_t th, int64_t tw) {
  return pair.h->lo[b.qh[i]] <= th && th < pair.h->hi[b.qh[i]] && pair.w->lo[b.qw[i]] <= tw && tw < pair.w->hi[b.qw[i]];
}

template <class K>
inline const char* source_of(const Work<K>& work, const PhasePair& pair, const BlockRows<K>& b, int i, int64_t th,
                             int64_t tw) {
  return b.base[i] + (pair.h->tap[th].offset * work.problem->SW + pair.w->tap[tw].offset) * work.pixel;
}

// Pointers to the rows where they lie: a run per tap.
template <class K>
inline int point_to_rows(const Work<K>& work, const PhasePair& pair, const BlockRows<K>& b, Run* run,
                         const char** left) {
  const int64_t units = work.panels->tap_units;
  int runs = 0;
  for (int64_t th = b.h0; th < b.h1; ++th)
    for (int64_t tw = b.w0; tw < b.w1; ++tw, ++runs, left += K::ROWS) {
      run[runs] = {(th * pair.w->taps + tw) * units, units};
      for (int i = 0; i < K::ROWS; ++i)
        left[i] = i < b.count && uses(pair, b, i, th, tw) ? source_of(work, pair, b, i, th, tw) : work.zeros;
    }
  return runs;
}

// Copies of the rows, padded with zeros to whole runs.
template <class K>
inline int gather_rows(const Work<K>& work, const PhasePair& pair, const BlockRows<K>& b, char* to, int64_t row_bytes,
                       Run* run, const char** left) {
  const Panels<K>& panels = *work.panels;
  const int64_t bytes = work.problem->C * work.source_size, tap_bytes = panels.merged ? bytes : panels.tap_units * 4;
  const int64_t w1 = panels.merged ? pair.w->taps : b.w1, w0 = panels.merged ? 0 : b.w0;
  const int64_t h1 = panels.merged ? pair.h->taps : b.h1, h0 = panels.merged ? 0 : b.h0;
  for (int i = 0; i < b.count; ++i) {
    char* at = to + i * row_bytes;
    for (int64_t th = h0; th < h1; ++th)
      for (int64_t tw = w0; tw < w1; ++tw, at += tap_bytes) {
        const bool valid = uses(pair, b, i, th, tw);
        if (valid) std::memcpy(at, source_of(work, pair, b, i, th, tw), static_cast<size_t>(bytes));
        std::memset(at + (valid ? bytes : 0), 0, static_cast<size_t>(tap_bytes - (valid ? bytes : 0)));
      }
    std::memset(at, 0, static_cast<size_t>(panels.merged ? to + (i + 1) * row_bytes - at : 0));
  }
  const auto row = [&](int i) { return i < b.count ? to + i * row_bytes : to; };
  if (panels.merged) {
    run[0] = {0, pair.units};
    for (int i = 0; i < K::ROWS; ++i) left[i] = row(i);
    return 1;
  }
  int runs = 0;
  for (int64_t th = h0; th < h1; ++th)
    for (int64_t tw = w0; tw < w1; ++tw, ++runs, left += K::ROWS) {
      run[runs] = {(th * pair.w->taps + tw) * panels.tap_units, panels.tap_units};
      for (int i = 0; i < K::ROWS; ++i) left[i] = row(i) + runs * tap_bytes;
    }
  return runs;
}

// bias, activation and rounding of a finished tile.
template <class T>
inline void store_tile(const Problem& p, const float* tile, int64_t ld, int rows, const int64_t* out, int64_t group,
                       int64_t column, int64_t columns) {
  const float* bias = p.bias ? p.bias + group * p.M + column : nullptr;
  for (int i = 0; i < rows; ++i, tile += ld) {
    T* to = static_cast<T*>(p.out) + out[i] + column;
    int64_t j = 0;
    for (; j + VF <= columns; j += VF) {
      vec v = vload(tile + j);
      if (bias) v += vload(bias + j);
      vstore(to + j, vact(v, p.act, p.slope));
    }
    if (j < columns) {
      const int rest = static_cast<int>(columns - j);
      vec v = vload_n(tile + j, rest);
      if (bias) v += vload_n(bias + j, rest);
      vstore_n(to + j, vact(v, p.act, p.slope), rest);
    }
  }
}

template <class K>
inline void compute_chunk(const Work<K>& work, const Tables<K>& t, const PhasePair& pair, int64_t group, int64_t chunk,
                          int64_t block0, int64_t block1) {
  const Problem& p = *work.problem;
  const int64_t total = p.N * pair.h->count * pair.w->count;
  const int64_t first = chunk * work.chunk * K::ROWS;
  if (first >= total) return;
  const int64_t blocks = least(work.chunk, ceil_div(total - first, K::ROWS));
  for (int64_t m = 0; m < blocks; ++m) {
    const BlockRows<K> b = block_rows(work, pair, group, first + m * K::ROWS, t.out + m * K::ROWS);
    Run* run = t.run + m * t.max_runs;
    const char** left = t.left + m * t.max_runs * K::ROWS;
    t.rows[m] = b.count;
    t.runs[m] = work.gather ? gather_rows(work, pair, b, t.gathered + m * K::ROWS * t.row_bytes, t.row_bytes, run, left)
                            : point_to_rows(work, pair, b, run, left);
  }
  constexpr int64_t LD = K::COLUMNS > VF ? K::COLUMNS : VF;
  for (int64_t block = block0; block < block1; ++block) {
    const char* panel = work.packed + work.panels->panel(pair, group, block);
    const int64_t column = work.panels->first_column(block), width = work.panels->width(block);
    for (int64_t m = 0; m < blocks; ++m) {
      K::tile(t.run + m * t.max_runs, t.runs[m], t.left + m * t.max_runs * K::ROWS, t.rows[m], panel, pair.units,
              static_cast<int>(width), t.tile, LD, false);
      const int64_t columns = least(width, p.M - column);
      if (p.out_dtype == BF16)
        store_tile<bf16>(p, t.tile, LD, t.rows[m], t.out + m * K::ROWS, group, column, columns);
      else
        store_tile<float>(p, t.tile, LD, t.rows[m], t.out + m * K::ROWS, group, column, columns);
    }
  }
}

// Share of the multiplications whose source pixel lies in the padding.
inline double padding_share(const Problem& p) {
  const auto axis = [](const Axis& a) {
    double used = 0, all = 0;
    for (int64_t f = 0; f < a.phases; ++f)
      for (int64_t q = 0; q < a.phase[f].count; ++q) {
        used += a.phase[f].hi[q] - a.phase[f].lo[q];
        all += static_cast<double>(a.phase[f].taps);
      }
    return all > 0 ? used / all : 1.0;
  };
  return 1.0 - axis(p.h) * axis(p.w);
}

template <class K>
inline void compute_with(const Problem& p) {
  Panels<K> panels;
  const Scratch<PhasePair> pair(p.h.phases * p.w.phases);
  const Scratch<TapSlot> slot(p.R * p.S);
  panels.pair = pair.data;
  panels.slot = slot.data;
  plan_panels(p, panels);
  const Scratch<char> packed(panels.bytes);

  Work<K> work;
  work.problem = &p;
  work.panels = &panels;
  work.packed = packed.data;
  work.source_size = K::BF16_SOURCE ? 2 : 4;
  work.pixel = p.groups * p.C * work.source_size;
  work.gather = p.C % (K::PER_UNIT * K::RUN_UNITS) != 0;
  // In (position, image) order a block's rows share their position, so the taps in the padding are skipped: 23 % of a
  // 4x4 stride 2 layer with 4x4 outputs. Neighbours in memory are worth more where the padding is a few percent.
  work.batch_fastest = p.N >= 2 * K::ROWS && padding_share(p) > 0.05;
  int64_t most_blocks = 0, most_taps = 1, panel_bytes = 0, row_bytes = 0;
  for (int64_t i = 0; i < panels.pairs; ++i) {
    most_blocks = most(most_blocks, ceil_div(p.N * pair.data[i].h->count * pair.data[i].w->count, K::ROWS));
    most_taps = most(most_taps, pair.data[i].taps);
    panel_bytes += pair.data[i].units * panels.columns * 4;
    row_bytes = most(row_bytes, pair.data[i].units * 4);
  }
  if (most_blocks == 0) return;
  const int64_t block_bytes = most_taps * K::ROWS * 8 + (work.gather ? row_bytes * K::ROWS : 0);
  work.chunk = most(1, least(K::CHUNK_BLOCKS, 262144 / block_bytes));
  work.column_jobs = panel_bytes > 524288 ? panels.blocks : 1;
  work.pairs_inner = panel_bytes / work.column_jobs <= 524288;
  const int64_t per_chunk = panels.pairs * p.groups * work.column_jobs;
  work.chunk = most(1, least(work.chunk, most_blocks * per_chunk / (8 * p.threads)));
  work.chunks = ceil_div(most_blocks, work.chunk);

  int64_t table_bytes;
  lay_out_tables<K>(nullptr, work, table_bytes);
  const Scratch<char> tables(p.threads * table_bytes);
  const Scratch<char> zeros(panels.tap_units * 4);
  std::memset(zeros.data, 0, static_cast<size_t>(panels.tap_units * 4));
  work.zeros = zeros.data;

  const int64_t pieces = pack_pieces(p, panels), jobs = work.chunks * per_chunk;
#pragma omp parallel num_threads(p.threads)
  {
    int64_t unused;
    const Tables<K> t = lay_out_tables<K>(tables.data + thread_index() * table_bytes, work, unused);
    K::enter();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < pieces; ++i) pack_piece(p, panels, i, t.stage, packed.data);
#pragma omp for schedule(dynamic) nowait
    for (int64_t j = 0; j < jobs; ++j) {
      int64_t at = j, pair_index, chunk;
      if (work.pairs_inner) {
        pair_index = at % panels.pairs, at /= panels.pairs;
        chunk = at % work.chunks, at /= work.chunks;
      } else {
        chunk = at % work.chunks, at /= work.chunks;
        pair_index = at % panels.pairs, at /= panels.pairs;
      }
      const int64_t column_job = at % work.column_jobs, group = at / work.column_jobs;
      compute_chunk(work, t, panels.pair[pair_index], group, chunk, work.column_jobs == 1 ? 0 : column_job,
                    work.column_jobs == 1 ? panels.blocks : column_job + 1);
    }
    K::leave();
  }
}

// Few output channels and many input channels: the dot-product form.
inline bool rowwise(const Problem& p) { return p.M <= 4 && p.C >= 16; }

inline void widen_source(const bf16* from, float* to, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i += 4096) {
    const int64_t end = least(count, i + 4096);
    int64_t j = i;
    for (; j + VF <= end; j += VF) vstore(to + j, vload(from + j));
    for (; j < end; ++j) to[j] = to_float(from[j]);
  }
}

inline void compute(Problem& p) {
  if (p.N == 0 || p.OH == 0 || p.OW == 0 || p.M == 0) return;
  p.source_is_bf16 = p.source_dtype == BF16;
  if (p.source_is_bf16) {
#if defined(FG_AMX)
    if (!rowwise(p)) return compute_with<TileKernel>(p);
#endif
#if defined(__AVX512BF16__)
    return rowwise(p) ? compute_with<RowKernel<true>>(p) : compute_with<BroadcastKernel<true>>(p);
#else
    // No bf16 arithmetic: the products of widened operands are exact in fp32, at the price of a copy of the source.
    const int64_t count = p.N * p.SH * p.SW * p.groups * p.C;
    const Scratch<float> wide(count);
    widen_source(static_cast<const bf16*>(p.source), wide.data, count, p.threads);
    p.source = wide.data;
    return rowwise(p) ? compute_with<RowKernel<false>>(p) : compute_with<BroadcastKernel<false>>(p);
#endif
  }
  return rowwise(p) ? compute_with<RowKernel<false>>(p) : compute_with<BroadcastKernel<false>>(p);
}

}  // namespace
}  // namespace fg::ISA
