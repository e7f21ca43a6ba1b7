// Barriers in shared memory that count arrivals and bytes, between the warps of a block or of a cluster of blocks.
//
// A barrier goes through phases 0, 1, 2, ...; a wait names the phase by its parity and returns once that phase is over.
// It must be the present phase or the one before: two phases ahead, the parity is that of one that is over already.
// Waiting for the parity of the phase before the first one returns at once: a ring starts with all of its slots free.
// Addresses are 32 bits in the shared window; the same address names the same thing in every block of a cluster.
#pragma once

#include <cstdint>

namespace tpo {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the inits, before the cluster meets: peers and the copy engine may then use the barriers.
__device__ __forceinline__ void publish_barrier_inits() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrive, and let the phase wait for that many bytes from the copy engine too. They may come before this call: what
// holds the phase open until then is the arrival.
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Whoever waits for the phase sees what this thread has stored or seen.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Relaxed: publishes nothing.
__device__ __forceinline__ void barrier_arrive_relaxed(uint32_t barrier) {
  asm volatile("mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive at the barrier of the same address in block `rank` of the cluster, the own block included. Relaxed: it says that
// something has been read, and publishes no store; a release to the cluster would fence all of memory at each stage.
__device__ __forceinline__ void barrier_arrive_in_cluster_relaxed(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n\t"
      ".reg .b32 there;\n\t"
      "mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there];\n\t"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ bool barrier_is_over(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  asm volatile(
      "{\n\t"
      ".reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t"
      "}"
      : "=r"(over)
      : "r"(barrier), "r"(parity)
      : "memory");
  return over;
}

// The hardware suspends the thread for some microseconds at a time. Nothing outside the cluster is waited for, so only
// a mistake in the kernel could make a wait last; a build with TPO_BOUNDED_BARRIERS traps after ten seconds, for debuggers to
// show where. It prints nothing: a call in the loop would make the compiler serialise the products.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef TPO_BOUNDED_BARRIERS
  const long long started = clock64();
  while (!barrier_is_over(barrier, parity)) {
    if (clock64() - started > 16000000000ll) __trap();
  }
#else
  while (!barrier_is_over(barrier, parity)) {
  }
#endif
}

// The place of a role in a ring of kSlots: which slot comes next, and the parity of the phase that its use ends.
template <int kSlots>
struct RingPosition {
  uint32_t slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void skip(uint32_t uses) {
    const uint32_t sum = slot + uses;
    parity ^= (sum / kSlots) & 1;
    slot = sum % kSlots;
  }
};

// ---- words that barriers publish ----------------------------------------------------------------------------------

__device__ __forceinline__ void put_shared(uint32_t to, int64_t word) {
  asm volatile("st.shared::cta.b64 [%0], %1;" ::"r"(to), "l"(word) : "memory");
}

__device__ __forceinline__ int64_t get_shared(uint32_t from) {
  int64_t word;
  asm volatile("ld.shared::cta.b64 %0, [%1];" : "=l"(word) : "r"(from) : "memory");
  return word;
}

// Release and acquire, within the block.
__device__ __forceinline__ void publish_shared(uint32_t to, int64_t word) {
  asm volatile("st.release.cta.shared::cta.b64 [%0], %1;" ::"r"(to), "l"(word) : "memory");
}

__device__ __forceinline__ int64_t peek_shared(uint32_t from) {
  int64_t word;
  asm volatile("ld.acquire.cta.shared::cta.b64 %0, [%1];" : "=l"(word) : "r"(from) : "memory");
  return word;
}

// ---- other ways to meet -------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster. Relaxed: of what was stored before, only what a fence has published is seen.
__device__ __forceinline__ void cluster_barrier_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// The 128 threads of one warpgroup. Barrier 0 is __syncthreads.
__device__ __forceinline__ void warpgroup_barrier(uint32_t id) {
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

}  // namespace tpo
