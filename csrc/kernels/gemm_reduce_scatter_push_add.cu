// GEMM + reduce-scatter between two ranks, push: each sends the other its partials, which the L2 cache adds. For Hopper.
//
//     out_r[rows of r, N] = (a_0[M, K] @ b_0[N, K].T + a_1[M, K] @ b_1[N, K].T)[rows of r]  (+ bias[N])
//
// a, b, out: as in gemm.cu. out: the rows [r * c, min(M, (r + 1) * c)), c = ceil(M / 2), on rank r. Any M; N a multiple
//   of 8, by the strides.
// Rounding: f32 over K, and the bias on rank 0; each rank's product is rounded to the wire dtype; the sum of the two is
//   rounded once more.
// Bytes: a rank sends M*N*itemsize / 2, the tiles at the edges whole.
//
//     rank 0 (owns the upper rows)                       rank 1 (owns the lower rows)                      time
//     1. products of a lower tile, round to staging      products of an upper tile, round to staging        |
//        courier: push, notify -------------------. .------------------- courier: push, notify              v
//     2. products of an upper tile, to staging     X     products of a lower tile, to staging
//        keeper: to out                           | |    keeper: to out
//        collector: wait, through shared <--------' '--------> collector: wait, through shared
//        memory, add to out                                 memory, add to out
//
// gemm_reduce_scatter_push.cu, but for who adds: consumers wait for nobody.
// Of stages and staging within a block: gemm_block.cuh, gemm_collective.cuh. Of adding: gemm_collector.cuh.
// Fresh (no one reads too early). The courier's bulk store of a tile has been written, and is seen by it, before it
//   raises the tile's flag, release, system scope; the owner's collector acquires the flag and only then has the copy
//   engine load. Slots hold the epoch, so an older call's arrival does not pass.
// Reuse (no one overwrites too early). Our finishing says nothing of a peer's: it may still be adding what we pushed. So a
//   peer pushes in call e only after our `done` of the last call that raised it, sent by our last block after every
//   block's loads.
// Live (no one waits for ever). A courier waits for its consumers, for the peer's `done`, for the link, for a turn while
//   others send, who wait for the link alone, and for the keeper, who waits for consumers and for tiles that the courier
//   carried before; consumers for both; a collector, whom nobody waits for, for the keeper and the peer's courier. So one
//   cluster of blocks is enough.
#include <cuda_runtime.h>

#include "api.h"
#include "tpo/gemm_collective_launch.cuh"
#include "tpo/gemm_collector.cuh"

namespace tpo {
namespace {

constexpr int kOpReduceScatter = 2;  // in the record

using Params = CollectiveParams<RowOwners>;

// Two threads carry tiles, the courier those of the peer, the keeper the own ones: those would else wait until what was
// sent has been written. Each sees the tiles in order, and waits until those before in its buffer have been carried, by
// whichever: the phase of `staged` that it waits for is then the present one.
template <typename Shape>
struct Carrier : Courier<Shape> {
  using Courier<Shape>::Courier;
  int64_t uses[Shape::kStagings] = {};  // of each buffer, by the tiles so far; the present one's first

  __device__ __forceinline__ void await_tile(const Work& work) {
    while (peek_shared(this->memory.carried(this->buffer.slot)) < uses[0]) __nanosleep(32);
    this->await_staged(work);
  }

  // Of the present tile, after its buffer has been freed.
  __device__ __forceinline__ void tell(uint32_t slot) { publish_shared(this->memory.carried(slot), uses[0] + 1); }

  __device__ __forceinline__ void next() {
    const int64_t again = uses[0] + 1;
    for (int i = 1; i < Shape::kStagings; ++i) uses[i - 1] = uses[i];
    uses[Shape::kStagings - 1] = again;
  }
};

// By one thread. Returns whether a wait has failed in this call.
template <typename Shape>
__device__ __forceinline__ bool carry_tiles(const Params& params, const CollectiveMemory<Shape>& memory,
                                            uint32_t rank_in_cluster) {
  const TpoGemmCollectiveArgs& args = params.args;
  Carrier<Shape> courier(args, memory, kOpReduceScatter);
  courier.await_done();
  courier.let_others_begin();
  Itinerary<Shape, RowOwners> itinerary(params.owners, args, rank_in_cluster);
  for (Work work; itinerary.next(&work); courier.next()) {
    if (work.owner == args.rank) {
      courier.buffer.advance();
      continue;
    }
    courier.await_tile(work);
    const uint32_t slot = courier.buffer.slot;
    courier.push_partial(work, itinerary.is_over());
    courier.tell(slot);
    courier.publish_partial(work.owner, work.tile);
  }
  return courier.failed && !courier.failed_before;
}

// By one thread.
template <typename Shape>
__device__ __forceinline__ void keep_tiles(const Params& params, const CollectiveMemory<Shape>& memory,
                                           uint32_t rank_in_cluster) {
  const TpoGemmCollectiveArgs& args = params.args;
  Carrier<Shape> keeper(args, memory, kOpReduceScatter, 0, false);
  Itinerary<Shape, RowOwners> itinerary(params.owners, args, rank_in_cluster);
  int64_t kept = 0;
  for (Work work; itinerary.next(&work); keeper.next()) {
    if (work.owner != args.rank) {
      keeper.buffer.advance();
      continue;
    }
    keeper.await_tile(work);
    const uint32_t slot = keeper.buffer.slot;
    if (work.in_sum.row < params.owners.rows_of(args.rank)) keeper.store_sum(&params.out, work);
    keeper.free_staging();
    keeper.tell(slot);
    keeper.keep(++kept);
  }
}

// By a warp. Returns whether a wait has failed in this call.
template <typename Shape>
__device__ __forceinline__ bool collect_tiles(const Params& params, const CollectiveMemory<Shape>& memory,
                                              uint32_t rank_in_cluster) {
  const TpoGemmCollectiveArgs& args = params.args;
  const int peer = 1 - args.rank;
  const CollectedCall call = await_call(args, memory);
  Collector<Shape> collector{&params.out, params.owners.rows_of(args.rank), args.gemm.N, memory, {}, {}};
  Trace<Shape::kTraced> trace(args, TPO_TRACE_COLLECTOR, threadIdx.x % 32 == 0);
  Itinerary<Shape, RowOwners> itinerary(params.owners, args, rank_in_cluster);
  bool failed = call.failed_before;
  int64_t kept = 0;
  for (Work work; itinerary.next(&work);) {
    if (work.owner != args.rank) continue;
    const Waiter who{kOpReduceScatter, args.rank, peer, work.tile, call.word, 0};
    failed = add_peers_tile(args, collector, trace, work, ++kept, partial_flag(args, peer, args.rank, work.tile),
                            staged_partial<Shape>(args, peer, args.rank, work.tile), who, itinerary.is_over(), failed);
  }
  if (threadIdx.x % 32 == 0) leave(args, call.word, failed);
  return failed && !call.failed_before;
}

template <typename Element, typename Shape>
__global__ void __launch_bounds__(kGemmThreads, 1) gemm_reduce_scatter_push_add(const __grid_constant__ Params params) {
  extern __shared__ uint8_t window[];
  const CollectiveMemory<Shape> memory(window);
  const uint32_t rank_in_cluster = cluster_rank();
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0);  // uniform, and known to be
  if (threadIdx.x == 0) {
    prefetch_map(&params.a);
    prefetch_map(&params.b);
    prefetch_map(&params.out);
    init_barriers<Shape>(memory);
    init_collective_barriers(memory);
  }
  __syncwarp();
  cluster_barrier_relaxed();  // the barriers' inits have been published
  wait_for_kernels_before();
  let_next_kernel_begin();  // there is room for a block of it where one of ours has ended

  if (warpgroup == 0) {
    give_registers<kCollectiveProducerRegisters>();
    if (threadIdx.x == 0) load_tiles(params, memory, rank_in_cluster);
    bool failed = false;
    if (threadIdx.x / 32 == kCourierWarp)
      failed = threadIdx.x % 32 == 0 && carry_tiles(params, memory, rank_in_cluster);
    if (threadIdx.x == 32 * kFetcherWarp) keep_tiles(params, memory, rank_in_cluster);
    if (threadIdx.x / 32 == kTransitWarp) failed = collect_tiles(params, memory, rank_in_cluster);
    if (__any_sync(0xffffffffu, failed)) spoil(params.args.gemm, params.owners.rows_of(params.args.rank));
  } else {
    take_registers<kCollectiveConsumerRegisters>();
    compute_tiles<Element>(params, memory, warpgroup - 1, rank_in_cluster);
  }
  // relaxed: nothing is read any more; but a block that has ended could not be told of released stages
  __syncwarp();
  cluster_barrier_relaxed();
}

// ---- the launcher -------------------------------------------------------------------------------------------------------

template <typename Element, typename Shape>
struct Host {
  static cudaError_t launch(const TpoGemmCollectiveArgs& args, cudaStream_t stream) {
    Params params;
    params.args = args;
    const int rows = divide_up(args.gemm.M, args.world_size);
    params.owners = RowOwners{grid_of<Shape>(rows, args.gemm.N, args.gemm.group_rows), args.gemm.M, rows};
    if (args.world_size != 2 || !has_room<Shape>(args, params.owners.tiles_per_owner())) return cudaErrorInvalidValue;
    return launch_collective<Shape>(gemm_reduce_scatter_push_add<Element, Shape>, &params,
                                    params.owners.rows_of(args.rank), stream);
  }

  static cudaError_t prepare() { return allow_shared<Shape>(gemm_reduce_scatter_push_add<Element, Shape>); }
};

// By TpoGemmSchedule. Columns, rows and columns of a cluster, stages, stagings, boxes in transit; the copy engine adds.
constexpr CollectiveVariant kVariants[] = {{},
                                           {},
                                           {},
                                           {},
                                           {},
                                           {},
                                           variant<Host, CollectiveShape<256, 2, 1, 3, 1, 2, true>>(),
                                           {},
                                           variant<Host, CollectiveShape<128, 2, 1, 4, 2, 4, true>>()};
constexpr int kVariantCount = sizeof(kVariants) / sizeof(kVariants[0]);

}  // namespace
}  // namespace tpo

#pragma GCC visibility push(default)

extern "C" int tpo_gemm_reduce_scatter_add(const TpoGemmCollectiveArgs* args, void* cuda_stream) {
  return tpo::launch_variant(tpo::kVariants, tpo::kVariantCount, *args, cuda_stream);
}

extern "C" int tpo_gemm_reduce_scatter_add_prepare(void) {
  return tpo::prepare_variants(tpo::kVariants, tpo::kVariantCount);
}

#pragma GCC visibility pop
