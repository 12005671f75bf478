// The draws of torch's CPU generator, at::mt19937 of at::bernoulli_distribution<double>: one number after another, in
// one thread, but many at once. A draw is two words of 32 bits, of which 53 bits are a number in [0, 1).
#include <algorithm>
#include <cmath>

#include "common/kernels.hpp"
#include "cpu/simd.hpp"

namespace fg::ISA {
namespace {

constexpr int WORDS = 624, MIDDLE = 397;

// What torch.Generator.get_state() begins with.
struct Generator {
  uint64_t seed;
  int32_t left, seeded;  // left: words of `state` that were not drawn yet, and 1
  uint64_t next;         // the first of them
  uint64_t state[WORDS];
};

uint32_t twisted(uint32_t word, uint32_t following, uint32_t far) {
  const uint32_t y = (word & 0x80000000u) | (following & 0x7fffffffu);
  return far ^ (y >> 1) ^ (following & 1u ? 0x9908b0dfu : 0u);
}

void refill(uint32_t (&s)[WORDS]) {
  for (int i = 0; i < WORDS - MIDDLE; ++i) s[i] = twisted(s[i], s[i + 1], s[i + MIDDLE]);
  for (int i = WORDS - MIDDLE; i < WORDS - 1; ++i) s[i] = twisted(s[i], s[i + 1], s[i + MIDDLE - WORDS]);
  s[WORDS - 1] = twisted(s[WORDS - 1], s[0], s[MIDDLE - 1]);
}

uint32_t tempered(uint32_t y) {
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

template <class T>
void draw(const BernoulliArgs& a) {
  Generator& g = *static_cast<Generator*>(a.generator);
  T* y = static_cast<T*>(a.y);
  const T hit = from_float<T>(a.value), miss = from_float<T>(0.0f);
  const auto bound = static_cast<int64_t>(std::ceil(std::ldexp(a.p, 53)));  // of the 53 bits; a draw below it is 1

  uint32_t state[WORDS], stream[WORDS + 1];  // stream: the words drawn and not used, one of them from the last turn
  std::copy(g.state, g.state + WORDS, state);
  int64_t next = static_cast<int64_t>(g.next), available = g.left - 1, held = 0;
  for (int64_t done = 0; done < a.N;) {
    if (available == 0) {
      refill(state);
      next = 0, available = WORDS;
    }
    const int64_t taken = std::min(available, 2 * (a.N - done) - held), pairs = (held + taken) / 2;
    for (int64_t i = 0; i < taken; ++i) stream[held + i] = tempered(state[next + i]);
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t bits = static_cast<int64_t>(stream[2 * i] & 0x1fffffu) << 32 | stream[2 * i + 1];
      y[done + i] = bits < bound ? hit : miss;
    }
    next += taken, available -= taken, done += pairs;
    held = (held + taken) % 2;
    stream[0] = stream[2 * pairs];
  }
  std::copy(state, state + WORDS, g.state);
  g.next = static_cast<uint64_t>(next), g.left = static_cast<int32_t>(available) + 1;
}

}  // namespace

void bernoulli(const BernoulliArgs& a) { a.dtype == BF16 ? draw<bf16>(a) : draw<float>(a); }

}  // namespace fg::ISA
