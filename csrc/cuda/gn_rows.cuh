// Group norm where a sample has few pixels, layer norm with its one among them. Sums per sample and channel, as
// gn_act.cuh keeps them, would be as large as x itself. Here a sample is one row of C HW columns, NCHW:
//   statistics       sums along the N groups pieces of rows, as batch norm's with a piece for a channel
//   row sums         the same with weight and bias along the row (ALONG): s1 = sum weight dt, s2 = sum weight dt xc, ..
//   columns          a thread keeps its columns' weights and walks down the rows, whose constants it joins (At): writes
//                    the elements and, in the same pass, adds up the parameters' gradients over the samples
// so the accesses are batch norm's: 3 forward, 5 backward, 8 double backward.
#pragma once

#include "cuda/norm.cuh"

namespace fg::cuda {

struct RowNorm {
  const float *weight, *bias;  // [C] or null
  const float *mean, *var;     // [N][groups]
  float eps;
  Act act;
  float slope;
  int groups, width, pixels;  // groups a sample, channels a group

  FG_MEMBER int channel(int column) const { return pixels == 1 ? column : column / pixels; }
  FG_MEMBER float rstd(i64 statistic) const { return rsqrtf(load(var + statistic) + eps); }

  // A vector [C] for V neighbouring columns.
  template <int V>
  FG_MEMBER void columns(const float* p, int column, float absent, float (&v)[V]) const {
    if (pixels == 1) {
      load_neighbours(p, column, absent, v);
      return;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = load_or(p, column / pixels + (column % pixels + j) / pixels, absent);
  }
  // The first column of a piece: piece i of all is group i % groups of sample i / groups.
  FG_MEMBER int first(int piece) const { return piece % groups * width * pixels; }
};

// ---------------------------------------------------------------------------------------------- sums along the rows

template <class T_>
struct GnRowSums {
  using T = T_;
  using Acc = Sums<2>;
  static constexpr int INPUTS = 2, ALONG = 2;
  static constexpr bool WRITES = false;
  const T* in[2];  // dy, x
  RowNorm norm;

  struct Coef {
    float mean, rstd;
  };
  FG_MEMBER void coefs(i64, int piece, Coef (&c)[1]) const { c[0] = {load(norm.mean + piece), norm.rstd(piece)}; }
  template <int V>
  FG_MEMBER void vectors(int piece, int offset, float (&along)[ALONG][V]) const {
    norm.columns(norm.weight, norm.first(piece) + offset, 1.0f, along[0]);
    norm.columns(norm.bias, norm.first(piece) + offset, 0.0f, along[1]);
  }
  template <int M>
  FG_MEMBER void accumulate(Acc& acc, const Coef& c, const float (&v)[INPUTS + ALONG][M], int count) const {
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if (i >= count) continue;
      const Affine affine = {c.mean, v[2][i] * c.rstd, v[3][i]};
      const float centred = v[1][i] - c.mean;
      const float dt = v[2][i] * activate_gradient(v[0][i], affine.t(centred), norm.act, norm.slope);
      acc.word[0] += dt;
      acc.word[1] += dt * centred;
    }
  }
};

// The seven sums of gn_act_double_backward_finish_kernel.
template <class T_>
struct GnRowDoubleSums {
  using T = T_;
  using Acc = Sums<7>;
  static constexpr int INPUTS = 3, ALONG = 3;
  static constexpr bool WRITES = false;
  const T* in[3];  // ddx (null: zero), dy, x
  RowNorm norm;
  const float* ddweight;  // [C] or null (zero)

  using Coef = typename GnRowSums<T>::Coef;
  FG_MEMBER void coefs(i64, int piece, Coef (&c)[1]) const { c[0] = {load(norm.mean + piece), norm.rstd(piece)}; }
  template <int V>
  FG_MEMBER void vectors(int piece, int offset, float (&along)[ALONG][V]) const {
    norm.columns(norm.weight, norm.first(piece) + offset, 1.0f, along[0]);
    norm.columns(norm.bias, norm.first(piece) + offset, 0.0f, along[1]);
    norm.columns(ddweight, norm.first(piece) + offset, 0.0f, along[2]);
  }
  template <int M>
  FG_MEMBER void accumulate(Acc& acc, const Coef& c, const float (&v)[INPUTS + ALONG][M], int count) const {
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if (i >= count) continue;
      const Affine affine = {c.mean, v[3][i] * c.rstd, v[4][i]};
      const float w = v[0][i], centred = v[2][i] - c.mean;
      const float dt = activate_gradient(v[1][i], affine.t(centred), norm.act, norm.slope);
      const float weighted = v[3][i] * dt, along = v[5][i] * dt;
      acc.word[0] += weighted;
      acc.word[1] += weighted * centred;
      acc.word[2] += w;
      acc.word[3] += w * centred;
      acc.word[4] += weighted * w;
      acc.word[5] += along;
      acc.word[6] += along * centred;
    }
  }
};

// ---------------------------------------------------------------------------------------------- columns

// What a thread keeps of one of its columns.
struct RowColumn {
  float weight, bias;
  int group;
};

template <int V>
FG_DEVICE void columns_of(const RowNorm& n, int column, RowColumn (&c)[V]) {
  float weight[V], bias[V];
  n.columns(n.weight, column, 1.0f, weight);
  n.columns(n.bias, column, 0.0f, bias);
#pragma unroll
  for (int j = 0; j < V; ++j) c[j] = {weight[j], bias[j], n.groups == 1 ? 0 : n.channel(column + j) / n.width};
}

template <class T_>
struct GnRowForward {
  using T = T_;
  static constexpr int INPUTS = 1, OUTPUTS = 1;
  const T* in[1];  // x
  T* out[1];       // y
  RowNorm norm;

  using Coef = RowColumn;
  using At = Affine;
  template <int V>
  FG_MEMBER void coefs(i64, int column, Coef (&c)[V]) const {
    columns_of(norm, column, c);
  }
  template <int V>
  FG_MEMBER void at_row(i64 row, const Coef (&c)[V], At (&at)[V]) const {
    float mean = 0.0f, rstd = 0.0f;  // neighbours of one group share the loads
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j == 0 || c[j].group != c[j > 0 ? j - 1 : 0].group) {
        const i64 i = row * norm.groups + c[j].group;
        mean = load(norm.mean + i);
        rstd = norm.rstd(i);
      }
      at[j] = {mean, c[j].weight * rstd, c[j].bias};
    }
  }
  FG_MEMBER void apply(const At& c, const float (&v)[1], float (&y)[1]) const {
    y[0] = activate(c.t(v[0] - c.mean), norm.act, norm.slope);
  }
};

template <class T_>
struct GnRowBackward {
  using T = T_;
  using Acc = Sums<2>;  // dweight, dbias
  static constexpr int INPUTS = 2, OUTPUTS = 1;
  static constexpr bool WRITES = true;
  const T* in[2];  // dy, x
  T* out[1];       // dx; null: not wanted
  RowNorm norm;
  const float* k;  // [2][N groups]: K0, K1 of NormBackward
  i64 stride;      // N groups

  using Coef = RowColumn;
  struct At {
    Affine affine;
    float rstd, k0, k1;
  };
  template <int V>
  FG_MEMBER void coefs(i64, int column, Coef (&c)[V]) const {
    columns_of(norm, column, c);
  }
  template <int V>
  FG_MEMBER void at_row(i64 row, const Coef (&c)[V], At (&at)[V]) const {
    float mean = 0.0f, rstd = 0.0f, k0 = 0.0f, k1 = 0.0f;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j == 0 || c[j].group != c[j > 0 ? j - 1 : 0].group) {
        const i64 i = row * norm.groups + c[j].group;
        mean = load(norm.mean + i);
        rstd = norm.rstd(i);
        k0 = load(k + i);
        k1 = load(k + stride + i);
      }
      at[j] = {{mean, c[j].weight * rstd, c[j].bias}, rstd, k0, k1};
    }
  }
  template <int M>
  FG_MEMBER void accumulate(Acc& acc, const At& c, const float (&v)[2][M], int) const {
    const float centred = v[1][0] - c.affine.mean;
    const float dt = activate_gradient(v[0][0], c.affine.t(centred), norm.act, norm.slope);
    acc.word[0] += c.rstd * dt * centred;
    acc.word[1] += dt;
  }
  FG_MEMBER void apply(const At& c, const float (&v)[2], float (&dx)[1]) const {
    const float centred = v[1] - c.affine.mean;
    const float dt = activate_gradient(v[0], c.affine.t(centred), norm.act, norm.slope);
    dx[0] = fmaf(c.affine.scale, dt, fmaf(c.k1, centred, c.k0));
  }
};

// Of a row: W1/M, W2/M, and NormDouble's XW, X0, X1; U0 and U1 are its U of one column.
enum GnRowCoef : int { ROW_W1, ROW_W2, ROW_XW, ROW_X0, ROW_X1, ROW_COEFS };

template <class T_>
struct GnRowDouble {
  using T = T_;
  using Acc = Sums<1>;  // d_weight
  static constexpr int INPUTS = 3, OUTPUTS = 2;
  static constexpr bool WRITES = true;
  const T* in[3];  // ddx (null: zero), dy, x
  T* out[2];       // d_dy, d_x; null: not wanted
  RowNorm norm;
  const float *ddweight, *ddbias;  // [C] or null (zero)
  const float* k;                  // [ROW_COEFS][N groups]
  i64 stride;                      // N groups

  struct Coef {
    RowColumn column;
    float v_weight, v_bias;
  };
  struct Row {
    float mean, rstd, k[ROW_COEFS];
  };
  struct At {
    Row row;
    Affine affine;
    float u0, u1;
  };
  template <int V>
  FG_MEMBER void coefs(i64, int column, Coef (&c)[V]) const {
    RowColumn columns[V];
    float v_weight[V], v_bias[V];
    columns_of(norm, column, columns);
    norm.columns(ddweight, column, 0.0f, v_weight);
    norm.columns(ddbias, column, 0.0f, v_bias);
#pragma unroll
    for (int j = 0; j < V; ++j) c[j] = {columns[j], v_weight[j], v_bias[j]};
  }
  template <int V>
  FG_MEMBER void at_row(i64 row, const Coef (&c)[V], At (&at)[V]) const {
    Row r = {};
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j == 0 || c[j].column.group != c[j > 0 ? j - 1 : 0].column.group) {
        const i64 i = row * norm.groups + c[j].column.group;
        r.mean = load(norm.mean + i);
        r.rstd = norm.rstd(i);
#pragma unroll
        for (int q = 0; q < ROW_COEFS; ++q) r.k[q] = load(k + q * stride + i);
      }
      const float scale = c[j].column.weight * r.rstd;
      at[j] = {r,
               {r.mean, scale, c[j].column.bias},
               c[j].v_bias - scale * r.k[ROW_W1],
               r.rstd * (c[j].v_weight - scale * r.k[ROW_W2])};
    }
  }
  template <int M>
  FG_MEMBER void accumulate(Acc& acc, const At& c, const float (&v)[3][M], int) const {
    const float centred = v[2][0] - c.row.mean;
    const float dt = activate_gradient(v[1][0], c.affine.t(centred), norm.act, norm.slope);
    acc.word[0] += c.row.rstd * dt * (v[0][0] - c.row.k[ROW_W1] - c.row.k[ROW_W2] * c.row.rstd * centred);
  }
  FG_MEMBER void apply(const At& c, const float (&v)[3], float (&d)[2]) const {
    const float w = v[0], centred = v[2] - c.row.mean, t = c.affine.t(centred);
    const float dt = activate_gradient(v[1], t, norm.act, norm.slope);
    d[0] = activate_gradient(fmaf(c.affine.scale, w, fmaf(c.u1, centred, c.u0)), t, norm.act, norm.slope);
    d[1] = fmaf(c.row.k[ROW_XW], w, fmaf(c.u1, dt, fmaf(c.row.k[ROW_X1], centred, c.row.k[ROW_X0])));
  }
};

// ---------------------------------------------------------------------------------------------- finish

struct GnRowFinish {
  const float* partials;
  int splits, pieces;  // N groups
  RowNorm norm;
  double inv_m;  // 1 / elements of a group
  float* k;

  FG_MEMBER double rstd(int piece) const { return 1.0 / sqrt(static_cast<double>(load(norm.var + piece)) + norm.eps); }
};

// A thread of row 0 has one piece. Grid of these three: 32 pieces a block.
static __global__ void __launch_bounds__(THREADS)
    gn_rows_statistics_kernel(GnRowFinish f, Pivot pivot, float* mean, float* var) {
  const int piece = blockIdx.x * FINISH_COLUMNS + threadIdx.x % FINISH_COLUMNS;
  const Moments m = merge_splits<Moments>(f.partials, 0, f.splits, piece, f.pieces);
  if (threadIdx.x >= FINISH_COLUMNS || piece >= f.pieces) return;
  store(mean + piece, pivot.at(0, piece) + m.mean());
  store(var + piece, m.variance());
}

static __global__ void __launch_bounds__(THREADS) gn_rows_backward_finish_kernel(GnRowFinish f) {
  const int piece = blockIdx.x * FINISH_COLUMNS + threadIdx.x % FINISH_COLUMNS;
  const Sums<2> s = merge_splits<Sums<2>>(f.partials, 0, f.splits, piece, f.pieces);
  if (threadIdx.x >= FINISH_COLUMNS || piece >= f.pieces) return;
  const FirstOrder o = first_order(s, f.inv_m, f.rstd(piece));
  store(f.k + piece, static_cast<float>(o.x0));
  store(f.k + f.pieces + piece, static_cast<float>(o.x1));
}

// docs/maths.md, section 5, as gn_act_double_backward_finish_kernel.
static __global__ void __launch_bounds__(THREADS) gn_rows_double_backward_finish_kernel(GnRowFinish f) {
  const int piece = blockIdx.x * FINISH_COLUMNS + threadIdx.x % FINISH_COLUMNS;
  const Sums<7> s = merge_splits<Sums<7>>(f.partials, 0, f.splits, piece, f.pieces);
  if (threadIdx.x >= FINISH_COLUMNS || piece >= f.pieces) return;
  const SecondOrder o = second_order(s, f.inv_m, f.rstd(piece));
  const double k[ROW_COEFS] = {o.w1, o.w2, o.xw, o.x0, o.x1};
  for (int q = 0; q < ROW_COEFS; ++q) store(f.k + static_cast<i64>(q) * f.pieces + piece, static_cast<float>(k[q]));
}

// The parameters' gradients from sums a column [splits][WORDS][C HW]. Grid: 32 channels a block.
template <int WORDS>
__global__ void __launch_bounds__(THREADS) gn_rows_parameters_kernel(const float* partials, int splits, int channels,
                                                                     int pixels, float* dweight, float* dbias) {
  const int channel = blockIdx.x * FINISH_COLUMNS + threadIdx.x % FINISH_COLUMNS;
  const i64 columns = static_cast<i64>(channels) * pixels;
  Sums<WORDS> sum;
  sum.clear();
  if (channel < channels)
    for (i64 i = threadIdx.x / FINISH_COLUMNS; i < static_cast<i64>(splits) * pixels; i += FINISH_ROWS) {
      const i64 split = i / pixels, pixel = i - split * pixels;
#pragma unroll
      for (int k = 0; k < WORDS; ++k)
        sum.word[k] += load(partials + (split * WORDS + k) * columns + static_cast<i64>(channel) * pixels + pixel);
    }
  merge_block<THREADS, FINISH_COLUMNS>(sum);
  if (threadIdx.x >= FINISH_COLUMNS || channel >= channels) return;
  if (dweight) store(dweight + channel, sum.word[0]);
  if constexpr (WORDS == 2)
    if (dbias) store(dbias + channel, sum.word[1]);
}

}  // namespace fg::cuda
