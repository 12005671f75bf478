// Tensor-core instructions and what feeds them: cp.async, ldmatrix, mma.sync. Each is one PTX instruction on a GPU and
// the same exchange between lanes under the SIMT emulator.
//
// Fragments of mma m16n8 (PTX ISA, "Matrix Fragments"), lane = 4 g + t: a chunk is 16 bytes of the reduction axis, 8
// values of 16 bits or 4 of 32, and one mma takes two of them (k16 or k8). a[0], a[1]: rows g and g+8 of the first
// chunk; a[2], a[3]: of the second; b[0], b[1]: column g of the first and second; c[0], c[1]: row g, columns 2t and
// 2t+1; c[2], c[3]: row g+8.
#pragma once

#include "cuda/prelude.cuh"

namespace fg::cuda {

constexpr int CHUNK = 16;  // bytes

struct Tf32 {};  // float operands rounded to 10 bits of mantissa

// ---------------------------------------------------------------------------------------------- global to shared

// 16 bytes to shared memory, or zeros: asynchronous from sm_80 on. `from` is valid memory in either case.
FG_DEVICE void copy_chunk(void* shared, const void* from, bool inside) {
#ifdef FG_SIMT
  if (inside) FG_READ(from, CHUNK);
  for (int i = 0; i < 4; ++i) static_cast<u32*>(shared)[i] = ALL_LANES;  // NaN until the wait, as far as anyone may know
  simt::copy_later(shared, from, CHUNK, inside ? CHUNK : 0);
  simt::shared_access(shared, CHUNK);
#elif __CUDA_ARCH__ >= 800
  const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? CHUNK : 0) : "memory");
#else
  const uint4 zero = {0, 0, 0, 0};
  *static_cast<uint4*>(shared) = inside ? *static_cast<const uint4*>(from) : zero;
#endif
}

FG_DEVICE void commit_copies() {
#ifdef FG_SIMT
  simt::commit_copies();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most IN_FLIGHT of this thread's groups are unfinished; a barrier makes the others' copies visible.
template <int IN_FLIGHT>
FG_DEVICE void wait_copies() {
#ifdef FG_SIMT
  simt::wait_copies(IN_FLIGHT);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(IN_FLIGHT) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------- shared to registers

// Lane l brings the address of row l % 8 of 8x8 matrix l / 8 (rows of 16 bytes); d[j] is this lane's word of matrix j:
// word t of row g, or with TRANSPOSED the 16-bit values (2t, g) and (2t+1, g).
template <bool TRANSPOSED>
FG_DEVICE void load_matrices(u32 (&d)[4], const void* row) {
#ifdef FG_SIMT
  uint64_t rows[32];
  simt::shared_access(row, CHUNK);
  simt::meet(simt::Meeting::EXCHANGE, ALL_LANES, reinterpret_cast<uintptr_t>(row), rows, {__FILE__, __LINE__});
  const int g = simt::current->lane / 4, t = simt::current->lane % 4;
  for (int j = 0; j < 4; ++j) {
    if (TRANSPOSED) {
      const auto value = [&](int k) { return static_cast<u32>(reinterpret_cast<const uint16_t*>(rows[8 * j + k])[g]); };
      d[j] = value(2 * t) | value(2 * t + 1) << 16;
    } else {
      d[j] = reinterpret_cast<const u32*>(rows[8 * j + g])[t];
    }
  }
#else
  const u32 from = static_cast<u32>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(from)
                 : "memory");
#endif
}

// An access to shared memory that the emulator counts.
template <class P>
FG_DEVICE P load_shared(const void* from) {
#ifdef FG_SIMT
  simt::shared_access(from, sizeof(P));
#endif
  return *static_cast<const P*>(from);
}

template <class P>
FG_DEVICE void store_shared(void* to, const P& value) {
#ifdef FG_SIMT
  simt::shared_access(to, sizeof(P));
#endif
  *static_cast<P*>(to) = value;
}

// ---------------------------------------------------------------------------------------------- products

// Nearest value of 10 mantissa bits, ties away from zero, as the tensor core wants it; without it, it truncates.
FG_DEVICE u32 to_tf32(u32 bits) {
#ifdef FG_SIMT
  const float v = simt::unpack<float>(bits);
  return v - v == 0.0f ? (bits + 0x1000u) & ~0x1fffu : bits;
#elif __CUDA_ARCH__ >= 800
  u32 rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
#else
  return bits;
#endif
}

#ifdef FG_SIMT
// One chunk pair's products for the values V of a word: sums of float products in the order of the reduction axis.
template <int PER_WORD, class V>
void multiply_add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], V value) {
  uint64_t low[32], high[32], columns[32];
  const auto exchange = [](u32 first, u32 second, uint64_t(&words)[32]) {
    simt::meet(simt::Meeting::EXCHANGE, ALL_LANES, first | static_cast<uint64_t>(second) << 32, words,
               {__FILE__, __LINE__});
  };
  exchange(a[0], a[1], low);
  exchange(a[2], a[3], high);
  exchange(b[0], b[1], columns);
  const int g = simt::current->lane / 4, t = simt::current->lane % 4;
  for (int chunk = 0; chunk < 2; ++chunk)
    for (int word = 0; word < 4; ++word)
      for (int part = 0; part < PER_WORD; ++part)
        for (int i = 0; i < 4; ++i) {
          const uint64_t rows = (chunk ? high : low)[4 * g + word], column = columns[4 * (2 * t + i % 2) + word];
          c[i] += value(static_cast<u32>(i < 2 ? rows : rows >> 32), part) *
                  value(static_cast<u32>(chunk ? column >> 32 : column), part);
        }
}
#endif

// c += a b^T for one 16 x 8 tile over two chunks.
template <class T>
FG_DEVICE void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]);

#define FG_MMA(shape_and_types)                                                                 \
  asm volatile("mma.sync.aligned." shape_and_types                                              \
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                         \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <>
FG_MEMBER void multiply<__half>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef FG_SIMT
  multiply_add<2>(c, a, b, [](u32 w, int i) { return __half2float({static_cast<uint16_t>(w >> 16 * i)}); });
#elif __CUDA_ARCH__ >= 800
  FG_MMA("m16n8k16.row.col.f32.f16.f16.f32");
#else
  // sm_75 multiplies one chunk at a time
  for (int chunk = 0; chunk < 2; ++chunk)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2 * chunk]), "r"(a[2 * chunk + 1]), "r"(b[chunk]));
#endif
}

// Without an instruction below sm_80: the launcher declines those cards, and a kernel that came there would trap.
template <>
FG_MEMBER void multiply<__nv_bfloat16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef FG_SIMT
  multiply_add<2>(c, a, b, [](u32 w, int i) { return __bfloat162float({static_cast<uint16_t>(w >> 16 * i)}); });
#elif __CUDA_ARCH__ >= 800
  FG_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
#else
  __trap();
#endif
}

template <>
FG_MEMBER void multiply<Tf32>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef FG_SIMT
  multiply_add<1>(c, a, b, [](u32 w, int) { return simt::unpack<float>(w); });
#elif __CUDA_ARCH__ >= 800
  FG_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#else
  __trap();
#endif
}

#undef FG_MMA

}  // namespace fg::cuda
