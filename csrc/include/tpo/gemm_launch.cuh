// Launching what is built on gemm_block.cuh: what arguments must be, grids of clusters, shared memory.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "api.h"
#include "tpo/gemm_tile.cuh"

namespace tpo {

inline int divide_up(int whole, int part) { return (whole + part - 1) / part; }

inline bool is_aligned_to(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// What api.h asks of TpoGemmArgs.
inline bool is_sound(const TpoGemmArgs& args) {
  const bool sized = args.M >= 0 && args.N >= 0 && args.N % 2 == 0 && args.K > 0 && args.group_rows > 0;
  const bool strided = args.a_stride >= args.K && args.b_stride >= args.K && args.out_stride >= args.N &&
                       args.a_stride % 8 == 0 && args.b_stride % 8 == 0 && args.out_stride % 8 == 0;
  const bool aligned = is_aligned_to(args.a, 16) && is_aligned_to(args.b, 16) && is_aligned_to(args.out, 16) &&
                       is_aligned_to(args.bias, 4);
  return sized && strided && aligned && (args.dtype == 0 || args.dtype == 1);
}

inline int blocks_of_device() {
  int device = 0, blocks = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return blocks;
}

template <typename Shape>
TileGrid grid_of(int rows, int cols, int group_rows) {
  return TileGrid{divide_up(rows, Shape::kTileM * Shape::kClusterRows),
                  divide_up(cols, Shape::kTileN * Shape::kClusterCols), group_rows};
}

// To be called before the first launch; loads the kernel, too.
template <typename Shape, typename Params>
cudaError_t allow_shared(void (*kernel)(Params)) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              Shape::kSharedBytes);
}

template <typename Shape>
struct ClusterLaunch {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  // ahead: blocks may begin while the kernel before on the stream still runs, and wait by themselves.
  ClusterLaunch(int clusters, cudaStream_t stream, bool ahead) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {Shape::kCluster, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(clusters * Shape::kCluster);
    config.blockDim = dim3(kGemmThreads);
    config.dynamicSmemBytes = Shape::kSharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = ahead ? 2 : 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;  // it points at itself
};

template <typename Shape, typename Params>
cudaError_t launch_clusters(void (*kernel)(Params), int clusters, Params* params, cudaStream_t stream,
                            bool ahead = false) {
  const ClusterLaunch<Shape> launch(clusters, stream, ahead);
  void* parameters[] = {params};
  return cudaLaunchKernelExC(&launch.config, reinterpret_cast<const void*>(kernel), parameters);
}

// How many clusters the current device holds at a time: a grid whose blocks wait for peers must not be larger.
template <typename Shape, typename Params>
int resident_clusters(void (*kernel)(Params)) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // by device; 0: not yet asked. The same whoever asks
  int device = 0, clusters = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  clusters = known[device].load(std::memory_order_relaxed);
  if (clusters == 0) {
    const ClusterLaunch<Shape> launch(1, nullptr, false);
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess) return 0;
    known[device].store(clusters, std::memory_order_relaxed);
  }
  return clusters;
}

}  // namespace tpo
