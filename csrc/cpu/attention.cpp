// Attention and its two derivatives (docs/maths.md, section 6), in tiles: no more than a stretch of rows of the scores
// is ever in memory. Everything is computed in float32.
//
// Bound: 2 products of rows x keys x d multiply-adds forward, 5 backward, 12 in the double backward; beside each
// element of the scores' 2 d multiply-adds a product, one exponential and the elementwise work of about 15, 20 and 50
// vector operations.
#include "cpu/attention_tiles.hpp"

namespace fg::ISA {

void attention_forward(const AttentionShape& s, const AttentionForwardArgs& a);
void attention_backward(const AttentionShape& s, const AttentionBackwardArgs& a);
void attention_double_backward(const AttentionShape& s, const AttentionDoubleBackwardArgs& a);

namespace {

// Rows of queries that go through the products together, and keys: a key's packed rows and panels are reused by all of
// the rows while they lie in the second-level cache. Multiples of TILE_ROWS and, the keys, of PANEL.
constexpr int64_t FORWARD_ROWS = 96;
constexpr int64_t ROWS = 48;
constexpr int64_t KEYS = 384;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// An odd number of cache lines from a row of scores to the next: with 4 KB between them the columns of a stretch share
// eight ways of the first-level cache.
inline int64_t leading(int64_t keys) { return (ceil_div(round_up(keys, TILE_ROWS), 16) | 1) * 16; }

FG_INLINE vf biased(const float* s, const float* bias, int64_t j, int lanes) {
  const vf t = load_some(s + j, lanes);
  return bias ? t + load_some(bias + j, lanes) : t;
}

// e^(s - lse), the probabilities of a row.
FG_INLINE vf probability(vf s, vf lse) { return exp_falling(s - lse); }

inline void clear(float* row, int64_t from, int64_t to) {
  if (from < to) std::memset(row + from, 0, sizeof(float) * static_cast<size_t>(to - from));
}

inline float largest(vf v) {
  float most = v[0];
  for (int i = 1; i < VF; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// ---------------------------------------------------------------------------------------------- forward

// A row's running maximum and sum (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018).
struct Running {
  float highest, sum;
};

// Scores of `valid` keys become exponentials from the new maximum on, the rest of the row 0; y follows the maximum.
FG_NOINLINE void exponentials(float* s, const float* bias, int64_t valid, int64_t width, Running& run, float* y,
                              int64_t dv) {
  vf highest = set1(run.highest);
  each(0, valid, [&](int64_t j, int lanes) {
    const vf t = biased(s, bias, j, lanes);
    if (bias) store_some(s + j, t, lanes);
    const vf seen = lanes == VF ? t : select(first(lanes), t, highest);
    highest = select(gt(seen, highest), seen, highest);
  });
  const float most = largest(highest), from = most == -INFINITE ? 0.0f : most;
  vf sum = zero();
  each(0, valid, [&](int64_t j, int lanes) {
    vf e = probability(load_some(s + j, lanes), set1(from));
    if (lanes < VF) e = select(first(lanes), e, zero());
    store_some(s + j, e, lanes);
    sum += e;
  });
  clear(s, valid, width);
  const float shrink = __builtin_expf(run.highest - from);
  run = {most, run.sum * shrink + fg::ISA::sum(sum)};
  if (shrink != 1.0f)
    for (int64_t c = 0; c < dv; c += VF) store(y + c, load(y + c) * set1(shrink));
}

struct ForwardMemory {
  float *q, *k, *v, *scores, *y;
  int64_t ld = leading(KEYS);
  ForwardMemory(Cutter& m, const Plan& p) {
    q = m.cut(FORWARD_ROWS * p.d);
    k = m.cut(round_up(p.s->keys, PANEL) * p.s->d);
    v = m.cut(p.s->keys * p.dv);
    scores = m.cut(FORWARD_ROWS * ld);
    y = m.cut(FORWARD_ROWS * p.dv);
  }
};

template <class T>
void forward_rows(const Plan& p, const ForwardMemory& m, Rows<const T> q, Rows<const float> bias, int64_t first,
                  int64_t rows, Rows<T> y, float* lse) {
  const AttentionShape& s = *p.s;
  Running run[FORWARD_ROWS];
  for (auto& r : run) r = {-INFINITE, 0.0f};
  pack_rows<T>(q, first, rows, s.d, p.d, s.scale, m.q);
  clear(m.y, 0, FORWARD_ROWS * p.dv);
  const int64_t keys = p.visible(first + rows - 1);
  for (int64_t key = 0; key < keys; key += KEYS) {
    const int64_t width = least(KEYS, keys - key);
    product<1>({{m.q, m.k + key * s.d}}, rows_of(p.d), in_panels(s.d), s.d, rows, width, m.scores, m.ld, false);
    for (int64_t i = 0; i < rows; ++i)
      exponentials(m.scores + i * m.ld, bias.at ? bias.row(first + i) + key : nullptr,
                   most(0, least(width, p.visible(first + i) - key)), width, run[i], m.y + i * p.dv, p.dv);
    product<1>({{m.scores, m.v + key * p.dv}}, rows_of(m.ld), in_rows(p.dv), width, rows, s.dv, m.y, p.dv, true);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const bool empty = run[i].sum == 0.0f;
    unpack_rows(m.y + i * p.dv, p.dv, empty ? 0.0f : 1.0f / run[i].sum, y, first + i, 1, s.dv);
    lse[first + i] = empty ? 0.0f : run[i].highest + __builtin_logf(run[i].sum);
  }
}

template <class T>
void forward(const AttentionShape& s, const AttentionForwardArgs& a) {
  const Plan p = plan_jobs(s, FORWARD_ROWS, nullptr, a.bias_strides);
  Cutter count{nullptr};
  const ForwardMemory counted(count, p);
  const Scratch<float> scratch(s.threads * count.used);
#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
  for (int64_t job = 0; job < p.jobs(); ++job) {
    Cutter mine{scratch.data + thread_index() * count.used};
    const ForwardMemory m(mine, p);
    p.heads(job, [&](int64_t n, int64_t h) {
      pack_panels<T>(head_of<T>(a.k, a.k_strides, n, h), 0, p.visible(p.last_row(job) - 1), s.d, m.k);
      pack_rows<T>(head_of<T>(a.v, a.v_strides, n, h), 0, p.visible(p.last_row(job) - 1), s.dv, p.dv, 1.0f, m.v);
      for (int64_t i = p.first_row(job); i < p.last_row(job); i += FORWARD_ROWS)
        forward_rows<T>(p, m, head_of<T>(a.q, a.q_strides, n, h), head_of(a.bias, a.bias_strides, n, h), i,
                        least(FORWARD_ROWS, p.last_row(job) - i), head_of<T>(a.y, a.y_strides, n, h),
                        a.lse + (n * s.heads + h) * s.rows);
    });
  }
}

// ---------------------------------------------------------------------------------------------- sums over rows

// What a job adds up for every key: dk and dv of a head. Of one part alone they are done when the job is; of several
// parts each has its own, and `finish` adds them in order.
struct KeySums {
  float *k, *v;
};

class KeySumsOfAll {
 public:
  KeySumsOfAll(const Plan& p)
      : p_(p),
        keys_(round_up(p.s->keys, TILE_ROWS)),
        scratch_((p.parts > 1 ? p.s->N * p.s->heads * p.parts : p.s->threads) * keys_ * (p.d + p.dv)) {}

  KeySums begin(int64_t job, int64_t n, int64_t h) const {
    const int64_t own = p_.parts > 1 ? (n * p_.s->heads + h) * p_.parts + job % p_.parts : thread_index();
    float* k = scratch_.data + own * keys_ * (p_.d + p_.dv);
    clear(k, 0, keys_ * (p_.d + p_.dv));
    return {k, k + keys_ * p_.d};
  }

  // The sums of a head, complete where there is one part.
  template <class T>
  void store(KeySums sums, Rows<T> dk, Rows<T> dv) const {
    unpack_rows(sums.k, p_.d, 1.0f, dk, 0, p_.s->keys, p_.s->d);
    unpack_rows(sums.v, p_.dv, 1.0f, dv, 0, p_.s->keys, p_.s->dv);
  }

  KeySums added(int64_t n, int64_t h) const {
    const int64_t size = keys_ * (p_.d + p_.dv);
    float* k = scratch_.data + (n * p_.s->heads + h) * p_.parts * size;
    for (int64_t part = 1; part < p_.parts; ++part)
      for (int64_t i = 0; i < size; i += VF) fg::ISA::store(k + i, load(k + i) + load(k + part * size + i));
    return {k, k + keys_ * p_.d};
  }

 private:
  const Plan& p_;
  int64_t keys_;
  Scratch<float> scratch_;
};

// Runs job(index) for all of them, then stores what several parts of a head have added up.
template <class T, class Job>
void run_jobs(const Plan& p, const KeySumsOfAll& sums, void* dk, const Strides& dk_strides, void* dv,
              const Strides& dv_strides, const Job& job) {
  const int64_t heads = p.parts > 1 ? p.s->N * p.s->heads : 0;
#pragma omp parallel num_threads(p.s->threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < p.jobs(); ++i) job(i);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < heads; ++i) {
      const int64_t n = i / p.s->heads, h = i % p.s->heads;
      sums.store(sums.added(n, h), head_of<T>(dk, dk_strides, n, h), head_of<T>(dv, dv_strides, n, h));
    }
  }
}

// ---------------------------------------------------------------------------------------------- backward

struct BackwardMemory {
  float *q, *dy, *delta, *dq;      // of the job's rows
  float *k_panels, *v_panels, *k;  // of KEYS keys
  float *p, *ds;                   // [ROWS][ld]
  int64_t ld = leading(KEYS);
  BackwardMemory(Cutter& m, const Plan& plan) {
    const int64_t rows = round_up(plan.block, TILE_ROWS);
    q = m.cut(rows * plan.d);
    dy = m.cut(rows * plan.dv);
    delta = m.cut(rows);
    dq = m.cut(rows * plan.d);
    k_panels = m.cut(KEYS * plan.s->d);
    v_panels = m.cut(KEYS * plan.s->dv);
    k = m.cut(KEYS * plan.d);
    p = m.cut(ROWS * ld);
    ds = m.cut(ROWS * ld);
  }
};

// p: scores become probabilities; ds: dp becomes p (dp - delta), which dbias takes too.
FG_NOINLINE void score_gradient(float* p, float* ds, const float* bias, int64_t valid, int64_t width, float lse,
                                float delta, float* dbias) {
  each(0, valid, [&](int64_t j, int lanes) {
    const vf e = probability(biased(p, bias, j, lanes), set1(lse));
    const vf d = e * (load_some(ds + j, lanes) - set1(delta));
    store_some(p + j, e, lanes);
    store_some(ds + j, d, lanes);
    if (dbias) store_some(dbias + j, load_some(dbias + j, lanes) + d, lanes);
  });
  clear(p, valid, width);
  clear(ds, valid, width);
}

template <class T>
void begin_rows(const Plan& p, const BackwardMemory& m, const AttentionBackwardArgs& a, int64_t n, int64_t h,
                int64_t first, int64_t rows) {
  const AttentionShape& s = *p.s;
  pack_rows<T>(head_of<T>(a.q, a.q_strides, n, h), first, rows, s.d, p.d, s.scale, m.q);
  pack_rows<T>(head_of<T>(a.dy, a.dy_strides, n, h), first, rows, s.dv, p.dv, 1.0f, m.dy);
  clear(m.dq, 0, round_up(rows, TILE_ROWS) * p.d);
  const Rows<const T> y = head_of<T>(a.y, a.y_strides, n, h);
  for (int64_t i = 0; i < rows; ++i) {
    vf dot = zero();
    each(0, s.dv, [&](int64_t c, int lanes) {
      dot = fma(load_some(y.row(first + i) + c, lanes), load(m.dy + i * p.dv + c), dot);
    });
    m.delta[i] = sum(dot);
  }
}

template <class T>
void backward_tile(const Plan& p, const BackwardMemory& m, const AttentionBackwardArgs& a, int64_t n, int64_t h,
                   int64_t first, int64_t i, int64_t rows, int64_t key, int64_t keys, KeySums sums) {
  const AttentionShape& s = *p.s;
  const float *q = m.q + i * p.d, *dy = m.dy + i * p.dv, *lse = a.lse + (n * s.heads + h) * s.rows + first + i;
  const int64_t width = least(keys, p.visible(first + i + rows - 1) - key);
  if (width <= 0) return;
  product<1>({{q, m.k_panels}}, rows_of(p.d), in_panels(s.d), s.d, rows, width, m.p, m.ld, false);
  product<1>({{dy, m.v_panels}}, rows_of(p.dv), in_panels(s.dv), s.dv, rows, width, m.ds, m.ld, false);
  const Rows<const float> bias = head_of(a.bias, a.bias_strides, n, h);
  const Rows<float> dbias = head_of(a.dbias, a.dbias_strides, n, h);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first + i + r;
    score_gradient(m.p + r * m.ld, m.ds + r * m.ld, bias.at ? bias.row(row) + key : nullptr,
                   most(0, least(width, p.visible(row) - key)), round_up(width, TILE_ROWS), lse[r], m.delta[i + r],
                   dbias.at ? dbias.row(row) + key : nullptr);
  }
  product<1>({{m.ds, m.k}}, rows_of(m.ld), in_rows(p.d), width, rows, s.d, m.dq + i * p.d, p.d, true);
  const int64_t whole = round_up(width, TILE_ROWS);  // keys past `width` get zeros
  product<1>({{m.p, dy}}, columns_of(m.ld), in_rows(p.dv), rows, whole, s.dv, sums.v + key * p.dv, p.dv, true);
  product<1>({{m.ds, q}}, columns_of(m.ld), in_rows(p.d), rows, whole, s.d, sums.k + key * p.d, p.d, true);
}

template <class T>
void backward(const AttentionShape& s, const AttentionBackwardArgs& a) {
  const Plan p = plan_jobs(s, ROWS, a.dbias, a.dbias_strides);
  Cutter count{nullptr};
  const BackwardMemory counted(count, p);
  const Scratch<float> scratch(s.threads * count.used);
  const KeySumsOfAll all(p);
  run_jobs<T>(p, all, a.dk, a.dk_strides, a.dv_out, a.dv_strides, [&](int64_t job) {
    Cutter mine{scratch.data + thread_index() * count.used};
    const BackwardMemory m(mine, p);
    const int64_t first = p.first_row(job), rows = p.last_row(job) - first;
    p.heads(job, [&](int64_t n, int64_t h) {
      const KeySums sums = all.begin(job, n, h);
      begin_rows<T>(p, m, a, n, h, first, rows);
      const Rows<const T> k = head_of<T>(a.k, a.k_strides, n, h), v = head_of<T>(a.v, a.v_strides, n, h);
      for (int64_t key = 0; key < p.visible(first + rows - 1); key += KEYS) {
        const int64_t keys = least(KEYS, s.keys - key);
        pack_panels<T>(k, key, keys, s.d, m.k_panels);
        pack_panels<T>(v, key, keys, s.dv, m.v_panels);
        pack_rows<T>(k, key, keys, s.d, p.d, 1.0f, m.k);
        for (int64_t i = 0; i < rows; i += ROWS)
          backward_tile<T>(p, m, a, n, h, first, i, least(ROWS, rows - i), key, keys, sums);
      }
      unpack_rows(m.dq, p.d, s.scale, head_of<T>(a.dq, a.dq_strides, n, h), first, rows, s.d);
      if (p.parts == 1) all.store(sums, head_of<T>(a.dk, a.dk_strides, n, h), head_of<T>(a.dv_out, a.dv_strides, n, h));
    });
  });
}

// ---------------------------------------------------------------------------------------------- double backward

// Its row sums run over all keys, so a stretch of ROWS whole rows of four arrays is kept: 768 bytes a key and thread,
// against five products computed twice.
struct DoubleMemory {
  float *q, *ddq, *dy, *d_q, *d_dy;                      // of ROWS rows
  float *k_panels, *ddk_panels, *v_panels, *ddv_panels;  // of all keys
  float *k, *ddk, *v, *ddv;                              // their rows
  float* plane[4];                                       // [ROWS][ld]: p, dp, a, c, then p, ds, g, r
  int64_t ld;
  DoubleMemory(Cutter& m, const Plan& p) {
    const int64_t keys = p.s->keys, panel = round_up(keys, PANEL);
    ld = leading(keys);
    q = m.cut(ROWS * p.d), ddq = m.cut(ROWS * p.d), d_q = m.cut(ROWS * p.d);
    dy = m.cut(ROWS * p.dv), d_dy = m.cut(ROWS * p.dv);
    k_panels = m.cut(panel * p.s->d), ddk_panels = m.cut(panel * p.s->d);
    v_panels = m.cut(panel * p.s->dv), ddv_panels = m.cut(panel * p.s->dv);
    k = m.cut(keys * p.d), ddk = m.cut(keys * p.d);
    v = m.cut(keys * p.dv), ddv = m.cut(keys * p.dv);
    for (float*& one : plane) one = m.cut(ROWS * ld);
  }
};

// One row of the four planes. p holds scores, a and c as the products left them.
struct DoubleRow {
  float *p, *dp, *a, *c;
  const float *bias, *ddbias;
  float* d_bias;
};

// The row's sums of p a, p dp and p (a dp + c), and then ds = p (dp - delta), g = p (a - alpha) and
// r = p ((a - alpha) (dp - delta) + c - gamma + alpha delta).
FG_NOINLINE void double_row(const DoubleRow& w, int64_t valid, int64_t width, float lse) {
  vf alpha = zero(), delta = zero(), gamma = zero();
  each(0, valid, [&](int64_t j, int lanes) {
    vf e = probability(biased(w.p, w.bias, j, lanes), set1(lse));
    if (lanes < VF) e = select(first(lanes), e, zero());
    const vf a = biased(w.a, w.ddbias, j, lanes), dp = load_some(w.dp + j, lanes), c = load_some(w.c + j, lanes);
    store_some(w.p + j, e, lanes);
    if (w.ddbias) store_some(w.a + j, a, lanes);
    alpha = fma(e, a, alpha);
    delta = fma(e, dp, delta);
    gamma = fma(e, fma(a, dp, c), gamma);
  });
  const float mean_a = sum(alpha), mean_dp = sum(delta), shift = mean_a * mean_dp - sum(gamma);
  each(0, valid, [&](int64_t j, int lanes) {
    const vf e = load_some(w.p + j, lanes), a = load_some(w.a + j, lanes) - set1(mean_a);
    const vf dp = load_some(w.dp + j, lanes) - set1(mean_dp);
    const vf r = e * fma(a, dp, load_some(w.c + j, lanes) + set1(shift));
    store_some(w.dp + j, e * dp, lanes);
    store_some(w.a + j, e * a, lanes);
    store_some(w.c + j, r, lanes);
    if (w.d_bias) store_some(w.d_bias + j, load_some(w.d_bias + j, lanes) + r, lanes);
  });
  float* const rows[] = {w.p, w.dp, w.a, w.c};
  for (float* row : rows) clear(row, valid, width);
}

template <class T>
void pack_double_keys(const Plan& p, const DoubleMemory& m, const AttentionDoubleBackwardArgs& a, int64_t n, int64_t h,
                      int64_t keys) {
  const AttentionShape& s = *p.s;
  const Rows<const T> k = head_of<T>(a.k, a.k_strides, n, h), ddk = head_of<T>(a.ddk, a.ddk_strides, n, h);
  const Rows<const T> v = head_of<T>(a.v, a.v_strides, n, h), ddv = head_of<T>(a.ddv, a.ddv_strides, n, h);
  pack_panels<T>(k, 0, keys, s.d, m.k_panels);
  pack_panels<T>(ddk, 0, keys, s.d, m.ddk_panels);
  pack_panels<T>(v, 0, keys, s.dv, m.v_panels);
  pack_panels<T>(ddv, 0, keys, s.dv, m.ddv_panels);
  pack_rows<T>(k, 0, keys, s.d, p.d, 1.0f, m.k);
  pack_rows<T>(ddk, 0, keys, s.d, p.d, 1.0f, m.ddk);
  pack_rows<T>(v, 0, keys, s.dv, p.dv, 1.0f, m.v);
  pack_rows<T>(ddv, 0, keys, s.dv, p.dv, 1.0f, m.ddv);
}

// The planes of a stretch of rows: scores, dp = dy v^T, a = scale (ddq k^T + q ddk^T) + ddbias, c = dy ddv^T.
template <class T>
void double_planes(const Plan& p, const DoubleMemory& m, const AttentionDoubleBackwardArgs& a, int64_t n, int64_t h,
                   int64_t first, int64_t rows, int64_t keys) {
  const AttentionShape& s = *p.s;
  pack_rows<T>(head_of<T>(a.q, a.q_strides, n, h), first, rows, s.d, p.d, s.scale, m.q);
  pack_rows<T>(head_of<T>(a.ddq, a.ddq_strides, n, h), first, rows, s.d, p.d, s.scale, m.ddq);
  pack_rows<T>(head_of<T>(a.dy, a.dy_strides, n, h), first, rows, s.dv, p.dv, 1.0f, m.dy);
  const Left by_d = rows_of(p.d), by_dv = rows_of(p.dv);
  product<1>({{m.q, m.k_panels}}, by_d, in_panels(s.d), s.d, rows, keys, m.plane[0], m.ld, false);
  product<1>({{m.dy, m.v_panels}}, by_dv, in_panels(s.dv), s.dv, rows, keys, m.plane[1], m.ld, false);
  product<2>({{m.ddq, m.k_panels}, {m.q, m.ddk_panels}}, by_d, in_panels(s.d), s.d, rows, keys, m.plane[2], m.ld,
             false);
  product<1>({{m.dy, m.ddv_panels}}, by_dv, in_panels(s.dv), s.dv, rows, keys, m.plane[3], m.ld, false);
  const Rows<const float> bias = head_of(a.bias, a.bias_strides, n, h);
  const Rows<const float> ddbias = head_of(a.ddbias, a.ddbias_strides, n, h);
  const Rows<float> d_bias = head_of(a.d_bias, a.d_bias_strides, n, h);
  const float* lse = a.lse + (n * s.heads + h) * s.rows;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = i * m.ld, row = first + i;
    const DoubleRow one = {m.plane[0] + at,
                           m.plane[1] + at,
                           m.plane[2] + at,
                           m.plane[3] + at,
                           bias.at ? bias.row(row) : nullptr,
                           ddbias.at ? ddbias.row(row) : nullptr,
                           d_bias.at ? d_bias.row(row) : nullptr};
    double_row(one, p.visible(row), round_up(keys, TILE_ROWS), lse[row]);
  }
}

// d_dy = g v + p ddv, d_q = scale (r k + ds ddk), d_v = g^T dy, d_k = scale (r^T q + ds^T ddq).
inline void double_products(const Plan& p, const DoubleMemory& m, int64_t rows, int64_t keys, KeySums sums) {
  const AttentionShape& s = *p.s;
  clear(m.d_q, 0, ROWS * p.d);
  clear(m.d_dy, 0, ROWS * p.dv);
  for (int64_t key = 0; key < keys; key += KEYS / 2) {
    const int64_t width = least(KEYS / 2, keys - key);
    const float *prob = m.plane[0] + key, *ds = m.plane[1] + key, *g = m.plane[2] + key, *r = m.plane[3] + key;
    product<2>({{g, m.v + key * p.dv}, {prob, m.ddv + key * p.dv}}, rows_of(m.ld), in_rows(p.dv), width, rows, s.dv,
               m.d_dy, p.dv, true);
    product<2>({{r, m.k + key * p.d}, {ds, m.ddk + key * p.d}}, rows_of(m.ld), in_rows(p.d), width, rows, s.d, m.d_q,
               p.d, true);
    const int64_t whole = round_up(width, TILE_ROWS);  // keys past `width` get zeros
    product<1>({{g, m.dy}}, columns_of(m.ld), in_rows(p.dv), rows, whole, s.dv, sums.v + key * p.dv, p.dv, true);
    product<2>({{r, m.q}, {ds, m.ddq}}, columns_of(m.ld), in_rows(p.d), rows, whole, s.d, sums.k + key * p.d, p.d,
               true);
  }
}

template <class T>
void double_backward(const AttentionShape& s, const AttentionDoubleBackwardArgs& a) {
  const Plan p = plan_jobs(s, ROWS, a.d_bias, a.d_bias_strides);
  Cutter count{nullptr};
  const DoubleMemory counted(count, p);
  const Scratch<float> scratch(s.threads * count.used);
  const KeySumsOfAll all(p);
  run_jobs<T>(p, all, a.d_k, a.d_k_strides, a.d_v, a.d_v_strides, [&](int64_t job) {
    Cutter mine{scratch.data + thread_index() * count.used};
    const DoubleMemory m(mine, p);
    p.heads(job, [&](int64_t n, int64_t h) {
      const KeySums sums = all.begin(job, n, h);
      pack_double_keys<T>(p, m, a, n, h, p.visible(p.last_row(job) - 1));
      for (int64_t i = p.first_row(job); i < p.last_row(job); i += ROWS) {
        const int64_t rows = least(ROWS, p.last_row(job) - i), keys = p.visible(i + rows - 1);
        double_planes<T>(p, m, a, n, h, i, rows, keys);
        double_products(p, m, rows, keys, sums);
        unpack_rows(m.d_q, p.d, s.scale, head_of<T>(a.d_q, a.d_q_strides, n, h), i, rows, s.d);
        unpack_rows(m.d_dy, p.dv, 1.0f, head_of<T>(a.d_dy, a.d_dy_strides, n, h), i, rows, s.dv);
      }
      if (p.parts == 1) all.store(sums, head_of<T>(a.d_k, a.d_k_strides, n, h), head_of<T>(a.d_v, a.d_v_strides, n, h));
    });
  });
}

}  // namespace

void attention_forward(const AttentionShape& s, const AttentionForwardArgs& a) {
  s.dtype == BF16 ? forward<bf16>(s, a) : forward<float>(s, a);
}
void attention_backward(const AttentionShape& s, const AttentionBackwardArgs& a) {
  s.dtype == BF16 ? backward<bf16>(s, a) : backward<float>(s, a);
}
void attention_double_backward(const AttentionShape& s, const AttentionDoubleBackwardArgs& a) {
  s.dtype == BF16 ? double_backward<bf16>(s, a) : double_backward<float>(s, a);
}

}  // namespace fg::ISA
