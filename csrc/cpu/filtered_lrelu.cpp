// y = every down-th sample of f_down * phi(f_up * (x + bias)), x with up - 1 zeros behind each sample, phi a leaky ReLU
// with gain and clamp, in one pass. The derivative is such a pass too: there phi multiplies by the slope that the signs
// of the forward pass tell.
//
// A thread takes VF planes at a time, a lane each, and walks down their rows. An input row is read once and kept while
// taps reach it. An upsampled row is filtered down as soon as it is made. As many filtered rows are kept as the last
// filter is high. The upsampled image, up^2 times as large as x, never reaches memory: only one bit a sample for the
// sign does and, under a clamp, one that says whether the clamp holds the sample.
//
// Bound: x and y once, and 1/32 or 1/16 of the upsampled image. StyleGAN3's 12 taps, up 2 and down 2, take 36 FMA for
// each sample of the upsampled image where rows are long (K / up + K / up along and down, the same again for `down`),
// so it is bound by the two FMA ports of a core, not by memory: 114 MFLOP a [8, 64, 36, 36] in float32 beside 6.2 MB.
#include <cstring>

#include "common/kernels.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "cpu/planes.hpp"

namespace fg::ISA {
namespace {

// Where a pass reads and writes. The forward pass adds the bias and writes the signs, the others read them.
struct Work {
  const void* x;
  const float* bias;
  void* y;
  const uint32_t* known;  // null: forward
  uint32_t* signs;
};

// What all threads share.
struct Plan {
  const FilteredLreluShape& s;
  const Work& work;
  Stage up, down;
  int64_t planes, words;  // of 32 bits, a row's signs

  Plan(const FilteredLreluShape& shape, const Work& w, Phase* phases, float* taps, const Taps& f_up, const Taps& f_down)
      : s(shape),
        work(w),
        up(axis(s.H, s.MH, s.KH_up, s.up, 1, s.pad_y, phases), axis(s.W, s.MW, s.KW_up, s.up, 1, s.pad_x, phases),
           Filter(f_up, s.flip, w.known ? 1.0f : static_cast<float>(s.up * s.up), taps)),
        down(axis(s.MH, s.OH, s.KH_down, 1, s.down, s.pad_out_y, phases),
             axis(s.MW, s.OW, s.KW_down, 1, s.down, s.pad_out_x, phases),
             Filter(f_down, s.flip, 1.0f, taps + f_up.floats())),
        planes(s.N * s.C),
        words((s.MW + 31) / 32) {}

  static Axis axis(int64_t in, int64_t out, int64_t taps, int64_t up, int64_t down, int64_t pad, Phase*& memory) {
    Phase* own = memory;
    memory += up;
    return Axis(in, out, taps, up, down, pad, own);
  }
  // Of a product, rows are kept that are filtered along already: OW vectors each.
  Margins kept() const { return down.filter.product ? Margins(s.OW) : down.margins; }
};

// A band of output rows of VF planes, and one thread's memory for it.
template <class T>
struct Band {
  const Plan& plan;
  const FilteredLreluShape& s;
  Ring inputs, kept;
  float *sum, *fine, *line;  // an input row's and an upsampled row's margins and samples, an output row
  const float** rows;        // what a vertical filter reads
  int64_t first = 0, lanes = 0;

  explicit Band(const Plan& p)
      : plan(p), s(p.s), inputs(p.up.rows_read() + 1, p.up.margins), kept(s.KH_down, p.kept()) {}
  int64_t floats() const { return inputs.floats() + kept.floats() + plan.up.floats() + plan.down.floats() + s.OW * VF; }
  int64_t pointers() const { return std::max(inputs.slots, kept.slots); }
  void use(float* memory, const float** pointer_memory) {
    std::fill_n(memory, floats(), 0.0f);  // the margins stay so
    inputs.memory = memory;
    kept.memory = inputs.memory + inputs.floats();
    sum = kept.memory + kept.floats();
    fine = sum + plan.up.floats();
    line = fine + plan.down.floats();
    rows = pointer_memory;
  }

  // Output rows [begin, end) of the planes from `first` on.
  void operator()(int64_t first_plane, int64_t begin, int64_t end) {
    const Planes<const T> x(static_cast<const T*>(plan.work.x), s.N, s.C, s.H, s.W, s.channels_last, first_plane);
    const Planes<T> y(static_cast<T*>(plan.work.y), s.N, s.C, s.OH, s.OW, s.channels_last, first_plane);
    first = first_plane;
    lanes = x.lanes;
    const vf bias = biases();
    // A band writes the signs of the rows from the first that it needs up to the next band's first; the outer bands to
    // the edges.
    const auto needs_from = [&](int64_t o) { return std::clamp<int64_t>(o * s.down - s.pad_out_y, 0, s.MH); };
    const bool signs = plan.work.signs != nullptr;
    const int64_t until = !signs ? 0 : end == s.OH ? s.MH : needs_from(end);
    int64_t m = signs && begin == 0 ? 0 : needs_from(begin), read = -1;
    for (int64_t o = begin; o < end; ++o) {
      const int64_t last = std::min(s.MH, o * s.down - s.pad_out_y + s.KH_down);
      for (; m < last; ++m) make_row(m, x, bias, read, m < until);
      make_output(o);
      y.write(o, line);
    }
    for (; m < until; ++m) make_row(m, x, bias, read, true);
  }

  vf biases() const {
    float value[VF] = {};
    if (plan.work.bias)
      for (int64_t l = 0; l < lanes; ++l) value[l] = plan.work.bias[(first + l) % s.C];
    return load(value);
  }

  // Row m of the upsampled image, through phi and, where the last filter is a product, along it. `read`: the last input
  // row that was read.
  void make_row(int64_t m, const Planes<const T>& x, vf bias, int64_t& read, bool signs) {
    const auto [from, to, tap] = plan.up.reach(m);
    for (read = std::max(read, from - 1); read < to - 1; ++read) x.read(read + 1, bias, inputs.row(read + 1));
    const bool along = plan.down.filter.product;
    float* made = along ? fine + plan.down.margins.before * VF : kept.row(m);
    plan.up.make(m, inputs, sum, rows, made);
    plan.work.known ? slope(made, m) : activate(made, m, signs);
    if (along) filter_row(plan.down.horizontal, plan.down.filter.rows, made, false, kept.row(m));
  }

  // Output row o, into `line`.
  void make_output(int64_t o) {
    if (!plan.down.filter.product) return plan.down.make(o, kept, nullptr, rows, line);
    const auto [from, to, tap] = plan.down.reach(o);
    for (int64_t m = from; m < to; ++m) rows[m - from] = kept.row(m);
    combine_rows(rows, plan.down.filter.column + tap, 1, to - from, s.OW, line);
  }

  // ---- phi. Signs are words of 32 samples of a plane's row, [kind][plane][MH][words]: not positive, and held by the
  // clamp.

  int64_t word_at(int64_t kind, int64_t lane, int64_t m, int64_t word) const {
    return ((kind * plan.planes + first + lane) * s.MH + m) * plan.words + word;
  }

  void activate(float* row, int64_t m, bool signs) const {
    const vf gain = set1(s.gain), low = set1(s.gain * s.slope);
    const bool clamps = s.clamp >= 0;
    const vf limit = set1(clamps ? s.clamp : INFINITY);
    for (int64_t word = 0; word < plan.words; ++word) {
      const int64_t begin = word * 32, count = std::min<int64_t>(32, s.MW - begin);
      vu negative = {}, held = {}, bit = (vu)(vi{} + 1);
      for (int64_t i = 0; i < count; ++i, bit += bit) {  // comparisons in place: 14 instructions, 20 with gt() and le()
        float* at = row + (begin + i) * VF;
        const vf t = load(at);
        vf v = t * (t > zero() ? gain : low);
        negative = t > zero() ? negative : negative | bit;
        if (clamps) {
          held = abs(v) >= limit ? held | bit : held;
          v = limit < v ? limit : v;  // NaN stays
          v = -limit > v ? -limit : v;
        }
        store(at, v);
      }
      if (!signs) continue;
      keep(negative, 0, m, word);
      if (clamps) keep(held, 1, m, word);
    }
  }

  void keep(vu bits, int64_t kind, int64_t m, int64_t word) const {
    uint32_t lane[VF];
    std::memcpy(lane, &bits, sizeof lane);
    for (int64_t l = 0; l < lanes; ++l) plan.work.signs[word_at(kind, l, m, word)] = lane[l];
  }

  vu bits_of(int64_t kind, int64_t m, int64_t word) const {
    uint32_t lane[VF] = {};
    for (int64_t l = 0; l < lanes; ++l) lane[l] = plan.work.known[word_at(kind, l, m, word)];
    vu bits;
    std::memcpy(&bits, lane, sizeof bits);
    return bits;
  }

  // The row times phi' as the forward pass left it.
  void slope(float* row, int64_t m) const {
    const vf gain = set1(s.gain), low = set1(s.gain * s.slope);
    const bool clamps = s.clamp >= 0;
    for (int64_t word = 0; word < plan.words; ++word) {
      const int64_t begin = word * 32, count = std::min<int64_t>(32, s.MW - begin);
      const vu negative = bits_of(0, m, word), held = clamps ? bits_of(1, m, word) : vu{};
      vu bit = (vu)(vi{} + 1);
      for (int64_t i = 0; i < count; ++i, bit += bit) {
        float* at = row + (begin + i) * VF;
        const vf v = load(at) * ((negative & bit) != 0 ? low : gain);
        store(at, (held & bit) != 0 ? zero() : v);
      }
    }
  }
};

template <class T>
void run(const FilteredLreluShape& s, const Work& work, const Taps& f_up, const Taps& f_down) {
  const Scratch<Phase> phases(2 * (s.up + 1));
  const Scratch<float> taps(f_up.floats() + f_down.floats());
  const Plan plan(s, work, phases.data, taps.data, f_up, f_down);
  Band<T> like(plan);
  // Bands where there are few planes. Each band makes the rows of the last filter's height anew, so a band is at least
  // four times that high.
  const int64_t blocks = (plan.planes + VF - 1) / VF;
  const int64_t most = std::max<int64_t>(1, s.OH * s.down / (4 * s.KH_down));
  const int64_t bands = std::clamp<int64_t>((4 * s.threads + blocks - 1) / blocks, 1, most);
  const int threads = team_for(plan.planes * s.MH * s.MW, s.threads);
  const Scratch<float> memory(threads * like.floats());
  const Scratch<const float*> pointers(threads * like.pointers());
#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_index(), team = team_size();
    Band<T> band(plan);
    band.use(memory.data + thread * band.floats(), pointers.data + thread * band.pointers());
    const int64_t jobs = blocks * bands;
    for (int64_t i = part_begin(jobs, thread, team); i < part_begin(jobs, thread + 1, team); ++i)
      band(i / bands * VF, part_begin(s.OH, i % bands, bands), part_begin(s.OH, i % bands + 1, bands));
  }
}

void run(const FilteredLreluShape& s, const Work& work, const float* f_up, const float* f_down) {
  const Taps first{f_up, s.KH_up, s.KW_up, s.separable_up}, second{f_down, s.KH_down, s.KW_down, s.separable_down};
  s.dtype == BF16 ? run<bf16>(s, work, first, second) : run<float>(s, work, first, second);
}

}  // namespace

void filtered_lrelu_forward(const FilteredLreluShape& s, const FilteredLreluForwardArgs& a) {
  run(s, {a.x, a.bias, a.y, nullptr, static_cast<uint32_t*>(a.signs)}, a.f_up, a.f_down);
}

void filtered_lrelu_backward(const FilteredLreluShape& s, const FilteredLreluBackwardArgs& a) {
  run(s, {a.x, nullptr, a.y, static_cast<const uint32_t*>(a.signs), nullptr}, a.f_up, a.f_down);
}

}  // namespace fg::ISA
