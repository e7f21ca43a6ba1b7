// Tiles of matrices, carried between global and shared memory by the copy engine of the multiprocessor (TMA).
//
// A tensor map describes a row-major matrix of 2-byte elements and a box of it, 64 elements (128 bytes) wide. In shared
// memory row r of a box lies at 128 * r, and its 16-byte chunk c at 16 * (c ^ (r & 7)): swizzled, so that a column of
// chunks touches all banks. Boxes start at multiples of 1024 bytes. What a box has outside of the matrix is loaded as
// zeros and counted in bytes all the same; it is not stored.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace tpo {

constexpr int kBoxCols = 64;  // elements
constexpr int kBoxRowBytes = 128;
constexpr int kSwizzleBytes = 1024;  // the pattern repeats, hence alignment

// Of the 16 bytes of chunk `chunk` (0..7) in row `row` of a box.
__host__ __device__ constexpr uint32_t swizzled_offset(uint32_t row, uint32_t chunk) {
  return row * kBoxRowBytes + ((chunk ^ (row & 7)) << 4);
}

// ---- device -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at (row, col) to shared memory; `barrier` gets its bytes.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, int row, int col, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(col), "r"(row), "r"(barrier)
      : "memory");
}

// The same to each block of the cluster whose bit is set in `blocks`: the same address there, and the barrier there.
__device__ __forceinline__ void load_box_to_cluster(uint32_t to, const CUtensorMap* map, int row, int col,
                                                    uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(col), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// Stores of this thread before it are seen by the copy engine after the next barrier.
__device__ __forceinline__ void publish_to_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// From shared memory; part of the thread's current group of stores.
__device__ __forceinline__ void store_box(const CUtensorMap* map, int row, int col, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(col),
               "r"(row), "r"(from)
               : "memory");
}

// Add the box to what lies there, by the L2 cache: each element is rounded once, to nearest even, subnormals kept.
__device__ __forceinline__ void add_box(const CUtensorMap* map, int row, int col, uint32_t from) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(col), "r"(row), "r"(from)
               : "memory");
}

// Bytes as they lie, between shared memory and anywhere in global memory, a peer's too. Multiples of 16.
__device__ __forceinline__ void store_bytes(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void load_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void end_store_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most kGroups of this thread's groups still have to be read from shared memory. They are not yet visible then.
template <int kGroups>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

// Until all of this thread's groups but the last kGroups have been written, and this thread sees that: it may then tell
// others.
template <int kGroups>
__device__ __forceinline__ void wait_stores_written() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Between what threads do and what the copy engine does in global memory: to be passed after a wait for a flag and before
// loads of what it published, and after the copy engine's stores and before the flag that publishes them.
__device__ __forceinline__ void order_with_tma() { asm volatile("fence.proxy.async;" ::: "memory"); }

// ---- host ---------------------------------------------------------------------------------------------------------

struct Matrix {
  const void* data;  // 16-byte aligned
  int rows, cols;
  int64_t row_stride;  // elements, a multiple of 8
  int dtype;           // 0 bf16, 1 fp16
};

// Takes about 100 ns; nothing is cached, since an address may be given to another tensor at any time.
inline cudaError_t make_map(CUtensorMap* map, const Matrix& matrix, int box_rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.cols), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.row_stride) * 2};  // bytes
  const cuuint32_t box[] = {kBoxCols, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(map, matrix.dtype == 0 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(matrix.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace tpo
