// Products of tiles in shared memory by a warpgroup, 128 threads (wgmma): d += a @ b.T, asynchronous, f32 sums.
//
// a: 64 rows, b: kCols rows, both 16 elements of K wide, in boxes as tma.cuh lays them out. The warpgroup holds d as
// fragments: thread t has rows 16 * (t / 32) + (t % 32) / 4 and that + 8, and of every 8 columns the two that begin at
// 2 * (t % 4): d[4 * j + {0, 1}] in column 8 * j of the upper row, d[4 * j + {2, 3}] in the lower one.
//
// From mma_begin to mma_wait the registers of d belong to the tensor cores.
#pragma once

#include <cstdint>

#include "tpo/tma.cuh"
#include "tpo/vec.cuh"

namespace tpo {

// Of a box at an address in shared memory that is a multiple of 1024: addresses in units of 16 bytes; 8 rows (one
// repeat of the swizzle) are 1024 bytes; the distance along K is not used with this swizzle; layout 1 is 128 bytes.
__device__ __forceinline__ uint64_t mma_operand(uint32_t box) {
  constexpr uint64_t kUnusedStride = 1;
  constexpr uint64_t kEightRows = kSwizzleBytes >> 4;
  return (uint64_t{1} << 62) | (kEightRows << 32) | (kUnusedStride << 16) | ((box & 0x3ffffu) >> 4);
}

// 16 elements further along K within a box: the hardware swizzles the sum of the addresses, so adding is right.
__device__ __forceinline__ uint64_t mma_operand_at(uint64_t operand, int k_step) {
  return operand + k_step * (32 >> 4);
}

__device__ __forceinline__ void mma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kGroups of the groups begun are unfinished.
template <int kGroups>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// No use of d moves across: the compiler does not know that an unfinished product still writes it.
template <int kRegisters>
__device__ __forceinline__ void mma_pin(float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// accumulate = 0: d = a @ b.T, whatever d held.
template <typename Element>
__device__ __forceinline__ void mma(float (&d)[128], uint64_t a, uint64_t b, uint32_t accumulate);
template <typename Element>
__device__ __forceinline__ void mma(float (&d)[64], uint64_t a, uint64_t b, uint32_t accumulate);

// clang-format off
#define TPO_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define TPO_D64(i) TPO_D8(i), TPO_D8(i + 8), TPO_D8(i + 16), TPO_D8(i + 24), \
                   TPO_D8(i + 32), TPO_D8(i + 40), TPO_D8(i + 48), TPO_D8(i + 56)

#define TPO_MMA_256(Element, type) \
  template <> \
  __device__ __forceinline__ void mma<Element>(float (&d)[128], uint64_t a, uint64_t b, uint32_t accumulate) { \
    asm volatile( \
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %130, 0;\n\t" \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
        "%128, %129, p, 1, 1, 0, 0;\n\t}" \
        : TPO_D64(0), TPO_D64(64) \
        : "l"(a), "l"(b), "r"(accumulate) \
        : "memory"); \
  }

#define TPO_MMA_128(Element, type) \
  template <> \
  __device__ __forceinline__ void mma<Element>(float (&d)[64], uint64_t a, uint64_t b, uint32_t accumulate) { \
    asm volatile( \
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t" \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
        "%64, %65, p, 1, 1, 0, 0;\n\t}" \
        : TPO_D64(0) \
        : "l"(a), "l"(b), "r"(accumulate) \
        : "memory"); \
  }

TPO_MMA_256(Bf16, "bf16")
TPO_MMA_256(Fp16, "f16")
TPO_MMA_128(Bf16, "bf16")
TPO_MMA_128(Fp16, "f16")
// clang-format on

#undef TPO_MMA_128
#undef TPO_MMA_256
#undef TPO_D64
#undef TPO_D8

// Four 8 x 8 matrices of 2-byte elements from the fragments of a warp to shared memory: lane l gives the address of row
// l % 8 of matrix l / 8, and holds two elements of each.
__device__ __forceinline__ void store_fragments(uint32_t row_address, uint32_t m0, uint32_t m1, uint32_t m2,
                                                uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(m0),
               "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// The way back: fragments of a warp from shared memory.
__device__ __forceinline__ void load_fragments(uint32_t (&m)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row_address)
               : "memory");
}

// Registers a thread, of all warps of a warpgroup; the sum over the block must fit what it was launched with.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace tpo
