// Group norm + identity, relu or leaky_relu: forward, backward and double backward. Instance norm has one channel a
// group; layer norm is [rows, D] with one group.
//
// Per sample and group, M elements, r = (var + eps)^(-1/2), x̂ = (x - mean) r, t = weight x̂ + bias, y = φ(t), m = φ'(t).
//
// A tensor is cut into units that hold whole groups and lie in one piece of memory. A unit is finished before the next
// one begins, so that its second pass finds in the cache what the first one read:
//   planes   [N][C][HW]: a unit is a group, whose channels are planes
//   columns  [N][HW][C]: a unit is a sample, a matrix whose channels are columns
//   rows     HW = 1: a unit is a group, whose channels are its elements. Coefficients and the parameters' gradients
//            change from element to element, so they are made in registers instead of being laid out beforehand
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
  double inv_m;  // 1 / elements of a group
  float eps, slope;
  int threads;

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
        inv_m(1.0 / static_cast<double>(per_group * HW)),
        eps(s.eps),
        slope(slope_of(s)),
        threads(team_for(units * elements, s.threads)) {
    if (!columns && threads > units) threads = static_cast<int>(units);
  }

  bool empty() const { return units * elements == 0; }
  Grid grid() const { return Grid(1, channels, HW, 1, columns); }
  int64_t first_channel(int64_t unit) const { return columns ? 0 : unit % groups * per_group; }
  // Few samples: all threads share each unit, with barriers between the passes. Else every thread has its own units.
  bool shared() const { return columns && units % threads != 0 && units < 4 * threads; }

  template <class Args>
  Statistic statistic(const Args& args, int64_t unit, int64_t j) const {
    return Statistic(args.mean, args.var, unit * inner + j, eps);
  }
  // Calls f(channel of the unit) for those of its group j.
  template <class F>
  void each_channel(int64_t j, const F& f) const {
    for (int64_t c = j * per_group; c < (j + 1) * per_group; ++c) f(c);
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

// For the channels of the unit's group j.
template <class Args>
void put_affine(const Cut& cut, const Grid& grid, float* coef, const Args& args, int64_t unit, int64_t j) {
  const int64_t first = cut.first_channel(unit);
  const Statistic statistic = cut.statistic(args, unit, j);
  cut.each_channel(j, [&](int64_t c) {
    put_affine(grid, coef, c, statistic, value_of(args.weight, first + c, 1.0), value_of(args.bias, first + c, 0.0));
  });
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

// A row's parameters from its first channel on, null where absent, and its statistics.
struct Row {
  int64_t first;
  const float *weight, *bias;
  double r;
  vf mean_lanes, r_lanes;

  template <class Args>
  Row(const Cut& cut, const Args& args, int64_t unit)
      : first(cut.first_channel(unit)), weight(moved<float>(args.weight, first)), bias(moved<float>(args.bias, first)) {
    const Statistic statistic = cut.statistic(args, unit, 0);
    r = statistic.r;
    mean_lanes = set1(static_cast<float>(statistic.mean));
    r_lanes = set1(static_cast<float>(r));
  }

  template <class Lane>
  FG_INLINE_MEMBER void affine(Lane lane, vf* k) const {
    k[K_MEAN] = mean_lanes;
    k[K_SCALE] = load_or(lane, weight, 1.0f) * r_lanes;
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

// ------------------------------------------------------------------------------------------------ parameters

// One thread's sums per channel over its units: COUNT arrays [C] in float64. A row adds to arrays of fp32 first, which
// are emptied every 128 rows. Threads are added up in order.
template <int COUNT>
struct ParameterSums {
  double* total;
  float* recent;
  int64_t C;
  int pending;

  static int64_t doubles(const Cut& cut) { return cut.threads * COUNT * cut.C; }
  static int64_t floats(const Cut& cut) { return cut.rows ? doubles(cut) : 0; }

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

// ------------------------------------------------------------------------------------------------ forward

template <class T, Act ACT>
void forward(const GnShape& shape, const NormForwardArgs& args) {
  const Cut cut(shape);
  if (cut.empty()) return;
  using Body = NormForwardBody<T, ACT>;
  const Grid grid = cut.grid();
  const bool shared = cut.shared();
  const int64_t row = cut.rows ? 0 : grid.padded, column = cut.columns ? grid.padded : 0;
  float *coefs, *own;
  double* sums;
  const ScratchArrays memory(Array(coefs, cut.threads * Body::COEFS * row), Array(own, cut.threads * 3 * column),
                             Array(sums, cut.threads * 3 * column));

#pragma omp parallel num_threads(cut.threads)
  {
    const int thread = thread_index(), team = team_size(), place = shared ? 0 : thread;
    const Work work(cut, grid, shared, thread, team);
    const Partials<3> partials{sums + place * 3 * column, grid.padded, work.share.slots};
    float *coef = coefs + place * Body::COEFS * row, *guess = own + thread * 3 * column;
    if (!cut.rows && (thread == 0 || !shared)) clear_padding(grid, coef, Body::COEFS);
    for (int64_t u = work.unit0; u < work.unit1; ++u) {
      const Body body(args, cut.slope, u * cut.elements);
      if (cut.columns) statistics(grid, work.share, 0, body.x, guess, guess + column, partials);
      work.barrier();
      for (int64_t j = work.group0; j < work.group1; ++j) {
        const int64_t index = u * cut.inner + j;
        if (cut.columns)
          pool_statistics(grid, 0, j * cut.per_group, (j + 1) * cut.per_group, partials, args.mean + index,
                          args.var + index);
        else
          run_statistics(body.x, cut.elements, args.mean + index, args.var + index);
        if (!cut.rows) put_affine(cut, grid, coef, args, u, j);
      }
      work.barrier();
      if (cut.rows) {
        const Row affine(cut, args, u);
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

// ------------------------------------------------------------------------------------------------ derivatives

// Both derivatives. A row is of_row's, with `gradients` for its parameters. Any other unit has sums of every channel,
// finish(partials, unit, j, coef, gradients) for each of its groups j, and then the elements. `outputs` are the
// parameters' gradients [C], null where not wanted.
template <class Sums, class Body, int COUNT, class Args, class OfRow, class Finish>
void two_passes(const Cut& cut, const Args& args, float* const (&outputs)[COUNT], const OfRow& of_row,
                const Finish& finish) {
  using Gradients = ParameterSums<COUNT>;
  if (cut.empty()) {
    for (float* output : outputs) fill_zero(output, cut.C);
    return;
  }
  const Grid grid = cut.grid();
  const bool shared = cut.shared();
  const int64_t row = cut.rows ? 0 : grid.padded;
  float *coefs, *own, *recents;
  double *sums, *totals;
  const ScratchArrays memory(Array(coefs, cut.threads * Body::COEFS * row), Array(own, cut.threads * Sums::SUMS * row),
                             Array(recents, Gradients::floats(cut)), Array(sums, cut.threads * Sums::SUMS * row),
                             Array(totals, Gradients::doubles(cut)));

#pragma omp parallel num_threads(cut.threads)
  {
    const int thread = thread_index(), team = team_size(), place = shared ? 0 : thread;
    const Work work(cut, grid, shared, thread, team);
    const Partials<Sums::SUMS> partials{sums + place * Sums::SUMS * row, grid.padded, work.share.slots};
    Gradients gradients(cut, totals, recents, thread);
    float *coef = coefs + place * Body::COEFS * row, *mine = own + thread * Sums::SUMS * row;
    if (!cut.rows && (thread == 0 || !shared)) clear_padding(grid, coef, Body::COEFS);
    for (int64_t u = work.unit0; u < work.unit1; ++u) {
      const Sums sums_body(args, cut.slope, u * cut.elements);
      const Body body(args, cut.slope, u * cut.elements);
      if (cut.rows) {
        of_row(sums_body, body, Row(cut, args, u), gradients);
        gradients.row_done();
        continue;
      }
      for (int64_t j = work.group0; j < work.group1; ++j) put_affine(cut, grid, coef, args, u, j);
      work.barrier();
      sweep_sums(grid, work.share, 0, sums_body, coef, mine, partials);
      work.barrier();
      for (int64_t j = work.group0; j < work.group1; ++j) finish(grid, partials, u, j, coef, gradients);
      work.barrier();
      if (body.wanted()) sweep_elementwise(grid, work.share, 0, body, coef, true);
      work.barrier();
    }
    gradients.flush();
#pragma omp barrier
    for (int i = 0; i < COUNT; ++i) Gradients::reduce(cut, totals, i, outputs[i], thread, team);
  }
}

template <class Sums, class Body>
void backward_row(const Cut& cut, const Sums& sums, const Body& body, const Row& row, ParameterSums<2>& gradients) {
  float *dweight = gradients.recent + row.first, *dbias = dweight + cut.C;
  FirstOrder o{};
  for (int64_t begin = 0; begin < cut.elements; begin += RUN) {
    vf a1 = zero(), a2 = zero();
    for_lanes(begin, begin + RUN < cut.elements ? begin + RUN : cut.elements, [&](auto lane) {
      vf k[Sums::COEFS], s[Sums::SUMS] = {zero(), zero()};
      row.affine(lane, k);
      sums(lane, k, s);
      const vf weight = load_or(lane, row.weight, 1.0f);
      a1 = fma(weight, s[0], a1);
      a2 = fma(weight, s[1], a2);
      lane.store(dweight, fma(s[1], row.r_lanes, lane.load(dweight)));
      lane.store(dbias, lane.load(dbias) + s[0]);
    });
    o.s1 += sum(a1);
    o.s2 += sum(a2) * row.r;
  }
  if (!body.dx) return;
  o.finish(cut.inv_m, row.r);
  const vf x0 = set1(static_cast<float>(o.x0)), x1 = set1(static_cast<float>(o.x1));
  for_lanes(0, cut.elements, [&](auto lane) {
    vf k[Body::COEFS];
    row.affine(lane, k);
    k[Body::K_X0] = x0;
    k[Body::K_X1] = x1;
    body(lane, k, nullptr);
  });
}

// dbias = Σ dt, dweight = Σ dt x̂.
template <class T, Act ACT>
void backward(const GnShape& shape, const NormBackwardArgs& args) {
  using Sums = NormBackwardSumsBody<T, ACT>;
  using Body = NormBackwardBody<T, ACT>;
  using Gradients = ParameterSums<2>;
  const Cut cut(shape);
  const auto of_row = [&](const Sums& sums, const Body& body, const Row& row, Gradients& gradients) {
    backward_row(cut, sums, body, row, gradients);
  };
  const auto finish = [&](const Grid& grid, const Partials<2>& partials, int64_t unit, int64_t j, float* coef,
                          Gradients& gradients) {
    const int64_t first = cut.first_channel(unit);
    const double r = cut.statistic(args, unit, j).r;
    FirstOrder o{};
    cut.each_channel(j, [&](int64_t c) {
      double s[2];
      partials.total(grid, 0, c, s);
      o.add(s, value_of(args.weight, first + c, 1.0), r);
      gradients.total[first + c] += s[1] * r;
      gradients.total[cut.C + first + c] += s[0];
    });
    o.finish(cut.inv_m, r);
    cut.each_channel(j, [&](int64_t c) { put_first_order<Body>(grid, coef, c, o); });
  };
  two_passes<Sums, Body>(cut, args, {args.dweight, args.dbias}, of_row, finish);
}

template <class Sums, class Body>
void double_backward_row(const Cut& cut, const Sums& sums, const Body& body, const Row& row,
                         const NormDoubleBackwardArgs& args, ParameterSums<1>& gradients) {
  const float *v_weight = moved<float>(args.ddweight, row.first), *v_bias = moved<float>(args.ddbias, row.first);
  float* d_weight = gradients.recent + row.first;
  const double r = row.r;
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
    lane.store(d_weight, fma(row.r_lanes, s[4] - fma(w1, s[0], w2r * s[1]), lane.load(d_weight)));
    k[Body::K_U0] = load_or(lane, v_bias, 0.0f) - k[K_SCALE] * w1;
    k[Body::K_U1] = row.r_lanes * (load_or(lane, v_weight, 0.0f) - k[K_SCALE] * w2);
    k[Body::K_XW] = xw;
    k[Body::K_X0] = x0;
    k[Body::K_X1] = x1;
    body(lane, k, nullptr);
  });
}

template <class T, Act ACT>
void double_backward(const GnShape& shape, const NormDoubleBackwardArgs& args) {
  using Sums = NormDoubleSumsBody<T, ACT>;
  using Body = NormDoubleBody<T, ACT>;
  using Gradients = ParameterSums<1>;
  const Cut cut(shape);
  const auto of_row = [&](const Sums& sums, const Body& body, const Row& row, Gradients& gradients) {
    double_backward_row(cut, sums, body, row, args, gradients);
  };
  const auto finish = [&](const Grid& grid, const Partials<5>& partials, int64_t unit, int64_t j, float* coef,
                          Gradients& gradients) {
    const int64_t first = cut.first_channel(unit);
    const double r = cut.statistic(args, unit, j).r;
    const auto weight = [&](int64_t c) { return value_of(args.weight, first + c, 1.0); };
    const auto v_weight = [&](int64_t c) { return value_of(args.ddweight, first + c, 0.0); };
    SecondOrder o{};
    double s[5];
    cut.each_channel(j, [&](int64_t c) {
      partials.total(grid, 0, c, s);
      o.add(s, weight(c), v_weight(c), r);
    });
    o.finish(cut.inv_m, r);
    cut.each_channel(j, [&](int64_t c) {
      partials.total(grid, 0, c, s);
      gradients.total[first + c] += o.d_weight(s, cut.inv_m, r);
      put_second_order<Body>(grid, coef, c, o, o.u0(weight(c), value_of(args.ddbias, first + c, 0.0), r),
                             o.u1(weight(c), v_weight(c), r));
    });
  };
  two_passes<Sums, Body>(cut, args, {args.d_weight}, of_row, finish);
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
