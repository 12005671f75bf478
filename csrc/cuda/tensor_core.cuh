// Tensor-core steps and asynchronous copies, each one instruction: mma.sync, ldmatrix, cp.async. The emulator runs the
// same calls on tests/emulation/simt/tensor_core.hpp.
//
// Fragments of m16n8 as PTX defines them, with lane = 4 g + t. A chunk is 16 bytes along the reduction, 8 values of 16
// bits or 4 floats; a step takes two chunks (k16, or k8 for tf32). Word t of a chunk:
//   A  a[0] row g, a[1] row g+8 of the first chunk; a[2], a[3] of the second
//   B  b[0] column g of the first chunk, b[1] of the second
//   C  c[0], c[1] row g, columns 2t and 2t+1; c[2], c[3] row g+8
#pragma once

#include "cuda/prelude.cuh"

#ifdef FG_SIMT
#include "tensor_core.hpp"
#endif

namespace fg::cuda {

constexpr int CHUNK = 16;  // bytes

struct Tf32 {};  // an operand type: floats in memory, rounded to 10 fraction bits when multiplied

// c += a b for an operand type: __half, __nv_bfloat16 or Tf32 (its floats rounded by to_tf32 first).
template <class Operand>
FG_DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]);

#ifdef FG_SIMT

template <>
FG_MEMBER void mma<__half>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  simt::mma_16816<__half>(c, a, b);
}
template <>
FG_MEMBER void mma<__nv_bfloat16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  simt::mma_16816<__nv_bfloat16>(c, a, b);
}
template <>
FG_MEMBER void mma<Tf32>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  simt::mma_1688_tf32(c, a, b);
}
FG_DEVICE u32 to_tf32(u32 bits) { return simt::to_tf32(simt::unpack<float>(bits)); }

template <bool TRANSPOSED>
FG_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  simt::ldmatrix<4>(r, row, TRANSPOSED);
}

// The copy happens at the wait; until then the place holds NaN, whatever it held before.
FG_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  if (valid) FG_READ(global, CHUNK);
  for (int i = 0; i < 4; ++i) static_cast<u32*>(shared)[i] = ~0u;
  simt::shared_access(shared, CHUNK);
  simt::copy_later(shared, global, CHUNK, valid ? CHUNK : 0);
}
FG_DEVICE void cp_async_commit() { simt::commit_copies(); }
template <int GROUPS>
FG_DEVICE void cp_async_wait() {
  simt::wait_copies(GROUPS);
}

#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800

// sm_75 copies through registers, multiplies fp16 one chunk at a time, and has neither bf16 nor tf32: launchers decline
// those there.
template <>
FG_MEMBER void mma<__half>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2 * chunk]), "r"(a[2 * chunk + 1]), "r"(b[chunk]));
}
template <>
FG_MEMBER void mma<__nv_bfloat16>(float (&)[4], const u32 (&)[4], const u32 (&)[2]) {
  __trap();
}
template <>
FG_MEMBER void mma<Tf32>(float (&)[4], const u32 (&)[4], const u32 (&)[2]) {
  __trap();
}
FG_DEVICE u32 to_tf32(u32 bits) { return bits; }
FG_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  const uint4 zero = {0, 0, 0, 0};
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : zero;
}
FG_DEVICE void cp_async_commit() {}
template <int GROUPS>
FG_DEVICE void cp_async_wait() {}

#else

#define FG_MMA(types)                                                                             \
  asm volatile("mma.sync.aligned." types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <>
FG_MEMBER void mma<__half>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  FG_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
template <>
FG_MEMBER void mma<__nv_bfloat16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  FG_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
template <>
FG_MEMBER void mma<Tf32>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  FG_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef FG_MMA
FG_DEVICE u32 to_tf32(u32 bits) {
  u32 r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(__uint_as_float(bits)));
  return r;
}
// 16 bytes from global to shared memory, or 16 zero bytes (`global` is valid memory all the same). Done after
// cp_async_wait, and for other threads after a barrier.
FG_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
FG_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most GROUPS of the committed groups are in flight.
template <int GROUPS>
FG_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

#endif

// 8x8 matrices of 16-bit values (or 8x4 words, not transposed): lane 8m + i gives the address of row i (16 bytes) of
// matrix m, r[m] is its fragment: word t of row g, or transposed the values (2t, g) and (2t+1, g).
template <bool TRANSPOSED>
FG_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

#endif

}  // namespace fg::cuda
