// Signals between ranks: loads and stores whose names say order and scope, waits that end, failures that are told.
//
// A slot is a 64-bit word in symmetric memory, epoch << 16 | call hash; it only grows. As in lang/signal.py.
// The ordered form has the short name; what is relaxed says so, and its caller says why nothing else need be seen.
#pragma once

#include <cstdint>

#include "api.h"

namespace tpo {

enum Status {
  kOk = 0,
  kTimeout = TPO_FAILURE_TIMEOUT,
  kMismatch = TPO_FAILURE_MISMATCH,
  kAborted = TPO_FAILURE_ABORTED
};

// Raise a slot, release, system scope: whoever acquires it sees all that this thread has stored or seen.
__device__ __forceinline__ void notify(int64_t* slot, int64_t word) {
  asm volatile("st.release.sys.global.b64 [%0], %1;" ::"l"(slot), "l"(word) : "memory");
}

// Acquire, system scope: what the rank that raised the slot to this word had stored or seen before is seen after this.
__device__ __forceinline__ int64_t peek(const int64_t* slot) {
  int64_t word;
  asm volatile("ld.acquire.sys.global.b64 %0, [%1];" : "=l"(word) : "l"(slot) : "memory");
  return word;
}

__device__ __forceinline__ void notify_relaxed(int64_t* slot, int64_t word) {
  asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(slot), "l"(word) : "memory");
}

__device__ __forceinline__ int64_t peek_relaxed(const int64_t* slot) {
  int64_t word;
  asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(word) : "l"(slot) : "memory");
  return word;
}

// Words that only this device writes.
__device__ __forceinline__ int64_t local_peek_relaxed(const int64_t* word) {
  int64_t value;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ void local_poke_relaxed(int64_t* word, int64_t value) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

// Returns the count before this arrival. Orders nothing else.
__device__ __forceinline__ int64_t count_arrival_relaxed(int64_t* counter) {
  int64_t before;
  asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(counter) : "memory");
  return before;
}

// The same, and whoever is the last to arrive has seen what the others had stored or seen.
__device__ __forceinline__ int64_t count_arrival(int64_t* counter) {
  int64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(counter) : "memory");
  return before;
}

__device__ __forceinline__ int64_t call_word(int64_t epoch, int64_t call_hash) { return epoch << 16 | call_hash; }

// How long a thread goes on polling. It looks at the clock and at the device's word that ends a wait after 512 polls and
// then every 1024: a wait of the usual length pays for neither. From 8192 polls on, which is after milliseconds, it looks
// at the host's word, too: when all blocks ask for that in the middle of a call, their loads of products wait for it.
// All of it is inlined: a call would move the counter from a register to the stack.
class Patience {
 public:
  __device__ Patience(const int64_t* control, const int64_t* record, int64_t timeout_ns)
      : control_(control), record_(record), timeout_ns_(timeout_ns) {}

  // To be asked after each poll that found nothing of `peer`: kOk means poll again. Anything else is about the time
  // before now: what a peer sent before it closed may have come, so poll once more before giving up.
  __device__ __forceinline__ Status spent(int peer) { return (++polls_ & 1023) == 512 ? look(peer) : kOk; }
  __device__ __forceinline__ bool has_looked() const { return (polls_ & 1023) == 512; }

 private:
  __device__ __forceinline__ Status look(int peer) {
    const int64_t ended = 1 | int64_t{1} << (TPO_RECORD_ABORT_PEER + peer);
    if (local_peek_relaxed(control_ + TPO_CONTROL_FAILED)) return kAborted;
    if (polls_ >= kPollsBeforeHost && peek_relaxed(record_ + TPO_RECORD_ABORT) & ended) return kAborted;
    int64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));  // nanoseconds; clock64 would follow the SM clock
    if (started_ == 0) started_ = now;
    return timeout_ns_ != 0 && now - started_ > timeout_ns_ ? kTimeout : kOk;
  }

  static constexpr uint32_t kPollsBeforeHost = 8192;

  const int64_t* control_;
  const int64_t* record_;
  int64_t timeout_ns_;
  int64_t started_ = 0;
  uint32_t polls_ = 0;
};

// Who waited for whom, where, for what.
struct Waiter {
  int64_t op, rank, peer, tile, wanted, seen;
};

// Mark the group as failed; the first thread to come here also describes its wait in the record, for the host to read.
__device__ __forceinline__ void report_failure(int64_t* control, int64_t* record, Status status, Waiter who) {
  unsigned long long taken;
  asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], 0, 1;"
               : "=l"(taken)
               : "l"(control + TPO_CONTROL_REPORTER)
               : "memory");
  if (taken == 0) {
    notify_relaxed(record + TPO_RECORD_CODE, status);
    notify_relaxed(record + TPO_RECORD_OP, who.op);
    notify_relaxed(record + TPO_RECORD_RANK, who.rank);
    notify_relaxed(record + TPO_RECORD_PEER, who.peer);
    notify_relaxed(record + TPO_RECORD_TILE, who.tile);
    notify_relaxed(record + TPO_RECORD_WANTED, who.wanted);
    notify_relaxed(record + TPO_RECORD_SEEN, who.seen);
    notify(record + TPO_RECORD_STATE, 2);
  }
  local_poke_relaxed(control + TPO_CONTROL_FAILED, 1);
}

// Wait until the slot holds the epoch of who.wanted or a later one; acquire, system scope. A status other than kOk has
// been reported, and what the slot publishes must not be used. header: where the peer tells which call it is in, or null
// if who.wanted holds no hash; a peer that calls something else would never raise the slot.
__device__ __forceinline__ Status wait(const int64_t* slot, const int64_t* header, Waiter who, int64_t* control,
                                       int64_t* record, int64_t timeout_ns) {
  Patience patience(control, record, timeout_ns);
  const int64_t epoch = who.wanted >> 16;
  Status status = kOk;
  who.seen = peek(slot);
  while (who.seen >> 16 < epoch && (status = patience.spent(static_cast<int>(who.peer))) == kOk) {
    if (header != nullptr && patience.has_looked()) {
      const int64_t theirs = peek_relaxed(header);  // relaxed: it publishes no data
      if (theirs >> 16 == epoch && theirs != who.wanted) {
        who.seen = theirs;
        break;
      }
    }
    who.seen = peek(slot);
  }
  if (status != kOk && (who.seen = peek(slot)) >> 16 >= epoch) status = kOk;
  if (status == kOk && who.seen >> 16 == epoch && who.seen != who.wanted) status = kMismatch;
  if (status != kOk) report_failure(control, record, status, who);
  return status;
}

}  // namespace tpo
