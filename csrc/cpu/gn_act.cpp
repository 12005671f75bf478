// Group norm + identity, relu or leaky_relu: forward, backward and double backward. Instance norm has one channel a
// group; layer norm is [rows, D] with one group.
//
// Per sample and group, M elements, r = (var + eps)^(-1/2), x̂ = (x - mean) r, t = weight x̂ + bias, y = φ(t), m = φ'(t).
//
// A tensor is cut into units that hold whole groups and lie in one piece of memory, and a unit is done with before the
// next one begins, so that its second pass finds in the cache what the first one read:
//   planes   [N][C][HW]: a unit is a group, whose channels are planes
//   columns  [N][HW][C]: a unit is a sample, a matrix whose channels are columns
//   rows     HW = 1: a unit is a group, whose channels are its elements. Coefficients and the parameters' gradients
//   change
//            from element to element, so they are made in registers instead of being laid out beforehand
#include "common/kernels.hpp"
#include "common/scratch.hpp"
#include "common/second_order.hpp"
#include "cpu/norm.hpp"

namespace fg::ISA {
namespace {

struct Cut {
  bool rows, columns;
  int64_t C, HW, groups;
  int64_t per_group;           // channels of a group
  int64_t inner;               // groups of a unit
  int64_t channels, elements;  // of a unit
  int64_t units;
  double eps, inv_m;  // 1 / elements of a group
  float slope;

  explicit Cut(const GnShape& s)
      : rows(s.HW == 1),
        columns(s.channels_last && !rows),
        C(s.C),
        HW(s.HW),
        groups(s.groups),
        per_group(s.C / s.groups),
        inner(columns ? groups : 1),
        channels(inner * per_group),
        elements(channels * HW),
        units(s.N * (columns ? 1 : groups)),
        eps(s.eps),
        inv_m(1.0 / static_cast<double>(per_group * HW)),
        slope(slope_of(s)) {}

  bool empty() const { return units * elements == 0; }
  Grid grid() const { return Grid(1, channels, HW, 1, columns); }
  int64_t first_channel(int64_t unit) const { return columns ? 0 : unit % groups * per_group; }
  // Few samples: all threads share each unit, with barriers between the passes. Else every thread has its own units.
  bool shared(int threads) const { return columns && units % threads != 0 && units < 4 * threads; }
  int team(int threads) const {
    const int useful = team_for(units * elements, threads);
    return columns || useful < units ? useful : static_cast<int>(units);
  }
};

// What one thread does: units [unit0, unit1); within a unit its share of the sweeps, and groups [group0, group1).
struct Work {
  int64_t unit0, unit1, group0, group1;
  Share share;
  bool shared;

  Work(const Cut& cut, const Grid& grid, bool shared_, int thread, int team)
      : unit0(shared_ ? 0 : part_begin(cut.units, thread, team)),
        unit1(shared_ ? cut.units : part_begin(cut.units, thread + 1, team)),
        group0(shared_ ? part_begin(cut.inner, thread, team) : 0),
        group1(shared_ ? part_begin(cut.inner, thread + 1, team) : cut.inner),
        share(grid, shared_ ? thread : 0, shared_ ? team : 1),
        shared(shared_) {}

  void barrier() const {
    if (shared) {
#pragma omp barrier
    }
  }
};

// A group's statistics. The variance is used as stored, so that every pass sees the same r.
struct Group {
  double mean, r;
  Group(const Cut& cut, const float* means, const float* vars, int64_t index)
      : mean(means[index]), r(1.0 / std::sqrt(static_cast<double>(vars[index]) + cut.eps)) {}
};

double value_of(const float* p, int64_t c, double otherwise) { return p ? p[c] : otherwise; }

// t = (x - mean) * scale + bias, for the channels of inner group j.
void put_affine(const Cut& cut, const Grid& grid, float* coef, int64_t first, int64_t j, const Group& group,
                const float* weight, const float* bias) {
  for (int64_t c = j * cut.per_group; c < (j + 1) * cut.per_group; ++c) {
    put(grid, coef, K_MEAN, c, static_cast<float>(group.mean));
    put(grid, coef, K_SCALE, c, static_cast<float>(value_of(weight, first + c, 1.0) * group.r));
    put(grid, coef, K_BIAS, c, static_cast<float>(value_of(bias, first + c, 0.0)));
  }
}

// ------------------------------------------------------------------------------------------------ rows

constexpr int64_t RUN = 4096;  // elements whose sums are kept in fp32

// visit(lane) for the vectors of [begin, end).
template <class Visit>
FG_INLINE void for_lanes(int64_t begin, int64_t end, const Visit& visit) {
  for (; begin + VF <= end; begin += VF) visit(FullLane{begin});
  if (begin < end) visit(TailLane{begin, static_cast<int>(end - begin)});
}

template <class Lane>
FG_INLINE vf load_or(Lane lane, const float* p, float otherwise) {
  return p ? lane.load(p) : set1(otherwise);
}

// The parameters of a row, from its first channel on; null where absent.
struct Row {
  const float *weight, *bias;
  vf mean, r;

  Row(const Group& group, int64_t first, const float* weight_, const float* bias_)
      : weight(weight_ ? weight_ + first : nullptr),
        bias(bias_ ? bias_ + first : nullptr),
        mean(set1(static_cast<float>(group.mean))),
        r(set1(static_cast<float>(group.r))) {}

  template <class Lane>
  FG_INLINE_MEMBER void affine(Lane lane, vf* k) const {
    k[K_MEAN] = mean;
    k[K_SCALE] = load_or(lane, weight, 1.0f) * r;
    k[K_BIAS] = load_or(lane, bias, 0.0f);
  }
};

// Mean and biased variance of n contiguous elements, in blocks of 1024: channels of unlike means drive the partial sums
// of a longer block up, and bf16 data repeat values, so that the roundings of these sums would add up, too.
template <class T>
void run_statistics(const T* x, int64_t n, float* mean, float* var) {
  constexpr int64_t BLOCK = 1024;
  double count = 0.0, m = 0.0, m2 = 0.0;
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
    // Shift by the mean of the first elements: see guess_mean.
    const int64_t sample = end - begin < 64 ? end - begin : 64;
    vf typical = zero();
    for_lanes(begin, begin + sample, [&](auto lane) { typical = typical + lane.load(x); });
    float guess = sum(typical) / static_cast<float>(sample);
    if (!std::isfinite(guess)) guess = 0.0f;
    const vf k = set1(guess);
    vf even[3] = {zero(), zero()}, odd[3] = {zero(), zero()};
    sweep_run(StatisticsBody<T>{x}, begin, end - begin, &k, even, odd);
    const double length = static_cast<double>(end - begin), first = sum(even[0] + odd[0]);
    const double within = sum(even[1] + odd[1]) - first * (first / length);
    merge(count, m, m2, length, guess + first / length, within < 0.0 ? 0.0 : within);
  }
  *mean = static_cast<float>(m);
  *var = static_cast<float>(m2 / count);
}

// ------------------------------------------------------------------------------------------------ gradients of
// parameters

// One thread's sums per channel over its units: COUNT arrays [C] in float64. A row adds to arrays of fp32 first, which
// are emptied every 128 rows. Threads are added up in order.
template <int COUNT>
struct ParameterSums {
  double* total;
  float* recent;
  int64_t C;
  int pending;

  static size_t doubles(const Cut& cut, int threads) { return size_t(threads) * COUNT * cut.C; }
  static size_t floats(const Cut& cut, int threads) { return cut.rows ? doubles(cut, threads) : 0; }

  ParameterSums(const Cut& cut, double* totals, float* recents, int thread)
      : total(totals + thread * COUNT * cut.C),
        recent(cut.rows ? recents + thread * COUNT * cut.C : nullptr),
        C(cut.C),
        pending(0) {
    for (int64_t i = 0; i < COUNT * C; ++i) total[i] = 0.0;
    if (recent)
      for (int64_t i = 0; i < COUNT * C; ++i) recent[i] = 0.0f;
  }
  void row_done() {
    if (++pending == 128) flush();
  }
  void flush() {
    if (!pending) return;
    for (int64_t i = 0; i < COUNT * C; ++i) {
      total[i] += recent[i];
      recent[i] = 0.0f;
    }
    pending = 0;
  }
  static void reduce(const Cut& cut, const double* totals, int which, float* out, int thread, int team) {
    if (!out) return;
    for (int64_t c = part_begin(cut.C, thread, team); c < part_begin(cut.C, thread + 1, team); ++c) {
      double s = 0.0;
      for (int i = 0; i < team; ++i) s += totals[(i * COUNT + which) * cut.C + c];
      out[c] = static_cast<float>(s);
    }
  }
};

void fill_zero(float* p, int64_t n) {
  if (p)
    for (int64_t i = 0; i < n; ++i) p[i] = 0.0f;
}

// ------------------------------------------------------------------------------------------------ forward

template <class T, Act ACT>
void forward(const GnShape& shape, const NormForwardArgs& args) {
  const Cut cut(shape);
  if (cut.empty()) return;
  using Body = NormForwardBody<T, ACT>;
  const Grid grid = cut.grid();
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  const int threads = cut.team(shape.threads);
  const bool shared = cut.shared(threads);
  const size_t row = cut.rows ? 0 : grid.padded, column = cut.columns ? grid.padded : 0;
  Scratch scratch(Scratch::bytes_for<float>(threads * Body::COEFS * row) +
                  Scratch::bytes_for<float>(threads * 3 * column) + Scratch::bytes_for<double>(threads * 3 * column));
  float* coefs = scratch.cut<float>(threads * Body::COEFS * row);
  float* own = scratch.cut<float>(threads * 3 * column);
  double* sums = scratch.cut<double>(threads * 3 * column);

#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size(), place = shared ? 0 : thread;
    const Work work(cut, grid, shared, thread, team);
    const Partials<3> partials{sums + place * 3 * column, grid.padded, work.share.slots};
    float *coef = coefs + place * Body::COEFS * row, *guess = own + thread * 3 * column;
    if (!cut.rows && (thread == 0 || !shared)) clear_padding(grid, coef, Body::COEFS);
    for (int64_t u = work.unit0; u < work.unit1; ++u) {
      const Body body{x + u * cut.elements, y + u * cut.elements, cut.slope};
      const int64_t first = cut.first_channel(u);
      if (cut.columns) statistics(grid, work.share, 0, body.x, guess, guess + column, partials);
      work.barrier();
      for (int64_t j = work.group0; j < work.group1; ++j) {
        const int64_t index = u * cut.inner + j;
        if (cut.columns)
          pool_statistics(grid, 0, j * cut.per_group, (j + 1) * cut.per_group, partials, args.mean + index,
                          args.var + index);
        else
          run_statistics(body.x, cut.elements, args.mean + index, args.var + index);
        if (!cut.rows)
          put_affine(cut, grid, coef, first, j, Group(cut, args.mean, args.var, index), args.weight, args.bias);
      }
      work.barrier();
      if (cut.rows) {
        const Row affine(Group(cut, args.mean, args.var, u), first, args.weight, args.bias);
        for_lanes(0, cut.elements, [&](auto lane) {
          vf k[Body::COEFS];
          affine.affine(lane, k);
          body(lane, k, nullptr);
        });
      } else {
        sweep_elementwise(grid, work.share, 0, body, coef, true);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ backward

// Coefficients of inner group j and the sums of its channels: h = weight dt, s1 = Σ h, s2 = Σ h x̂,
// dx = r (h - s1/M - x̂ s2/M), dbias = Σ dt, dweight = Σ dt x̂.
template <class Body>
void finish_backward(const Cut& cut, const Grid& grid, const Partials<2>& partials, int64_t first, int64_t j,
                     const Group& group, const float* weight, float* coef, ParameterSums<2>& gradients) {
  double s1 = 0.0, s2 = 0.0;
  for (int64_t c = j * cut.per_group; c < (j + 1) * cut.per_group; ++c) {
    double s[2];
    partials.total(grid, 0, c, s);
    const double w = value_of(weight, first + c, 1.0);
    s1 += w * s[0];
    s2 += w * s[1];
    gradients.total[first + c] += s[1] * group.r;
    gradients.total[cut.C + first + c] += s[0];
  }
  s2 *= group.r;
  for (int64_t c = j * cut.per_group; c < (j + 1) * cut.per_group; ++c) {
    put(grid, coef, Body::K_X0, c, static_cast<float>(-group.r * s1 * cut.inv_m));
    put(grid, coef, Body::K_X1, c, static_cast<float>(-group.r * group.r * s2 * cut.inv_m));
  }
}

template <class Sums, class Body>
void backward_row(const Cut& cut, const Sums& sums, const Body& body, const Row& row, const Group& group, int64_t first,
                  ParameterSums<2>& gradients) {
  float *dweight = gradients.recent + first, *dbias = dweight + cut.C;
  double s1 = 0.0, s2 = 0.0;
  for (int64_t begin = 0; begin < cut.elements; begin += RUN) {
    vf a1 = zero(), a2 = zero();
    for_lanes(begin, begin + RUN < cut.elements ? begin + RUN : cut.elements, [&](auto lane) {
      vf k[Sums::COEFS], s[Sums::SUMS] = {zero(), zero()};
      row.affine(lane, k);
      sums(lane, k, s);
      const vf weight = load_or(lane, row.weight, 1.0f);
      a1 = fma(weight, s[0], a1);
      a2 = fma(weight, s[1], a2);
      lane.store(dweight, fma(s[1], row.r, lane.load(dweight)));
      lane.store(dbias, lane.load(dbias) + s[0]);
    });
    s1 += sum(a1);
    s2 += sum(a2);
  }
  gradients.row_done();
  if (!body.dx) return;
  const double r = group.r;
  const vf x0 = set1(static_cast<float>(-r * s1 * cut.inv_m));
  const vf x1 = set1(static_cast<float>(-r * r * (s2 * r) * cut.inv_m));
  for_lanes(0, cut.elements, [&](auto lane) {
    vf k[Body::COEFS];
    row.affine(lane, k);
    k[Body::K_X0] = x0;
    k[Body::K_X1] = x1;
    body(lane, k, nullptr);
  });
}

template <class T, Act ACT>
void backward(const GnShape& shape, const NormBackwardArgs& args) {
  const Cut cut(shape);
  if (cut.empty()) {
    fill_zero(args.dweight, shape.C);
    fill_zero(args.dbias, shape.C);
    return;
  }
  using Sums = NormBackwardSumsBody<T, ACT>;
  using Body = NormBackwardBody<T, ACT>;
  using Gradients = ParameterSums<2>;
  const Grid grid = cut.grid();
  const T *dy = static_cast<const T*>(args.dy), *x = static_cast<const T*>(args.x);
  T* dx = static_cast<T*>(args.dx);
  const int threads = cut.team(shape.threads);
  const bool shared = cut.shared(threads);
  const size_t row = cut.rows ? 0 : grid.padded;
  Scratch scratch(Scratch::bytes_for<float>(threads * Body::COEFS * row) +
                  Scratch::bytes_for<float>(threads * Sums::SUMS * row) +
                  Scratch::bytes_for<float>(Gradients::floats(cut, threads)) +
                  Scratch::bytes_for<double>(threads * Sums::SUMS * row) +
                  Scratch::bytes_for<double>(Gradients::doubles(cut, threads)));
  float* coefs = scratch.cut<float>(threads * Body::COEFS * row);
  float* own = scratch.cut<float>(threads * Sums::SUMS * row);
  float* recents = scratch.cut<float>(Gradients::floats(cut, threads));
  double* sums = scratch.cut<double>(threads * Sums::SUMS * row);
  double* totals = scratch.cut<double>(Gradients::doubles(cut, threads));

#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size(), place = shared ? 0 : thread;
    const Work work(cut, grid, shared, thread, team);
    const Partials<2> partials{sums + place * Sums::SUMS * row, grid.padded, work.share.slots};
    Gradients gradients(cut, totals, recents, thread);
    float *coef = coefs + place * Body::COEFS * row, *mine = own + thread * Sums::SUMS * row;
    if (!cut.rows && (thread == 0 || !shared)) clear_padding(grid, coef, Body::COEFS);
    for (int64_t u = work.unit0; u < work.unit1; ++u) {
      const int64_t at = u * cut.elements, first = cut.first_channel(u);
      const Sums sums_body{dy + at, x + at, cut.slope};
      const Body body{dy + at, x + at, dx ? dx + at : nullptr, cut.slope};
      if (cut.rows) {
        const Group group(cut, args.mean, args.var, u);
        backward_row(cut, sums_body, body, Row(group, first, args.weight, args.bias), group, first, gradients);
        continue;
      }
      for (int64_t j = work.group0; j < work.group1; ++j)
        put_affine(cut, grid, coef, first, j, Group(cut, args.mean, args.var, u * cut.inner + j), args.weight,
                   args.bias);
      work.barrier();
      sweep_sums(grid, work.share, 0, sums_body, coef, mine, partials);
      work.barrier();
      for (int64_t j = work.group0; j < work.group1; ++j)
        finish_backward<Body>(cut, grid, partials, first, j, Group(cut, args.mean, args.var, u * cut.inner + j),
                              args.weight, coef, gradients);
      work.barrier();
      if (dx) sweep_elementwise(grid, work.share, 0, body, coef, true);
      work.barrier();
    }
    gradients.flush();
#pragma omp barrier
    Gradients::reduce(cut, totals, 0, args.dweight, thread, team);
    Gradients::reduce(cut, totals, 1, args.dbias, thread, team);
  }
}

// ------------------------------------------------------------------------------------------------ double backward

template <class Body>
void finish_double_backward(const Cut& cut, const Grid& grid, const Partials<5>& partials, int64_t first, int64_t j,
                            const Group& group, const NormDoubleBackwardArgs& args, float* coef,
                            ParameterSums<1>& gradients) {
  const double r = group.r;
  SecondOrder o{};
  double s[5];
  for (int64_t c = j * cut.per_group; c < (j + 1) * cut.per_group; ++c) {
    partials.total(grid, 0, c, s);
    const double weight = value_of(args.weight, first + c, 1.0), v = value_of(args.ddweight, first + c, 0.0);
    o.add(s, weight, v, r);
  }
  o.finish(cut.inv_m, r);
  for (int64_t c = j * cut.per_group; c < (j + 1) * cut.per_group; ++c) {
    partials.total(grid, 0, c, s);
    gradients.total[first + c] += o.d_weight(s, r);
    const double weight = value_of(args.weight, first + c, 1.0);
    const auto set = [&](int i, double value) { put(grid, coef, i, c, static_cast<float>(value)); };
    set(Body::K_U0, o.u0(weight, value_of(args.ddbias, first + c, 0.0), r));
    set(Body::K_U1, o.u1(weight, value_of(args.ddweight, first + c, 0.0), r));
    set(Body::K_XW, o.xw);
    set(Body::K_X0, o.x0);
    set(Body::K_X1, o.x1);
  }
}

template <class Sums, class Body>
void double_backward_row(const Cut& cut, const Sums& sums, const Body& body, const Row& row, const Group& group,
                         int64_t first, const NormDoubleBackwardArgs& args, ParameterSums<1>& gradients) {
  const float* v_weight = args.ddweight ? args.ddweight + first : nullptr;
  const float* v_bias = args.ddbias ? args.ddbias + first : nullptr;
  float* d_weight = gradients.recent + first;
  const double r = group.r;
  SecondOrder o{};
  for (int64_t begin = 0; begin < cut.elements; begin += RUN) {
    vf a[7];
    for (vf& v : a) v = zero();
    for_lanes(begin, begin + RUN < cut.elements ? begin + RUN : cut.elements, [&](auto lane) {
      vf k[Sums::COEFS], s[Sums::SUMS] = {zero(), zero(), zero(), zero(), zero()};
      row.affine(lane, k);
      sums(lane, k, s);
      const vf weight = load_or(lane, row.weight, 1.0f), v = load_or(lane, v_weight, 0.0f);
      a[0] = fma(weight, s[0], a[0]);
      a[1] = fma(weight, s[1], a[1]);
      a[2] = a[2] + s[2];
      a[3] = a[3] + s[3];
      a[4] = fma(weight, s[4], a[4]);
      a[5] = fma(v, s[0], a[5]);
      a[6] = fma(v, s[1], a[6]);
    });
    o.s1 += sum(a[0]);
    o.s2 += sum(a[1]) * r;
    o.W1 += sum(a[2]);
    o.W2 += sum(a[3]) * r;
    o.A0 += sum(a[4]);
    o.vdt += sum(a[5]);
    o.vdtx += sum(a[6]) * r;
  }
  o.finish(cut.inv_m, r);
  const auto spread = [](double v) { return set1(static_cast<float>(v)); };
  const vf w1 = spread(o.w1), w2 = spread(o.w2), w2r = spread(o.w2 * r), xw = spread(o.xw), x0 = spread(o.x0),
           x1 = spread(o.x1);
  for_lanes(0, cut.elements, [&](auto lane) {
    vf k[Body::COEFS], s[Sums::SUMS] = {zero(), zero(), zero(), zero(), zero()};
    row.affine(lane, k);
    sums(lane, k, s);
    lane.store(d_weight, fma(row.r, s[4] - fma(w1, s[0], w2r * s[1]), lane.load(d_weight)));
    k[Body::K_U0] = load_or(lane, v_bias, 0.0f) - k[K_SCALE] * w1;
    k[Body::K_U1] = row.r * (load_or(lane, v_weight, 0.0f) - k[K_SCALE] * w2);
    k[Body::K_XW] = xw;
    k[Body::K_X0] = x0;
    k[Body::K_X1] = x1;
    body(lane, k, nullptr);
  });
  gradients.row_done();
}

template <class T, Act ACT>
void double_backward(const GnShape& shape, const NormDoubleBackwardArgs& args) {
  const Cut cut(shape);
  if (cut.empty()) {
    fill_zero(args.d_weight, shape.C);
    return;
  }
  using Sums = NormDoubleSumsBody<T, ACT>;
  using Body = NormDoubleBody<T, ACT>;
  using Gradients = ParameterSums<1>;
  const Grid grid = cut.grid();
  const T *ddx = static_cast<const T*>(args.ddx), *dy = static_cast<const T*>(args.dy);
  const T* x = static_cast<const T*>(args.x);
  T *d_dy = static_cast<T*>(args.d_dy), *d_x = static_cast<T*>(args.d_x);
  const auto move = [](auto* p, int64_t by) { return p ? p + by : p; };
  const int threads = cut.team(shape.threads);
  const bool shared = cut.shared(threads);
  const size_t row = cut.rows ? 0 : grid.padded;
  Scratch scratch(Scratch::bytes_for<float>(threads * Body::COEFS * row) +
                  Scratch::bytes_for<float>(threads * Sums::SUMS * row) +
                  Scratch::bytes_for<float>(Gradients::floats(cut, threads)) +
                  Scratch::bytes_for<double>(threads * Sums::SUMS * row) +
                  Scratch::bytes_for<double>(Gradients::doubles(cut, threads)));
  float* coefs = scratch.cut<float>(threads * Body::COEFS * row);
  float* own = scratch.cut<float>(threads * Sums::SUMS * row);
  float* recents = scratch.cut<float>(Gradients::floats(cut, threads));
  double* sums = scratch.cut<double>(threads * Sums::SUMS * row);
  double* totals = scratch.cut<double>(Gradients::doubles(cut, threads));

#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size(), place = shared ? 0 : thread;
    const Work work(cut, grid, shared, thread, team);
    const Partials<5> partials{sums + place * Sums::SUMS * row, grid.padded, work.share.slots};
    Gradients gradients(cut, totals, recents, thread);
    float *coef = coefs + place * Body::COEFS * row, *mine = own + thread * Sums::SUMS * row;
    if (!cut.rows && (thread == 0 || !shared)) clear_padding(grid, coef, Body::COEFS);
    for (int64_t u = work.unit0; u < work.unit1; ++u) {
      const int64_t at = u * cut.elements, first = cut.first_channel(u);
      const Sums sums_body{move(ddx, at), dy + at, x + at, cut.slope};
      const Body body{move(ddx, at), dy + at, x + at, move(d_dy, at), move(d_x, at), cut.slope};
      if (cut.rows) {
        const Group group(cut, args.mean, args.var, u);
        double_backward_row(cut, sums_body, body, Row(group, first, args.weight, args.bias), group, first, args,
                            gradients);
        continue;
      }
      for (int64_t j = work.group0; j < work.group1; ++j)
        put_affine(cut, grid, coef, first, j, Group(cut, args.mean, args.var, u * cut.inner + j), args.weight,
                   args.bias);
      work.barrier();
      sweep_sums(grid, work.share, 0, sums_body, coef, mine, partials);
      work.barrier();
      for (int64_t j = work.group0; j < work.group1; ++j)
        finish_double_backward<Body>(cut, grid, partials, first, j, Group(cut, args.mean, args.var, u * cut.inner + j),
                                     args, coef, gradients);
      work.barrier();
      sweep_elementwise(grid, work.share, 0, body, coef, true);
      work.barrier();
    }
    gradients.flush();
#pragma omp barrier
    Gradients::reduce(cut, totals, 0, args.d_weight, thread, team);
  }
}

}  // namespace

void gn_act_forward(const GnShape& shape, const NormForwardArgs& args) {
  by_kernel(shape, [&]<class T, Act ACT>() { forward<T, ACT>(shape, args); });
}
void gn_act_backward(const GnShape& shape, const NormBackwardArgs& args) {
  by_kernel(shape, [&]<class T, Act ACT>() { backward<T, ACT>(shape, args); });
}
void gn_act_double_backward(const GnShape& shape, const NormDoubleBackwardArgs& args) {
  by_kernel(shape, [&]<class T, Act ACT>() { double_backward<T, ACT>(shape, args); });
}

}  // namespace fg::ISA
