// How a block multiplies: a producer warp fills a ring of stages, warpgroups of consumers multiply what is in them.
//
//     producer          load 0 1 2 3 | of the next tile: 0 1 2 ...            a stage: kTileM rows of a, kTileN of b,
//     consumers 0, 1          mma 0 1 2 3, epilogue, mma 0 1 ...              64 elements of K
//
// The consumers form teams, and the teams take the tiles of the block in turn.
//   One team of two (cooperative): the rows of a 128-row tile are halved between them, and they share its columns of b.
//   Two teams of one (ping-pong): tiles of 64 rows; the epilogue of one team hides behind the products of the other.
// The blocks of a cluster have tiles beside each other, of rows or of columns. Those with the same columns load
// a share of b each and hand it to all of them, those with the same rows a share of a. Tiles of blocks 0, 1, ... of the
// cluster: down the rows first.
//
// Fresh (no one reads too early). `full` of a stage ends its phase when the bytes of both boxes have come, from whichever
//   block sent them; consumers wait for it.
// Reuse (no one overwrites too early). `empty` of a stage ends its phase when each warp that reads the stage, in every
//   block that this one's producer writes into, is done with its products: the producer waits for it.
// Turn. A team waits for the stages of its tile only after the other team has found all stages of the tile before: it
//   would else wait for a phase of `full` that is more than one ahead, which parities cannot tell from one long past.
// Live. Producers and consumers take tiles in the same order, and blocks of a cluster have equally many.
#pragma once

#include "tpo/mbarrier.cuh"
#include "tpo/tma.cuh"
#include "tpo/vec.cuh"
#include "tpo/wgmma.cuh"
#include "tpo/wgmma_narrow.cuh"

namespace tpo {

constexpr int kTileK = kBoxCols;
constexpr int kWarpgroupThreads = 128;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kGemmThreads = (1 + kConsumers) * kWarpgroupThreads;
constexpr int kProducerRegisters = 40;  // 128 * 40 + 256 * 232 of 64 Ki
constexpr int kConsumerRegisters = 232;
constexpr int kRowsOfWarpgroup = 64;
constexpr int kChunkBytes = kRowsOfWarpgroup * kBoxRowBytes;  // of staging: one box of 64 columns

template <int kTileN_, int kTeams_, int kClusterRows_, int kClusterCols_, int kStages_, int kStagingChunks_>
struct GemmShape {
  static constexpr int kTileN = kTileN_;
  static constexpr int kTeams = kTeams_;
  static constexpr int kClusterRows = kClusterRows_;  // blocks down the rows
  static constexpr int kClusterCols = kClusterCols_;
  static constexpr int kCluster = kClusterRows * kClusterCols;      // blocks
  static constexpr int kSharers = kClusterRows + kClusterCols - 1;  // a block and those that it loads for
  static constexpr int kStages = kStages_;
  static constexpr int kStagingChunks = kStagingChunks_;  // a warpgroup
  static constexpr int kTeamWarpgroups = kConsumers / kTeams;
  static constexpr int kTileM = kRowsOfWarpgroup * kTeamWarpgroups;
  static constexpr int kFragment = kTileN / 2;  // f32 a thread
  static constexpr int kTileChunks = kTileN / kBoxCols;
  static constexpr int kRowsOfALoaded = kTileM / kClusterCols;
  static constexpr int kRowsOfBLoaded = kTileN / kClusterRows;
  static constexpr uint32_t kABytes = kTileM * kBoxRowBytes;
  static constexpr uint32_t kBBytes = kTileN * kBoxRowBytes;
  static constexpr uint32_t kStageBytes = kABytes + kBBytes;
  static constexpr uint32_t kStagingBytes = kConsumers * kStagingChunks * kChunkBytes;
  static constexpr uint32_t kBarrierBytes = (2 * kStages + kTeams) * 8;
  // The window of dynamic memory begins at a multiple of 16 only.
  static constexpr uint32_t kSharedBytes = kSwizzleBytes + kStages * kStageBytes + kStagingBytes + kBarrierBytes;
  static_assert(kSharedBytes <= 227 * 1024);
  static_assert(kConsumers % kTeams == 0 && kCluster <= 2);
  static_assert(kRowsOfALoaded * kBoxRowBytes % kSwizzleBytes == 0 &&
                kRowsOfBLoaded * kBoxRowBytes % kSwizzleBytes == 0);
  static_assert(kTileChunks % kStagingChunks == 0 || kStagingChunks == 1);
};

// Which of the tiles of its cluster a block has.
template <typename Shape>
struct PlaceInCluster {
  int row, col;

  __device__ explicit PlaceInCluster(uint32_t rank_in_cluster)
      : row(static_cast<int>(rank_in_cluster) % Shape::kClusterRows),
        col(static_cast<int>(rank_in_cluster) / Shape::kClusterRows) {}

  __device__ uint16_t with_these_cols() const {
    return static_cast<uint16_t>(((1 << Shape::kClusterRows) - 1) << col * Shape::kClusterRows);
  }
  __device__ uint16_t with_these_rows() const {
    return static_cast<uint16_t>((1 | (Shape::kClusterCols > 1 ? 1 << Shape::kClusterRows : 0)) << row);
  }
  // Of the blocks that load for this one, itself among them: the one at this place, 0 .. kSharers - 1.
  __device__ uint32_t sharer(int place) const {
    if (place < Shape::kClusterRows) return col * Shape::kClusterRows + place;
    return (1 - col) * Shape::kClusterRows + row;
  }
};

// Addresses of a block's shared memory: stages, staging, barriers.
template <typename Shape>
struct BlockMemory {
  uint32_t base;

  __device__ explicit BlockMemory(const void* window)
      : base((shared_address(window) + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes) {}

  __device__ uint32_t a(uint32_t stage) const { return base + stage * Shape::kStageBytes; }
  __device__ uint32_t b(uint32_t stage) const { return a(stage) + Shape::kABytes; }
  __device__ uint32_t staging(int consumer) const {
    return base + Shape::kStages * Shape::kStageBytes + consumer * Shape::kStagingChunks * kChunkBytes;
  }
  __device__ uint32_t full(uint32_t stage) const {
    return base + Shape::kStages * Shape::kStageBytes + Shape::kStagingBytes + stage * 8;
  }
  __device__ uint32_t empty(uint32_t stage) const { return full(stage) + Shape::kStages * 8; }
  __device__ uint32_t turn(int team) const { return full(2 * Shape::kStages + team); }
};

// By one thread of each block, before the blocks of the cluster meet.
template <typename Shape>
__device__ __forceinline__ void init_barriers(const BlockMemory<Shape>& memory) {
  constexpr int kTeamWarps = Shape::kTeamWarpgroups * (kWarpgroupThreads / 32);
  for (int stage = 0; stage < Shape::kStages; ++stage) {
    barrier_init(memory.full(stage), 1);
    barrier_init(memory.empty(stage), Shape::kSharers * kTeamWarps);
  }
  for (int team = 0; team < Shape::kTeams; ++team) barrier_init(memory.turn(team), kTeamWarps);
  publish_barrier_inits();
}

// A box to this block, or to several blocks of the cluster: the same address and the same barrier there.
template <bool kToSeveral>
__device__ __forceinline__ void load_share(uint32_t to, const CUtensorMap* map, int row, int col, uint32_t barrier,
                                           uint16_t blocks) {
  if constexpr (kToSeveral) {
    load_box_to_cluster(to, map, row, col, barrier, blocks);
  } else {
    load_box(to, map, row, col, barrier);
  }
}

// Load one tile's stages: rows of a from row_a on, rows of b from row_b on, of which this block loads its share.
template <typename Shape>
__device__ __forceinline__ void load_tile(const BlockMemory<Shape>& memory, RingPosition<Shape::kStages>& ring,
                                          const CUtensorMap* a, const CUtensorMap* b, int row_a, int row_b,
                                          int k_blocks, uint32_t rank_in_cluster) {
  const PlaceInCluster<Shape> place(rank_in_cluster);
  const int own_row_a = place.col * Shape::kRowsOfALoaded, own_row_b = place.row * Shape::kRowsOfBLoaded;
  for (int k = 0; k < k_blocks; ++k) {
    const uint32_t full = memory.full(ring.slot);
    barrier_wait(memory.empty(ring.slot), ring.parity ^ 1);
    barrier_arrive_expecting(full, Shape::kStageBytes);
    load_share<(Shape::kClusterCols > 1)>(memory.a(ring.slot) + own_row_a * kBoxRowBytes, a, row_a + own_row_a,
                                          k * kTileK, full, place.with_these_rows());
    load_share<(Shape::kClusterRows > 1)>(memory.b(ring.slot) + own_row_b * kBoxRowBytes, b, row_b + own_row_b,
                                          k * kTileK, full, place.with_these_cols());
    ring.advance();
  }
}

// This warp reads the stage no more: told to every block that may write into it, by a lane each. sharer: of this lane.
template <typename Shape>
__device__ __forceinline__ void release_stage(const BlockMemory<Shape>& memory, uint32_t stage, uint32_t sharer) {
  // relaxed: the products have been waited for, so the stage has been read, and nothing was stored to it
  if (threadIdx.x % 32 < Shape::kSharers) barrier_arrive_in_cluster_relaxed(memory.empty(stage), sharer);
}

// What a consumer warpgroup knows of itself: which rows of its team's tiles it has, and where in the ring it is.
template <typename Shape>
struct Consumer {
  int team, row_block;
  RingPosition<Shape::kStages> ring;
  uint32_t turn_parity;
  uint32_t sharer;  // that this lane tells of released stages

  __device__ Consumer(int number, int k_blocks, uint32_t rank_in_cluster)
      : team(number % Shape::kTeams),
        row_block(number / Shape::kTeams),
        turn_parity(team == 0),
        sharer(PlaceInCluster<Shape>(rank_in_cluster).sharer(threadIdx.x % 32)) {
    ring.skip(team * k_blocks);  // the first tiles of the teams before
  }
};

// The product of the team's next tile, 64 rows of it. Two groups of products are in flight, so that the tensor cores
// have the next one when one ends; a stage is released one later.
template <typename Element, typename Shape>
__device__ __forceinline__ void multiply_tile(float (&sum)[Shape::kFragment], const BlockMemory<Shape>& memory,
                                              Consumer<Shape>& consumer, int k_blocks) {
  RingPosition<Shape::kStages>& ring = consumer.ring;
  const uint32_t own_rows = consumer.row_block * kRowsOfWarpgroup * kBoxRowBytes;
  if constexpr (Shape::kTeams > 1) {
    barrier_wait(memory.turn(consumer.team), consumer.turn_parity);
    consumer.turn_parity ^= 1;
  }
  uint32_t previous = 0;
  for (int k = 0; k < k_blocks; ++k) {
    barrier_wait(memory.full(ring.slot), ring.parity);
    const uint64_t a = mma_operand(memory.a(ring.slot) + own_rows);
    const uint64_t b = mma_operand(memory.b(ring.slot));
    mma_begin();
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
      mma<Element>(sum, mma_operand_at(a, step), mma_operand_at(b, step), k > 0 || step > 0);
    }
    mma_end_group();
    if (k > 0) {
      mma_wait<1>();
      release_stage(memory, previous, consumer.sharer);
    }
    previous = ring.slot;
    ring.advance();
  }
  if constexpr (Shape::kTeams > 1) {
    // relaxed: the turn is about what has been waited for; nothing was stored
    if (threadIdx.x % 32 == 0) barrier_arrive_relaxed(memory.turn((consumer.team + 1) % Shape::kTeams));
    ring.skip((Shape::kTeams - 1) * k_blocks);
  }
  mma_wait<0>();
  mma_pin(sum);
  release_stage(memory, previous, consumer.sharer);
}

}  // namespace tpo
