// The collector: a warp of the producer warpgroup that brings what peers have sent from the arena to out, while the products
// go on. It goes through shared memory, box by box (kTransitBoxes of them), from where the copy engine stores it to out, or
// adds it to what is there.
//
// Adding (kTmaAdds) is for two ranks. Each rank's own product then lies in out already, rounded to the wire dtype; the
// L2 cache adds the peer's to it, with one rounding. A sum of two is the same in either order, hence equal on both ranks.
// Consumers never wait for a partial, and do not add; what it costs is a rounding, and one more pass over out in L2.
// Fresh. The courier brings a block's own tile to out, waits until it has been written, and publishes that in `kept`; the
//   collector acquires that, and the flag of the peer's tile, before it loads and adds.
#pragma once

#include "tpo/gemm_collective.cuh"

namespace tpo {

template <typename Shape>
struct Collector {
  const CUtensorMap* out;
  int rows, cols;  // of out
  const CollectiveMemory<Shape>& memory;
  RingPosition<Shape::kTransitBoxes> coming, going;

  __device__ __forceinline__ bool is_inside(const Tile& tile, int box) const {
    return row_of(tile, box) < rows && col_of(tile, box) < cols;
  }
  __device__ __forceinline__ int row_of(const Tile& tile, int box) const {
    return tile.row + box / Shape::kTileChunks * kRowsOfWarpgroup;
  }
  __device__ __forceinline__ int col_of(const Tile& tile, int box) const {
    return tile.col + box % Shape::kTileChunks * kBoxCols;
  }

  // By one lane. Boxes come while those before them go, as many as there is room for. What went before has been read.
  __device__ __forceinline__ void bring(const char* from, const Tile& tile) {
    order_with_tma();
    int next = inside(tile, 0), on_their_way = 0;
    for (int box = next; box < Shape::kTileBoxes; box = inside(tile, box + 1)) {
      for (; on_their_way < Shape::kTransitBoxes && next < Shape::kTileBoxes; ++on_their_way) {
        barrier_arrive_expecting(memory.landed(coming.slot), kChunkBytes);
        load_bytes(memory.transit(coming.slot), from + next * kChunkBytes, kChunkBytes, memory.landed(coming.slot));
        coming.advance();
        next = inside(tile, next + 1);
      }
      barrier_wait(memory.landed(going.slot), going.parity);
      to_out(tile, box, memory.transit(going.slot));
      end_store_group();
      if (next < Shape::kTileBoxes) wait_stores_read<0>();  // its place is loaded into next
      going.advance();
      --on_their_way;
    }
    wait_stores_read<0>();
  }

  // The same for the last tile of the block, when its products are over: the stages have room for all of it at a time.
  __device__ __forceinline__ void bring_last(const char* from, const Tile& tile) {
    constexpr int kParts = Shape::kTransitBoxes, kBoxes = Shape::kTileBoxes / kParts;
    static_assert(kParts * kBoxes == Shape::kTileBoxes && Shape::kTileBytes <= Shape::kStages * Shape::kStageBytes);
    order_with_tma();
    for (int part = 0; part < kParts; ++part) {
      const int offset = part * kBoxes * kChunkBytes;
      barrier_arrive_expecting(memory.landed(coming.slot), kBoxes * kChunkBytes);
      load_bytes(memory.a(0) + offset, from + offset, kBoxes * kChunkBytes, memory.landed(coming.slot));
      coming.advance();
    }
    for (int box = 0; box < Shape::kTileBoxes; ++box) {
      if (box % kBoxes == 0) {
        barrier_wait(memory.landed(going.slot), going.parity);
        going.advance();
      }
      if (is_inside(tile, box)) to_out(tile, box, memory.a(0) + box * kChunkBytes);
    }
    end_store_group();
    wait_stores_read<0>();
  }

  // This box, or the first behind it, that has something of out.
  __device__ __forceinline__ int inside(const Tile& tile, int box) const {
    while (box < Shape::kTileBoxes && !is_inside(tile, box)) ++box;
    return box;
  }

  __device__ __forceinline__ void to_out(const Tile& tile, int box, uint32_t from) {
    if constexpr (Shape::kTmaAdds) {
      add_box(out, row_of(tile, box), col_of(tile, box), from);
    } else {
      store_box(out, row_of(tile, box), col_of(tile, box), from);
    }
  }

  // By all lanes: NaN in place of what has not come.
  __device__ __forceinline__ void give_up(const Tile& tile) {
    const uint32_t lane = threadIdx.x % 32;
    constexpr int64_t kNans = 0x7fff7fff7fff7fff;
    for (uint32_t offset = 8 * lane; offset < kChunkBytes; offset += 8 * 32)
      put_shared(memory.transit(0) + offset, kNans);
    publish_to_tma();
    __syncwarp();
    if (lane == 0) {
      for (int box = 0; box < Shape::kTileBoxes; ++box) {
        if (is_inside(tile, box)) to_out(tile, box, memory.transit(0));
      }
      end_store_group();
      wait_stores_read<0>();
    }
    __syncwarp();
  }
};

// What the collector knows of the call, once the courier has begun it.
struct CollectedCall {
  int64_t word;
  bool failed_before;
};

template <typename Shape>
__device__ __forceinline__ CollectedCall await_call(const TpoGemmCollectiveArgs& args,
                                                    const CollectiveMemory<Shape>& memory) {
  barrier_wait(memory.begun(), 0);
  return CollectedCall{call_word(get_shared(memory.epoch()), args.call_hash), get_shared(memory.failed()) != 0};
}

// Where a block's own tile lies in out, and the peer's partial of it in the arena, add that. By a warp, for each of the
// block's tiles that it keeps, in the order in which the courier brings them; failed: as it was after the one before.
// flag, from: of the peer's partial. last: the block computes no other. Returns whether a wait has failed.
template <typename Shape>
__device__ __forceinline__ bool add_peers_tile(const TpoGemmCollectiveArgs& args, Collector<Shape>& collector,
                                               Trace<Shape::kTraced>& trace, const Work& work, int64_t tiles_kept,
                                               const int64_t* flag, const char* from, Waiter who, bool last,
                                               bool failed) {
  const CollectiveMemory<Shape>& memory = collector.memory;
  if (threadIdx.x % 32 == 0) {
    while (peek_shared(memory.kept()) < tiles_kept) __nanosleep(64);
    if (!failed) {
      const int64_t* header = header_of(args, args.rank, static_cast<int>(who.peer), who.wanted >> 16);
      failed = wait(flag, header, who, args.control, args.record, args.timeout_ns) != kOk;
      if (failed) put_shared(memory.failed(), 1);
      trace.of(work.owner, work.tile);
      trace.end(TPO_TRACE_AWAIT_SUM);
      if (!failed && last) collector.bring_last(from, work.in_sum);
      if (!failed && !last) collector.bring(from, work.in_sum);
      trace.end(TPO_TRACE_COPY);
    }
  }
  failed = __shfl_sync(0xffffffffu, failed, 0);
  if (failed) collector.give_up(work.in_sum);
  return failed;
}

}  // namespace tpo
