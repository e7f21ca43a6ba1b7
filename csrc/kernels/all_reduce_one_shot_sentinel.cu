// One-shot all-reduce without flags: each rank pushes its elements to every peer, and the data itself says that it came.
//
//     out[n] = sum over r of  x_r[n]
//
// x, out: n elements, bf16 or fp16, any alignment, any n; out may be x. Every rank gets the same out.
// Rounding: ranks are added in order 0..W-1 in f32, the own one at its place among them; one rounding at the end. All
//   ranks therefore hold the same bits. An element that is -0.0 counts as +0.0.
// Bytes: a rank sends (W-1) * 2n. Meant for small n, where latency rules: no flag travels behind the data, and no
//   fence.
//
//     rank 0                                          rank 1                                          time
//     announce e to 1 (header)                        announce e to 0 (header)                         |
//     push x to slot 0 of buffer i%3 at 1             push x to slot 1 of buffer i%3 at 0              v
//     clear own buffer (i-1)%3                        clear own buffer (i-1)%3
//     poll own slot 1 until no word is a sentinel     poll own slot 0 until no word is a sentinel
//     add x and slot 1, store out                     add slot 0 and x, store out
//
// e is the number of the call in its group, i the number of the call of this kernel; both live on the device, since a
// captured integer would replay as old.
//
// Fresh (no one reads too early). A slot is full of the word 0x80008000, two negative zeros, before data comes; data
//   never holds that word. Each 32-bit word of a 16-byte access is written and read whole, so a word that is not the
//   sentinel is this call's data, whatever the order of arrival. Nothing else need be seen, hence relaxed accesses
//   and no fence.
// Reuse (no one overwrites too early, no one takes old data for new). Buffer b = i%3 is written and read in call i,
//   cleared by its owner in call i+1, and written again by a peer in call i+3. A peer enters call i+3 only after its
//   call i+2 ended; that took our data of call i+2, which we push only after our call i+1 ended, and with it the
//   clearing: two kernels on one stream do not overlap. Two buffers are not enough: a peer in call i+2 may already
//   write while we, in i+1, still clear. Our call i+1 clears as many bytes as call i wrote, which is remembered on
//   the device, since shapes change. Header words alternate by the parity of e; where a peer has run ahead through
//   other ops and overwritten one, the newer word counts as come.
// Live (no one waits for ever). A block pushes all it has before it waits, and blocks start in order on every rank,
//   so the lowest unfinished block anywhere gets its data. All waits are bounded by a Patience. A block stores no sum
//   before every peer's header has come and agrees about what is called: a rank that calls something else is named,
//   and the outputs are NaN. Ranks whose data_threads differ need the whole grid resident: 256 KiB are 64 blocks of
//   288 threads.
//
// `done` (what lets peers overwrite, in later calls, what we have read in this one or before) is raised at the start:
// earlier calls have ended, and this one reads nothing from the arena but the sentinel region, which protects itself.
#include <cuda_runtime.h>

#include "api.h"
#include "tpo/sentinel.cuh"
#include "tpo/sentinel_launch.cuh"

namespace tpo {
namespace {

constexpr int kWatchers = 32;      // one warp a block speaks with the peers about the call; all other threads move data
constexpr int kDataThreads = 256;  // unless the caller knows better
constexpr int kMaxDataThreads = 512;
constexpr int64_t kOpAllReduce = 3;  // in the record

// The parameters are TpoAllReduceArgs (api.h), as they came.
__device__ __forceinline__ int data_threads() { return blockDim.x - kWatchers; }
__device__ __forceinline__ bool is_watcher() { return threadIdx.x < kWatchers; }
// ---- phases of the data threads: each owns the vector of its index ------------------------------------------------

__device__ __forceinline__ int own_index() { return blockIdx.x * data_threads() + threadIdx.x - kWatchers; }

// Send the vector to our slot at every peer, the next rank first, so that ranks do not all hit the same one.
template <int kWorld>
__device__ __forceinline__ void push(const TpoAllReduceArgs& args, const Call& call, int index, Vec own) {
#pragma unroll
  for (int turn = 1; turn < kWorld; ++turn) {
    const int peer = (args.rank + turn) % kWorld;
    push_relaxed(slot(args, call.base[peer], call.buffer, args.rank) + int64_t{kVecBytes} * index, own);
  }
}

// ---- the kernel ---------------------------------------------------------------------------------------------------

template <typename Element, int kWorld>
__global__ void __launch_bounds__(kMaxDataThreads + kWatchers)
    all_reduce_one_shot_sentinel(const __grid_constant__ TpoAllReduceArgs args) {
  __shared__ Call call;
  const int index = own_index();
  const bool has_data = !is_watcher() && index < vecs_of(args.n_elems);

  // 0. fetch: x and the call's words come in one memory latency
  Vec own = splat(0);
  if (is_watcher()) read_call(args, &call);
  if (has_data) own = without_negative_zero(load_vec(args.x, index, args.n_elems));
  __syncthreads();

  Status status = kOk;
  Vec total = splat(kNan);
  if (is_watcher()) {
    status = watch(args, call, kOpAllReduce, vecs_of(args.n_elems));
  } else if (!call.failed) {
    // 1. push, then 2. clear while the data travels, then 3. receive and add
    if (has_data) push<kWorld>(args, call, index, own);
    clear_stale(args, call, kWorld, index, gridDim.x * data_threads());
    if (has_data) status = receive_and_add<Element, kWorld>(args, call, kOpAllReduce, index, own, &total);
  }
  // 4. store, once the headers are known to agree too
  const bool agreed = __syncthreads_and(status == kOk);
  if (has_data) store_vec(args.out, index, args.n_elems, agreed ? total : splat(kNan));
  // 5. all of out, if this call failed here; if the group had failed before it, every block knows by itself
  if (!agreed && !call.failed) spoil(args.out, args.n_elems);
}

// ---- the launcher -------------------------------------------------------------------------------------------------

using Kernel = void (*)(TpoAllReduceArgs);

template <typename Element>
Kernel kernel_for(int world_size) {
  static constexpr Kernel kernels[kMaxWorld] = {
      all_reduce_one_shot_sentinel<Element, 1>, all_reduce_one_shot_sentinel<Element, 2>,
      all_reduce_one_shot_sentinel<Element, 3>, all_reduce_one_shot_sentinel<Element, 4>,
      all_reduce_one_shot_sentinel<Element, 5>, all_reduce_one_shot_sentinel<Element, 6>,
      all_reduce_one_shot_sentinel<Element, 7>, all_reduce_one_shot_sentinel<Element, 8>};
  return kernels[world_size - 1];
}

}  // namespace
}  // namespace tpo

#pragma GCC visibility push(default)

extern "C" int tpo_all_reduce_one_shot_sentinel(const TpoAllReduceArgs* args, void* cuda_stream) {
  using namespace tpo;
  const int threads = args->data_threads ? args->data_threads : kDataThreads;
  const bool fits =
      args->n_elems >= 0 && args->n_elems <= args->sentinel_bytes / 2 && args->sentinel_bytes % kVecBytes == 0;
  const bool known = args->world_size >= 1 && args->world_size <= kMaxWorld && args->rank >= 0 &&
                     args->rank < args->world_size && (args->dtype == 0 || args->dtype == 1);
  const bool shaped = threads > 0 && threads <= kMaxDataThreads && threads % 32 == 0;
  if (!fits || !known || !shaped) return cudaErrorInvalidValue;
  if (args->n_elems == 0) return cudaSuccess;
  const Kernel kernel = args->dtype == 0 ? kernel_for<Bf16>(args->world_size) : kernel_for<Fp16>(args->world_size);
  const dim3 blocks((vecs_of(args->n_elems) + threads - 1) / threads);
  void* parameters[] = {const_cast<TpoAllReduceArgs*>(args)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(threads + kWatchers), parameters, 0,
                          static_cast<cudaStream_t>(cuda_stream));
}

extern "C" int tpo_prepare(int world_size) {
  using namespace tpo;
  if (world_size < 1 || world_size > kMaxWorld) return cudaErrorInvalidValue;
  return load({kernel_for<Bf16>(world_size), kernel_for<Fp16>(world_size)});
}

#pragma GCC visibility pop
