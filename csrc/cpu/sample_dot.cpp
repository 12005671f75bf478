// dot[n] = sum x[n] y[n]: 2 accesses an element, bound by memory.
#include "common/kernels.hpp"
#include "cpu/samples.hpp"

namespace fg::ISA {
namespace {

template <class T>
void dots(const SampleDotArgs& a) {
  const T *x = static_cast<const T*>(a.x), *y = static_cast<const T*>(a.y);
  sum_samples(
      a.N, a.E, a.threads,
      [&](int64_t i, int lanes, vf so_far) { return fma(load_some(x + i, lanes), load_some(y + i, lanes), so_far); },
      [&](int64_t n, double total) { a.dot[n] = static_cast<float>(total); });
}

}  // namespace

void sample_dot(const SampleDotArgs& args) { args.dtype == BF16 ? dots<bf16>(args) : dots<float>(args); }

}  // namespace fg::ISA
