// Two-shot GEMM + all-reduce, push: the owner of a tile sums its partials and pushes the sum to everyone. For Hopper.
//
//     out[M, N] = sum over r of  a_r[M, K] @ b_r[N, K].T  (+ bias[N])     on every rank
//
// a, b, out: as in gemm.cu. Any M; N a multiple of 8, by the strides.
// Rounding: f32 over K; a partial that travels is rounded once to the wire dtype, the owner's own stays in f32; added in
//   the order own, then ranks 0..W-1; bias; one last rounding. The owner alone adds and everyone gets its bits: they are
//   equal on all ranks.
// Bytes: a rank sends 2 (W-1)/W * M*N*itemsize, partials to their owners and sums to all; tiles at the edges whole.
//
//     rank 0 (owns the first tiles)                      rank 1 (owns the others)                          time
//     1. products of a peer's tile, round to staging     products of a peer's tile, round to staging        |
//        courier: push, notify -------------------. .------------------- courier: push, notify              v
//     2. products of an own tile                   X     products of an own tile
//        courier: wait, fetch <-------------------' '-------------------> courier: wait, fetch
//        add, round to staging                           add, round to staging
//        courier: store, push the sum, notify ----. .---- courier: store, push the sum, notify
//     3. collector: wait <-------------------------X-------------------------> collector: wait
//        through shared memory to out                    through shared memory to out
//
// The collector is a warp beside the others: it takes sums out of the arena as they come, while the products go on.
// Of stages and staging within a block: gemm_block.cuh, gemm_collective.cuh.
// Fresh (no one reads too early). The courier's bulk stores of a tile have been written, and are seen by it, before it
//   raises the tile's flag, release, system scope; the reader acquires the flag and only then has the copy engine load.
//   Slots hold the epoch, so an older call's arrival does not pass.
// Reuse (no one overwrites too early). Staging: we leave a call only after every owner's sums have come, which it sends
//   after it has read our partials; a call of another kind sends `done`, for which the first push waits. Result: an owner
//   pushes a sum only after our partial of that tile has come, hence after we have left the call before.
// Live (no one waits for ever). The grid is no larger than what is resident at a time, and each block walks its tiles in
//   rising order: tiles of step 1 wait for nobody (but for the end of the peers' previous call), those of step 2 for tiles
//   of step 1 that stand before them in that order on every rank, and the collector, whom nobody waits for, for tiles of
//   step 2. A courier raises the flags of what it has sent before it waits for a partial; where a fetcher waits for them, a
//   block's push needs only what it does before in that order. So one cluster of blocks is enough. A turn to send is waited
//   for while others send, who wait for the link alone.
#include <cuda_runtime.h>

#include "api.h"
#include "tpo/gemm_collective_launch.cuh"
#include "tpo/gemm_collector.cuh"

namespace tpo {
namespace {

constexpr int kOpAllReduce = 1;  // gemm_all_reduce, in the record

using Params = CollectiveParams<TileOwners>;

template <typename Shape>
__device__ __forceinline__ int tiles_of_owner(const Params& params) {
  return params.owners.tiles_per_owner() * Shape::kCluster;
}

// The sum of an owner's tile, on its way to out at rank `at`.
template <typename Shape>
__device__ __forceinline__ char* result_of(const Params& params, int at, int owner, int tile) {
  return arena_of(params.args, at) + params.args.result_offset +
         int64_t{Shape::kTileBytes} * (place_at(at, owner) * tiles_of_owner<Shape>(params) + tile);
}

template <typename Shape>
__device__ __forceinline__ int64_t* result_flag(const Params& params, int at, int owner, int tile) {
  return word_at(params.args, at, params.args.result_flags_offset, owner * tiles_of_owner<Shape>(params) + tile);
}

// ---- the courier ----------------------------------------------------------------------------------------------------

template <typename Shape>
__device__ __forceinline__ void push_sum(Courier<Shape>& courier, const Params& params, const Work& work, bool last) {
  const TpoGemmCollectiveArgs& args = params.args;
  if (!courier.failed) courier.begin_turn();
  for (int turn = 1; turn < args.world_size && !courier.failed; ++turn) {
    const int peer = (args.rank + turn) % args.world_size;
    courier.send_tile(result_of<Shape>(params, peer, args.rank, work.tile), last);
  }
  courier.store_sum(&params.out, work);
  courier.free_staging();
  if (!courier.failed) courier.end_turn();
}

template <typename Shape>
__device__ __forceinline__ void publish_sum(Courier<Shape>& courier, const Params& params, int tile) {
  const TpoGemmCollectiveArgs& args = params.args;
  wait_stores_written<0>();
  order_with_tma();
  for (int turn = 1; turn < args.world_size && !courier.failed; ++turn) {
    const int peer = (args.rank + turn) % args.world_size;
    notify(result_flag<Shape>(params, peer, args.rank, tile), courier.word);
  }
  courier.trace.of(args.rank, tile);
  courier.trace.end(TPO_TRACE_PUBLISH);
}

// By one thread. Returns whether a wait has failed in this call.
template <typename Shape>
__device__ __forceinline__ bool carry_tiles(const Params& params, const CollectiveMemory<Shape>& memory,
                                            uint32_t rank_in_cluster) {
  const TpoGemmCollectiveArgs& args = params.args;
  Courier<Shape> courier(args, memory, kOpAllReduce);
  courier.await_done();
  courier.let_others_begin();
  Itinerary<Shape, TileOwners> itinerary(params.owners, args, rank_in_cluster);
  Work work;
  bool found = itinerary.next(&work), fetched = false;
  while (found) {
    const int owner = work.owner, tile = work.tile;
    if (owner != args.rank) {
      courier.await_staged(work);
      courier.push_partial(work, itinerary.is_over());
    } else {
      if (!Shape::kFetches) {  // else the fetcher does
        if (!fetched) courier.fetch_partial(tile, 0);
        courier.fetch_other_partials(tile);
      }
      courier.await_staged(work);
      push_sum(courier, params, work, itinerary.is_over());
    }
    found = itinerary.next(&work);
    fetched = courier.fetch_early(found, work);
    if (owner != args.rank) {
      courier.publish_partial(owner, tile);
    } else {
      publish_sum(courier, params, tile);
    }
  }
  return courier.failed && !courier.failed_before;
}

// ---- the collector, a warp ------------------------------------------------------------------------------------------

// The sums of the other owners, from the arena to out, in the order in which they are computed. Returns whether a wait has
// failed in this call.
template <typename Shape>
__device__ __forceinline__ bool collect_tiles(const Params& params, const CollectiveMemory<Shape>& memory) {
  const TpoGemmCollectiveArgs& args = params.args;
  const auto [word, failed_before] = await_call(args, memory);
  int failed = failed_before;
  Collector<Shape> collector{&params.out, args.gemm.M, args.gemm.N, memory, {}, {}};
  Trace<Shape::kTraced> trace(args, TPO_TRACE_COLLECTOR, threadIdx.x % 32 == 0);
  const int peers = args.world_size - 1;
  const int total = peers * tiles_of_owner<Shape>(params);
  // The blocks that have one tile fewer to compute begin.
  for (int i = gridDim.x - 1 - blockIdx.x; i < total; i += gridDim.x) {
    const int peer = (args.rank + 1 + i % peers) % args.world_size;
    const int tile = i / peers;
    Work work;
    if (!params.owners.find<Shape>(peer, tile / Shape::kCluster, tile % Shape::kCluster, &work)) continue;
    if (threadIdx.x % 32 == 0 && !failed) {
      const Waiter who{kOpAllReduce, args.rank, peer, peer * tiles_of_owner<Shape>(params) + tile, word, 0};
      const int64_t* header = header_of(args, args.rank, peer, word >> 16);
      failed = wait(result_flag<Shape>(params, args.rank, peer, tile), header, who, args.control, args.record,
                    args.timeout_ns) != kOk;
      trace.of(peer, tile);
      trace.end(TPO_TRACE_AWAIT_SUM);
      if (!failed) collector.bring(result_of<Shape>(params, args.rank, peer, tile), work.in_sum);
      trace.end(TPO_TRACE_COPY);
    }
    failed = __shfl_sync(0xffffffffu, failed, 0);
    if (failed) collector.give_up(work.in_sum);
  }
  return failed && !failed_before;
}

// ---- the kernel -------------------------------------------------------------------------------------------------------

template <typename Element, typename Shape>
__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm_all_reduce_two_shot_push(const __grid_constant__ Params params) {
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
    if (threadIdx.x / 32 == kTransitWarp) failed = collect_tiles(params, memory);
    if (Shape::kFetches && threadIdx.x == 32 * kFetcherWarp) {
      fetch_tiles(params, memory, kOpAllReduce, rank_in_cluster);
    }
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
    params.owners.run = divide_up(params.owners.grid.tiles(), args.world_size);
    const int64_t results = int64_t{args.world_size - 1} * params.owners.run * Shape::kCluster;
    if (!has_room<Shape>(args, params.owners.run) || results * Shape::kTileBytes > args.result_bytes) {
      return cudaErrorInvalidValue;
    }
    return launch_collective<Shape>(gemm_all_reduce_two_shot_push<Element, Shape>, &params, args.gemm.M, stream);
  }

  static cudaError_t prepare() { return allow_shared<Shape>(gemm_all_reduce_two_shot_push<Element, Shape>); }
};

// By TpoGemmSchedule. Columns, rows and columns of a cluster, stages, stagings, boxes in transit.
constexpr CollectiveVariant kVariants[] = {variant<Host, CollectiveShape<256, 2, 1, 3, 1, 2>>(),
                                           {},
                                           variant<Host, CollectiveShape<128, 2, 1, 5, 1, 4>>(),
                                           variant<Host, CollectiveShape<128, 2, 1, 4, 2, 2>>()};
constexpr int kVariantCount = sizeof(kVariants) / sizeof(kVariants[0]);

}  // namespace
}  // namespace tpo

#pragma GCC visibility push(default)

extern "C" int tpo_gemm_all_reduce(const TpoGemmCollectiveArgs* args, void* cuda_stream) {
  return tpo::launch_variant(tpo::kVariants, tpo::kVariantCount, *args, cuda_stream);
}

extern "C" int tpo_gemm_all_reduce_prepare(void) { return tpo::prepare_variants(tpo::kVariants, tpo::kVariantCount); }

#pragma GCC visibility pop
