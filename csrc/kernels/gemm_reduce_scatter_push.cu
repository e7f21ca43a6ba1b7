// GEMM + reduce-scatter, push: each partial goes to the rank that owns its rows, which adds. For Hopper.
//
//     out_r[rows of r, N] = sum over s of  (a_s[M, K] @ b_s[N, K].T)[rows of r]  (+ bias[N])
//
// a, b, out: as in gemm.cu. out: the rows [r * c, min(M, (r + 1) * c)), c = ceil(M / W), on rank r. Any M; N a multiple
//   of 8, by the strides.
// Rounding: f32 over K; a partial that travels is rounded once to the wire dtype, the owner's own stays in f32; added in
//   the order own, then ranks 0..W-1; bias; one last rounding.
// Bytes: a rank sends (W-1)/W * M*N*itemsize, the tiles at the edges whole.
//
//     rank 0 (owns the upper rows)                       rank 1 (owns the lower rows)                      time
//     1. products of a lower tile, round to staging      products of an upper tile, round to staging        |
//        courier: push, notify -------------------. .------------------- courier: push, notify              v
//     2. products of an upper tile                 X     products of a lower tile
//        courier: wait, fetch <-------------------' '-------------------> courier: wait, fetch
//        add, round to staging                           add, round to staging
//        courier: store                                  courier: store
//
// Of stages and staging within a block: gemm_block.cuh, gemm_collective.cuh.
// Fresh (no one reads too early). The courier's bulk store of a tile has been written, and is seen by it, before it
//   raises the tile's flag, release, system scope; the owner's courier acquires the flag and only then has the copy
//   engine load. Slots hold the epoch, so an older call's arrival does not pass.
// Reuse (no one overwrites too early). Our finishing says nothing of a peer's: it may still be adding what we pushed. So a
//   peer pushes in call e only after our `done` of the last call that raised it, sent by our last block after every
//   block's loads. One staging buffer is enough then, also after calls in which some rank owned no row.
// Live (no one waits for ever). The grid is no larger than what is resident at a time, and each block walks its tiles in
//   rising order: tiles of step 1 wait for nobody (but for the end of the peers' previous call), those of step 2 for tiles
//   of step 1 that stand before them in that order on every rank. A courier raises the flag of one tile before it waits for
//   those of the next; where a fetcher waits for them, a block's push needs only what it does before in that order. So
//   one cluster of blocks is enough. A turn to send is waited for while others send, who wait for the link alone.
#include <cuda_runtime.h>

#include "api.h"
#include "tpo/gemm_collective_launch.cuh"

namespace tpo {
namespace {

constexpr int kOpReduceScatter = 2;  // in the record

using Params = CollectiveParams<RowOwners>;

// By one thread. Returns whether a wait has failed in this call.
template <typename Shape>
__device__ __forceinline__ bool carry_tiles(const Params& params, const CollectiveMemory<Shape>& memory,
                                            uint32_t rank_in_cluster) {
  const TpoGemmCollectiveArgs& args = params.args;
  Courier<Shape> courier(args, memory, kOpReduceScatter);
  courier.await_done();
  courier.let_others_begin();
  Itinerary<Shape, RowOwners> itinerary(params.owners, args, rank_in_cluster);
  Work work;
  bool found = itinerary.next(&work), fetched = false;
  while (found) {
    if (work.owner != args.rank) {
      courier.await_staged(work);
      courier.push_partial(work, itinerary.is_over());
      const int owner = work.owner, tile = work.tile;
      found = itinerary.next(&work);
      fetched = courier.fetch_early(found, work);
      courier.publish_partial(owner, tile);
      continue;
    }
    if (!Shape::kFetches) {  // else the fetcher does
      if (!fetched) courier.fetch_partial(work.tile, 0);
      courier.fetch_other_partials(work.tile);
    }
    courier.await_staged(work);
    if (work.in_sum.row < params.owners.rows_of(args.rank)) courier.store_sum(&params.out, work);
    courier.free_staging();
    found = itinerary.next(&work);
    fetched = false;
  }
  leave(args, courier.word, courier.failed);
  return courier.failed && !courier.failed_before;
}

template <typename Element, typename Shape>
__global__ void __launch_bounds__(kGemmThreads, 1) gemm_reduce_scatter_push(const __grid_constant__ Params params) {
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
    if (threadIdx.x / 32 == kCourierWarp) {
      const bool failed = threadIdx.x % 32 == 0 && carry_tiles(params, memory, rank_in_cluster);
      if (__any_sync(0xffffffffu, failed)) spoil(params.args.gemm, params.owners.rows_of(params.args.rank));
    }
    if (Shape::kFetches && threadIdx.x == 32 * kFetcherWarp) {
      fetch_tiles(params, memory, kOpReduceScatter, rank_in_cluster);
    }
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
    if (!has_room<Shape>(args, params.owners.tiles_per_owner())) return cudaErrorInvalidValue;
    return launch_collective<Shape>(gemm_reduce_scatter_push<Element, Shape>, &params, params.owners.rows_of(args.rank),
                                    stream);
  }

  static cudaError_t prepare() { return allow_shared<Shape>(gemm_reduce_scatter_push<Element, Shape>); }
};

// By TpoGemmSchedule. Columns, rows and columns of a cluster, stages, stagings, boxes in transit.
constexpr CollectiveVariant kVariants[] = {
    variant<Host, CollectiveShape<256, 2, 1, 3, 1, 0>>(), {},
    variant<Host, CollectiveShape<128, 2, 1, 5, 1, 0>>(), variant<Host, CollectiveShape<128, 2, 1, 5, 2, 0>>(),
    variant<Host, CollectiveShape<128, 1, 2, 5, 2, 0>>(), variant<Host, CollectiveShape<64, 1, 2, 8, 2, 0>>()};
constexpr int kVariantCount = sizeof(kVariants) / sizeof(kVariants[0]);

}  // namespace
}  // namespace tpo

#pragma GCC visibility push(default)

extern "C" int tpo_gemm_reduce_scatter(const TpoGemmCollectiveArgs* args, void* cuda_stream) {
  return tpo::launch_variant(tpo::kVariants, tpo::kVariantCount, *args, cuda_stream);
}

extern "C" int tpo_gemm_reduce_scatter_prepare(void) {
  return tpo::prepare_variants(tpo::kVariants, tpo::kVariantCount);
}

#pragma GCC visibility pop
