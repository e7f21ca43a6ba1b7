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
#include "tpo/gemm_block.cuh"

namespace tpo {
namespace {

struct GemmParams {
  CUtensorMap a, b, out;  // boxes: kTileM rows, kRowsOfBLoaded rows, 64 rows
  const void* bias;       // N elements, 4-byte aligned; null: none
  int N;
  int k_blocks;  // of 64 elements, the last one may be partial
  // Tiles are numbered by clusters: kCluster tiles of neighbouring rows have one number.
  int row_tiles, col_tiles;
  int group_rows;  // so many row_tiles are walked through together, column by column, so that b stays in L2
};

struct Tile {
  int row, col;  // of its first element in out
};

template <typename Shape>
__device__ __forceinline__ Tile tile_of(const GemmParams& params, int tile_id, uint32_t rank_in_cluster) {
  const int group_tiles = params.group_rows * params.col_tiles;
  const int first_row = tile_id / group_tiles * params.group_rows;
  const int rows = min(params.group_rows, params.row_tiles - first_row);
  const int in_group = tile_id % group_tiles;
  const int row_tile = first_row + in_group % rows;
  return Tile{(row_tile * Shape::kCluster + static_cast<int>(rank_in_cluster)) * Shape::kTileM,
              in_group / rows * Shape::kTileN};
}

// ---- phases of a consumer warpgroup after its products --------------------------------------------------------------

template <typename Element, typename Shape>
__device__ __forceinline__ void add_bias(float (&sum)[Shape::kFragment], const GemmParams& params, int col) {
  const int own_col = col + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < Shape::kTileN / 8; ++j) {
    if (own_col + 8 * j >= params.N) continue;
    const auto* pairs = static_cast<const uint32_t*>(params.bias) + own_col / 2 + 4 * j;
    const float2 bias = Element::unpack(__ldg(pairs));
    sum[4 * j] += bias.x;
    sum[4 * j + 1] += bias.y;
    sum[4 * j + 2] += bias.x;
    sum[4 * j + 3] += bias.y;
  }
}

// Round columns 64 * chunk .. of the fragment into a box of staging.
template <typename Element, int kFragment>
__device__ __forceinline__ void stage_chunk(const float (&sum)[kFragment], int chunk, uint32_t box) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {  // of 8-column chunks of 16 bytes
    const float* d = sum + 32 * chunk + 8 * pair;
    store_fragments(box + swizzled_offset(row, 2 * pair + lane / 16), Element::pack(float2{d[0], d[1]}),
                    Element::pack(float2{d[2], d[3]}), Element::pack(float2{d[4], d[5]}),
                    Element::pack(float2{d[6], d[7]}));
  }
}

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
  const int tiles = params.row_tiles * params.col_tiles;
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
        const Tile tile = tile_of<Shape>(params, tile_id, rank_in_cluster);
        load_tile<Shape>(memory, ring, &params.a, &params.b, tile.row, tile.col, params.k_blocks, rank_in_cluster);
      }
    }
  } else {  // the consumers
    take_registers<kConsumerRegisters>();
    Consumer<Shape> consumer(warpgroup - 1, params.k_blocks);
    for (int tile_id = cluster + consumer.team * clusters; tile_id < tiles; tile_id += Shape::kTeams * clusters) {
      float sum[Shape::kFragment];
      multiply_tile<Element, Shape>(sum, memory, consumer, params.k_blocks);
      const Tile tile = tile_of<Shape>(params, tile_id, rank_in_cluster);
      if (params.bias) add_bias<Element, Shape>(sum, params, tile.col);
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

int blocks_of_device() {
  int device = 0, blocks = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return blocks;
}

int divide_up(int whole, int part) { return (whole + part - 1) / part; }

template <typename Element, typename Shape>
cudaError_t launch(const TpoGemmArgs& args, cudaStream_t stream) {
  GemmParams params;
  const Matrix a{args.a, args.M, args.K, args.a_stride, args.dtype};
  const Matrix b{args.b, args.N, args.K, args.b_stride, args.dtype};
  const Matrix out{args.out, args.M, args.N, args.out_stride, args.dtype};
  if (const cudaError_t error = make_map(&params.a, a, Shape::kTileM)) return error;
  if (const cudaError_t error = make_map(&params.b, b, Shape::kRowsOfBLoaded)) return error;
  if (const cudaError_t error = make_map(&params.out, out, kRowsOfWarpgroup)) return error;
  params.bias = args.bias;
  params.N = args.N;
  params.k_blocks = divide_up(args.K, kTileK);
  params.row_tiles = divide_up(args.M, Shape::kTileM * Shape::kCluster);
  params.col_tiles = divide_up(args.N, Shape::kTileN);
  params.group_rows = args.group_rows;

  const int clusters = std::min(params.row_tiles * params.col_tiles, blocks_of_device() / Shape::kCluster);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Shape::kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * Shape::kCluster);
  config.blockDim = dim3(kGemmThreads);
  config.dynamicSmemBytes = Shape::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* parameters[] = {&params};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(gemm<Element, Shape>), parameters);
}

template <typename Element, typename Shape>
cudaError_t prepare() {
  const void* kernel = reinterpret_cast<const void*>(gemm<Element, Shape>);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
}

struct Variant {
  cudaError_t (*launch[2])(const TpoGemmArgs&, cudaStream_t);  // by dtype
  cudaError_t (*prepare[2])();
};

template <typename Shape>
constexpr Variant variant() {
  return Variant{{launch<Bf16, Shape>, launch<Fp16, Shape>}, {prepare<Bf16, Shape>, prepare<Fp16, Shape>}};
}

// By TpoGemmSchedule. Columns, teams, cluster, stages, chunks of staging.
constexpr Variant kVariants[] = {
    variant<GemmShape<256, 1, 2, 4, 2>>(), variant<GemmShape<256, 1, 2, 3, 4>>(), variant<GemmShape<256, 1, 1, 4, 2>>(),
    variant<GemmShape<256, 2, 2, 5, 1>>(), variant<GemmShape<256, 2, 2, 4, 4>>(), variant<GemmShape<128, 1, 2, 6, 2>>(),
    variant<GemmShape<128, 1, 1, 6, 2>>(),
};
constexpr int kVariantCount = sizeof(kVariants) / sizeof(kVariants[0]);

bool is_aligned_to(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace
}  // namespace tpo

#pragma GCC visibility push(default)

extern "C" int tpo_gemm(const TpoGemmArgs* args, void* cuda_stream) {
  using namespace tpo;
  const bool sized = args->M >= 0 && args->N >= 0 && args->N % 2 == 0 && args->K > 0;
  const bool strided = args->a_stride >= args->K && args->b_stride >= args->K && args->out_stride >= args->N &&
                       args->a_stride % 8 == 0 && args->b_stride % 8 == 0 && args->out_stride % 8 == 0;
  const bool aligned = is_aligned_to(args->a, 16) && is_aligned_to(args->b, 16) && is_aligned_to(args->out, 16) &&
                       is_aligned_to(args->bias, 4);
  const bool known = args->schedule >= 0 && args->schedule < kVariantCount && args->group_rows > 0 &&
                     (args->dtype == 0 || args->dtype == 1);
  if (!sized || !strided || !aligned || !known) return cudaErrorInvalidValue;
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
