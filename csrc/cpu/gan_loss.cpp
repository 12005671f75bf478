// GAN losses on logits: loss and statistics in one pass over fake and real, the gradients in another, and theirs.
//
// With σ the sigmoid, sp the softplus, r real and f fake logits:
//   kind           D loss                          G loss
//   bce            mean sp(-r) + mean sp(f)        mean sp(-f)
//   minimax        the same                        -mean sp(f)
//   lsgan          ½ mean (r-1)² + ½ mean f²       ½ mean (f-1)²
//   hinge          mean relu(1-r) + mean relu(1+f) -mean f
//   wasserstein    mean f - mean r                 -mean f
//   relativistic   mean sp(f-r)                    mean sp(r-f)       (pairwise)
// Label smoothing s replaces the real target 1 by 1-s in the D loss of bce, minimax and lsgan. sp(r) - (1-s) r is
// computed as sp(-r) + s r, which does not cancel for large r.
#include "common/kernels.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "cpu/vmath.hpp"

namespace fg::ISA {
namespace {

FG_INLINE vf negative(vf a) { return zero() - a; }
FG_INLINE vf relu(vf a) { return select(le(a, zero()), zero(), a); }

// Loss of one logit; relativistic is handled by pairs.
FG_INLINE vf loss_real(vf r, Loss kind, float smoothing) {
  switch (kind) {
    case LOSS_BCE:
    case LOSS_MINIMAX:
      return fma(r, set1(smoothing), softplus(negative(r)));
    case LOSS_LSGAN: {
      const vf d = r - set1(1.0f - smoothing);
      return set1(0.5f) * d * d;
    }
    case LOSS_HINGE:
      return relu(set1(1.0f) - r);
    default:
      return negative(r);
  }
}

FG_INLINE vf loss_fake(vf f, Loss kind, Side side) {
  const bool d_side = side == SIDE_D;
  switch (kind) {
    case LOSS_BCE:
      return softplus(d_side ? f : negative(f));
    case LOSS_MINIMAX:
      return d_side ? softplus(f) : negative(softplus(f));
    case LOSS_LSGAN: {
      const vf d = d_side ? f : f - set1(1.0f);
      return set1(0.5f) * d * d;
    }
    case LOSS_HINGE:
      return d_side ? relu(set1(1.0f) + f) : negative(f);
    default:
      return d_side ? f : negative(f);
  }
}

// Derivatives of the two above.
FG_INLINE vf slope_real(vf r, Loss kind, float smoothing) {
  switch (kind) {
    case LOSS_BCE:
    case LOSS_MINIMAX:
      return set1(smoothing) - sigmoid(negative(r));
    case LOSS_LSGAN:
      return r - set1(1.0f - smoothing);
    case LOSS_HINGE:
      return select(le(set1(1.0f) - r, zero()), zero(), set1(-1.0f));
    default:
      return set1(-1.0f);
  }
}

FG_INLINE vf slope_fake(vf f, Loss kind, Side side) {
  const bool d_side = side == SIDE_D;
  switch (kind) {
    case LOSS_BCE:
      return d_side ? sigmoid(f) : negative(sigmoid(negative(f)));
    case LOSS_MINIMAX:
      return d_side ? sigmoid(f) : negative(sigmoid(f));
    case LOSS_LSGAN:
      return d_side ? f : f - set1(1.0f);
    case LOSS_HINGE:
      if (d_side) return select(le(set1(1.0f) + f, zero()), zero(), set1(1.0f));
      return set1(-1.0f);
    default:
      return set1(d_side ? 1.0f : -1.0f);
  }
}

// And of these: L'' by either logit, which is L''(f - r) for the relativistic kind. σ'(x) = e/(1+e)², e = exp(-|x|).
FG_INLINE vf curve(vf v, Loss kind, Side side) {
  if (kind == LOSS_LSGAN) return set1(1.0f);
  if (kind == LOSS_HINGE || kind == LOSS_WASSERSTEIN) return zero();
  const vf e = exp(negative(abs(v))), one_e = set1(1.0f) + e, bump = e / (one_e * one_e);
  return kind == LOSS_MINIMAX && side == SIDE_G ? negative(bump) : bump;
}

// ------------------------------------------------------------------------------------------------ forward

// What one pass adds up: the loss, and of the logits their sum, the sum of their sigmoids, and how many are right.
constexpr int SUM_LOSS = 0, SUM_LOGIT = 1, SUM_SIGMOID = 2, SUM_RIGHT = 3, SUMS = 4;

// Adds the first KEPT sums over logits[begin, end) to `into`; fp32 for at most 4096 elements, float64 beyond.
template <int KEPT, class T, class LossOf>
static void add_up(const T* logits, int64_t begin, int64_t end, bool real, const LossOf& loss_of, double* into) {
  constexpr int64_t BLOCK = 4096;
  for (int64_t at = begin; at < end; at += BLOCK) {
    vf s[KEPT] = {};
    each(at, at + BLOCK < end ? at + BLOCK : end, [&](int64_t i, int n) {
      const vf v = load_some(logits + i, n);
      const vf right = select(real ? gt(v, zero()) : gt(zero(), v), set1(1.0f), zero());
      const vf add[SUMS] = {loss_of(v, i, n), v, sigmoid(v), right};
      const vm lanes = first(n == VF ? 0 : n);
      for (int k = 0; k < KEPT; ++k) s[k] = s[k] + (n == VF ? add[k] : select(lanes, add[k], zero()));
    });
    for (int k = 0; k < KEPT; ++k) into[k] += static_cast<double>(sum(s[k]));
  }
}

// KEPT: SUMS, or 1 where only the loss is wanted, which saves the exp and the division of a sigmoid.
template <int KEPT, class T>
static void forward(const GanLossShape& s, const GanLossForwardArgs& a) {
  const T *fake = static_cast<const T*>(a.fake), *real = static_cast<const T*>(a.real);
  const int threads = team_for(8 * (s.n_fake + s.n_real), s.threads);  // an exp or two: dearer than a plain sweep
  constexpr int PITCH = 2 * SUMS;                                      // doubles of one thread: 64 bytes, a cache line
  const Scratch<double> memory(threads * PITCH);
  double* partial = memory.data;
  int team = 1;
#pragma omp parallel num_threads(threads)
  {
    const int t = thread_index(), parts = team_size();
    if (t == 0) team = parts;
    double *f = partial + t * PITCH, *r = f + SUMS;
    for (int k = 0; k < PITCH; ++k) f[k] = 0.0;
    const auto none = [](vf, int64_t, int) { return zero(); };
    const int64_t f0 = part_begin(s.n_fake, t, parts), f1 = part_begin(s.n_fake, t + 1, parts);
    const int64_t r0 = part_begin(s.n_real, t, parts), r1 = part_begin(s.n_real, t + 1, parts);
    if (s.kind == LOSS_RELATIVISTIC) {
      add_up<KEPT>(
          fake, f0, f1, false,
          [&](vf v, int64_t i, int n) {
            const vf z = v - load_some(real + i, n);
            return softplus(s.side == SIDE_D ? z : negative(z));
          },
          f);
      add_up<KEPT>(real, r0, r1, true, none, r);
    } else {
      add_up<KEPT>(fake, f0, f1, false, [&](vf v, int64_t, int) { return loss_fake(v, s.kind, s.side); }, f);
      if (s.side == SIDE_D)
        add_up<KEPT>(real, r0, r1, true, [&](vf v, int64_t, int) { return loss_real(v, s.kind, s.smoothing); }, r);
      else
        add_up<KEPT>(real, r0, r1, true, none, r);
    }
  }
  double f[SUMS] = {}, r[SUMS] = {};
  for (int t = 0; t < team; ++t)
    for (int k = 0; k < SUMS; ++k) {
      f[k] += partial[t * PITCH + k];
      r[k] += partial[t * PITCH + SUMS + k];
    }
  const double inv_f = 1.0 / static_cast<double>(s.n_fake),
               inv_r = s.n_real ? 1.0 / static_cast<double>(s.n_real) : 0.0;
  *a.loss = static_cast<float>(f[SUM_LOSS] * inv_f + r[SUM_LOSS] * inv_r);
  if (!a.statistics) return;
  const double statistics[6] = {r[SUM_LOGIT] * inv_r,   f[SUM_LOGIT] * inv_f, r[SUM_SIGMOID] * inv_r,
                                f[SUM_SIGMOID] * inv_f, r[SUM_RIGHT] * inv_r, f[SUM_RIGHT] * inv_f};
  for (int k = 0; k < 6; ++k) a.statistics[k] = static_cast<float>(statistics[k]);
}

// ------------------------------------------------------------------------------------------------ backward

template <class T>
static void backward_pairs(const GanLossShape& s, const GanLossBackwardArgs& a, int64_t begin, int64_t end, vf scale) {
  const T *fake = static_cast<const T*>(a.fake), *real = static_cast<const T*>(a.real);
  T *dfake = static_cast<T*>(a.dfake), *dreal = static_cast<T*>(a.dreal);
  each(begin, end, [&](int64_t i, int n) {
    const vf z = load_some(fake + i, n) - load_some(real + i, n);
    const vf d = scale * (s.side == SIDE_D ? sigmoid(z) : negative(sigmoid(negative(z))));
    if (dfake) store_some(dfake + i, d, n);
    if (dreal) store_some(dreal + i, negative(d), n);
  });
}

template <class T>
static void backward(const GanLossShape& s, const GanLossBackwardArgs& a) {
  const T *fake = static_cast<const T*>(a.fake), *real = static_cast<const T*>(a.real);
  T *dfake = static_cast<T*>(a.dfake), *dreal = static_cast<T*>(a.dreal);
  const int threads = team_for(8 * (s.n_fake + s.n_real), s.threads);
  const float dloss = *a.dloss;
#pragma omp parallel num_threads(threads)
  {
    const int t = thread_index(), parts = team_size();
    const int64_t f0 = part_begin(s.n_fake, t, parts), f1 = part_begin(s.n_fake, t + 1, parts);
    const int64_t r0 = part_begin(s.n_real, t, parts), r1 = part_begin(s.n_real, t + 1, parts);
    const vf scale_f = set1(static_cast<float>(static_cast<double>(dloss) / static_cast<double>(s.n_fake)));
    if (s.kind == LOSS_RELATIVISTIC) {
      backward_pairs<T>(s, a, f0, f1, scale_f);
    } else {
      if (dfake)
        each(f0, f1, [&](int64_t i, int n) {
          store_some(dfake + i, scale_f * slope_fake(load_some(fake + i, n), s.kind, s.side), n);
        });
      if (dreal && s.side == SIDE_D) {
        const vf scale_r = set1(static_cast<float>(static_cast<double>(dloss) / static_cast<double>(s.n_real)));
        each(r0, r1, [&](int64_t i, int n) {
          store_some(dreal + i, scale_r * slope_real(load_some(real + i, n), s.kind, s.smoothing), n);
        });
      } else if (dreal) {
        each(r0, r1, [&](int64_t i, int n) { store_some(dreal + i, zero(), n); });
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ double backward

// Over logits [begin, end): the sum of u slope, and scale u curve stored, for (u, slope, curve) = bends(i, lanes).
template <class T, class Bends>
static double bend(int64_t begin, int64_t end, vf scale, T* out, T* negated, const Bends& bends) {
  constexpr int64_t BLOCK = 4096;  // fp32 sums over as many elements, float64 beyond
  double total = 0.0;
  for (int64_t at = begin; at < end; at += BLOCK) {
    vf s = zero();
    each(at, at + BLOCK < end ? at + BLOCK : end, [&](int64_t i, int n) {
      vf u, slope, second;
      bends(i, n, u, slope, second);
      s = fma(u, slope, s);  // u is 0 in lanes beyond the end
      const vf d = scale * u * second;
      if (out) store_some(out + i, d, n);
      if (negated) store_some(negated + i, negative(d), n);
    });
    total += static_cast<double>(sum(s));
  }
  return total;
}

template <class T>
static void double_backward(const GanLossShape& s, const GanLossDoubleBackwardArgs& a) {
  const T *fake = static_cast<const T*>(a.fake), *real = static_cast<const T*>(a.real);
  const T *ddfake = static_cast<const T*>(a.ddfake), *ddreal = static_cast<const T*>(a.ddreal);
  T *d_fake = static_cast<T*>(a.d_fake), *d_real = static_cast<T*>(a.d_real);
  const int threads = team_for(8 * (s.n_fake + s.n_real), s.threads);
  constexpr int PITCH = 8;  // doubles of one thread: a cache line
  const Scratch<double> memory(threads * PITCH);
  double* partial = memory.data;
  const double inv_f = 1.0 / static_cast<double>(s.n_fake),
               inv_r = s.n_real ? 1.0 / static_cast<double>(s.n_real) : 0.0;
  const vf scale_f = set1(static_cast<float>(*a.dloss * inv_f)), scale_r = set1(static_cast<float>(*a.dloss * inv_r));
  int team = 1;
#pragma omp parallel num_threads(threads)
  {
    const int t = thread_index(), parts = team_size();
    if (t == 0) team = parts;
    const int64_t f0 = part_begin(s.n_fake, t, parts), f1 = part_begin(s.n_fake, t + 1, parts);
    const int64_t r0 = part_begin(s.n_real, t, parts), r1 = part_begin(s.n_real, t + 1, parts);
    double sum_f = 0.0, sum_r = 0.0;
    if (s.kind == LOSS_RELATIVISTIC) {
      sum_f = bend<T>(f0, f1, scale_f, d_fake, d_real, [&](int64_t i, int n, vf& u, vf& slope, vf& second) {
        const vf z = load_some(fake + i, n) - load_some(real + i, n);
        u = load_some(ddfake + i, n) - load_some(ddreal + i, n);
        slope = s.side == SIDE_D ? sigmoid(z) : negative(sigmoid(negative(z)));
        second = curve(z, s.kind, s.side);
      });
    } else {
      sum_f = bend<T>(f0, f1, scale_f, d_fake, nullptr, [&](int64_t i, int n, vf& u, vf& slope, vf& second) {
        const vf f = load_some(fake + i, n);
        u = load_some(ddfake + i, n);
        slope = slope_fake(f, s.kind, s.side);
        second = curve(f, s.kind, s.side);
      });
      if (s.side == SIDE_D)
        sum_r = bend<T>(r0, r1, scale_r, d_real, nullptr, [&](int64_t i, int n, vf& u, vf& slope, vf& second) {
          const vf r = load_some(real + i, n);
          u = load_some(ddreal + i, n);
          slope = slope_real(r, s.kind, s.smoothing);
          second = curve(r, s.kind, s.side);
        });
      else if (d_real)
        each(r0, r1, [&](int64_t i, int n) { store_some(d_real + i, zero(), n); });
    }
    partial[t * PITCH] = sum_f * inv_f + sum_r * inv_r;
  }
  double total = 0.0;
  for (int t = 0; t < team; ++t) total += partial[t * PITCH];
  *a.d_dloss = static_cast<float>(total);
}

}  // namespace

void gan_loss_forward(const GanLossShape& shape, const GanLossForwardArgs& args) {
  if (args.statistics)
    shape.dtype == BF16 ? forward<SUMS, bf16>(shape, args) : forward<SUMS, float>(shape, args);
  else
    shape.dtype == BF16 ? forward<1, bf16>(shape, args) : forward<1, float>(shape, args);
}
void gan_loss_backward(const GanLossShape& shape, const GanLossBackwardArgs& args) {
  shape.dtype == BF16 ? backward<bf16>(shape, args) : backward<float>(shape, args);
}
void gan_loss_double_backward(const GanLossShape& shape, const GanLossDoubleBackwardArgs& args) {
  shape.dtype == BF16 ? double_backward<bf16>(shape, args) : double_backward<float>(shape, args);
}

}  // namespace fg::ISA
