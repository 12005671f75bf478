// Micro-kernels: one register tile of a product whose left rows are read in place through pointers.
//
// out[i][j] (+)= sum over runs, sum over units u of run: left[run][i][u] * panel[run.row + u][j]
//
// A unit is 4 bytes of a row: one fp32 channel, or two bf16 channels for vdpbf16ps and AMX. Forward convolution, every
// phase of its adjoint, dense layers and the weight gradient differ only in the pointers that they put into the table.
#pragma once

#include "cpu/simd.hpp"

namespace fg::ISA {
namespace {

// A stretch of a row that is contiguous in memory, and where its weights start in the panel.
struct Run {
  int64_t row;
  int64_t units;
};

// 6 rows by 4 vectors: 24 of AVX-512's 32 registers accumulate, 4 hold the panel's row, one the broadcast. 10 loads
// serve 24 FMAs, and 6 row pointers fit the integer registers; 12x2 and 14x2 spill them (measured: 224 GFLOP/s for 6x4
// of 232 at the ceiling, 166 for 12x2, with the panel in L2). With 16 registers 6x2 is the largest.
constexpr int TILE_ROWS = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_VECTORS = 4;
#else
constexpr int TILE_VECTORS = 2;
#endif

// Multiplies units: fp32 FMA, or a dot product of two bf16 pairs with fp32 accumulation.
template <bool DOT>
inline vf multiply_add(vf a, vf b, vf sum) {
#if defined(__AVX512BF16__)
  if constexpr (DOT) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return fma(a, b, sum);
}

inline float load_unit(const char* p) {
  float f;
  std::memcpy(&f, p, sizeof f);
  return f;
}

inline vf load_units(const char* p) { return load(reinterpret_cast<const float*>(p)); }
inline vf load_units(const char* p, int n) { return load_tail(reinterpret_cast<const float*>(p), n); }

// A unit's weights for a vector of output channels: a row of units or, in a bf16 weight itself, two rows of channels,
// `apart` bytes from one to the next.
template <bool OF_UNITS>
inline vf load_weights(const char* b, int vector, int64_t apart) {
  if constexpr (OF_UNITS) return load_units(b + vector * VF * 4);
  const char* at = b + vector * VF * 2;
  const auto row = [](const char* p) { return load_half(reinterpret_cast<const bf16*>(p)); };
  return interleave(row(at), row(at + apart));
}

// IN_PLACE: rows lie `apart` bytes from each other, and Run::row counts the weight's elements. OF_UNITS: its rows are
// of units, not of channels.
template <bool DOT, int NV, bool IN_PLACE, bool OF_UNITS>
FG_NOINLINE void tile_vectors(const Run* run, int runs, const char* const* left, int64_t step, const char* panel,
                              int64_t apart, float* out, int64_t ld_out, bool accumulate) {
  constexpr int ROW_BYTES = NV * VF * 4;
  const int64_t row_bytes = IN_PLACE ? (OF_UNITS ? 1 : 2) * apart : ROW_BYTES;
  vf acc[TILE_ROWS][NV];
#pragma GCC unroll 8
  for (int i = 0; i < TILE_ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = accumulate ? load(out + i * ld_out + j * VF) : zero();

  for (int t = 0; t < runs; ++t, left += TILE_ROWS) {
    const char* b = panel + run[t].row * (!IN_PLACE ? ROW_BYTES : OF_UNITS ? 4 : 2);
    const char *a0 = left[0], *a1 = left[1], *a2 = left[2], *a3 = left[3], *a4 = left[4], *a5 = left[5];
    for (int64_t u = run[t].units, at = 0; u > 0; --u, at += step, b += row_bytes) {
      vf w[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) w[j] = load_weights < !IN_PLACE || OF_UNITS > (b, j, apart);
      const char* const a[TILE_ROWS] = {a0, a1, a2, a3, a4, a5};
#pragma GCC unroll 8
      for (int i = 0; i < TILE_ROWS; ++i) {
        const vf x = set1(load_unit(a[i] + at));
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = multiply_add<DOT>(x, w[j], acc[i][j]);
      }
    }
  }

#pragma GCC unroll 8
  for (int i = 0; i < TILE_ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(out + i * ld_out + j * VF, acc[i][j]);
}

// The broadcast form: vectors run over output channels. IN_PLACE: it reads the weights where they lie, output channels
// next to each other, or with OF_UNITS units; `panel_rows` of tile() are then the bytes from a row to the next.
template <bool DOT, bool IN_PLACE_ = false, bool OF_UNITS = !DOT>
struct BroadcastKernel {
  static constexpr bool IN_PLACE = IN_PLACE_;
  static constexpr int ROWS = TILE_ROWS;
  static constexpr int COLUMNS = TILE_VECTORS * VF;  // at most, in steps of GRAIN
  static constexpr int GRAIN = VF;
  static constexpr int PER_UNIT = DOT ? 2 : 1;  // channels in a unit
  static constexpr int RUN_UNITS = 1;           // a run is a multiple of this
  static constexpr bool BF16_SOURCE = DOT;
  static constexpr bool ROWWISE = false;  // panel [unit][column]
  static constexpr int CHUNK_BLOCKS = 32;

  static void enter() {}
  static void leave() {}

  // step: bytes from a unit of a row to the next.
  static void tile(const Run* run, int runs, const char* const* left, int64_t step, int /*rows*/, const char* panel,
                   int64_t panel_rows, int columns, float* out, int64_t ld_out, bool accumulate) {
    switch (columns / VF) {
      case 1:
        return tile_vectors<DOT, 1, IN_PLACE, OF_UNITS>(run, runs, left, step, panel, panel_rows, out, ld_out,
                                                        accumulate);
      case 2:
        return tile_vectors<DOT, 2, IN_PLACE, OF_UNITS>(run, runs, left, step, panel, panel_rows, out, ld_out,
                                                        accumulate);
#if defined(__AVX512F__) || defined(__aarch64__)
      case 3:
        return tile_vectors<DOT, 3, IN_PLACE, OF_UNITS>(run, runs, left, step, panel, panel_rows, out, ld_out,
                                                        accumulate);
      case 4:
        return tile_vectors<DOT, 4, IN_PLACE, OF_UNITS>(run, runs, left, step, panel, panel_rows, out, ld_out,
                                                        accumulate);
#endif
    }
  }
};

template <bool DOT, int NC, int MR>
FG_NOINLINE void dot_rows(const Run* run, int runs, const char* const* left, const char* panel, int64_t panel_rows,
                          float* out, int64_t ld_out) {
  vf acc[MR][NC];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NC; ++j) acc[i][j] = zero();
  for (int t = 0; t < runs; ++t, left += TILE_ROWS) {
    const char* b = panel + run[t].row * 4;
    const int64_t units = run[t].units, whole = units - units % VF;
    for (int64_t u = 0; u < whole; u += VF) {
      vf w[NC];
#pragma GCC unroll 4
      for (int j = 0; j < NC; ++j) w[j] = load_units(b + (j * panel_rows + u) * 4);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const vf x = load_units(left[i] + u * 4);
#pragma GCC unroll 4
        for (int j = 0; j < NC; ++j) acc[i][j] = multiply_add<DOT>(x, w[j], acc[i][j]);
      }
    }
    if (whole < units) {
      const int rest = static_cast<int>(units - whole);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const vf x = load_units(left[i] + whole * 4, rest);
#pragma GCC unroll 4
        for (int j = 0; j < NC; ++j)
          acc[i][j] = multiply_add<DOT>(x, load_units(b + (j * panel_rows + whole) * 4, rest), acc[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NC; ++j) out[i * ld_out + j] = sum(acc[i][j]);
}

// The dot-product form for 1 to 4 output channels (images, logits): vectors run over input channels, where the
// broadcast form would leave 12 of 16 lanes empty.
template <bool DOT>
struct RowKernel {
  static constexpr bool IN_PLACE = false;
  static constexpr int ROWS = TILE_ROWS;
  static constexpr int COLUMNS = 4;
  static constexpr int GRAIN = 1;
  static constexpr int PER_UNIT = DOT ? 2 : 1;
  static constexpr int RUN_UNITS = 1;
  static constexpr bool BF16_SOURCE = DOT;
  static constexpr bool ROWWISE = true;  // panel [column][unit]
  static constexpr int CHUNK_BLOCKS = 32;

  static void enter() {}
  static void leave() {}

  template <int NC>
  static void columns_of(const Run* run, int runs, const char* const* left, const char* panel, int64_t panel_rows,
                         float* out, int64_t ld_out) {
    if constexpr (TILE_VECTORS == 4 || NC == 1) {
      dot_rows<DOT, NC, 6>(run, runs, left, panel, panel_rows, out, ld_out);
    } else if constexpr (NC < 4) {  // 9 accumulators, 3 weights and a row in 16 registers
      dot_rows<DOT, NC, 3>(run, runs, left, panel, panel_rows, out, ld_out);
      dot_rows<DOT, NC, 3>(run, runs, left + 3, panel, panel_rows, out + 3 * ld_out, ld_out);
    } else {
      for (int i = 0; i < 6; i += 2)
        dot_rows<DOT, NC, 2>(run, runs, left + i, panel, panel_rows, out + i * ld_out, ld_out);
    }
  }

  static void tile(const Run* run, int runs, const char* const* left, int64_t /*step*/, int /*rows*/, const char* panel,
                   int64_t panel_rows, int columns, float* out, int64_t ld_out, bool /*accumulate*/) {
    switch (columns) {
      case 1:
        return columns_of<1>(run, runs, left, panel, panel_rows, out, ld_out);
      case 2:
        return columns_of<2>(run, runs, left, panel, panel_rows, out, ld_out);
      case 3:
        return columns_of<3>(run, runs, left, panel, panel_rows, out, ld_out);
      case 4:
        return columns_of<4>(run, runs, left, panel, panel_rows, out, ld_out);
    }
  }
};

}  // namespace
}  // namespace fg::ISA
