// What kernels that sum products over ranks add to gemm_block.cuh: tiles have owners, and a courier carries them.
//
//     consumers   products 0 | round to staging | products 1 | ...        | products i | add partials, round to staging
//     courier                                   carry 0 to its owner, flag | fetch partials of i                  store i
//                 ---- tiles that peers own, the next rank's first ----     ---- own tiles ----
//
// Own tiles come last, or, where the link is the slower part, among the others and so many tiles behind them
// (gemm_owners.cuh).
// Staging is one buffer or two, of a tile each: tile t of a block lies in buffer t % kStagings, which is passed to and fro.
// The courier is one thread of the producer warpgroup: the copy engine tells its stores' end only to the thread that gave
// them. Consumers never wait for the link, unless it is slower than the products of kStagings whole tiles, nor for a flag,
// unless it is late by as much.
// With two buffers another thread, the fetcher, fetches the partials. Else they would come after the push of the tile before,
// for which the courier waits, and consumers, who then wait for a partial, would gain nothing by the second buffer.
// The copy engine takes a block's loads and stores one after the other, and stores to a peer as fast as the link takes them:
// behind a whole tile the loads of the next products would wait for the link. So a tile goes in pieces, two on their way at
// a time, and the next when the first of them has been written; but a block's last tile, behind which nothing waits, whole.
// Where all blocks send at once, all tiles are there when the last one is, and then nothing is on the link until the next
// ones are computed. So blocks take turns, in the order in which they have a tile, some at a time: as many as fill the link.
// A tile travels, and lies in the arena, as it lies in staging: boxes of 64 rows and 64 columns, swizzled, each row of
// boxes from left to right. Fragments read back from it are those that were written.
//
// Staging, barrier by barrier, each buffer with its own but for `taken`, since partials are fetched one after the other
// (each wait is for the present phase or the one before, as parities need):
//   free     courier -> consumers, fetcher: the tile has been read from the buffer, the next may be written. One phase a tile.
//   partial  courier or fetcher, and copy engine -> consumers: one partial lies in the buffer. It is fetched after the tile
//            before has been read from there: the courier has itself seen that, the fetcher waits for `free`.
//   taken    consumers -> courier or fetcher: that partial has been added, and another follows.
//   staged   consumers -> courier: the tile, or the sum, lies in the buffer. The fetcher arrives, too, for every tile, once
//            it has seen the buffer free: no phase of `free` can then pass it by.
// Launched ahead (TpoStart), blocks come where those of the kernel before have ended, while others of it still wait for the
// link; they prepare their barriers and wait for its end.
// A wait that fails raises `failed` for the consumers, whose sums are then NaN; from then on the block sends nothing, so that
// peers fail, too, and at its end it fills all of out with NaN.
#pragma once

#include "api.h"
#include "tpo/dependent_launch.cuh"
#include "tpo/gemm_owners.cuh"
#include "tpo/gemm_tile.cuh"
#include "tpo/signal.cuh"
#include "tpo/trace.cuh"

namespace tpo {

// Threads of the producer warpgroup; thread 0 loads what is multiplied.
constexpr int kCourierWarp = 1;
constexpr int kTransitWarp = 2;
constexpr int kFetcherWarp = 3;  // or the keeper

// 128 * 56 + 256 * 224 of 63 Ki: the waits for peers take more than loads do.
constexpr int kCollectiveProducerRegisters = 56;
constexpr int kCollectiveConsumerRegisters = 224;

// kTmaAdds: see gemm_collector.cuh.
template <int kTileN_, int kClusterRows_, int kClusterCols_, int kStages_, int kStagings_, int kTransitBoxes_,
          bool kTmaAdds_ = false, bool kTraced_ = false>
struct CollectiveShape : GemmShape<kTileN_, 1, kClusterRows_, kClusterCols_, kStages_, kTileN_ / kBoxCols> {
  using Gemm = GemmShape<kTileN_, 1, kClusterRows_, kClusterCols_, kStages_, kTileN_ / kBoxCols>;
  static constexpr int kStagings = kStagings_;  // buffers of one tile each
  static constexpr uint32_t kTileBytes = Gemm::kStagingBytes;
  static constexpr uint32_t kStagingBytes = kStagings * kTileBytes;
  static constexpr int kTileBoxes = kTileBytes / kChunkBytes;
  static constexpr int kTransitBoxes = kTransitBoxes_;  // for what passes through beside the tiles
  static constexpr bool kTmaAdds = kTmaAdds_;
  static constexpr bool kFetches = kStagings == 2 && !kTmaAdds;
  static constexpr bool kTraced = kTraced_;
  using Traced =
      CollectiveShape<kTileN_, kClusterRows_, kClusterCols_, kStages_, kStagings_, kTransitBoxes_, kTmaAdds_, true>;
  static constexpr uint32_t kTransitOffset =
      (Gemm::kSharedBytes - kTileBytes + kStagingBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  static constexpr uint32_t kWordsOffset = kTransitOffset + kTransitBoxes * kChunkBytes;
  static constexpr uint32_t kSharedBytes = kSwizzleBytes + kWordsOffset + (5 + 4 * kStagings + kTransitBoxes) * 8;
  static_assert(kSharedBytes <= 227 * 1024);
  static_assert(kStagings == 1 || kStagings == 2);
};

template <typename Shape>
struct CollectiveMemory : BlockMemory<Shape> {
  using BlockMemory<Shape>::BlockMemory;

  __device__ uint32_t transit(uint32_t box) const { return this->base + Shape::kTransitOffset + box * kChunkBytes; }
  __device__ uint32_t tile(uint32_t buffer) const { return this->staging(buffer * kConsumers); }
  __device__ uint32_t staged(uint32_t buffer) const { return word(buffer); }
  __device__ uint32_t free(uint32_t buffer) const { return word(Shape::kStagings + buffer); }
  __device__ uint32_t partial(uint32_t buffer) const { return word(2 * Shape::kStagings + buffer); }
  __device__ uint32_t taken() const { return word(kOthers); }
  __device__ uint32_t begun() const { return word(kOthers + 1); }  // its only phase ends when the next two are right
  __device__ uint32_t epoch() const { return word(kOthers + 2); }
  __device__ uint32_t failed() const { return word(kOthers + 3); }
  __device__ uint32_t kept() const { return word(kOthers + 4); }  // tiles that have been brought to out
  __device__ uint32_t carried(uint32_t buffer) const {
    return word(kOthers + 5 + buffer);
  }  // tiles, out of this buffer
  __device__ uint32_t landed(uint32_t box) const { return word(kOthers + 5 + Shape::kStagings + box); }

 private:
  static constexpr uint32_t kOthers = 3 * Shape::kStagings;

  __device__ uint32_t word(uint32_t index) const { return this->base + Shape::kWordsOffset + index * 8; }
};

// By one thread, with init_barriers.
template <typename Shape>
__device__ __forceinline__ void init_collective_barriers(const CollectiveMemory<Shape>& memory) {
  constexpr int kConsumerWarps = kConsumers * (kWarpgroupThreads / 32);
  for (int buffer = 0; buffer < Shape::kStagings; ++buffer) {
    barrier_init(memory.staged(buffer), kConsumerWarps + Shape::kFetches);
    barrier_init(memory.free(buffer), 1);
    barrier_init(memory.partial(buffer), 1);
    put_shared(memory.carried(buffer), 0);
  }
  barrier_init(memory.taken(), kConsumerWarps);
  barrier_init(memory.begun(), 1);
  for (int box = 0; box < Shape::kTransitBoxes; ++box) barrier_init(memory.landed(box), 1);
  put_shared(memory.failed(), 0);
  put_shared(memory.kept(), 0);
  publish_barrier_inits();
}

// ---- addresses in the arena -----------------------------------------------------------------------------------------

__device__ __forceinline__ char* arena_of(const TpoGemmCollectiveArgs& args, int rank) {
  return reinterpret_cast<char*>(__ldg(args.base_table + rank));
}

__device__ __forceinline__ int64_t* word_at(const TpoGemmCollectiveArgs& args, int rank, int64_t offset,
                                            int64_t index) {
  return reinterpret_cast<int64_t*>(arena_of(args, rank) + offset) + index;
}

// Among the world_size - 1 places that `at` keeps for its peers, in rank order: that of `rank`.
__device__ __forceinline__ int place_at(int at, int rank) { return rank - (rank > at); }

template <typename Shape>
__device__ __forceinline__ char* staged_partial(const TpoGemmCollectiveArgs& args, int source, int owner, int tile) {
  return arena_of(args, owner) + args.staging_offset + place_at(owner, source) * args.staging_slot_bytes +
         int64_t{Shape::kTileBytes} * tile;
}

__device__ __forceinline__ int64_t* partial_flag(const TpoGemmCollectiveArgs& args, int source, int owner, int tile) {
  return word_at(args, owner, args.partial_flags_offset, int64_t{tile} * args.world_size + source);
}

__device__ __forceinline__ int64_t* header_of(const TpoGemmCollectiveArgs& args, int at, int source, int64_t epoch) {
  return word_at(args, at, args.header_offset, (epoch & 1) * args.world_size + source);
}

// ---- phases of the courier and the fetcher ----------------------------------------------------------------------------

template <typename Shape>
struct Courier {
  const TpoGemmCollectiveArgs& args;
  const CollectiveMemory<Shape>& memory;
  int op;  // in the record
  int64_t word;
  bool failed;
  bool failed_before;                     // the group had: every block knows that by itself
  RingPosition<Shape::kStagings> buffer;  // of the present tile
  uint32_t taken_parity = 0;
  Trace<Shape::kTraced> trace;

  // The fetcher, in a call that the courier has begun.
  __device__ Courier(const TpoGemmCollectiveArgs& args, const CollectiveMemory<Shape>& memory, int op, int64_t word,
                     bool failed)
      : args(args),
        memory(memory),
        op(op),
        word(word),
        failed(failed),
        failed_before(failed),
        trace(args, TPO_TRACE_FETCHER, true) {}

  // Begin the call: the epoch, the same in every block. The last block to read it advances it for the next call; the
  // count orders each read before that. Block 0 tells every peer which call this is.
  __device__ Courier(const TpoGemmCollectiveArgs& args, const CollectiveMemory<Shape>& memory, int op)
      : args(args), memory(memory), op(op), trace(args, TPO_TRACE_COURIER, true) {
    const int64_t epoch = local_peek_relaxed(args.control + TPO_CONTROL_EPOCH) + 1;
    failed = failed_before = local_peek_relaxed(args.control + TPO_CONTROL_FAILED) != 0;
    word = call_word(epoch, args.call_hash);
    if (count_arrival(args.control + TPO_CONTROL_ARRIVED) == gridDim.x - 1) {
      local_poke_relaxed(args.control + TPO_CONTROL_ARRIVED, 0);
      local_poke_relaxed(args.control + TPO_CONTROL_EPOCH, epoch);
    }
    if (blockIdx.x == 0 && !failed) {
      for (int turn = 1; turn < args.world_size; ++turn) {
        const int peer = (args.rank + turn) % args.world_size;
        notify(header_of(args, peer, args.rank, epoch), word);  // what we have read in calls before may be written
      }
    }
  }

  // Each peer has left the last call that ended with `leave`: before anything is pushed.
  __device__ __forceinline__ void await_done() {
    const int64_t staged = local_peek_relaxed(args.control + TPO_CONTROL_STAGED);
    for (int turn = 1; turn < args.world_size && !failed; ++turn) {
      const int peer = (args.rank + turn) % args.world_size;
      const Waiter who{op, args.rank, peer, 0, call_word(staged, 0), 0};
      const int64_t* slot = word_at(args, args.rank, args.done_offset, peer);
      failed = wait(slot, nullptr, who, args.control, args.record, args.timeout_ns) != kOk;
    }
  }

  // Each peer has begun this call, and so has left all before it: before anything is pushed to where those were read.
  __device__ __forceinline__ void await_begun() {
    for (int turn = 1; turn < args.world_size && !failed; ++turn) {
      const int peer = (args.rank + turn) % args.world_size;
      const Waiter who{op, args.rank, peer, 0, word, 0};
      const int64_t* header = header_of(args, args.rank, peer, word >> 16);
      failed = wait(header, nullptr, who, args.control, args.record, args.timeout_ns) != kOk;
    }
  }

  // The block's other threads may go on, since this one has waited for what peers were to leave. Not before: the collector
  // may end the call with `leave`, and what that advances is what await_done reads.
  __device__ __forceinline__ void let_others_begin() {
    put_shared(memory.epoch(), word >> 16);
    put_shared(memory.failed(), failed);
    barrier_arrive(memory.begun());
  }

  // To the buffer, which is free: the partial of an own tile that has this place in rank order.
  __device__ __forceinline__ void fetch_partial(int tile, int place) {
    const int peer = place + (place >= args.rank);
    if (!failed) {
      const Waiter who{op, args.rank, peer, tile, word, 0};
      const int64_t* header = header_of(args, args.rank, peer, word >> 16);
      const int64_t* flag = partial_flag(args, peer, args.rank, tile);
      failed = wait(flag, header, who, args.control, args.record, args.timeout_ns) != kOk;
      trace.of(args.rank, tile);
      trace.end(TPO_TRACE_AWAIT_FLAG);
    }
    if (failed) {
      put_shared(memory.failed(), 1);
      barrier_arrive(memory.partial(buffer.slot));
    } else {
      order_with_tma();
      barrier_arrive_expecting(memory.partial(buffer.slot), Shape::kTileBytes);
      load_bytes(memory.tile(buffer.slot), staged_partial<Shape>(args, peer, args.rank, tile), Shape::kTileBytes,
                 memory.partial(buffer.slot));
    }
  }

  // With one buffer, which is free: the first partial of the next tile, if that is an own one and if it has come. Done before
  // the flags of what was sent are raised, for which a busy link lets us wait. Nothing may be waited for here: a peer may
  // wait for one of those flags. Returns whether it is on its way.
  __device__ __forceinline__ bool fetch_early(bool found, const Work& next) {
    if (Shape::kFetches || !found || next.owner != args.rank || failed) return false;
    const int peer = args.rank == 0 ? 1 : 0;  // at the first place in rank order
    // relaxed: fetch_partial acquires
    if (peek_relaxed(partial_flag(args, peer, args.rank, next.tile)) >> 16 < word >> 16) return false;
    fetch_partial(next.tile, 0);
    return true;
  }

  // All partials but the first, each when the one before has been added.
  __device__ __forceinline__ void fetch_other_partials(int tile) {
    for (int place = 1; place < args.world_size - 1; ++place) {
      barrier_wait(memory.taken(), taken_parity);
      taken_parity ^= 1;
      fetch_partial(tile, place);
    }
  }

  __device__ __forceinline__ void await_staged(const Work& work) {
    barrier_wait(memory.staged(buffer.slot), buffer.parity);
    // in a wait of the fetcher or the collector
    if (Shape::kFetches || Shape::kTmaAdds) failed = failed || get_shared(memory.failed()) != 0;
    trace.of(work.owner, work.tile);
    trace.end(TPO_TRACE_AWAIT_TILE);
  }

  // The stores so far are a group; when they have been read, the buffer may be written again. To the next tile.
  __device__ __forceinline__ void free_staging() {
    end_store_group();
    wait_stores_read<0>();
    barrier_arrive(memory.free(buffer.slot));
    buffer.advance();
    trace.end(TPO_TRACE_SEND);
  }

  // Until it is this block's turn to send. Only those are waited for that are sending, and they wait for the link alone.
  __device__ __forceinline__ void begin_turn() {
    if (args.senders == 0) return;
    const int64_t turn =
        count_arrival_relaxed(args.control + TPO_CONTROL_TURNS_BEGUN);  // relaxed: about the link, not data
    while (local_peek_relaxed(args.control + TPO_CONTROL_TURNS_ENDED) + args.senders <= turn) {
    }
    trace.end(TPO_TRACE_AWAIT_TURN);
  }

  __device__ __forceinline__ void end_turn() {
    if (args.senders != 0) count_arrival_relaxed(args.control + TPO_CONTROL_TURNS_ENDED);
  }

  // The tile in the buffer to a peer's memory. last: the block computes no other.
  __device__ __forceinline__ void send_tile(char* to, bool last) {
    const uint32_t piece = last ? Shape::kTileBytes : args.piece_bytes;
    for (uint32_t sent = 0; sent < Shape::kTileBytes; sent += piece) {
      store_bytes(to + sent, memory.tile(buffer.slot) + sent, min(piece, Shape::kTileBytes - sent));
      end_store_group();
      wait_stores_written<1>();
    }
  }

  // A peer's tile to its owner. Its buffer is free as soon as it has been read; the flag waits until it has been written:
  // publish_partial.
  __device__ __forceinline__ void push_partial(const Work& work, bool last) {
    if (!failed) {
      begin_turn();
      send_tile(staged_partial<Shape>(args, args.rank, work.owner, work.tile), last);
    }
    free_staging();
    if (!failed) end_turn();
  }

  __device__ __forceinline__ void publish_partial(int owner, int tile) {
    if (!failed) {
      wait_stores_written<0>();
      order_with_tma();
      notify(partial_flag(args, args.rank, owner, tile), word);
    }
    trace.of(owner, tile);
    trace.end(TPO_TRACE_PUBLISH);
  }

  // The sum of an own tile to out.
  __device__ __forceinline__ void store_sum(const CUtensorMap* out, const Work& work) {
#pragma unroll
    for (int box = 0; box < Shape::kTileBoxes; ++box) {
      store_box(out, work.in_sum.row + box / Shape::kTileChunks * kRowsOfWarpgroup,
                work.in_sum.col + box % Shape::kTileChunks * kBoxCols, memory.tile(buffer.slot) + box * kChunkBytes);
    }
  }

  // The tile that was last stored to out lies there: the collector may add to it.
  __device__ __forceinline__ void keep(int64_t tiles) {
    wait_stores_written<0>();
    order_with_tma();
    publish_shared(memory.kept(), tiles);
  }
};

// End a call that gives peers no other sign that its loads of staging are over, by a thread of each block: the last one
// raises `done`. From a failed wait on nothing is written into a peer's memory, this word neither.
__device__ __forceinline__ void leave(const TpoGemmCollectiveArgs& args, int64_t word, bool failed) {
  if (count_arrival(args.control + TPO_CONTROL_LEFT) != gridDim.x - 1) return;
  local_poke_relaxed(args.control + TPO_CONTROL_LEFT, 0);
  local_poke_relaxed(args.control + TPO_CONTROL_STAGED, word >> 16);
  for (int turn = 1; turn < args.world_size && !failed; ++turn) {
    const int peer = (args.rank + turn) % args.world_size;
    notify(word_at(args, peer, args.done_offset, args.rank), call_word(word >> 16, 0));
  }
}

// By a warp of which a wait has failed in this call: all of out is NaN. Other blocks may have stored sums, or be about to,
// of what came in time: hence the delay.
__device__ __forceinline__ void spoil(const TpoGemmArgs& gemm, int rows) {
  for (int i = 0; i < 2000; ++i) __nanosleep(1000);
  auto* row = static_cast<uint16_t*>(gemm.out);
  for (int i = 0; i < rows; ++i, row += gemm.out_stride) {
    for (int col = threadIdx.x % 32 * kVecElems; col < gemm.N; col += 32 * kVecElems) put(row + col, splat(kNan));
  }
}

// ---- phases of a consumer warpgroup after its products ---------------------------------------------------------------

template <typename Element, typename Shape>
struct Epilogue {
  const CollectiveMemory<Shape>& memory;
  uint32_t staging;                                  // of this warpgroup, in the first buffer
  uint32_t buffer = 0;                               // of the present tile
  uint32_t free_parity = 1;                          // nothing has been staged yet
  uint32_t partial_parities[Shape::kStagings] = {};  // that of the present buffer first
  Trace<Shape::kTraced>& trace;

  __device__ Epilogue(const CollectiveMemory<Shape>& memory, int consumer, Trace<Shape::kTraced>& trace)
      : memory(memory), staging(memory.staging(consumer)), trace(trace) {}

  // All lanes of the warp have come here.
  __device__ __forceinline__ void arrive(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
  }

  __device__ __forceinline__ uint32_t box(int chunk) const {
    return staging + buffer * Shape::kTileBytes + chunk * kChunkBytes;
  }

  __device__ __forceinline__ void await_free() {
    barrier_wait(memory.free(buffer), free_parity);
    if (buffer == Shape::kStagings - 1) free_parity ^= 1;
    trace.end(TPO_TRACE_AWAIT_STAGING);
  }

  __device__ __forceinline__ void hand_over(const float (&sum)[Shape::kFragment]) {
#pragma unroll
    for (int chunk = 0; chunk < Shape::kTileChunks; ++chunk) {
      stage_chunk<Element>(sum, chunk, box(chunk));
    }
    publish_to_tma();
    arrive(memory.staged(buffer));
    if constexpr (Shape::kStagings == 2) {
      buffer ^= 1;
      const uint32_t parity = partial_parities[1];
      partial_parities[1] = partial_parities[0];
      partial_parities[0] = parity;
    }
    trace.end(TPO_TRACE_STAGE);
  }

  // The peers' partials, in rank order, to our own product. NaN if one has not come.
  __device__ __forceinline__ void add_partials(float (&sum)[Shape::kFragment], int world_size) {
    bool failed = false;
    for (int place = 0; place < world_size - 1; ++place) {
      barrier_wait(memory.partial(buffer), partial_parities[0]);
      partial_parities[0] ^= 1;
      trace.end(TPO_TRACE_AWAIT_PARTIAL);
      failed = get_shared(memory.failed()) != 0;
      if (!failed) {
#pragma unroll
        for (int chunk = 0; chunk < Shape::kTileChunks; ++chunk) {
          add_chunk<Element>(sum, chunk, box(chunk));
        }
      }
      if (place < world_size - 2) arrive(memory.taken());
      trace.end(TPO_TRACE_ADD);
    }
    if (failed) {
#pragma unroll
      for (int i = 0; i < Shape::kFragment; ++i) sum[i] = __int_as_float(0x7fffffff);
    }
  }
};

// ---- the consumers and the producer of a block, alike in all such kernels ----------------------------------------------

// Of the kernel parameters.
template <typename Owners>
struct CollectiveParams {
  TpoGemmCollectiveArgs args;
  CUtensorMap a, b, out;  // boxes: kRowsOfALoaded rows, kRowsOfBLoaded rows, 64 rows
  Owners owners;
  int k_blocks;  // of 64 elements, the last one may be partial
};

template <typename Shape, typename Owners>
__device__ __forceinline__ void load_tiles(const CollectiveParams<Owners>& params,
                                           const CollectiveMemory<Shape>& memory, uint32_t rank_in_cluster) {
  RingPosition<Shape::kStages> ring;
  Itinerary<Shape, Owners> itinerary(params.owners, params.args, rank_in_cluster);
  for (Work work; itinerary.next(&work);) {
    load_tile<Shape>(memory, ring, &params.a, &params.b, work.row_a, work.in_sum.col, params.k_blocks, rank_in_cluster);
  }
}

// By the fetcher, one thread: the partials of own tiles, each as soon as its buffer is free and its flag is up.
template <typename Shape, typename Owners>
__device__ __forceinline__ void fetch_tiles(const CollectiveParams<Owners>& params,
                                            const CollectiveMemory<Shape>& memory, int op, uint32_t rank_in_cluster) {
  const TpoGemmCollectiveArgs& args = params.args;
  barrier_wait(memory.begun(), 0);
  Courier<Shape> fetcher(args, memory, op, call_word(get_shared(memory.epoch()), args.call_hash),
                         get_shared(memory.failed()) != 0);
  Itinerary<Shape, Owners> itinerary(params.owners, args, rank_in_cluster);
  for (Work work; itinerary.next(&work);) {
    barrier_wait(memory.free(fetcher.buffer.slot), fetcher.buffer.parity ^ 1);
    fetcher.trace.of(work.owner, work.tile);
    fetcher.trace.end(TPO_TRACE_AWAIT_STAGING);
    if (work.owner == args.rank) {
      fetcher.fetch_partial(work.tile, 0);
      fetcher.fetch_other_partials(work.tile);
    }
    barrier_arrive(memory.staged(fetcher.buffer.slot));
    fetcher.buffer.advance();
  }
}

template <typename Element, typename Shape, typename Owners>
__device__ __forceinline__ void compute_tiles(const CollectiveParams<Owners>& params,
                                              const CollectiveMemory<Shape>& memory, int number,
                                              uint32_t rank_in_cluster) {
  const TpoGemmCollectiveArgs& args = params.args;
  Consumer<Shape> consumer(number, params.k_blocks, rank_in_cluster);
  Trace<Shape::kTraced> trace(args, TPO_TRACE_CONSUMER, threadIdx.x == kWarpgroupThreads);
  Epilogue<Element, Shape> epilogue(memory, number, trace);
  Itinerary<Shape, Owners> itinerary(params.owners, args, rank_in_cluster);
  for (Work work; itinerary.next(&work);) {
    float sum[Shape::kFragment];
    trace.of(work.owner, work.tile);
    multiply_tile<Element, Shape>(sum, memory, consumer, params.k_blocks);
    trace.end(TPO_TRACE_MULTIPLY);
    epilogue.await_free();  // an own tile's partial has then been fetched, or could be: only the phase is counted
    const bool owns = work.owner == args.rank;
    if (!Shape::kTmaAdds && owns) epilogue.add_partials(sum, args.world_size);
    if (args.gemm.bias && (Shape::kTmaAdds ? args.rank == 0 : owns)) {
      add_bias<Element, Shape>(sum, args.gemm.bias, args.gemm.N, work.in_sum.col);
    }
    epilogue.hand_over(sum);
  }
}

}  // namespace tpo
