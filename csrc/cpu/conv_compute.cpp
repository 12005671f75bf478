// Computes a Problem (conv_geometry.hpp): packs the weights, then walks blocks of output pixels.
#include "cpu/activation.hpp"
#include "cpu/conv_amx.hpp"
#include "cpu/conv_geometry.hpp"
#include "cpu/conv_micro.hpp"
#include "cpu/conv_pack.hpp"
#include "cpu/conv_winograd.hpp"

namespace fg::ISA {
namespace {

// How a kernel comes to the source rows of a block.
enum Supply {
  IN_PLACE,  // a run per tap, or per row of taps where they are neighbours in memory
  ROW_RUNS,  // few channels: always a run per row of taps; pixels at the edges are copied and padded with zeros
  COPIED     // every row is copied, because runs are no whole units
};

template <class K>
struct Work {
  const Problem* problem;
  const Panels<K>* panels;
  const char* packed;
  const char* zeros;   // a row of zeros, for taps that lie in the padding
  bool batch_fastest;  // pixels ordered (position, image) instead of (image, position)
  Supply supply;
  bool adjacent;        // the taps of a row are neighbours in memory
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
  char* copies;       // [chunk][ROWS][row bytes]
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
  t.row_bytes = work.supply == IN_PLACE ? 0 : units * 4;
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
  take(t.copies, work.chunk * K::ROWS * t.row_bytes);
  take(t.tile, K::ROWS * most(K::COLUMNS, VF));
  take(t.stage, pack_stage_floats(p, *work.panels));
  bytes = at;
  return t;
}

// Walks over the output pixels of a phase pair in the order of the work.
struct Cursor {
  int64_t n, qh, qw;
  const char* base;  // source pixel of offset (0, 0); may lie outside the image
  int64_t out;       // first element of the output pixel
};

template <class K>
inline void locate(const Work<K>& work, const PhasePair& pair, int64_t group, Cursor& c) {
  const Problem& p = *work.problem;
  c.base = static_cast<const char*>(p.source) + p.C * work.source_size * group +
           ((c.n * p.SH + c.qh * p.h.step) * p.SW + c.qw * p.w.step) * work.pixel;
  c.out = (((c.n * p.OH + pair.h->first_out + c.qh * p.h.out_step) * p.OW + pair.w->first_out + c.qw * p.w.out_step) *
               p.groups +
           group) *
          p.M;
}

template <class K>
inline Cursor cursor_at(const Work<K>& work, const PhasePair& pair, int64_t group, int64_t index) {
  const int64_t N = work.problem->N, ch = pair.h->count, cw = pair.w->count;
  Cursor c;
  if (work.batch_fastest)
    c.n = index % N, c.qw = index / N % cw, c.qh = index / N / cw;
  else
    c.qw = index % cw, c.qh = index / cw % ch, c.n = index / cw / ch;
  locate(work, pair, group, c);
  return c;
}

template <class K>
inline void advance(const Work<K>& work, const PhasePair& pair, int64_t group, Cursor& c) {
  const Problem& p = *work.problem;
  if (work.batch_fastest) {
    if (++c.n < p.N) {
      c.base += p.SH * p.SW * work.pixel;
      c.out += p.OH * p.OW * p.groups * p.M;
      return;
    }
    c.n = 0;
    if (++c.qw == pair.w->count) c.qw = 0, ++c.qh;
  } else {
    if (++c.qw < pair.w->count) {
      c.base += p.w.step * work.pixel;
      c.out += p.w.out_step * p.groups * p.M;
      return;
    }
    c.qw = 0;
    if (++c.qh == pair.h->count) c.qh = 0, ++c.n;
  }
  if (c.qh < pair.h->count) locate(work, pair, group, c);
}

// The rows of one block, and the taps that any of them uses. Rows past the last pixel repeat the first row.
template <class K>
struct BlockRows {
  const char* base[K::ROWS];
  int32_t h0[K::ROWS], h1[K::ROWS], w0[K::ROWS], w1[K::ROWS];  // valid taps of the row
  int32_t H0, H1, W0, W1;                                      // of any row
  bool uniform;                                                // of every row; then h0 to w1 are not set
};

template <class K>
inline void block_rows(const Work<K>& work, const PhasePair& pair, int64_t group, int count, Cursor& cursor,
                       BlockRows<K>& b, int64_t* out) {
  const Problem& p = *work.problem;
  // Blocks of one position, or of one image row away from its edges, are the rule: equally spaced rows.
  const bool one_position = work.batch_fastest && cursor.n + count <= p.N;
  const bool one_row = !work.batch_fastest && cursor.qw >= pair.w_inside && cursor.qw + count <= pair.w_outside;
  if (one_position || one_row) {
    const int64_t step = one_position ? p.SH * p.SW * work.pixel : p.w.step * work.pixel;
    const int64_t out_step = (one_position ? p.OH * p.OW : p.w.out_step) * p.groups * p.M;
    for (int i = 0; i < K::ROWS; ++i) b.base[i] = cursor.base + (i < count ? i : 0) * step;
    for (int i = 0; i < K::ROWS; ++i) out[i] = cursor.out + i * out_step;
    b.H0 = pair.h->lo[cursor.qh], b.H1 = pair.h->hi[cursor.qh];
    b.W0 = pair.w->lo[cursor.qw], b.W1 = pair.w->hi[cursor.qw];
    b.uniform = true;
    (one_position ? cursor.n : cursor.qw) += count - 1;
    cursor.base += (count - 1) * step;
    cursor.out += (count - 1) * out_step;
    advance(work, pair, group, cursor);
    return;
  }
  for (int i = 0; i < count; ++i) {
    b.base[i] = cursor.base;
    out[i] = cursor.out;
    b.h0[i] = pair.h->lo[cursor.qh], b.h1[i] = pair.h->hi[cursor.qh];
    b.w0[i] = pair.w->lo[cursor.qw], b.w1[i] = pair.w->hi[cursor.qw];
    advance(work, pair, group, cursor);
  }
  for (int i = count; i < K::ROWS; ++i)
    b.base[i] = b.base[0], b.h0[i] = b.h0[0], b.h1[i] = b.h1[0], b.w0[i] = b.w0[0], b.w1[i] = b.w1[0];
  b.H0 = b.h0[0], b.H1 = b.h1[0], b.W0 = b.w0[0], b.W1 = b.w1[0];
  for (int i = 1; i < K::ROWS; ++i) {
    b.H0 = b.h0[i] < b.H0 ? b.h0[i] : b.H0;
    b.H1 = b.h1[i] > b.H1 ? b.h1[i] : b.H1;
    b.W0 = b.w0[i] < b.W0 ? b.w0[i] : b.W0;
    b.W1 = b.w1[i] > b.W1 ? b.w1[i] : b.W1;
  }
  b.uniform = false;
}

// Bytes from a row's base to the source pixel of a tap.
template <class K>
inline int64_t tap_bytes(const Work<K>& work, const PhasePair& pair, int64_t th, int64_t tw) {
  return (pair.h->tap[th].offset * work.problem->SW + pair.w->tap[tw].offset) * work.pixel;
}

// Where a tap's weights begin: as Run::row counts.
template <class K>
inline int64_t weight_row(const Work<K>& work, const PhasePair& pair, int64_t th, int64_t tw) {
  const Problem& p = *work.problem;
  if constexpr (K::IN_PLACE) return pair.h->tap[th].index * p.stride_r + pair.w->tap[tw].index * p.stride_s;
  return (th * pair.w->taps + tw) * work.panels->tap_units;
}

template <class K>
inline int point_in_place(const Work<K>& work, const PhasePair& pair, const BlockRows<K>& b, Run* run,
                          const char** left) {
  const int64_t units = work.panels->tap_units;
  int runs = 0;
  if (b.uniform) {
    const int32_t stretch = work.adjacent ? b.W1 - b.W0 : 1;
    for (int32_t th = b.H0; th < b.H1; ++th)
      for (int32_t tw = b.W0; tw < b.W1; tw += stretch, ++runs, left += K::ROWS) {
        run[runs] = {weight_row(work, pair, th, tw), stretch * units};
        const int64_t bytes = tap_bytes(work, pair, th, tw);
        for (int i = 0; i < K::ROWS; ++i) left[i] = b.base[i] + bytes;
      }
    return runs;
  }
  for (int32_t th = b.H0; th < b.H1; ++th)
    for (int32_t tw = b.W0; tw < b.W1; ++tw, ++runs, left += K::ROWS) {
      run[runs] = {weight_row(work, pair, th, tw), units};
      const int64_t bytes = tap_bytes(work, pair, th, tw);
      for (int i = 0; i < K::ROWS; ++i) {
        const bool used = (b.h0[i] <= th) & (th < b.h1[i]) & (b.w0[i] <= tw) & (tw < b.w1[i]);
        left[i] = used ? b.base[i] + bytes : work.zeros;
      }
    }
  return runs;
}

template <class K>
inline int point_to_row_runs(const Work<K>& work, const PhasePair& pair, const BlockRows<K>& b, char* copies, Run* run,
                             const char** left) {
  const int64_t C = work.problem->C, taps = pair.w->taps, units = taps * C / K::PER_UNIT;
  int runs = 0;
  for (int32_t th = b.H0; th < b.H1; ++th, ++runs, left += K::ROWS) {
    run[runs] = {th * units, units};
    const int64_t bytes = taps > 0 ? tap_bytes(work, pair, th, 0) : 0;
    for (int i = 0; i < K::ROWS; ++i) left[i] = b.base[i] + bytes;
    if (b.uniform && b.W1 - b.W0 == taps) continue;
    for (int i = 0; i < K::ROWS; ++i) {
      const int64_t w0 = b.uniform ? b.W0 : b.w0[i], w1 = b.uniform ? b.W1 : b.w1[i];
      if (!b.uniform && (th < b.h0[i] || th >= b.h1[i])) {
        left[i] = work.zeros;
      } else if (w1 - w0 < taps) {
        char* copy = copies + (runs * K::ROWS + i) * units * 4;
        std::memset(copy, 0, static_cast<size_t>(units * 4));
        std::memcpy(copy + w0 * work.pixel, left[i] + w0 * work.pixel, static_cast<size_t>((w1 - w0) * work.pixel));
        left[i] = copy;
      }
    }
  }
  return runs;
}

// Copies of the rows, every tap padded with zeros to whole runs, or all taps in one run if the panels are merged.
template <class K>
inline int copy_rows(const Work<K>& work, const PhasePair& pair, const BlockRows<K>& b, int count, char* copies,
                     int64_t row_bytes, Run* run, const char** left) {
  const Panels<K>& panels = *work.panels;
  const int64_t bytes = work.problem->C * work.source_size, step = panels.merged ? bytes : panels.tap_units * 4;
  const int64_t w1 = panels.merged ? pair.w->taps : b.W1, w0 = panels.merged ? 0 : b.W0;
  const int64_t h1 = panels.merged ? pair.h->taps : b.H1, h0 = panels.merged ? 0 : b.H0;
  for (int i = 0; i < count; ++i) {
    const int64_t bh0 = b.uniform ? b.H0 : b.h0[i], bh1 = b.uniform ? b.H1 : b.h1[i];
    const int64_t bw0 = b.uniform ? b.W0 : b.w0[i], bw1 = b.uniform ? b.W1 : b.w1[i];
    char* at = copies + i * row_bytes;
    char* const end = panels.merged ? at + row_bytes : at + (h1 - h0) * (w1 - w0) * step;
    if (bytes != step || bh1 - bh0 < h1 - h0 || bw1 - bw0 < w1 - w0 || panels.merged)
      std::memset(at, 0, static_cast<size_t>(end - at));
    for (int64_t th = h0; th < h1; ++th, at += (w1 - w0) * step) {
      if (th < bh0 || th >= bh1) continue;
      if (work.adjacent && step == bytes) {
        std::memcpy(at + (bw0 - w0) * step, b.base[i] + tap_bytes(work, pair, th, bw0),
                    static_cast<size_t>((bw1 - bw0) * step));
        continue;
      }
      for (int64_t tw = bw0; tw < bw1; ++tw)
        std::memcpy(at + (tw - w0) * step, b.base[i] + tap_bytes(work, pair, th, tw), static_cast<size_t>(bytes));
    }
  }
  const auto row = [&](int i) { return copies + (i < count ? i : 0) * row_bytes; };
  if (panels.merged) {
    run[0] = {0, pair.units};
    for (int i = 0; i < K::ROWS; ++i) left[i] = row(i);
    return 1;
  }
  int runs = 0;
  for (int64_t th = h0; th < h1; ++th)
    for (int64_t tw = w0; tw < w1; ++tw, ++runs, left += K::ROWS) {
      run[runs] = {(th * pair.w->taps + tw) * panels.tap_units, panels.tap_units};
      for (int i = 0; i < K::ROWS; ++i) left[i] = row(i) + runs * step;
    }
  return runs;
}

// bias, activation and rounding of a finished tile.
template <class T>
FG_NOINLINE void store_tile(const Problem& p, const float* tile, int64_t ld, int rows, const int64_t* out,
                            int64_t group, int64_t column, int64_t columns) {
  const float* bias = p.bias ? p.bias + group * p.M + column : nullptr;
  const int64_t whole = columns / VF * VF;
  const int rest = static_cast<int>(columns - whole);
  T* const to = static_cast<T*>(p.out) + column;
  if (!bias && p.act == ACT_IDENTITY) {
    for (int i = 0; i < rows; ++i, tile += ld) {
      for (int64_t j = 0; j < whole; j += VF) store(to + out[i] + j, load(tile + j));
      if (rest) store_tail(to + out[i] + whole, load_tail(tile + whole, rest), rest);
    }
    return;
  }
  for (int i = 0; i < rows; ++i, tile += ld) {
    for (int64_t j = 0; j < whole; j += VF) {
      vf v = load(tile + j);
      if (bias) v += load(bias + j);
      store(to + out[i] + j, activate(v, p.act, p.slope));
    }
    if (rest) {
      vf v = load_tail(tile + whole, rest);
      if (bias) v += load_tail(bias + whole, rest);
      store_tail(to + out[i] + whole, activate(v, p.act, p.slope), rest);
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
  Cursor cursor = cursor_at(work, pair, group, first);
  for (int64_t m = 0; m < blocks; ++m) {
    const int count = static_cast<int>(least(K::ROWS, total - first - m * K::ROWS));
    BlockRows<K> b;
    block_rows(work, pair, group, count, cursor, b, t.out + m * K::ROWS);
    Run* run = t.run + m * t.max_runs;
    const char** left = t.left + m * t.max_runs * K::ROWS;
    char* copies = t.copies + m * K::ROWS * t.row_bytes;
    t.rows[m] = count;
    t.runs[m] = work.supply == IN_PLACE   ? point_in_place(work, pair, b, run, left)
                : work.supply == ROW_RUNS ? point_to_row_runs(work, pair, b, copies, run, left)
                                          : copy_rows(work, pair, b, count, copies, t.row_bytes, run, left);
  }
  constexpr int64_t LD = K::COLUMNS > VF ? K::COLUMNS : VF;
  for (int64_t block = block0; block < block1; ++block) {
    const int64_t column = work.panels->first_column(block), width = work.panels->width(block);
    const char* panel = work.packed + (K::IN_PLACE ? (group * p.stride_g + column) * work.source_size
                                                   : work.panels->panel(pair, group, block));
    const int64_t panel_rows = K::IN_PLACE ? p.stride_c * work.source_size : pair.units;
    for (int64_t m = 0; m < blocks; ++m) {
      K::tile(t.run + m * t.max_runs, t.runs[m], t.left + m * t.max_runs * K::ROWS, 4, t.rows[m], panel, panel_rows,
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

// The taps of a row read neighbouring pixels, and a pixel holds nothing but the group's channels.
inline bool adjacent_taps(const Problem& p) {
  if (p.groups != 1) return false;
  for (int64_t f = 0; f < p.w.phases; ++f)
    for (int64_t t = 1; t < p.w.phase[f].taps; ++t)
      if (p.w.phase[f].tap[t].offset != p.w.phase[f].tap[t - 1].offset + 1) return false;
  return true;
}

// Images: less than a cache line per pixel, so that a run per tap would be mostly overhead, and a row of taps is a
// whole number of units.
inline bool thin_rows(const Problem& p, int64_t per_unit) {
  if (p.C >= 16 || !adjacent_taps(p)) return false;
  for (int64_t f = 0; f < p.w.phases; ++f)
    if (p.w.phase[f].taps * p.C % per_unit != 0) return false;
  return true;
}

template <class K>
inline void compute_with(const Problem& p) {
  Panels<K> panels;
  const Scratch<PhasePair> pair(p.h.phases * p.w.phases);
  const Scratch<TapSlot> slot(p.R * p.S);
  panels.pair = pair.data;
  panels.slot = slot.data;
  plan_panels(p, panels);
  Packed<char> packed(K::IN_PLACE ? 0 : panels.bytes);

  Work<K> work;
  work.problem = &p;
  work.panels = &panels;
  work.packed = K::IN_PLACE ? static_cast<const char*>(p.weight) : packed.data;
  work.source_size = K::BF16_SOURCE ? 2 : 4;
  work.pixel = p.groups * p.C * work.source_size;
  const bool whole_runs = p.C % (K::PER_UNIT * K::RUN_UNITS) == 0;
  const bool row_runs = K::RUN_UNITS == 1 && !K::ROWWISE && thin_rows(p, K::PER_UNIT);
  work.supply = row_runs ? ROW_RUNS : whole_runs ? IN_PLACE : COPIED;
  work.adjacent = !K::IN_PLACE && adjacent_taps(p);
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
  const int64_t block_bytes = most_taps * K::ROWS * 8 + (work.supply == IN_PLACE ? 0 : row_bytes * K::ROWS);
  work.chunk = most(1, least(K::CHUNK_BLOCKS, 262144 / block_bytes));
  work.column_jobs = panel_bytes > 524288 ? panels.blocks : 1;
  work.pairs_inner = panel_bytes / work.column_jobs <= 524288;
  const int64_t per_chunk = panels.pairs * p.groups * work.column_jobs;
  work.chunk = most(1, least(work.chunk, most_blocks * per_chunk / (8 * p.threads)));
  work.chunks = ceil_div(most_blocks, work.chunk);

  int64_t table_bytes;
  lay_out_tables<K>(nullptr, work, table_bytes);
  const Scratch<char> tables(p.threads * table_bytes);
  const int64_t zero_bytes = most(panels.tap_units * 4, work.supply == ROW_RUNS ? row_bytes : 0);
  const Scratch<char> zeros(zero_bytes);
  std::memset(zeros.data, 0, static_cast<size_t>(zero_bytes));
  work.zeros = zeros.data;

  const int64_t pieces = K::IN_PLACE || packed.made() ? 0 : pack_pieces(p, panels), jobs = work.chunks * per_chunk;
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
  packed.keep();
}

// Few output channels and many input channels: the dot-product form.
inline bool rowwise(const Problem& p) { return p.M <= 4 && p.C >= 16; }

// Few pixels do not pay for packing: the weights are then read from where they lie, a row of channels in a page of its
// own. In float32 a generator's 512 to 256 channels at 4x4, 8 MB in 2,048 pages, took in ms on two threads:
//   pixels of a phase        16: packed, in place   64: packed, in place   256: packed, in place
//   Zen 5, AVX-512               0.97, 0.34                                     4.9, 4.6
//   Cascade Lake, AVX-512        3.3, 2.5               4.7, 6.9                7.9, 17.3
//   Zen 1, AVX2                  3.9, 6.8                                      13.2, 49.8
// A Cascade Lake and a Zen 1 translate 1,536 pages at once, and 512 to 128 channels, half of them, took 1.85 packed and
// 1.46 in place at 16 pixels, 2.3 and 3.0 at 64; a Zen 1 2.0 and 0.9, 3.1 and 3.0; AVX2 on a Cascade Lake 2.4 and 3.9.
inline bool leave_weights(const Problem& p) {
  static const bool many = translates_many_pages();
  const int64_t pixels = !many ? 16 : VF == 16 ? 256 : 64, bytes = VF == 16 ? INT64_MAX : int64_t{4} << 20;
  if (kept_of_step()) return false;  // they are packed once for many calls
  if (p.weight_dtype != p.source_dtype || p.stride_m != 1 || p.M % VF || p.C < 32 || p.C % 2) return false;
  if (p.C * p.M * p.R * p.S * 4 > bytes) return false;
  return p.N * p.OH * p.OW <= pixels * p.h.phases * p.w.phases;
}

#if !defined(FG_BELOW)
inline void compute_in_fp32(const Problem& p) {
  if (p.source_dtype == F32 && leave_weights(p)) return compute_with<BroadcastKernel<false, true>>(p);
  TilePair pair[MAX_TILE_PAIRS];
  if (plan_tiles(p, pair)) return compute_minimal(p, pair);
  return rowwise(p) ? compute_with<RowKernel<false>>(p) : compute_with<BroadcastKernel<false>>(p);
}

// The products of widened bf16 operands are exact in fp32, at the price of a copy of the source.
inline void compute_widened(const Problem& p) {
  const int64_t count = p.N * p.SH * p.SW * p.groups * p.C;
  const Scratch<float> wide(count);
  widen(static_cast<const bf16*>(p.source), wide.data, count, p.threads);
  Problem q = p;
  q.source = wide.data;
  compute_in_fp32(q);
}
#endif

}  // namespace

#if !defined(FG_BELOW)
void widen(const bf16* from, float* to, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i += 4096) {
    const int64_t end = least(count, i + 4096);
    int64_t j = i;
    for (; j + VF <= end; j += VF) store(to + j, load(from + j));
    for (; j < end; ++j) to[j] = to_float(from[j]);
  }
}
#endif

void compute(const Problem& p) {
  if (p.N == 0 || p.OH == 0 || p.OW == 0 || p.M == 0) return;
#if defined(FG_AMX)
  if (p.source_dtype == F32 || leave_weights(p) || rowwise(p)) return FG_BELOW::compute(p);
  compute_with<TileKernel>(p);
#elif defined(FG_BELOW)
  if (p.source_dtype == F32) return FG_BELOW::compute(p);
  if (leave_weights(p)) return compute_with<BroadcastKernel<true, true>>(p);
  if (rowwise(p)) return compute_with<RowKernel<true>>(p);
  // Odd rows of few channels (grey images) are no whole pairs: to widen them is cheaper than to copy them together.
  if (thin_rows(p, 1) && !thin_rows(p, 2)) return FG_BELOW::compute(p);
  compute_with<BroadcastKernel<true>>(p);
#else
  p.source_dtype == F32 ? compute_in_fp32(p) : compute_widened(p);
#endif
}

}  // namespace fg::ISA
