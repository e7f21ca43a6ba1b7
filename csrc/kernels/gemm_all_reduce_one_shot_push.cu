// One-shot GEMM + all-reduce between two ranks, push: each sends the other all of its product, and adds. For Hopper.
//
//     out[M, N] = a_0[M, K] @ b_0[N, K].T + a_1[M, K] @ b_1[N, K].T  (+ bias[N])     on both ranks
//
// a, b, out: as in gemm.cu. Any M; N a multiple of 8, by the strides.
// Rounding: f32 over K, and the bias on rank 0; each rank's product is rounded to the wire dtype; the sum of the two is
//   rounded once more. A sum of two is the same in either order: equal bits on both ranks.
// Bytes: a rank sends M*N*itemsize, as many as in two shots between two ranks; tiles at the edges whole.
//
//     rank 0                                             rank 1                                            time
//     1. products of tile i, round to staging            products of tile i, round to staging               |
//        courier: to out, push, notify -----------. .----------- courier: to out, push, notify              v
//     2. products of the next tile                 X     products of the next tile
//        collector: wait, through shared <--------' '--------> collector: wait, through shared
//        memory, add to out                                 memory, add to out
//
// Nothing that is computed waits for a peer, and no tile crosses the link behind another: where products take about as long
// as the link, neither stands still for the other.
// Of stages and staging within a block: gemm_block.cuh, gemm_collective.cuh. Of adding: gemm_collector.cuh.
// Fresh (no one reads too early). The courier's bulk stores of a tile have been written, and are seen by it, before it
//   raises the tile's flag, release, system scope; the peer's collector acquires the flag and only then has the copy engine
//   load. Slots hold the epoch, so an older call's arrival does not pass.
// Reuse (no one overwrites too early). Partials go to `result`, which no kernel reads but in calls that write it: we push
//   after the peer has told that it has begun this call, release, system scope, hence has left those before.
// Live (no one waits for ever). A courier waits for its consumers, for the peer's beginning, for the link, and for a turn
//   while others send, who wait for the link alone; consumers for the courier; a collector, whom nobody waits for, for the
//   peer's courier. So one cluster of blocks is enough, and blocks of both ranks need not be equally many.
#include <cuda_runtime.h>

#include "api.h"
#include "tpo/gemm_collective_launch.cuh"
#include "tpo/gemm_collector.cuh"

namespace tpo {
namespace {

constexpr int kOpAllReduce = 1;  // gemm_all_reduce, in the record

using Params = CollectiveParams<SharedTiles>;

// The peer's partial of a tile, at rank `at`.
template <typename Shape>
__device__ __forceinline__ char* partial_of(const Params& params, int at, int tile) {
  return arena_of(params.args, at) + params.args.result_offset + int64_t{Shape::kTileBytes} * tile;
}

__device__ __forceinline__ int64_t* flag_of(const Params& params, int at, int tile) {
  return word_at(params.args, at, params.args.result_flags_offset, tile);
}

// By one thread. Returns whether a wait has failed in this call.
template <typename Shape>
__device__ __forceinline__ bool carry_tiles(const Params& params, const CollectiveMemory<Shape>& memory,
                                            uint32_t rank_in_cluster) {
  const TpoGemmCollectiveArgs& args = params.args;
  const int peer = 1 - args.rank;
  Courier<Shape> courier(args, memory, kOpAllReduce);
  courier.await_begun();
  courier.let_others_begin();
  Itinerary<Shape, SharedTiles> itinerary(params.owners, args, rank_in_cluster);
  int64_t kept = 0;
  for (Work work; itinerary.next(&work);) {
    courier.await_staged(work);
    courier.store_sum(&params.out, work);
    end_store_group();
    if (!courier.failed) {
      courier.begin_turn();
      courier.send_tile(partial_of<Shape>(params, peer, work.tile), itinerary.is_over());
    }
    courier.free_staging();
    if (!courier.failed) courier.end_turn();
    courier.keep(++kept);
    if (!courier.failed) notify(flag_of(params, peer, work.tile), courier.word);
    courier.trace.of(work.owner, work.tile);
    courier.trace.end(TPO_TRACE_PUBLISH);
  }
  return courier.failed && !courier.failed_before;
}

// By a warp. Returns whether a wait has failed in this call.
template <typename Shape>
__device__ __forceinline__ bool collect_tiles(const Params& params, const CollectiveMemory<Shape>& memory,
                                              uint32_t rank_in_cluster) {
  const TpoGemmCollectiveArgs& args = params.args;
  const int peer = 1 - args.rank;
  const CollectedCall call = await_call(args, memory);
  Collector<Shape> collector{&params.out, args.gemm.M, args.gemm.N, memory, {}, {}};
  Trace<Shape::kTraced> trace(args, TPO_TRACE_COLLECTOR, threadIdx.x % 32 == 0);
  Itinerary<Shape, SharedTiles> itinerary(params.owners, args, rank_in_cluster);
  bool failed = call.failed_before;
  int64_t kept = 0;
  for (Work work; itinerary.next(&work);) {
    const Waiter who{kOpAllReduce, args.rank, peer, work.tile, call.word, 0};
    failed = add_peers_tile(args, collector, trace, work, ++kept, flag_of(params, args.rank, work.tile),
                            partial_of<Shape>(params, args.rank, work.tile), who, itinerary.is_over(), failed);
  }
  return failed && !call.failed_before;
}

template <typename Element, typename Shape>
__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm_all_reduce_one_shot_push(const __grid_constant__ Params params) {
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
    if (threadIdx.x / 32 == kTransitWarp) failed = collect_tiles(params, memory, rank_in_cluster);
    if (__any_sync(0xffffffffu, failed)) spoil(params.args.gemm, params.args.gemm.M);
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
    params.owners.grid = grid_of<Shape>(args.gemm.M, args.gemm.N, args.gemm.group_rows);
    const int64_t tiles = int64_t{params.owners.grid.tiles()} * Shape::kCluster;
    if (args.world_size != 2 || tiles * Shape::kTileBytes > args.result_bytes || tiles > args.tile_slots) {
      return cudaErrorInvalidValue;
    }
    return launch_collective<Shape>(gemm_all_reduce_one_shot_push<Element, Shape>, &params, args.gemm.M, stream);
  }

  static cudaError_t prepare() { return allow_shared<Shape>(gemm_all_reduce_one_shot_push<Element, Shape>); }
};

// By TpoGemmSchedule. Columns, rows and columns of a cluster, stages, stagings, boxes in transit; the copy engine adds.
constexpr CollectiveVariant kVariants[] = {{},
                                           {},
                                           {},
                                           {},
                                           {},
                                           {},
                                           variant<Host, CollectiveShape<256, 2, 1, 3, 1, 2, true>>(),
                                           variant<Host, CollectiveShape<128, 2, 1, 5, 1, 4, true>>()};
constexpr int kVariantCount = sizeof(kVariants) / sizeof(kVariants[0]);

}  // namespace
}  // namespace tpo

#pragma GCC visibility push(default)

extern "C" int tpo_gemm_all_reduce_one_shot(const TpoGemmCollectiveArgs* args, void* cuda_stream) {
  return tpo::launch_variant(tpo::kVariants, tpo::kVariantCount, *args, cuda_stream);
}

extern "C" int tpo_gemm_all_reduce_one_shot_prepare(void) {
  return tpo::prepare_variants(tpo::kVariants, tpo::kVariantCount);
}

#pragma GCC visibility pop
