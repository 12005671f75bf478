// y = a[n] x + b[n] z, of real and fake samples with b = 1 - a: 3 accesses an element, bound by memory.
#include "common/kernels.hpp"
#include "cpu/samples.hpp"

namespace fg::ISA {
namespace {

template <class T>
void forward(const InterpolateArgs& a) {
  const T *real = static_cast<const T*>(a.real), *fake = static_cast<const T*>(a.fake);
  T* y = static_cast<T*>(a.y);
#pragma omp parallel num_threads(team_for(a.N* a.E, a.threads))
  each_block(a.N, a.E, thread_index(), team_size(), [&](int64_t n, int64_t begin, int64_t end, int64_t) {
    const vf e = set1(a.epsilon[n]), rest = set1(a.rest ? a.rest[n] : 1.0f - a.epsilon[n]);
    each(n * a.E + begin, n * a.E + end, [&](int64_t i, int lanes) {
      const vf r = load_some(real + i, lanes);
      // the ends are exact: 1 real + 0 fake
      store_some(y + i, fake ? fma(e, r, rest * load_some(fake + i, lanes)) : e * r, lanes);
    });
  });
}

}  // namespace

void interpolate_forward(const InterpolateArgs& args) {
  args.dtype == BF16 ? forward<bf16>(args) : forward<float>(args);
}

}  // namespace fg::ISA
