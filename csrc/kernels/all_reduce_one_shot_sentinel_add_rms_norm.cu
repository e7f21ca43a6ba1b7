// The sentinel all-reduce with the residual and the RMS norm that follow it: one launch for all three.
//
//     new_residual[m, h] = sum over r of  x_r[m, h] + residual[m, h]
//     y[m, h] = new_residual[m, h] / sqrt(mean over h of new_residual[m, h]^2 + eps) * weight[h]
//
// x, residual, y, new_residual: (M, H) contiguous, weight: (H,); bf16 or fp16, any alignment, H up to 8192. y may be x,
// new_residual may be residual.
// Rounding: ranks are added in order 0..W-1 in f32, then residual in f32, one rounding to new_residual; the norm of that
//   rounded value in f32, one rounding to y. All ranks hold the same bits if residual, weight and eps are equal on them:
//   the order in which squares are added depends on H alone. An element of x that is -0.0 counts as +0.0.
// Bytes: a rank sends (W-1) * 2 * M * H, each row rounded up to 16 bytes. Meant for a few hundred KiB at most.
//
//     rank 0                                          rank 1                                          time
//     announce e to 1 (header)                        announce e to 0 (header)                         |
//     push x to slot 0 of buffer i%3 at 1             push x to slot 1 of buffer i%3 at 0              v
//     clear own buffer (i-1)%3                        clear own buffer (i-1)%3
//     poll own slot 1 until no word is a sentinel     poll own slot 0 until no word is a sentinel
//     add x, slot 1, residual                         add slot 0, x, residual
//     squares of the row, store both                  squares of the row, store both
//
// A block has one row, so it norms what it has added without asking another; two vectors a thread stay in registers.
//
// Fresh, Reuse, Live: as in all_reduce_one_shot_sentinel.cu, whose buffers, words and turns these are. What is pushed,
//   polled and cleared is counted in whole vectors, of which a row has ceil(H / 8). The kernel may be launched while
//   the one before it still runs; every thread begins with a wait for that one's end, so that two kernels on one stream
//   overlap here as little as there.
#include <cuda_runtime.h>

#include "api.h"
#include "tpo/dependent_launch.cuh"
#include "tpo/sentinel.cuh"
#include "tpo/sentinel_launch.cuh"

namespace tpo {
namespace {

constexpr int kWatchers = 32;  // one warp a block speaks with the peers about the call; all other threads move data
constexpr int kMaxDataThreads = 512;
constexpr int kVecs = 2;                 // of a thread
constexpr int64_t kOpAllReduceNorm = 5;  // in the record

using Params = TpoAllReduceNormArgs;  // api.h, as they came

// Which part of its row a data thread has: the vectors first, first + stride, ...
struct Part {
  int first, stride, row_vecs;

  __device__ explicit Part(const Params& args)
      : first(static_cast<int>(threadIdx.x) - kWatchers),
        stride(static_cast<int>(blockDim.x) - kWatchers),
        row_vecs(vecs_of(args.H)) {}
  __device__ int index(int v) const { return first + v * stride; }
  __device__ bool has(int v) const { return first >= 0 && index(v) < row_vecs; }
};

// The block's row of an (M, H) array.
__device__ __forceinline__ const void* row_of(const Params& args, const void* array) {
  return static_cast<const uint16_t*>(array) + int64_t{blockIdx.x} * args.H;
}
__device__ __forceinline__ void* row_of(const Params& args, void* array) {
  return static_cast<uint16_t*>(array) + int64_t{blockIdx.x} * args.H;
}

// ---- phases of the data threads -------------------------------------------------------------------------------------

__device__ __forceinline__ void fetch(const Params& args, const Part& part, const void* array, Vec (&into)[kVecs]) {
#pragma unroll
  for (int v = 0; v < kVecs; ++v) into[v] = part.has(v) ? load_vec(array, part.index(v), args.H) : splat(0);
}

// Where the block's row begins in a slot.
__device__ __forceinline__ int64_t row_bytes(const Part& part) {
  return int64_t{kVecBytes} * blockIdx.x * part.row_vecs;
}

// Send the vectors to our slot at every peer, the next rank first, so that ranks do not all hit the same one.
template <int kWorld>
__device__ __forceinline__ void push(const Params& args, const Call& call, const Part& part, const Vec (&own)[kVecs]) {
  const TpoAllReduceArgs& sum = args.sum;
#pragma unroll
  for (int turn = 1; turn < kWorld; ++turn) {
    const int peer = (sum.rank + turn) % kWorld;
    char* row = slot(sum, call.base[peer], call.buffer, sum.rank) + row_bytes(part);
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      if (part.has(v)) push_relaxed(row + int64_t{kVecBytes} * part.index(v), own[v]);
    }
  }
}

// Wait until the vectors v, v + 1, ..., kAtOnce of them, have come from every peer: `from` is right if the status is kOk.
template <int kWorld, int kAtOnce>
__device__ __forceinline__ Status receive(const Params& args, const Call& call, const Part& part, int v,
                                          const Vec (&own)[kVecs], Vec (&from)[kAtOnce][kWorld]) {
  const TpoAllReduceArgs& sum = args.sum;
  const char* row = slot(sum, call.base[sum.rank], call.buffer, 0) + row_bytes(part);
  Patience patience(sum.control, sum.record, sum.timeout_ns);
  Status status = kOk;
  for (int asked = -1;;) {
    int missing = -1;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const char* slots = row + int64_t{kVecBytes} * part.index(v + i);
#pragma unroll
      for (int r = 0; r < kWorld; ++r) {
        const bool is_there = r == sum.rank || !part.has(v + i);
        from[i][r] = is_there ? own[v + i] : poll_relaxed(slots + r * sum.sentinel_bytes);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int r = 0; r < kWorld; ++r) missing = holds_sentinel(from[i][r]) ? r : missing;
    }
    if (missing < 0) return kOk;
    if (status == kOk || missing != asked) {
      asked = missing;
      status = patience.spent(missing);
    } else {
      const int64_t seen = peek_relaxed(header(sum, call.base[sum.rank], call.epoch, missing));
      const int64_t wanted = call_word(call.epoch, sum.call_hash);
      report_failure(sum.control, sum.record, status,
                     Waiter{kOpAllReduceNorm, sum.rank, missing, blockIdx.x, wanted, seen});
      return status;
    }
  }
}

// ---- the norm -------------------------------------------------------------------------------------------------------

template <typename Element>
__device__ __forceinline__ float squares_of(Vec v) {
  const Wide wide = widen<Element>(v);
  const Wide square = wide * wide;
  return square.x.x + square.x.y + square.y.x + square.y.y + square.z.x + square.z.y + square.w.x + square.w.y;
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename Element, int kWorld>
__global__ void __launch_bounds__(kMaxDataThreads + kWatchers)
    all_reduce_one_shot_sentinel_add_rms_norm(const __grid_constant__ Params args) {
  __shared__ Call call;
  __shared__ float of_warps[kMaxDataThreads / 32];
  constexpr int kAtOnce = kWorld > 6 ? 1 : kVecs;  // vectors that are polled together, as far as registers reach
  const Part part(args);
  const bool is_watcher = part.first < 0;
  wait_for_kernels_before();

  // 0. fetch: all inputs and the call's words come in one memory latency
  Vec own[kVecs], residual[kVecs], weight[kVecs];
  if (is_watcher) read_call(args.sum, &call);
  fetch(args, part, row_of(args, args.sum.x), own);
  fetch(args, part, row_of(args, args.residual), residual);
  fetch(args, part, args.weight, weight);
#pragma unroll
  for (int v = 0; v < kVecs; ++v) own[v] = without_negative_zero(own[v]);
  __syncthreads();

  Status status = kOk;
  Vec hidden[kVecs];  // new_residual
  if (is_watcher) {
    status = watch(args.sum, call, kOpAllReduceNorm, args.M * part.row_vecs);
  } else if (!call.failed) {
    // 1. push, then 2. clear while the data travels, then 3. receive, add and square
    push<kWorld>(args, call, part, own);
    clear_stale(args.sum, call, kWorld, blockIdx.x * part.stride + part.first, gridDim.x * part.stride);
    float squares = 0;
#pragma unroll
    for (int v = 0; v < kVecs && status == kOk; v += kAtOnce) {
      Vec from[kAtOnce][kWorld];
      status = receive<kWorld, kAtOnce>(args, call, part, v, own, from);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        hidden[v + i] = narrow<Element>(sum_wide<Element, kWorld>(from[i]) + widen<Element>(residual[v + i]));
        squares += squares_of<Element>(hidden[v + i]);
      }
    }
    squares = sum_of_warp(squares);
    if (part.first % 32 == 0) of_warps[part.first / 32] = squares;
  }
  // 4. norm and store, once the headers are known to agree too
  const bool agreed = __syncthreads_and(status == kOk) && !call.failed;
  float squares = 0;
  for (int warp = 0; warp < part.stride / 32; ++warp) squares += of_warps[warp];
  const float scale = rsqrtf(__fdividef(squares, static_cast<float>(args.H)) + args.eps);
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (!part.has(v)) continue;
    const Vec y = narrow<Element>(widen<Element>(hidden[v]) * scale * widen<Element>(weight[v]));
    store_vec(row_of(args, args.new_residual), part.index(v), args.H, agreed ? hidden[v] : splat(kNan));
    store_vec(row_of(args, args.sum.out), part.index(v), args.H, agreed ? y : splat(kNan));
  }
  // 5. all of both, if this call failed here; if the group had failed before it, every block knows by itself
  if (!agreed && !call.failed) {
    spoil(args.sum.out, args.sum.n_elems);
    spoil(args.new_residual, args.sum.n_elems);
  }
}

// ---- the launcher ---------------------------------------------------------------------------------------------------

using Kernel = void (*)(Params);

template <typename Element>
Kernel kernel_for(int world_size) {
  static constexpr Kernel kernels[kMaxWorld - 1] = {
      all_reduce_one_shot_sentinel_add_rms_norm<Element, 2>, all_reduce_one_shot_sentinel_add_rms_norm<Element, 3>,
      all_reduce_one_shot_sentinel_add_rms_norm<Element, 4>, all_reduce_one_shot_sentinel_add_rms_norm<Element, 5>,
      all_reduce_one_shot_sentinel_add_rms_norm<Element, 6>, all_reduce_one_shot_sentinel_add_rms_norm<Element, 7>,
      all_reduce_one_shot_sentinel_add_rms_norm<Element, 8>};
  return kernels[world_size - 2];
}

// What api.h asks of the arguments.
bool is_sound(const Params& args) {
  const TpoAllReduceArgs& sum = args.sum;
  const bool known = sum.world_size >= 2 && sum.world_size <= kMaxWorld && sum.rank >= 0 && sum.rank < sum.world_size &&
                     (sum.dtype == 0 || sum.dtype == 1);
  const bool shaped = vecs_of(args.H) <= kVecs * kMaxDataThreads && sum.n_elems == int64_t{args.M} * args.H;
  const int64_t slot_bytes = int64_t{kVecBytes} * args.M * vecs_of(args.H);
  return known && shaped && slot_bytes <= sum.sentinel_bytes && sum.sentinel_bytes % kVecBytes == 0;
}

}  // namespace
}  // namespace tpo

#pragma GCC visibility push(default)

extern "C" int tpo_all_reduce_one_shot_sentinel_add_rms_norm(const TpoAllReduceNormArgs* args, void* cuda_stream) {
  using namespace tpo;
  if (args->M < 0 || args->H < 0) return cudaErrorInvalidValue;
  if (args->M == 0 || args->H == 0) return cudaSuccess;
  if (!is_sound(*args)) return cudaErrorInvalidValue;
  const int threads = ((vecs_of(args->H) + kVecs - 1) / kVecs + 31) / 32 * 32;
  const int world_size = args->sum.world_size;
  const Kernel kernel = args->sum.dtype == 0 ? kernel_for<Bf16>(world_size) : kernel_for<Fp16>(world_size);
  return launch_ahead(kernel, args->M, threads + kWatchers, args->launched_ahead != 0, *args, cuda_stream);
}

extern "C" int tpo_all_reduce_one_shot_sentinel_add_rms_norm_prepare(int world_size) {
  using namespace tpo;
  if (world_size < 2 || world_size > kMaxWorld) return cudaErrorInvalidValue;
  return load({kernel_for<Bf16>(world_size), kernel_for<Fp16>(world_size)});
}

#pragma GCC visibility pop
