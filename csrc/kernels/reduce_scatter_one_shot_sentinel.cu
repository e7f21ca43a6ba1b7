// One-shot reduce-scatter without flags: each rank pushes to every peer what that one owns, and the data itself says that
// it came.
//
//     out_r[i] = sum over s of  x_s[r * part + i]         for the elements of rank r, at most `part`
//
// x: n elements, out: those of this rank, bf16 or fp16, any alignment, any n. Rank r owns [r * part, min(n, (r+1) * part)).
// Rounding: ranks are added in order 0..W-1 in f32, the own one at its place among them; one rounding at the end. An
//   element that is -0.0 counts as +0.0.
// Bytes: a rank sends (W-1) * 2 part, at most. Meant for small n, where latency rules: no flag travels behind the data,
//   and no fence.
//
//     rank 0                                          rank 1                                          time
//     announce e to 1 (header)                        announce e to 0 (header)                         |
//     push x[part..] to slot 0 of buffer i%3 at 1     push x[..part] to slot 1 of buffer i%3 at 0      v
//     clear own buffer (i-1)%3                        clear own buffer (i-1)%3
//     poll own slot 1 until no word is a sentinel     poll own slot 0 until no word is a sentinel
//     add x[..part] and slot 1, store out             add slot 0 and x[part..], store out
//
// Fresh, live, `done`: as in all_reduce_one_shot_sentinel.cu, whose buffers, epochs and headers are used: calls of both
//   may alternate.
// Reuse (no one overwrites too early). There a peer's data shows that it has left its last call. Here a rank may own
//   nothing and get no data; but every block awaits every peer's header before it ends, and a peer sends that at the
//   start of its call, hence after its last one. So a peer enters call i+3 only after our call i+1 has ended, and with it
//   the clearing of what it writes.
// Launched ahead, the kernel begins under the end of the one before, and waits for that before it touches any memory.
#include <cuda_runtime.h>

#include "api.h"
#include "tpo/dependent_launch.cuh"
#include "tpo/sentinel.cuh"
#include "tpo/sentinel_launch.cuh"

namespace tpo {
namespace {

constexpr int kWatchers = 32;  // one warp a block speaks with the peers about the call; all other threads move data
constexpr int kDataThreads = 256;
constexpr int64_t kOpReduceScatter = 2;  // gemm_reduce_scatter, in the record

// What `rank` owns.
__device__ __forceinline__ int64_t first_of(const TpoReduceScatterArgs& args, int rank) { return rank * args.part; }
__device__ __forceinline__ int64_t elems_of(const TpoReduceScatterArgs& args, int rank) {
  const int64_t left = args.sum.n_elems - first_of(args, rank);
  return left < 0 ? 0 : left < args.part ? left : args.part;
}

// Vector `index` of what `owner` owns, of our x.
__device__ __forceinline__ Vec load_part(const TpoReduceScatterArgs& args, int owner, int index) {
  const auto* from = static_cast<const uint16_t*>(args.sum.x) + first_of(args, owner);
  return without_negative_zero(load_vec(from, index, elems_of(args, owner)));
}

template <typename Element, int kWorld>
__global__ void __launch_bounds__(kDataThreads + kWatchers)
    reduce_scatter_one_shot_sentinel(const __grid_constant__ TpoReduceScatterArgs given) {
  __shared__ Call call;
  TpoAllReduceArgs args = given.sum;
  args.n_elems = elems_of(given, args.rank);  // of out
  const bool is_watcher = threadIdx.x < kWatchers;
  const int index = static_cast<int>(blockIdx.x) * kDataThreads + static_cast<int>(threadIdx.x) - kWatchers;
  const bool has_data = !is_watcher && index < vecs_of(args.n_elems);
  wait_for_kernels_before();

  // 0. fetch: x and the call's words come in one memory latency
  Vec own = splat(0), theirs[kWorld];
  if (is_watcher) {
    read_call(args, &call);
  } else {
#pragma unroll
    for (int turn = 1; turn < kWorld; ++turn) theirs[turn] = load_part(given, (args.rank + turn) % kWorld, index);
    if (has_data) own = load_part(given, args.rank, index);
  }
  __syncthreads();

  Status status = kOk;
  Vec total = splat(kNan);
  if (is_watcher) {
    status = watch(args, call, kOpReduceScatter, vecs_of(args.n_elems));
  } else if (!call.failed) {
    // 1. push, the next rank first, then 2. clear while the data travels, then 3. receive and add
#pragma unroll
    for (int turn = 1; turn < kWorld; ++turn) {
      const int peer = (args.rank + turn) % kWorld;
      if (index >= vecs_of(elems_of(given, peer))) continue;
      push_relaxed(slot(args, call.base[peer], call.buffer, args.rank) + int64_t{kVecBytes} * index, theirs[turn]);
    }
    clear_stale(args, call, kWorld, index, gridDim.x * kDataThreads);
    if (has_data) status = receive_and_add<Element, kWorld>(args, call, kOpReduceScatter, index, own, &total);
  }
  // 4. store, once the headers are known to agree too
  const bool agreed = __syncthreads_and(status == kOk);
  if (has_data) store_vec(args.out, index, args.n_elems, agreed ? total : splat(kNan));
  // 5. all of out, if this call failed here; if the group had failed before it, every block knows by itself
  if (!agreed && !call.failed) spoil(args.out, args.n_elems);
}

// ---- the launcher -------------------------------------------------------------------------------------------------

using Kernel = void (*)(TpoReduceScatterArgs);

template <typename Element>
Kernel kernel_for(int world_size) {
  static constexpr Kernel kernels[kMaxWorld - 1] = {
      reduce_scatter_one_shot_sentinel<Element, 2>, reduce_scatter_one_shot_sentinel<Element, 3>,
      reduce_scatter_one_shot_sentinel<Element, 4>, reduce_scatter_one_shot_sentinel<Element, 5>,
      reduce_scatter_one_shot_sentinel<Element, 6>, reduce_scatter_one_shot_sentinel<Element, 7>,
      reduce_scatter_one_shot_sentinel<Element, 8>};
  return kernels[world_size - 2];
}

}  // namespace
}  // namespace tpo

#pragma GCC visibility push(default)

extern "C" int tpo_reduce_scatter_one_shot_sentinel(const TpoReduceScatterArgs* args, void* cuda_stream) {
  using namespace tpo;
  const TpoAllReduceArgs& sum = args->sum;
  const bool known = sum.world_size >= 2 && sum.world_size <= kMaxWorld && sum.rank >= 0 && sum.rank < sum.world_size &&
                     (sum.dtype == 0 || sum.dtype == 1) && sum.sentinel_bytes % kVecBytes == 0;
  const bool fits = sum.n_elems >= 0 && args->part >= 0 && args->part <= sum.sentinel_bytes / 2 &&
                    args->part * sum.world_size >= sum.n_elems;
  if (!known || !fits) return cudaErrorInvalidValue;
  if (sum.n_elems == 0) return cudaSuccess;
  const Kernel kernel = sum.dtype == 0 ? kernel_for<Bf16>(sum.world_size) : kernel_for<Fp16>(sum.world_size);
  const int blocks = (vecs_of(args->part) + kDataThreads - 1) / kDataThreads;  // equal on all ranks
  return launch_ahead(kernel, blocks, kDataThreads + kWatchers, args->launched_ahead != 0, *args, cuda_stream);
}

extern "C" int tpo_reduce_scatter_prepare(int world_size) {
  using namespace tpo;
  if (world_size < 2 || world_size > kMaxWorld) return cudaErrorInvalidValue;
  return load({kernel_for<Bf16>(world_size), kernel_for<Fp16>(world_size)});
}

#pragma GCC visibility pop
