// Attention and its two derivatives (docs/maths.md, section 6), in tiles: no more than a stretch of rows of the scores
// is ever in memory. Sums and elements are float32, and so are the products' operands. For bf16 tensors, where the
// table has vdpbf16ps, the operands are pairs of bf16, and the squares of scores are rounded to bf16.
//
// Bound: 2 products of rows x keys x d multiply-adds forward, 5 backward, 12 in the double backward. Beside these an
// element of the scores takes one exponential and about 15, 20 and 50 elementwise vector operations.
#include <initializer_list>

#include "common/attention_derivatives.hpp"
#include "cpu/attention_tiles.hpp"

namespace fg::ISA {

void attention_forward(const AttentionShape& s, const AttentionForwardArgs& a);
void attention_backward(const AttentionShape& s, const AttentionBackwardArgs& a);
void attention_double_backward(const AttentionShape& s, const AttentionDoubleBackwardArgs& a);

namespace {

// Rows of queries, and keys, that go through the products together: all of the rows reuse a key's packed rows and
// panels while these lie in the second-level cache. Both are multiples of TILE_ROWS, the keys of PANEL too.
constexpr int64_t FORWARD_ROWS = 96;
constexpr int64_t ROWS = 48;
constexpr int64_t KEYS = 384;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// An odd number of cache lines from a row of scores to the next: with 4 KB between them the columns of a stretch share
// eight ways of the first-level cache.
inline int64_t leading(int64_t keys) { return (ceil_div(round_up(keys, TILE_ROWS), 16) | 1) * 16; }

// A score: what the products left, times the scale that they lack, plus its bias.
template <bool PAIRS>
FG_INLINE vf finished(const float* s, const float* bias, float scale, int64_t j, int lanes) {
  vf t = load_some(s + j, lanes);
  if constexpr (PAIRS) t = t * set1(scale);
  return bias ? t + load_some(bias + j, lanes) : t;
}

// e^(s - lse), the probabilities of a row.
FG_INLINE vf probability(vf s, vf lse) { return exp_falling(s - lse); }

inline float largest(vf v) {
  float most = v[0];
  for (int i = 1; i < VF; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// ---------------------------------------------------------------------------------------------- scores as operands

// Writes the operands of products: floats, or bf16 into the first half of the row. The writing never overtakes the
// reading of the same row.
template <bool PAIRS>
FG_INLINE void put(float* row, int64_t j, vf v, int lanes) {
#if defined(__AVX512BF16__)
  if constexpr (PAIRS) {  // vdpbf16ps takes denormals for 0 in any case
    const auto mask = static_cast<__mmask16>((1u << lanes) - 1);
    return _mm256_mask_storeu_epi16(reinterpret_cast<uint16_t*>(row) + j, mask, (__m256i)_mm512_cvtneps_pbh((__m512)v));
  }
#endif
  store_some(row + j, v, lanes);
}

template <bool PAIRS>
inline void clear_put(float* row, int64_t from, int64_t to) {
  if (from < to)
    std::memset(reinterpret_cast<char*>(row) + (PAIRS ? 2 : 4) * from, 0,
                static_cast<size_t>((PAIRS ? 2 : 4) * (to - from)));
}

// A square of scores, rows of `ld` floats, as the left side of two products: summed along keys (rows of units) and
// along rows (columns of units). Pairs of rows are put together by pair_rows.
template <bool PAIRS>
struct Square {
  float *plane, *pairs;

  void cut(Cutter& m, int64_t ld, bool along_rows) {
    plane = m.cut(ROWS * ld);
    pairs = PAIRS && along_rows ? m.cut(ROWS / 2 * ld) : plane;
  }
  const float* at_key(int64_t key) const { return plane + (PAIRS ? key / 2 : key); }
  const float* columns(int64_t key) const { return pairs + key; }

  void pair_rows(int64_t rows, int64_t width, int64_t ld) const {
    if constexpr (PAIRS)
      for (int64_t i = 0; i < rows; i += 2) {
        const auto* low = reinterpret_cast<const bf16*>(plane + i * ld);
        const auto* high = i + 1 < rows ? reinterpret_cast<const bf16*>(plane + (i + 1) * ld) : nullptr;
        for (int64_t j = 0; j < width; j += VF)
          store(pairs + i / 2 * ld + j, interleave(load_half(low + j), high ? load_half(high + j) : vh{}));
      }
  }
};

// Rows of q, dy or ddq: the left side of scores, and the right side of outputs along rows. One array where both are
// floats.
template <bool PAIRS>
struct Sides {
  float *left, *right;

  void cut(Cutter& m, int64_t rows, int64_t step, int64_t padded) {
    left = m.cut(rows * step);
    right = PAIRS ? m.cut(units<PAIRS>(rows) * padded) : left;
  }
  template <class T>
  void pack(Rows<const T> from, int64_t first, int64_t rows, int64_t width, int64_t step, int64_t padded,
            float factor) {
    pack_left<PAIRS>(from, first, rows, width, step, factor, left);
    if constexpr (PAIRS) pack_right<true>(from, first, rows, width, padded, 1.0f, right);
  }
};

// ---------------------------------------------------------------------------------------------- forward

// A row's running maximum and sum (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018).
struct Running {
  float highest, sum;
};

// Scores of `valid` keys become exponentials from the new maximum on, the rest of the row 0; y follows the maximum.
template <bool PAIRS>
FG_NOINLINE void exponentials(float* s, const float* bias, float scale, int64_t valid, int64_t width, Running& run,
                              float* y, int64_t dv) {
  vf highest = set1(run.highest);
  each(0, valid, [&](int64_t j, int lanes) {
    const vf t = finished<PAIRS>(s, bias, scale, j, lanes);
    if (bias || PAIRS) store_some(s + j, t, lanes);
    const vf seen = lanes == VF ? t : select(first(lanes), t, highest);
    highest = select(gt(seen, highest), seen, highest);
  });
  const float most = largest(highest), from = most == -INFINITE ? 0.0f : most;
  vf sum = zero();
  each(0, valid, [&](int64_t j, int lanes) {
    vf e = probability(load_some(s + j, lanes), set1(from));
    if (lanes < VF) e = select(first(lanes), e, zero());
    put<PAIRS>(s, j, e, lanes);
    sum += e;
  });
  clear_put<PAIRS>(s, valid, width);
  const float shrink = __builtin_expf(run.highest - from);
  run = {most, run.sum * shrink + fg::ISA::sum(sum)};
  if (shrink != 1.0f)
    for (int64_t c = 0; c < dv; c += VF) store(y + c, load(y + c) * set1(shrink));
}

template <bool PAIRS>
struct ForwardMemory {
  float *q, *k, *v, *scores, *y;
  int64_t ld = leading(KEYS);
  ForwardMemory(Cutter& m, const Plan& p) {
    q = m.cut(FORWARD_ROWS * p.left_d);
    k = m.cut(round_up(p.s->keys, PANEL) * units<PAIRS>(p.s->d));
    v = m.cut(units<PAIRS>(p.s->keys) * p.dv);
    scores = m.cut(FORWARD_ROWS * ld);
    y = m.cut(FORWARD_ROWS * p.dv);
  }
};

template <class T, bool PAIRS>
void forward_rows(const Plan& p, const ForwardMemory<PAIRS>& m, Rows<const T> q, Rows<const float> bias, int64_t first,
                  int64_t rows, Rows<T> y, float* lse) {
  const AttentionShape& s = *p.s;
  const int64_t of_d = units<PAIRS>(s.d);
  Running run[FORWARD_ROWS];
  for (auto& r : run) r = {-INFINITE, 0.0f};
  pack_left<PAIRS>(q, first, rows, s.d, p.left_d, p.scale_of_rows, m.q);
  clear(m.y, 0, FORWARD_ROWS * p.dv);
  const int64_t keys = p.visible(first + rows - 1);
  for (int64_t key = 0; key < keys; key += KEYS) {
    const int64_t width = least(KEYS, keys - key);
    product<PAIRS, 1>({{m.q, m.k + key * of_d}}, rows_of(p.left_d), in_panels(of_d), of_d, rows, width, m.scores, m.ld,
                      false);
    for (int64_t i = 0; i < rows; ++i)
      exponentials<PAIRS>(m.scores + i * m.ld, bias.at ? bias.row(first + i) + key : nullptr, p.scale,
                          most(0, least(width, p.visible(first + i) - key)), round_up(width, 2), run[i], m.y + i * p.dv,
                          p.dv);
    product<PAIRS, 1>({{m.scores, m.v + units<PAIRS>(key) * p.dv}}, rows_of(m.ld), in_rows(p.dv), units<PAIRS>(width),
                      rows, s.dv, m.y, p.dv, true);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const bool empty = run[i].sum == 0.0f;
    unpack_rows(m.y + i * p.dv, p.dv, empty ? 0.0f : 1.0f / run[i].sum, y, first + i, 1, s.dv);
    lse[first + i] = empty ? 0.0f : run[i].highest + __builtin_logf(run[i].sum);
  }
}

template <class T>
void forward(const AttentionShape& s, const AttentionForwardArgs& a) {
  constexpr bool PAIRS = PAIRED<T>;
  const Plan p = plan_jobs(s, PAIRS, FORWARD_ROWS, nullptr, a.bias_strides);
  Cutter count{nullptr};
  const ForwardMemory<PAIRS> counted(count, p);
  const Scratch<float> scratch(s.threads * count.used);
#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
  for (int64_t job = 0; job < p.jobs(); ++job) {
    Cutter mine{scratch.data + thread_index() * count.used};
    const ForwardMemory<PAIRS> m(mine, p);
    p.heads(job, [&](int64_t n, int64_t h) {
      const int64_t keys = p.visible(p.last_row(job) - 1);
      pack_panels<PAIRS>(head_of<T>(a.k, a.k_strides, n, h), 0, keys, s.d, m.k);
      pack_right<PAIRS>(head_of<T>(a.v, a.v_strides, n, h), 0, keys, s.dv, p.dv, 1.0f, m.v);
      for (int64_t i = p.first_row(job); i < p.last_row(job); i += FORWARD_ROWS)
        forward_rows<T, PAIRS>(p, m, head_of<T>(a.q, a.q_strides, n, h), head_of(a.bias, a.bias_strides, n, h), i,
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
    unpack_rows(sums.k, p_.d, p_.scale, dk, 0, p_.s->keys, p_.s->d);
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

// The skeleton of both derivatives: work(memory, n, h, first row, last row, sums) for every head of every job, each in
// memory of its thread; then the sums over rows, in the order of the parts.
template <class T, class Memory, class Work>
void walk(const Plan& p, void* dk, const Strides& dk_strides, void* dv, const Strides& dv_strides, const Work& work) {
  Cutter count{nullptr};
  const Memory counted(count, p);
  const Scratch<float> scratch(p.s->threads * count.used);
  const KeySumsOfAll all(p);
  const auto store = [&](KeySums sums, int64_t n, int64_t h) {
    all.store(sums, head_of<T>(dk, dk_strides, n, h), head_of<T>(dv, dv_strides, n, h));
  };
  const int64_t heads = p.parts > 1 ? p.s->N * p.s->heads : 0;
#pragma omp parallel num_threads(p.s->threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < p.jobs(); ++job) {
      Cutter mine{scratch.data + thread_index() * count.used};
      Memory m(mine, p);
      p.heads(job, [&](int64_t n, int64_t h) {
        const KeySums sums = all.begin(job, n, h);
        work(m, n, h, p.first_row(job), p.last_row(job), sums);
        if (p.parts == 1) store(sums, n, h);
      });
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < heads; ++i) {
      const int64_t n = i / p.s->heads, h = i % p.s->heads;
      store(all.added(n, h), n, h);
    }
  }
}

// ---------------------------------------------------------------------------------------------- backward

template <bool PAIRS>
struct BackwardMemory {
  Sides<PAIRS> q, dy;              // of the ROWS in hand
  float *delta, *dq;               // of the job's rows
  float *k_panels, *v_panels, *k;  // of all keys
  Square<PAIRS> p, ds;
  int64_t ld = leading(KEYS);
  BackwardMemory(Cutter& m, const Plan& plan) {
    const int64_t rows = round_up(plan.block, TILE_ROWS);
    q.cut(m, rows, plan.left_d, plan.d);
    dy.cut(m, rows, plan.left_dv, plan.dv);
    delta = m.cut(rows);
    dq = m.cut(rows * plan.d);
    k_panels = m.cut(KEYS * units<PAIRS>(plan.s->d));
    v_panels = m.cut(KEYS * units<PAIRS>(plan.s->dv));
    k = m.cut(units<PAIRS>(KEYS) * plan.d);
    p.cut(m, ld, true);
    ds.cut(m, ld, true);
  }
};

// p: scores become probabilities; ds: dp becomes p (dp - delta), which dbias takes too.
template <bool PAIRS>
FG_NOINLINE void score_gradient(float* p, float* ds, const float* bias, float scale, int64_t valid, int64_t width,
                                float lse, float delta, float* dbias) {
  each(0, valid, [&](int64_t j, int lanes) {
    const vf e = probability(finished<PAIRS>(p, bias, scale, j, lanes), set1(lse));
    const vf d = score_derivative(e, load_some(ds + j, lanes), set1(delta));
    put<PAIRS>(p, j, e, lanes);
    put<PAIRS>(ds, j, d, lanes);
    if (dbias) store_some(dbias + j, load_some(dbias + j, lanes) + d, lanes);
  });
  clear_put<PAIRS>(p, valid, width);
  clear_put<PAIRS>(ds, valid, width);
}

template <class T, bool PAIRS>
void begin_rows(const Plan& p, BackwardMemory<PAIRS>& m, const AttentionBackwardArgs& a, int64_t n, int64_t h,
                int64_t first, int64_t rows) {
  const AttentionShape& s = *p.s;
  const Rows<const T> y = head_of<T>(a.y, a.y_strides, n, h), dy = head_of<T>(a.dy, a.dy_strides, n, h);
  m.q.pack(head_of<T>(a.q, a.q_strides, n, h), first, rows, s.d, p.left_d, p.d, p.scale_of_rows);
  m.dy.pack(dy, first, rows, s.dv, p.left_dv, p.dv, 1.0f);
  clear(m.dq, 0, round_up(rows, TILE_ROWS) * p.d);
  for (int64_t i = first; i < first + rows; ++i) {
    vf dot = zero();
    each(0, s.dv, [&](int64_t c, int lanes) {
      dot = fma(load_some(y.row(i) + c, lanes), load_some(dy.row(i) + c, lanes), dot);
    });
    m.delta[i - first] = sum(dot);
  }
}

// Rows first + i on, keys `key` on. `i` is a multiple of ROWS, so that pairs of rows begin there.
template <class T, bool PAIRS>
void backward_tile(const Plan& p, const BackwardMemory<PAIRS>& m, const AttentionBackwardArgs& a, int64_t n, int64_t h,
                   int64_t first, int64_t i, int64_t rows, int64_t key, int64_t keys, KeySums sums) {
  const AttentionShape& s = *p.s;
  const int64_t of_d = units<PAIRS>(s.d), of_dv = units<PAIRS>(s.dv), of_rows = units<PAIRS>(rows),
                pair = units<PAIRS>(i);
  const float* lse = a.lse + (n * s.heads + h) * s.rows + first + i;
  const int64_t width = least(keys, p.visible(first + i + rows - 1) - key);
  if (width <= 0) return;
  product<PAIRS, 1>({{m.q.left + i * p.left_d, m.k_panels}}, rows_of(p.left_d), in_panels(of_d), of_d, rows, width,
                    m.p.plane, m.ld, false);
  product<PAIRS, 1>({{m.dy.left + i * p.left_dv, m.v_panels}}, rows_of(p.left_dv), in_panels(of_dv), of_dv, rows, width,
                    m.ds.plane, m.ld, false);
  const Rows<const float> bias = head_of(a.bias, a.bias_strides, n, h);
  const Rows<float> dbias = head_of(a.dbias, a.dbias_strides, n, h);
  const int64_t whole = round_up(width, TILE_ROWS);  // keys past `width` get zeros
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first + i + r;
    score_gradient<PAIRS>(m.p.plane + r * m.ld, m.ds.plane + r * m.ld, bias.at ? bias.row(row) + key : nullptr, p.scale,
                          most(0, least(width, p.visible(row) - key)), whole, lse[r], m.delta[i + r],
                          dbias.at ? dbias.row(row) + key : nullptr);
  }
  m.p.pair_rows(rows, whole, m.ld);
  m.ds.pair_rows(rows, whole, m.ld);
  product<PAIRS, 1>({{m.ds.plane, m.k}}, rows_of(m.ld), in_rows(p.d), units<PAIRS>(width), rows, s.d, m.dq + i * p.d,
                    p.d, true);
  product<PAIRS, 1>({{m.p.pairs, m.dy.right + pair * p.dv}}, columns_of(m.ld), in_rows(p.dv), of_rows, whole, s.dv,
                    sums.v + key * p.dv, p.dv, true);
  product<PAIRS, 1>({{m.ds.pairs, m.q.right + pair * p.d}}, columns_of(m.ld), in_rows(p.d), of_rows, whole, s.d,
                    sums.k + key * p.d, p.d, true);
}

template <class T>
void backward(const AttentionShape& s, const AttentionBackwardArgs& a) {
  constexpr bool PAIRS = PAIRED<T>;
  using Memory = BackwardMemory<PAIRS>;
  const Plan p = plan_jobs(s, PAIRS, ROWS, a.dbias, a.dbias_strides);
  const auto work = [&](Memory& m, int64_t n, int64_t h, int64_t first, int64_t last, KeySums sums) {
    begin_rows<T>(p, m, a, n, h, first, last - first);
    const Rows<const T> k = head_of<T>(a.k, a.k_strides, n, h), v = head_of<T>(a.v, a.v_strides, n, h);
    for (int64_t key = 0; key < p.visible(last - 1); key += KEYS) {
      const int64_t keys = least(KEYS, s.keys - key);
      pack_panels<PAIRS>(k, key, keys, s.d, m.k_panels);
      pack_panels<PAIRS>(v, key, keys, s.dv, m.v_panels);
      pack_right<PAIRS>(k, key, keys, s.d, p.d, 1.0f, m.k);
      for (int64_t i = 0; i < last - first; i += ROWS)
        backward_tile<T>(p, m, a, n, h, first, i, least(ROWS, last - first - i), key, keys, sums);
    }
    unpack_rows(m.dq, p.d, s.scale, head_of<T>(a.dq, a.dq_strides, n, h), first, last - first, s.d);
  };
  walk<T, Memory>(p, a.dk, a.dk_strides, a.dv_out, a.dv_strides, work);
}

// ---------------------------------------------------------------------------------------------- double backward

// A tensor of keys: the right side of scores, in panels, and of outputs.
struct KeySides {
  float *panels, *rows;
};

// Its row sums run over all keys, so a stretch of ROWS whole rows of four arrays is kept: 768 bytes a key and thread,
// against five products computed twice.
template <bool PAIRS>
struct DoubleMemory {
  Sides<PAIRS> q, ddq, dy;    // of ROWS rows
  float *d_q, *d_dy;          // of ROWS rows
  KeySides k, ddk, v, ddv;    // of all keys
  Square<PAIRS> p, dp, a, c;  // then p, ds, g, r
  int64_t ld;
  DoubleMemory(Cutter& m, const Plan& plan) {
    const int64_t keys = plan.s->keys, panel = round_up(keys, PANEL), of_keys = units<PAIRS>(keys);
    ld = leading(keys);
    q.cut(m, ROWS, plan.left_d, plan.d);
    ddq.cut(m, ROWS, plan.left_d, plan.d);
    dy.cut(m, ROWS, plan.left_dv, plan.dv);
    d_q = m.cut(ROWS * plan.d), d_dy = m.cut(ROWS * plan.dv);
    for (KeySides* t : {&k, &ddk}) *t = {m.cut(panel * units<PAIRS>(plan.s->d)), m.cut(of_keys * plan.d)};
    for (KeySides* t : {&v, &ddv}) *t = {m.cut(panel * units<PAIRS>(plan.s->dv)), m.cut(of_keys * plan.dv)};
    p.cut(m, ld, false);
    for (Square<PAIRS>* square : {&dp, &a, &c}) square->cut(m, ld, true);
  }
};

// One row of the four squares. p holds scores, a and c as the products left them.
struct DoubleRow {
  float *p, *dp, *a, *c;
  const float *bias, *ddbias;
  float* d_bias;
};

// The row's sums of p a, p dp and p (a dp + c), and then ds, g and r in the places of dp, a and c.
template <bool PAIRS>
FG_NOINLINE void double_row(const DoubleRow& w, float scale, int64_t valid, int64_t width, float lse) {
  ScoreSums<vf> sums = {zero(), zero(), zero()};
  each(0, valid, [&](int64_t j, int lanes) {
    vf e = probability(finished<PAIRS>(w.p, w.bias, scale, j, lanes), set1(lse));
    if (lanes < VF) e = select(first(lanes), e, zero());
    const vf a = finished<PAIRS>(w.a, w.ddbias, scale, j, lanes);
    store_some(w.p + j, e, lanes);
    if (w.ddbias || PAIRS) store_some(w.a + j, a, lanes);
    sums.add(e, load_some(w.dp + j, lanes), a, load_some(w.c + j, lanes));
  });
  const float alpha = sum(sums.alpha), delta = sum(sums.delta), shift = alpha * delta - sum(sums.gamma);
  each(0, valid, [&](int64_t j, int lanes) {
    const vf e = load_some(w.p + j, lanes);
    const auto t = ScoreCotangents<vf>::of(e, load_some(w.dp + j, lanes), load_some(w.a + j, lanes),
                                           load_some(w.c + j, lanes), set1(alpha), set1(delta), set1(shift));
    if constexpr (PAIRS) put<PAIRS>(w.p, j, e, lanes);
    put<PAIRS>(w.dp, j, t.ds, lanes);
    put<PAIRS>(w.a, j, t.g, lanes);
    put<PAIRS>(w.c, j, t.r, lanes);
    if (w.d_bias) store_some(w.d_bias + j, load_some(w.d_bias + j, lanes) + t.r, lanes);
  });
  float* const rows[] = {w.p, w.dp, w.a, w.c};
  for (float* row : rows) clear_put<PAIRS>(row, valid, width);
}

template <class T, bool PAIRS>
void pack_double_keys(const Plan& p, const DoubleMemory<PAIRS>& m, const AttentionDoubleBackwardArgs& a, int64_t n,
                      int64_t h, int64_t keys) {
  const auto pack = [&](Rows<const T> rows, int64_t width, int64_t padded, KeySides to) {
    pack_panels<PAIRS>(rows, 0, keys, width, to.panels);
    pack_right<PAIRS>(rows, 0, keys, width, padded, 1.0f, to.rows);
  };
  pack(head_of<T>(a.k, a.k_strides, n, h), p.s->d, p.d, m.k);
  pack(head_of<T>(a.ddk, a.ddk_strides, n, h), p.s->d, p.d, m.ddk);
  pack(head_of<T>(a.v, a.v_strides, n, h), p.s->dv, p.dv, m.v);
  pack(head_of<T>(a.ddv, a.ddv_strides, n, h), p.s->dv, p.dv, m.ddv);
}

// The squares of a stretch of rows: scores, dp = dy v^T, a = scale (ddq k^T + q ddk^T) + ddbias, c = dy ddv^T.
template <class T, bool PAIRS>
void double_squares(const Plan& p, DoubleMemory<PAIRS>& m, const AttentionDoubleBackwardArgs& a, int64_t n, int64_t h,
                    int64_t first, int64_t rows, int64_t keys) {
  const AttentionShape& s = *p.s;
  const int64_t of_d = units<PAIRS>(s.d), of_dv = units<PAIRS>(s.dv);
  m.q.pack(head_of<T>(a.q, a.q_strides, n, h), first, rows, s.d, p.left_d, p.d, p.scale_of_rows);
  m.ddq.pack(head_of<T>(a.ddq, a.ddq_strides, n, h), first, rows, s.d, p.left_d, p.d, p.scale_of_rows);
  m.dy.pack(head_of<T>(a.dy, a.dy_strides, n, h), first, rows, s.dv, p.left_dv, p.dv, 1.0f);
  const Left by_d = rows_of(p.left_d), by_dv = rows_of(p.left_dv);
  const Right of_k = in_panels(of_d), of_v = in_panels(of_dv);
  product<PAIRS, 1>({{m.q.left, m.k.panels}}, by_d, of_k, of_d, rows, keys, m.p.plane, m.ld, false);
  product<PAIRS, 1>({{m.dy.left, m.v.panels}}, by_dv, of_v, of_dv, rows, keys, m.dp.plane, m.ld, false);
  product<PAIRS, 2>({{m.ddq.left, m.k.panels}, {m.q.left, m.ddk.panels}}, by_d, of_k, of_d, rows, keys, m.a.plane, m.ld,
                    false);
  product<PAIRS, 1>({{m.dy.left, m.ddv.panels}}, by_dv, of_v, of_dv, rows, keys, m.c.plane, m.ld, false);
  const Rows<const float> bias = head_of(a.bias, a.bias_strides, n, h);
  const Rows<const float> ddbias = head_of(a.ddbias, a.ddbias_strides, n, h);
  const Rows<float> d_bias = head_of(a.d_bias, a.d_bias_strides, n, h);
  const float* lse = a.lse + (n * s.heads + h) * s.rows;
  const int64_t whole = round_up(keys, TILE_ROWS);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = i * m.ld, row = first + i;
    const DoubleRow one = {m.p.plane + at,
                           m.dp.plane + at,
                           m.a.plane + at,
                           m.c.plane + at,
                           bias.at ? bias.row(row) : nullptr,
                           ddbias.at ? ddbias.row(row) : nullptr,
                           d_bias.at ? d_bias.row(row) : nullptr};
    double_row<PAIRS>(one, p.scale, p.visible(row), whole, lse[row]);
  }
  for (const Square<PAIRS>* square : {&m.dp, &m.a, &m.c}) square->pair_rows(rows, whole, m.ld);
}

// d_dy = g v + p ddv, d_q = scale (r k + ds ddk), d_v = g^T dy, d_k = scale (r^T q + ds^T ddq).
template <bool PAIRS>
void double_products(const Plan& p, const DoubleMemory<PAIRS>& m, int64_t rows, int64_t keys, KeySums sums) {
  const AttentionShape& s = *p.s;
  const Square<PAIRS>&ds = m.dp, &g = m.a, &r = m.c;
  clear(m.d_q, 0, ROWS * p.d);
  clear(m.d_dy, 0, ROWS * p.dv);
  for (int64_t key = 0; key < keys; key += KEYS / 2) {
    const int64_t width = least(KEYS / 2, keys - key), of_keys = units<PAIRS>(width), pair = units<PAIRS>(key);
    const int64_t of_d = pair * p.d, of_dv = pair * p.dv, of_rows = units<PAIRS>(rows);
    product<PAIRS, 2>({{g.at_key(key), m.v.rows + of_dv}, {m.p.at_key(key), m.ddv.rows + of_dv}}, rows_of(m.ld),
                      in_rows(p.dv), of_keys, rows, s.dv, m.d_dy, p.dv, true);
    product<PAIRS, 2>({{r.at_key(key), m.k.rows + of_d}, {ds.at_key(key), m.ddk.rows + of_d}}, rows_of(m.ld),
                      in_rows(p.d), of_keys, rows, s.d, m.d_q, p.d, true);
    const int64_t whole = round_up(width, TILE_ROWS);  // keys past `width` get zeros
    product<PAIRS, 1>({{g.pairs + key, m.dy.right}}, columns_of(m.ld), in_rows(p.dv), of_rows, whole, s.dv,
                      sums.v + key * p.dv, p.dv, true);
    product<PAIRS, 2>({{r.pairs + key, m.q.right}, {ds.pairs + key, m.ddq.right}}, columns_of(m.ld), in_rows(p.d),
                      of_rows, whole, s.d, sums.k + key * p.d, p.d, true);
  }
}

template <class T>
void double_backward(const AttentionShape& s, const AttentionDoubleBackwardArgs& a) {
  constexpr bool PAIRS = PAIRED<T>;
  using Memory = DoubleMemory<PAIRS>;
  const Plan p = plan_jobs(s, PAIRS, ROWS, a.d_bias, a.d_bias_strides);
  const auto work = [&](Memory& m, int64_t n, int64_t h, int64_t first, int64_t last, KeySums sums) {
    pack_double_keys<T>(p, m, a, n, h, p.visible(last - 1));
    for (int64_t i = first; i < last; i += ROWS) {
      const int64_t rows = least(ROWS, last - i), keys = p.visible(i + rows - 1);
      double_squares<T>(p, m, a, n, h, i, rows, keys);
      double_products(p, m, rows, keys, sums);
      unpack_rows(m.d_q, p.d, s.scale, head_of<T>(a.d_q, a.d_q_strides, n, h), i, rows, s.d);
      unpack_rows(m.d_dy, p.dv, 1.0f, head_of<T>(a.d_dy, a.d_dy_strides, n, h), i, rows, s.dv);
    }
  };
  walk<T, Memory>(p, a.d_k, a.d_k_strides, a.d_v, a.d_v_strides, work);
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
