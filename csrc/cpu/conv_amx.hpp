// AMX-BF16 tiles behind six functions, and the micro-kernel on them.
//
// Tests also compile it with FG_AMX_EMULATED, which replaces the six functions by loops over memory with the same
// layout and the same fp32 accumulation, so that CPUs without AMX run the rest of it.
#pragma once

#include "cpu/conv_micro.hpp"

#if defined(__AMX_BF16__) || defined(FG_AMX_EMULATED)
#define FG_AMX 1

namespace fg::ISA {
namespace {

#if defined(FG_AMX_EMULATED)

alignas(64) thread_local char emulated_tile[8][16][64];

inline void tiles_configure() {}
inline void tiles_release() {}

template <int T>
inline void tile_zero() {
  std::memset(emulated_tile[T], 0, sizeof emulated_tile[T]);
}

template <int T>
inline void tile_load(const void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(emulated_tile[T][r], static_cast<const char*>(p) + r * stride, 64);
}

template <int T>
inline void tile_store(void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(p) + r * stride, emulated_tile[T][r], 64);
}

// C[16][16] += A[16][32] B[32][16], with B's rows in pairs: B row r holds (B[2r][j], B[2r+1][j]) for j = 0..15.
template <int C, int A, int B>
inline void tile_multiply() {
  for (int i = 0; i < 16; ++i) {
    float sum[16];
    std::memcpy(sum, emulated_tile[C][i], sizeof sum);
    for (int u = 0; u < 16; ++u) {
      bf16 a[2];
      std::memcpy(a, &emulated_tile[A][i][4 * u], sizeof a);
      for (int j = 0; j < 16; ++j) {
        bf16 b[2];
        std::memcpy(b, &emulated_tile[B][u][4 * j], sizeof b);
        sum[j] += to_float(a[0]) * to_float(b[0]);
        sum[j] += to_float(a[1]) * to_float(b[1]);
      }
    }
    std::memcpy(emulated_tile[C][i], sum, sizeof sum);
  }
}

#else

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// At the entry of EACH parallel region: oneDNN's bf16 kernels, which share our threads, release the configuration.
// Inline assembly because gcc 12 drops the stores to the struct before _tile_loadconfig.
inline void tiles_configure() {
  TileConfig config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = 16;
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}

inline void tiles_release() { _tile_release(); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

template <int T>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(p), "r"(stride) : "memory");
}

template <int T>
inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(p), "r"(stride) : "memory");
}

template <int C, int A, int B>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// 16 rows of 64 bytes: in place where the rows are equally far apart, else copied together.
struct TileRows {
  const char* first;
  int64_t stride;
  bool in_place;
};

inline TileRows tile_rows(const char* const* left) {
  const auto at = [left](int i) { return reinterpret_cast<intptr_t>(left[i]); };
  const int64_t stride = at(1) - at(0);
  bool equal = true;
  for (int i = 2; i < 16; ++i) equal &= at(i) - at(i - 1) == stride;
  return {left[0], stride, equal};
}

template <int T>
inline void load_left(const TileRows& rows, const char* const* left, int64_t byte, char* copy) {
  if (rows.in_place) return tile_load<T>(rows.first + byte, rows.stride);
  for (int i = 0; i < 16; ++i) std::memcpy(copy + 64 * i, left[i] + byte, 64);
  tile_load<T>(copy, 64);
}

// 32 rows by 32 columns: tiles 0 to 3 accumulate, 4 and 5 hold the left rows, 6 and 7 the panel. Each loaded tile is
// used twice, the most that 8 tiles allow. Columns may be 16, and rows at most 16: then half or a quarter is computed.
struct TileKernel {
  static constexpr bool IN_PLACE = false;
  static constexpr int ROWS = 32;
  static constexpr int COLUMNS = 32;
  static constexpr int GRAIN = 16;
  static constexpr int PER_UNIT = 2;
  static constexpr int RUN_UNITS = 16;
  static constexpr bool BF16_SOURCE = true;
  static constexpr bool ROWWISE = false;
  static constexpr int CHUNK_BLOCKS = 8;

  static void enter() { tiles_configure(); }
  static void leave() { tiles_release(); }

  template <bool TALL, bool WIDE>
  static void block(const Run* run, int runs, const char* const* left, const char* panel, float* out, int64_t ld_out,
                    bool accumulate) {
    constexpr int64_t ROW_BYTES = WIDE ? 128 : 64;
    alignas(64) char copy[2][1024];
    const int64_t ld = ld_out * 4;
    if (accumulate) {
      tile_load<0>(out, ld);
      if (WIDE) tile_load<1>(out + 16, ld);
      if (TALL) tile_load<2>(out + 16 * ld_out, ld);
      if (TALL && WIDE) tile_load<3>(out + 16 * ld_out + 16, ld);
    } else {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    for (int t = 0; t < runs; ++t, left += ROWS) {
      const TileRows upper = tile_rows(left), lower = tile_rows(left + 16);
      const char* b = panel + run[t].row * ROW_BYTES;
      for (int64_t u = 0; u < run[t].units; u += 16, b += 16 * ROW_BYTES) {
        load_left<4>(upper, left, u * 4, copy[0]);
        tile_load<6>(b, ROW_BYTES);
        tile_multiply<0, 4, 6>();
        if (WIDE) {
          tile_load<7>(b + 64, ROW_BYTES);
          tile_multiply<1, 4, 7>();
        }
        if (TALL) {
          load_left<5>(lower, left + 16, u * 4, copy[1]);
          tile_multiply<2, 5, 6>();
          if (WIDE) tile_multiply<3, 5, 7>();
        }
      }
    }
    tile_store<0>(out, ld);
    if (WIDE) tile_store<1>(out + 16, ld);
    if (TALL) tile_store<2>(out + 16 * ld_out, ld);
    if (TALL && WIDE) tile_store<3>(out + 16 * ld_out + 16, ld);
  }

  static void tile(const Run* run, int runs, const char* const* left, int64_t /*step*/, int rows, const char* panel,
                   int64_t /*panel_rows*/, int columns, float* out, int64_t ld_out, bool accumulate) {
    if (rows > 16) {
      if (columns > 16)
        block<true, true>(run, runs, left, panel, out, ld_out, accumulate);
      else
        block<true, false>(run, runs, left, panel, out, ld_out, accumulate);
    } else {
      if (columns > 16)
        block<false, true>(run, runs, left, panel, out, ld_out, accumulate);
      else
        block<false, false>(run, runs, left, panel, out, ld_out, accumulate);
    }
  }
};

}  // namespace
}  // namespace fg::ISA

#endif  // __AMX_BF16__ or FG_AMX_EMULATED
