// What the threads of a block did when, for a picture of a call: intervals in memory, written by kernels built to do so.
//
// A thread of each role tells the end of each step; a step begins where the one before has ended. Without kOn nothing is
// left of it: the kernels that serve are not the ones that are looked at, but compiled from the same lines.
#pragma once

#include "api.h"

namespace tpo {

__device__ __forceinline__ int64_t now_ns() {
  int64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

template <bool kOn>
struct Trace {
  __device__ Trace(const TpoGemmCollectiveArgs&, TpoTraceRole, bool) {}
  __device__ __forceinline__ void of(int, int) {}
  __device__ __forceinline__ void end(TpoTraceStep) {}
};

template <>
struct Trace<true> {
  TpoTraceInterval *next, *last;
  int64_t begun;
  int owner = 0, tile = 0;

  // writes: false in all threads of the role but one.
  __device__ Trace(const TpoGemmCollectiveArgs& args, TpoTraceRole role, bool writes)
      : next(args.trace + (int64_t{blockIdx.x} * TPO_TRACE_ROLES + role) * args.trace_intervals),
        last(writes ? next + args.trace_intervals : next),
        begun(now_ns()) {}

  // The tile that the next steps are about.
  __device__ __forceinline__ void of(int owner_, int tile_) {
    owner = owner_;
    tile = tile_;
  }

  __device__ __forceinline__ void end(TpoTraceStep step) {
    const int64_t now = now_ns();
    if (next != last) *next++ = TpoTraceInterval{begun, now, step, owner, tile, 0};
    begun = now;
  }
};

}  // namespace tpo
