// The words of the protocol in which data itself says that it came: slots, headers, clearing, failing.
//
// Three buffers of world_size slots lie in each arena; a slot is full of sentinels before data comes. How calls take turns
// with them, and why nobody reads or overwrites too early: kernels/all_reduce_one_shot_sentinel.cu. All kernels that use
// these slots share buffers, epochs and headers, and may alternate call by call.
#pragma once

#include <cstdint>

#include "api.h"
#include "tpo/signal.cuh"
#include "tpo/vec.cuh"

namespace tpo {

constexpr int kMaxWorld = 8;
constexpr int kBuffers = 3;

// What each call reads from device memory.
struct Call {
  int64_t base[kMaxWorld];  // arena of each rank
  int64_t epoch;            // of this call
  int32_t stale_vecs;       // vectors that peers wrote to each slot of buffer (i - 1) % 3 in the previous call
  int32_t buffer;           // that peers write in this call: i % 3
  int32_t failed;           // not 0: the group has failed before; touch no peer
};

__host__ __device__ __forceinline__ int vecs_of(int64_t n_elems) {
  return static_cast<int>((n_elems + kVecElems - 1) / kVecElems);  // a slot is far smaller than 32 GiB
}

__device__ __forceinline__ char* slot(const TpoAllReduceArgs& args, int64_t base, int buffer, int source) {
  return reinterpret_cast<char*>(base) + args.sentinel_offset +
         static_cast<int64_t>(buffer * args.world_size + source) * args.sentinel_bytes;
}

__device__ __forceinline__ int64_t* header(const TpoAllReduceArgs& args, int64_t base, int64_t epoch, int source) {
  return reinterpret_cast<int64_t*>(base + args.header_offset) + (epoch & 1) * args.world_size + source;
}

// ---- what the watching warp does ----------------------------------------------------------------------------------

// Lane r fetches what concerns rank r, lane 0 the rest; all loads are in flight together.
__device__ __forceinline__ void read_call(const TpoAllReduceArgs& args, Call* call) {
  const int lane = threadIdx.x % 32;
  const int64_t base = lane < args.world_size ? local_peek_relaxed(args.base_table + lane) : 0;
  if (lane == 0) {
    const int64_t epoch = local_peek_relaxed(args.control + TPO_CONTROL_EPOCH);
    const int64_t buffer = local_peek_relaxed(args.control + TPO_CONTROL_SENTINEL_BUFFER);
    const int64_t stale_bytes = local_peek_relaxed(args.control + TPO_CONTROL_SENTINEL_BYTES);
    const int64_t failed = local_peek_relaxed(args.control + TPO_CONTROL_FAILED);
    call->epoch = epoch + 1;
    call->stale_vecs = static_cast<int32_t>(stale_bytes / kVecBytes);
    call->buffer = static_cast<int32_t>(buffer);
    call->failed = failed != 0;
  }
  if (lane < args.world_size) call->base[lane] = base;
}

// Tell `peer` which call this is, and that whatever we read in earlier calls may be overwritten.
__device__ __forceinline__ void announce(const TpoAllReduceArgs& args, const Call& call, int peer) {
  const int64_t base = call.base[peer];
  // relaxed: the header is about the call and publishes no data
  notify_relaxed(header(args, base, call.epoch, args.rank), call_word(call.epoch, args.call_hash));
  // relaxed: the kernels before this one have ended, so their loads have returned, and there is nothing left to order
  notify_relaxed(reinterpret_cast<int64_t*>(base + args.done_offset) + args.rank, call_word(call.epoch, 0));
}

// Wait for the header of `peer`, and see whether it calls what we call.
__device__ __forceinline__ Status await_header(const TpoAllReduceArgs& args, const Call& call, int64_t op, int peer) {
  const int64_t* own = header(args, call.base[args.rank], call.epoch, peer);
  const int64_t wanted = call_word(call.epoch, args.call_hash);
  Patience patience(args.control, args.record, args.timeout_ns);
  Status status = kOk;
  int64_t seen = peek_relaxed(own);
  while (seen >> 16 < call.epoch && (status = patience.spent(peer)) == kOk) seen = peek_relaxed(own);
  if (status != kOk && (seen = peek_relaxed(own)) >> 16 >= call.epoch) status = kOk;
  if (status == kOk && seen >> 16 == call.epoch && seen != wanted) status = kMismatch;
  if (status != kOk) {
    report_failure(args.control, args.record, status, Waiter{op, args.rank, peer, blockIdx.x, wanted, seen});
  }
  return status;
}

// Leave the words as the next call on this rank wants them; it cannot start before we end.
__device__ __forceinline__ void advance(const TpoAllReduceArgs& args, const Call& call, int n_vecs) {
  local_poke_relaxed(args.control + TPO_CONTROL_ARRIVED, 0);
  local_poke_relaxed(args.control + TPO_CONTROL_SENTINEL_BUFFER, (call.buffer + 1) % kBuffers);
  local_poke_relaxed(args.control + TPO_CONTROL_SENTINEL_BYTES, int64_t{kVecBytes} * n_vecs);
  local_poke_relaxed(args.control + TPO_CONTROL_EPOCH, call.epoch);
}

// Lane r of the warp speaks with rank r. Every block hears the peers' headers, block 0 alone sends ours.
// op: its number in the record. n_vecs: how many vectors this call writes to each slot.
__device__ __forceinline__ Status watch(const TpoAllReduceArgs& args, const Call& call, int64_t op, int n_vecs) {
  const int peer = threadIdx.x % 32;
  const bool is_peer = peer < args.world_size && peer != args.rank && !call.failed;
  if (is_peer && blockIdx.x == 0) announce(args, call, peer);
  // Blocks are counted once they have read the call: the last one may advance it. Relaxed, because the words have left
  // memory here. Asked for before the wait and looked at after it, so that the two latencies lie beside each other.
  int64_t arrived_before = 0;
  if (peer == args.rank) arrived_before = count_arrival_relaxed(args.control + TPO_CONTROL_ARRIVED);
  const Status status = is_peer ? await_header(args, call, op, peer) : kOk;
  if (peer == args.rank && arrived_before == gridDim.x - 1) advance(args, call, n_vecs);
  return call.failed ? kAborted : status;
}

// ---- what data threads do -------------------------------------------------------------------------------------------

// Fill what peers wrote in the previous call with sentinels again. Our own slot is never written.
// first, stride: of this thread among those of the grid that do it. world_size: a constant where the caller knows it.
__device__ __forceinline__ void clear_stale(const TpoAllReduceArgs& args, const Call& call, int world_size, int first,
                                            int stride) {
  const int stale_buffer = (call.buffer + kBuffers - 1) % kBuffers;
  for (int index = first; index < call.stale_vecs; index += stride) {
#pragma unroll
    for (int turn = 1; turn < world_size; ++turn) {
      const int source = (args.rank + turn) % world_size;
      put(slot(args, call.base[args.rank], stale_buffer, source) + int64_t{kVecBytes} * index, splat(kSentinel));
    }
  }
}

// Wait until a vector has come from every peer, and add `own`: *total is right if the status is kOk.
template <typename Element, int kWorld>
__device__ __forceinline__ Status receive_and_add(const TpoAllReduceArgs& args, const Call& call, int64_t op, int index,
                                                  Vec own, Vec* total) {
  const char* slots = slot(args, call.base[args.rank], call.buffer, 0) + int64_t{kVecBytes} * index;
  Patience patience(args.control, args.record, args.timeout_ns);
  Vec from[kWorld];
  Status status = kOk;
  for (int asked = -1;;) {
    int missing = -1;
#pragma unroll
    for (int r = 0; r < kWorld; ++r) from[r] = r == args.rank ? own : poll_relaxed(slots + r * args.sentinel_bytes);
#pragma unroll
    for (int r = 0; r < kWorld; ++r) missing = holds_sentinel(from[r]) ? r : missing;
    if (missing < 0) break;
    if (status == kOk || missing != asked) {
      asked = missing;
      status = patience.spent(missing);
    } else {
      const int64_t seen = peek_relaxed(header(args, call.base[args.rank], call.epoch, missing));
      report_failure(args.control, args.record, status,
                     Waiter{op, args.rank, missing, blockIdx.x, call_word(call.epoch, args.call_hash), seen});
      return status;
    }
  }
  *total = sum_vecs<Element, kWorld>(from);
  return kOk;
}

// The blocks that have not failed may have stored their sums, or be about to, of what came in time: let them end.
__device__ __forceinline__ void spoil(void* out, int64_t n_elems) {
  for (int i = 0; i < 2000; ++i) __nanosleep(1000);
  for (int index = threadIdx.x; index < vecs_of(n_elems); index += blockDim.x) {
    store_vec(out, index, n_elems, splat(kNan));
  }
}

}  // namespace tpo
