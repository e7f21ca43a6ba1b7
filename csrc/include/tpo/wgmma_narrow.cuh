// Products of a warpgroup with few columns: as wgmma.cuh, where d += a @ b.T has 8 to 64 columns instead of 128 or 256.
//
// A matrix of weights takes the part of a here, 64 of its rows at a time, and the few rows of activations that of b.
#pragma once

#include "tpo/wgmma.cuh"

namespace tpo {

template <typename Element>
__device__ __forceinline__ void mma(float (&d)[4], uint64_t a, uint64_t b, uint32_t accumulate);
template <typename Element>
__device__ __forceinline__ void mma(float (&d)[8], uint64_t a, uint64_t b, uint32_t accumulate);
template <typename Element>
__device__ __forceinline__ void mma(float (&d)[16], uint64_t a, uint64_t b, uint32_t accumulate);
template <typename Element>
__device__ __forceinline__ void mma(float (&d)[32], uint64_t a, uint64_t b, uint32_t accumulate);

// clang-format off
#define TPO_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TPO_D16(i) TPO_D4(i), TPO_D4(i + 4), TPO_D4(i + 8), TPO_D4(i + 12)

#define TPO_MMA_NARROW(Element, type, cols, registers, names, a_name, b_name, p_name, ...) \
  template <> \
  __device__ __forceinline__ void mma<Element>(float (&d)[registers], uint64_t a, uint64_t b, uint32_t accumulate) { \
    asm volatile( \
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " p_name ", 0;\n\t" \
        "wgmma.mma_async.sync.aligned.m64n" cols "k16.f32." type "." type " {" names "}, " \
        a_name ", " b_name ", p, 1, 1, 0, 0;\n\t}" \
        : __VA_ARGS__ \
        : "l"(a), "l"(b), "r"(accumulate) \
        : "memory"); \
  }

TPO_MMA_NARROW(Bf16, "bf16", "8", 4, "%0, %1, %2, %3", \
               "%4", "%5", "%6", TPO_D4(0))
TPO_MMA_NARROW(Fp16, "f16", "8", 4, "%0, %1, %2, %3", \
               "%4", "%5", "%6", TPO_D4(0))
TPO_MMA_NARROW(Bf16, "bf16", "16", 8, "%0, %1, %2, %3, %4, %5, %6, %7", \
               "%8", "%9", "%10", TPO_D4(0), TPO_D4(4))
TPO_MMA_NARROW(Fp16, "f16", "16", 8, "%0, %1, %2, %3, %4, %5, %6, %7", \
               "%8", "%9", "%10", TPO_D4(0), TPO_D4(4))
TPO_MMA_NARROW(Bf16, "bf16", "32", 16, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", \
               "%16", "%17", "%18", TPO_D16(0))
TPO_MMA_NARROW(Fp16, "f16", "32", 16, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", \
               "%16", "%17", "%18", TPO_D16(0))
TPO_MMA_NARROW(Bf16, "bf16", "64", 32, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31", \
               "%32", "%33", "%34", TPO_D16(0), TPO_D16(16))
TPO_MMA_NARROW(Fp16, "f16", "64", 32, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31", \
               "%32", "%33", "%34", TPO_D16(0), TPO_D16(16))
// clang-format on

#undef TPO_MMA_NARROW
#undef TPO_D16
#undef TPO_D4

}  // namespace tpo
