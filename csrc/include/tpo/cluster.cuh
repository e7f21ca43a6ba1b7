// What the blocks of a cluster share: f32 in each other's shared memory, and barriers that publish them.
//
// Addresses are 32 bits in the shared window; the same address names the same thing in every block of a cluster.
#pragma once

#include <cstdint>

namespace tpo {

// ---- in the own block -----------------------------------------------------------------------------------------------

__device__ __forceinline__ void put_float(uint32_t to, float value) {
  asm volatile("st.shared::cta.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

__device__ __forceinline__ float4 get_floats(uint32_t from) {
  float4 v;
  asm volatile("ld.shared::cta.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

// kThreads threads of the block, whole warps, that name the same barrier: 1..15; barrier 0 is __syncthreads.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void barrier_of_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// ---- in the cluster -------------------------------------------------------------------------------------------------

__device__ __forceinline__ float4 get_floats_of_block(uint32_t from, uint32_t block) {
  float4 v;
  asm volatile(
      "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %4, %5;\n\t"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n\t}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(from), "r"(block)
      : "memory");
  return v;
}

// Arrive at the barrier of the same address in `block` of the cluster: whoever waits for it there sees what this thread has
// stored or seen.
__device__ __forceinline__ void barrier_arrive_in_cluster(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n\t}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

// As barrier_wait, for what other blocks of the cluster have stored.
__device__ __forceinline__ void barrier_wait_in_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t over = 0;
  while (!over) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

}  // namespace tpo
