// A persistent GEMM for Hopper: the mainloop of the fused kernels, with nothing but a local store behind it.
//
//     out[M, N] = a[M, K] @ b[N, K].T  (+ bias[N])
//
// a, b, out: row-major, bf16 or fp16, rows of any stride that is a multiple of 8 elements, first elements 16-byte aligned.
// M, K: any; N: even. What a tile has outside of the matrices is zeros to the products and is not stored.
// Rounding: f32 over K, bias added in f32, one rounding to out.
// Bytes: none leave the device.
//
//     producer warp       loads of tile 0 | of tile 1 | ...                             time ->
//     consumers                products 0 | store 0 | products 1 | ...
//     copy engine                                out 0                 out 1
//
// Fresh, reuse, live: of stages, see gemm_block.cuh. A chunk of staging is written again only after the thread that gave
//   its last content to the copy engine has seen it read; a barrier of the warpgroup tells the others.
#include <cuda_runtime.h>

#include <algorithm>

#include "api.h"
#include "tpo/gemm_launch.cuh"
#include "tpo/gemm_tile.cuh"

namespace tpo {
namespace {

struct GemmParams {
  CUtensorMap a, b, out;  // boxes: kTileM rows, kRowsOfBLoaded rows, 64 rows
  const void* bias;       // N elements, 4-byte aligned; null: none
  int N;
  int k_blocks;  // of 64 elements, the last one may be partial
  TileGrid grid;
};

// ---- phases of a consumer warpgroup after its products --------------------------------------------------------------

// Through staging to out, by the copy engine: it goes on while the next products run.
template <typename Element, typename Shape>
__device__ __forceinline__ void store_tile(const float (&sum)[Shape::kFragment], const GemmParams& params,
                                           const BlockMemory<Shape>& memory, int consumer, int row, int col) {
  // With room for the whole tile there is one wait a tile, else one a chunk.
  constexpr int kTogether = Shape::kStagingChunks == Shape::kTileChunks ? Shape::kTileChunks : 1;
  const bool is_storer = threadIdx.x % kWarpgroupThreads == 0;
  const uint32_t own_barrier = 1 + consumer;
#pragma unroll
  for (int first = 0; first < Shape::kTileChunks; first += kTogether) {
    if (is_storer) wait_stores_read<Shape::kStagingChunks - kTogether>();
    warpgroup_barrier(own_barrier);
#pragma unroll
    for (int chunk = first; chunk < first + kTogether; ++chunk) {
      stage_chunk<Element>(sum, chunk, memory.staging(consumer) + chunk % Shape::kStagingChunks * kChunkBytes);
    }
    publish_to_tma();
    warpgroup_barrier(own_barrier);
    if (is_storer) {
#pragma unroll
      for (int chunk = first; chunk < first + kTogether; ++chunk) {
        store_box(&params.out, row, col + chunk * kBoxCols,
                  memory.staging(consumer) + chunk % Shape::kStagingChunks * kChunkBytes);
      }
      end_store_group();
    }
  }
}

// ---- the kernel -------------------------------------------------------------------------------------------------------

template <typename Element, typename Shape>
__global__ void __launch_bounds__(kGemmThreads, 1) gemm(const __grid_constant__ GemmParams params) {
  extern __shared__ uint8_t window[];
  const BlockMemory<Shape> memory(window);
  const uint32_t rank_in_cluster = Shape::kCluster == 1 ? 0 : cluster_rank();
  const int cluster = blockIdx.x / Shape::kCluster;
  const int clusters = gridDim.x / Shape::kCluster;
  const int tiles = params.grid.tiles();
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0);  // uniform, and known to be
  if (threadIdx.x == 0) {
    prefetch_map(&params.a);
    prefetch_map(&params.b);
    prefetch_map(&params.out);
    init_barriers(memory);
  }
  __syncwarp();
  cluster_barrier_relaxed();  // the barriers' inits have been published

  RingPosition<Shape::kStages> ring;
  if (warpgroup == 0) {  // the producer: one thread of it
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      for (int tile_id = cluster; tile_id < tiles; tile_id += clusters) {
        const Tile tile = tile_of<Shape>(params.grid, tile_id, rank_in_cluster);
        load_tile<Shape>(memory, ring, &params.a, &params.b, tile.row, tile.col, params.k_blocks, rank_in_cluster);
      }
    }
  } else {  // the consumers
    take_registers<kConsumerRegisters>();
    Consumer<Shape> consumer(warpgroup - 1, params.k_blocks, rank_in_cluster);
    for (int tile_id = cluster + consumer.team * clusters; tile_id < tiles; tile_id += Shape::kTeams * clusters) {
      float sum[Shape::kFragment];
      multiply_tile<Element, Shape>(sum, memory, consumer, params.k_blocks);
      const Tile tile = tile_of<Shape>(params.grid, tile_id, rank_in_cluster);
      if (params.bias) add_bias<Element, Shape>(sum, params.bias, params.N, tile.col);
      store_tile<Element, Shape>(sum, params, memory, warpgroup - 1, tile.row + consumer.row_block * kRowsOfWarpgroup,
                                 tile.col);
    }
    if (threadIdx.x % kWarpgroupThreads == 0) wait_stores_read<0>();
  }
  // relaxed: nothing is read any more; but a block that has ended could not be told of released stages
  __syncwarp();
  cluster_barrier_relaxed();
}

// ---- the launcher -----------------------------------------------------------------------------------------------------

template <typename Element, typename Shape>
cudaError_t launch(const TpoGemmArgs& args, cudaStream_t stream) {
  GemmParams params;
  const Matrix a{args.a, args.M, args.K, args.a_stride, args.dtype};
  const Matrix b{args.b, args.N, args.K, args.b_stride, args.dtype};
  const Matrix out{args.out, args.M, args.N, args.out_stride, args.dtype};
  if (const cudaError_t error = make_map(&params.a, a, Shape::kRowsOfALoaded)) return error;
  if (const cudaError_t error = make_map(&params.b, b, Shape::kRowsOfBLoaded)) return error;
  if (const cudaError_t error = make_map(&params.out, out, kRowsOfWarpgroup)) return error;
  params.bias = args.bias;
  params.N = args.N;
  params.k_blocks = divide_up(args.K, kTileK);
  params.grid = grid_of<Shape>(args.M, args.N, args.group_rows);
  const int clusters = std::min(params.grid.tiles(), blocks_of_device() / Shape::kCluster);
  return launch_clusters<Shape>(gemm<Element, Shape>, clusters, &params, stream);
}

template <typename Element, typename Shape>
cudaError_t prepare() {
  return allow_shared<Shape>(gemm<Element, Shape>);
}

struct Variant {
  cudaError_t (*launch[2])(const TpoGemmArgs&, cudaStream_t);  // by dtype
  cudaError_t (*prepare[2])();
};

template <typename Shape>
constexpr Variant variant() {
  return Variant{{launch<Bf16, Shape>, launch<Fp16, Shape>}, {prepare<Bf16, Shape>, prepare<Fp16, Shape>}};
}

// By TpoGemmSchedule. Columns, teams, rows and columns of a cluster, stages, chunks of staging.
constexpr Variant kVariants[] = {
    variant<GemmShape<256, 1, 2, 1, 3, 4>>(),
    variant<GemmShape<256, 2, 2, 1, 5, 1>>(),
    variant<GemmShape<128, 1, 2, 1, 6, 2>>(),
};
constexpr int kVariantCount = sizeof(kVariants) / sizeof(kVariants[0]);

}  // namespace
}  // namespace tpo

#pragma GCC visibility push(default)

extern "C" int tpo_gemm(const TpoGemmArgs* args, void* cuda_stream) {
  using namespace tpo;
  const bool known = args->schedule >= 0 && args->schedule < kVariantCount;
  if (!known || !is_sound(*args)) return cudaErrorInvalidValue;
  if (args->M == 0 || args->N == 0) return cudaSuccess;
  return kVariants[args->schedule].launch[args->dtype](*args, static_cast<cudaStream_t>(cuda_stream));
}

extern "C" int tpo_gemm_prepare(void) {
  using namespace tpo;
  for (const Variant& variant : kVariants) {
    for (const auto prepare : variant.prepare) {
      if (const cudaError_t error = prepare()) return error;
    }
  }
  return cudaSuccess;
}

#pragma GCC visibility pop
