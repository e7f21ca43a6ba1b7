// Programmatic dependent launch: a kernel that is launched so may begin while the one before it on the stream still runs.
// In a kernel that is launched in the ordinary way these words do nothing.
#pragma once

#include <cuda.h>

namespace tpo {

// Until the kernels before have ended and all they wrote is seen. Nothing that they write may be read before, and nothing
// that they read may be written.
__device__ __forceinline__ void wait_for_kernels_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Once every block has said so, or has ended, the next kernel may begin. It waits by itself for what it needs of this one.
__device__ __forceinline__ void let_next_kernel_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// The box at (row, col) to L2, for a load to come.
__device__ __forceinline__ void fetch_box(const CUtensorMap* map, int row, int col) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(col), "r"(row) : "memory");
}

}  // namespace tpo
