// Tensor-core steps and asynchronous copies, each one instruction: mma.sync (sm_80 on), ldmatrix, cp.async.
//
// Fragments as PTX defines them, with g = lane / 4 and t = lane % 4:
//   A 16x16 of 16-bit values: a[0] (g, 2t), a[1] (g+8, 2t), a[2] (g, 2t+8), a[3] (g+8, 2t+8), each with its right
//   neighbour B 16x8:                   b[0] (2t, g), b[1] (2t+8, g), each with the one below A 16x8 of tf32: a[0] (g,
//   t), a[1] (g+8, t), a[2] (g, t+4), a[3] (g+8, t+4); B 8x8: b[0] (t, g), b[1] (t+4, g) C 16x8 of float:          c[0]
//   (g, 2t), c[1] (g, 2t+1), c[2] (g+8, 2t), c[3] (g+8, 2t+1)
// The emulator runs the same calls on tests/emulation/simt/tensor_core.hpp.
#pragma once

#include "cuda/prelude.cuh"

#ifdef FG_SIMT
#include "tensor_core.hpp"
#endif

namespace fg::cuda {

// c += a b for T = __half or __nv_bfloat16.
template <class T>
FG_DEVICE void mma_16816(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]);

#ifdef FG_SIMT

template <>
FG_MEMBER void mma_16816<__half>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  simt::mma_16816<__half>(c, a, b);
}
template <>
FG_MEMBER void mma_16816<__nv_bfloat16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  simt::mma_16816<__nv_bfloat16>(c, a, b);
}
FG_DEVICE void mma_1688_tf32(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { simt::mma_1688_tf32(c, a, b); }
FG_DEVICE u32 to_tf32(float v) { return simt::to_tf32(v); }
FG_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) { simt::ldmatrix<4>(r, row, false); }
FG_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) { simt::ldmatrix<4>(r, row, true); }
FG_DEVICE void ldmatrix_x2(u32 (&r)[2], const void* row) { simt::ldmatrix<2>(r, row, false); }
FG_DEVICE void ldmatrix_x2_trans(u32 (&r)[2], const void* row) { simt::ldmatrix<2>(r, row, true); }
FG_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  if (valid) FG_READ(global, 16);
  simt::copy_later(shared, global, 16, valid ? 16 : 0);
}
FG_DEVICE void cp_async_commit() { simt::commit_copies(); }
template <int GROUPS>
FG_DEVICE void cp_async_wait() {
  simt::wait_copies(GROUPS);
}

#else

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <>
FG_MEMBER void mma_16816<__half>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
FG_MEMBER void mma_16816<__nv_bfloat16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Reads the upper 19 bits of each float; round with to_tf32 first.
FG_DEVICE void mma_1688_tf32(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FG_DEVICE u32 to_tf32(float v) {
  u32 r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}
// 16 bytes from global to shared memory, or 16 zero bytes. Done after cp_async_wait and a barrier.
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

// 8x8 matrices of 16-bit values: lane 8m + i gives the address of row i (16 bytes) of matrix m, r[m] is its fragment.
FG_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
FG_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
FG_DEVICE void ldmatrix_x2(u32 (&r)[2], const void* row) {
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}
FG_DEVICE void ldmatrix_x2_trans(u32 (&r)[2], const void* row) {
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(at)
               : "memory");
}

#endif

}  // namespace fg::cuda
