// One-shot GEMM + all-reduce for decode, without flags: every block streams its rows of the weight once, pushes its part of
// the partial to all peers, and finds theirs in its own slots. For Hopper.
//
//     out[M, N] = sum over r of  a_r[M, K] @ b_r[N, K].T  (+ bias[N])     on every rank
//
// a: M up to 128 rows (64 with tiles of 128: beyond, registers spill), b: N rows; bf16 or fp16, rows at multiples of 16 bytes. out: contiguous, any N, same dtype.
// Rounding: f32 over K, in S parts that are added in order; one rounding to the wire dtype (the own partial too); ranks
//   added in order 0..W-1 in f32; bias; one last rounding. All ranks hold the same bits. A partial that is -0.0 counts
//   as +0.0.
// Bytes: a rank sends (W-1) * M*N*2, N rounded up to the rows of a tile. A tile is 64 or 128 rows of b by all rows of a,
//   transposed: d = b @ a.T, so that the weight has the side of 64 of the tensor cores, and a is only as wide as it is.
//
//     producer warp       computing warps             watching warp              another rank             time
//     load b             (wait for stages)            read the call                                        |
//     wait for kernels before (all warps)             announce, clear                                      v
//     load a             products of a stage
//     load a, b          ...                          await the peers' headers
//     let the next       parts of K together, round
//     kernel begin       push to slot of this rank at the peers  ------------------> poll
//                        poll own slots       <------------------------------------- push
//                        add W partials, bias, store out
//
// Who has which part of K: the S blocks of a cluster work on one tile, each on its part of K. Each then reads its share of
//   the columns from the shared memory of all of them, sums, and alone pushes, polls and stores that share.
// Weights ahead of time. Launched so (TpoStart), the kernel begins under the end of the one before, and loads of b
//   before that has ended; `b` must then be at rest, which the op sees to. All else comes after the wait: a, the words of
//   the call, the arena, out.
// Fresh, reuse: all_reduce_one_shot_sentinel.cu, whose buffers, epochs and headers are used: calls of the two may
//   alternate. There two kernels on a stream must not overlap, and here nothing before the wait touches the arena. A slot
//   holds blocks x vectors of a block; block, tile and split are equal on all ranks, being part of the plan and of the hash.
// Live (no one waits for ever). A block pushes all it has before it waits, and clusters start in order on every rank, so
//   the lowest unfinished cluster anywhere gets its data. The next kernel's blocks come only once all of ours have begun.
//   Two ranks on one device need room for both grids; they must be launched without dependence, so that no third comes.
#include <cuda_runtime.h>

#include <algorithm>

#include "api.h"
#include "tpo/cluster.cuh"
#include "tpo/dependent_launch.cuh"
#include "tpo/mbarrier.cuh"
#include "tpo/sentinel.cuh"
#include "tpo/tma.cuh"
#include "tpo/wgmma_narrow.cuh"

namespace tpo {
namespace {

constexpr int64_t kOpGemmAllReduce = 1;  // in the record
constexpr int kStageK = kBoxCols;        // elements of K in a stage: one box of b for each 64 rows, one of a
constexpr int kGroupRows = 64;           // rows of b that a warpgroup multiplies
constexpr int kMinStages = 3, kMaxStages = 32;
constexpr int kFetchedStages = 8;    // of b, beyond the ring: to L2, where the block begins ahead
constexpr int kServiceThreads = 64;  // behind the computing warps: the producer, then the watchers
constexpr int kAlignmentBytes = kSwizzleBytes;
constexpr int kSharedOfBlockPair = 233472 / 2 - 1024;  // bytes a block may have where an SM is to hold two of them
constexpr int kStaticBytes = 256;                      // no less than Call takes

struct Params {
  CUtensorMap a, b;
  TpoGemmAllReduceDecodeArgs args;
};

// kCols: rows of a, rounded up. kGroups: of 64 rows of b, one a warpgroup.
template <int kCols_, int kGroups_>
struct Shape {
  static constexpr int kCols = kCols_, kGroups = kGroups_;
  static constexpr int kTileRows = kGroupRows * kGroups;
  static constexpr int kTileVecs = kTileRows / kVecElems;  // of a row of out
  static constexpr int kDataThreads = 128 * kGroups;
  static constexpr int kThreads = kDataThreads + kServiceThreads;
  static constexpr int kBytesOfB = kTileRows * kBoxRowBytes, kBytesOfA = kCols * kBoxRowBytes;
  static constexpr int kStageBytes = kBytesOfB + kBytesOfA;
  static constexpr int kVecs = std::max(1, kCols* kTileVecs / kDataThreads);  // that a thread sums, at most
  static constexpr int kSources = std::max(1, 4 / kVecs);                     // ranks that a thread polls at a time
  static constexpr int kPitch =
      kTileRows + 4;  // f32 of a row of sums: 8 lanes that differ in row and column meet no bank twice
  static constexpr int kSumsBytes = kCols * kPitch * 4;
  static constexpr int kBlocksOfSm = kCols <= 64 ? 2 : 1;  // so that the next kernel's blocks find room beside ours
  static constexpr int kStagesForPair =
      std::min(kMaxStages, (kSharedOfBlockPair - kStaticBytes - kAlignmentBytes - 16 * kMaxStages - 16) / kStageBytes);
  static_assert(kSumsBytes <= kMinStages * kStageBytes, "the sums take the place of the first stages");

  static constexpr int shared_bytes(int stages) { return kAlignmentBytes + stages * kStageBytes + 16 * stages + 16; }
};

// Addresses in the shared window; the same in each block of a cluster.
template <typename Shape>
struct Memory {
  uint32_t ring, barriers;
  int stages;

  __device__ Memory(const void* window, int n_stages) : stages(n_stages) {
    ring = (shared_address(window) + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
    barriers = ring + stages * Shape::kStageBytes;
  }
  __device__ __forceinline__ uint32_t b(int slot) const { return ring + slot * Shape::kStageBytes; }
  __device__ __forceinline__ uint32_t a(int slot) const { return b(slot) + Shape::kBytesOfB; }
  __device__ __forceinline__ uint32_t full(int slot) const { return barriers + 16 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return barriers + 16 * slot + 8; }
  __device__ __forceinline__ uint32_t called() const { return barriers + 16 * stages; }  // the call has been read
  __device__ __forceinline__ uint32_t summed() const {
    return barriers + 16 * stages + 8;
  }  // in each block of the cluster
  __device__ __forceinline__ uint32_t sum(int col, int row) const { return ring + 4 * (col * Shape::kPitch + row); }
};

// A place in a ring whose length is not known when the kernel is compiled.
struct Place {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++slot == stages) slot = 0, parity ^= 1;
  }
};

// What this block does: stages [first, last) of K, for the tile that begins at `row` of b; then `vecs` of each row of out.
template <typename Shape>
struct Work {
  int row, first, last;
  int first_vec, vecs, vecs_log2;

  __device__ explicit Work(const TpoGemmAllReduceDecodeArgs& args) {
    const int all = (args.K + kStageK - 1) / kStageK;
    const int splits_log2 = __ffs(args.splits) - 1;
    const int part = blockIdx.x & (args.splits - 1);
    row = (blockIdx.x >> splits_log2) * Shape::kTileRows;
    first = (all * part) >> splits_log2;
    last = (all * (part + 1)) >> splits_log2;
    vecs = Shape::kTileVecs >> splits_log2;
    vecs_log2 = __ffs(vecs) - 1;
    first_vec = vecs * part;
  }
};

// ---- the producer, a thread -----------------------------------------------------------------------------------------

template <typename Shape>
__device__ __forceinline__ void init_barriers(const Memory<Shape>& memory, int splits) {
  for (int slot = 0; slot < memory.stages; ++slot) {
    barrier_init(memory.full(slot), 1);
    barrier_init(memory.empty(slot), Shape::kDataThreads / 32);
  }
  barrier_init(memory.called(), 1);
  barrier_init(memory.summed(), splits);
  publish_barrier_inits();
  publish_to_tma();  // this thread loads before it meets anybody
}

template <typename Shape>
__device__ __forceinline__ void load_b(const Params& params, const Memory<Shape>& memory, const Work<Shape>& work,
                                       int k, int slot) {
  barrier_arrive_expecting(memory.full(slot), Shape::kStageBytes);
#pragma unroll
  for (int group = 0; group < Shape::kGroups; ++group) {
    load_box(memory.b(slot) + group * kGroupRows * kBoxRowBytes, &params.b, work.row + group * kGroupRows, k * kStageK,
             memory.full(slot));
  }
}

template <typename Shape>
__device__ __forceinline__ void load_a(const Params& params, const Memory<Shape>& memory, int k, int slot) {
  load_box(memory.a(slot), &params.a, 0, k * kStageK, memory.full(slot));
}

// As much of b as there is room for, before anything else in this block.
template <typename Shape>
__device__ __forceinline__ int load_ahead(const Params& params, const Memory<Shape>& memory, const Work<Shape>& work) {
  if (params.args.start != TPO_START_WEIGHTS_AHEAD) wait_for_kernels_before();
  const int ahead = min(work.last - work.first, memory.stages);
  for (int i = 0; i < ahead; ++i) load_b(params, memory, work, work.first + i, i);
  if (params.args.start == TPO_START_WEIGHTS_AHEAD) {
    // At K=1024 this is all there is: the rest then comes from L2.
    const int last = min(work.last, work.first + ahead + kFetchedStages);
    for (int k = work.first + ahead; k < last; ++k) {
      for (int group = 0; group < Shape::kGroups; ++group) {
        fetch_box(&params.b, work.row + group * kGroupRows, k * kStageK);
      }
    }
  }
  return ahead;
}

template <typename Shape>
__device__ __forceinline__ void load_stages(const Params& params, const Memory<Shape>& memory, const Work<Shape>& work,
                                            int ahead) {
  for (int i = 0; i < ahead; ++i) load_a(params, memory, work.first + i, i);
  Place place;
  for (int k = work.first + ahead; k < work.last; ++k) {
    barrier_wait(memory.empty(place.slot), place.parity);
    load_b(params, memory, work, k, place.slot);
    load_a(params, memory, k, place.slot);
    place.advance(memory.stages);
  }
  let_next_kernel_begin();  // what it loads ahead lies behind our own loads, and hides under the exchange
}

// ---- the computing warps ----------------------------------------------------------------------------------------------

__device__ __forceinline__ void release(uint32_t empty) {
  // relaxed: says that a stage has been read, and publishes nothing
  if (threadIdx.x % 32 == 0) barrier_arrive_relaxed(empty);
}

// d = 64 rows of b times a.T, over this block's part of K.
template <typename Element, typename Shape>
__device__ __forceinline__ void multiply(const Memory<Shape>& memory, const Work<Shape>& work, int group,
                                         float (&d)[Shape::kCols / 2]) {
#pragma unroll
  for (int i = 0; i < Shape::kCols / 2; ++i) d[i] = 0.f;
  Place place;
  int before = 0;
  for (int k = work.first; k < work.last; ++k) {
    barrier_wait(memory.full(place.slot), place.parity);
    const uint64_t b = mma_operand(memory.b(place.slot) + group * kGroupRows * kBoxRowBytes);
    const uint64_t a = mma_operand(memory.a(place.slot));
    mma_pin(d);
    mma_begin();
#pragma unroll
    for (int step = 0; step < kStageK / 16; ++step) {
      mma<Element>(d, mma_operand_at(b, step), mma_operand_at(a, step), 1);
    }
    mma_end_group();
    if (k > work.first) {
      mma_wait<1>();
      release(memory.empty(before));
    }
    before = place.slot;
    place.advance(memory.stages);
  }
  mma_wait<0>();
  mma_pin(d);
}

// All computing threads of the block.
template <typename Shape>
__device__ __forceinline__ void data_barrier() {
  barrier_of_threads<1, Shape::kDataThreads>();
}

// The sums of this block's part of K, transposed, to where all blocks of the cluster find them.
template <typename Shape>
__device__ __forceinline__ void share_sums(const Memory<Shape>& memory, const TpoGemmAllReduceDecodeArgs& args,
                                           const float (&d)[Shape::kCols / 2]) {
  data_barrier<Shape>();  // the other warpgroup's products read what is overwritten here
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < Shape::kCols / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int col = 8 * i + 2 * (lane % 4) + j % 2;
      if (col < args.M) put_float(memory.sum(col, row + 8 * (j / 2)), d[4 * i + j]);
    }
  }
  data_barrier<Shape>();
  if (args.splits == 1) return;
  // The barrier puts the block's stores before the release, and whoever waits for it sees them.
  if (static_cast<int>(threadIdx.x) < args.splits) barrier_arrive_in_cluster(memory.summed(), threadIdx.x);
  barrier_wait_in_cluster(memory.summed(), 0);
}

// Which vectors are this thread's, by v < kVecs, and where they are. Computed where they are wanted, to save registers.
template <typename Shape>
struct Vecs {
  const Work<Shape>& work;
  int index;      // of the first in a slot
  uint32_t mine;  // bit v: there is such a vector, and it begins within N

  __device__ Vecs(const TpoGemmAllReduceDecodeArgs& args, const Work<Shape>& its_work) : work(its_work), mine(0) {
    const int count = args.M * work.vecs;
    index = static_cast<int>(blockIdx.x) * count + threadIdx.x;
#pragma unroll
    for (int v = 0; v < Shape::kVecs; ++v) mine |= (place(v) < count && n(v) < args.N ? 1u : 0u) << v;
  }
  __device__ __forceinline__ bool has(int v) const { return mine >> v & 1; }
  __device__ __forceinline__ int place(int v) const { return threadIdx.x + v * Shape::kDataThreads; }  // in the block
  __device__ __forceinline__ int col(int v) const { return place(v) >> work.vecs_log2; }  // row of a and of out
  __device__ __forceinline__ int row(int v) const {                                       // of the tile
    return kVecElems * (work.first_vec + (place(v) & (work.vecs - 1)));
  }
  __device__ __forceinline__ int n(int v) const { return work.row + row(v); }  // element of a row of out
  __device__ __forceinline__ int64_t offset(int v) const {                     // in a slot
    return int64_t{kVecBytes} * (index + v * Shape::kDataThreads);
  }
};

// Of the 8 elements of a vector.
struct Sum {
  float2 pair[4];

  __device__ __forceinline__ void add(float4 low, float4 high) {
    pair[0] = pair[0] + float2{low.x, low.y};
    pair[1] = pair[1] + float2{low.z, low.w};
    pair[2] = pair[2] + float2{high.x, high.y};
    pair[3] = pair[3] + float2{high.z, high.w};
  }
  template <typename Element>
  __device__ __forceinline__ void add(Vec v) {
    const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = pair[i] + Element::unpack(word[i]);
  }
  template <typename Element>
  __device__ __forceinline__ Vec rounded() const {
    return Vec{Element::pack(pair[0]), Element::pack(pair[1]), Element::pack(pair[2]), Element::pack(pair[3])};
  }
};

// This rank's partial, rounded: the parts of K in order.
template <typename Element, typename Shape>
__device__ __forceinline__ void read_partial(const Memory<Shape>& memory, const TpoGemmAllReduceDecodeArgs& args,
                                             const Vecs<Shape>& vecs, Vec (&own)[Shape::kVecs]) {
#pragma unroll
  for (int v = 0; v < Shape::kVecs; ++v) {
    if (!vecs.has(v)) continue;
    const uint32_t from = memory.sum(vecs.col(v), vecs.row(v));
    Sum sum = {};
    if (args.splits == 1) {
      sum.add(get_floats(from), get_floats(from + 16));
    } else {
      for (int part = 0; part < args.splits; ++part) {
        sum.add(get_floats_of_block(from, part), get_floats_of_block(from + 16, part));
      }
    }
    own[v] = without_negative_zero(sum.template rounded<Element>());
  }
}

// To our slot at every peer, the next rank first, so that ranks do not all hit the same one.
template <typename Shape>
__device__ __forceinline__ void push(const TpoAllReduceArgs& args, const Call& call, const Vecs<Shape>& vecs,
                                     const Vec (&own)[Shape::kVecs]) {
  for (int turn = 1; turn < args.world_size; ++turn) {
    const int peer = (args.rank + turn) % args.world_size;
    char* to = slot(args, call.base[peer], call.buffer, args.rank);
#pragma unroll
    for (int v = 0; v < Shape::kVecs; ++v) {
      if (vecs.has(v)) push_relaxed(to + vecs.offset(v), own[v]);
    }
  }
}

// Wait until all of the thread's vectors have come from the ranks that begin with `first`, as many as `from` holds.
template <typename Shape>
__device__ __forceinline__ Status receive(const TpoAllReduceArgs& args, const Call& call, int first,
                                          const Vecs<Shape>& vecs, Patience* patience,
                                          Vec (&from)[Shape::kSources][Shape::kVecs]) {
  const char* slots = slot(args, call.base[args.rank], call.buffer, first);
  const auto is_wanted = [&](int source, int v) {
    return source < args.world_size && source != args.rank && vecs.has(v);
  };
  for (Status status = kOk;;) {
    int missing = -1;
#pragma unroll
    for (int i = 0; i < Shape::kSources * Shape::kVecs; ++i) {  // all are in flight together
      const int s = i / Shape::kVecs, v = i % Shape::kVecs;
      if (is_wanted(first + s, v)) from[s][v] = poll_relaxed(slots + s * args.sentinel_bytes + vecs.offset(v));
    }
#pragma unroll
    for (int i = 0; i < Shape::kSources * Shape::kVecs; ++i) {
      const int s = i / Shape::kVecs, v = i % Shape::kVecs;
      if (is_wanted(first + s, v) && holds_sentinel(from[s][v])) missing = first + s;
    }
    if (missing < 0) return kOk;
    if (status != kOk) {
      const int64_t seen = peek_relaxed(header(args, call.base[args.rank], call.epoch, missing));
      const int64_t wanted = call_word(call.epoch, args.call_hash);
      report_failure(args.control, args.record, status,
                     Waiter{kOpGemmAllReduce, args.rank, missing, blockIdx.x, wanted, seen});
      return status;
    }
    status = patience->spent(missing);
  }
}

template <typename Element, typename Shape>
__device__ __forceinline__ Status receive_and_add(const TpoGemmAllReduceDecodeArgs& args, const Call& call,
                                                  const Vecs<Shape>& vecs, const Vec (&own)[Shape::kVecs],
                                                  Vec (&total)[Shape::kVecs]) {
  Patience patience(args.sum.control, args.sum.record, args.sum.timeout_ns);
  Sum sum[Shape::kVecs] = {};
  for (int first = 0; first < args.sum.world_size; first += Shape::kSources) {
    Vec from[Shape::kSources][Shape::kVecs];
    const Status status = receive(args.sum, call, first, vecs, &patience, from);
    if (status != kOk) return status;
#pragma unroll
    for (int i = 0; i < Shape::kSources * Shape::kVecs; ++i) {
      const int source = first + i / Shape::kVecs, v = i % Shape::kVecs;
      if (source >= args.sum.world_size || !vecs.has(v)) continue;
      sum[v].template add<Element>(source == args.sum.rank ? own[v] : from[i / Shape::kVecs][v]);
    }
  }
#pragma unroll
  for (int v = 0; v < Shape::kVecs; ++v) {
    if (!vecs.has(v)) continue;
    if (args.bias != nullptr) sum[v].template add<Element>(load_vec(args.bias, vecs.n(v) / kVecElems, args.N));
    total[v] = sum[v].template rounded<Element>();
  }
  return kOk;
}

template <typename Shape>
__device__ __forceinline__ void store(const TpoGemmAllReduceDecodeArgs& args, const Vecs<Shape>& vecs,
                                      const Vec (&total)[Shape::kVecs], bool agreed) {
#pragma unroll
  for (int v = 0; v < Shape::kVecs; ++v) {
    if (!vecs.has(v)) continue;
    uint16_t* row = static_cast<uint16_t*>(args.sum.out) + int64_t{args.N} * vecs.col(v);
    store_vec(row, vecs.n(v) / kVecElems, args.N, agreed ? total[v] : splat(kNan));
  }
}

// ---- the watching warp ------------------------------------------------------------------------------------------------

template <typename Shape>
__device__ __forceinline__ Status watch_call(const TpoGemmAllReduceDecodeArgs& args, const Memory<Shape>& memory,
                                             const Work<Shape>& work, Call* call) {
  read_call(args.sum, call);
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(memory.called());
  if (!call->failed) {
    const int lanes = 32 * gridDim.x;
    clear_stale(args.sum, *call, args.sum.world_size, 32 * blockIdx.x + threadIdx.x % 32, lanes);
  }
  return watch(args.sum, *call, kOpGemmAllReduce, static_cast<int>(gridDim.x) * args.M * work.vecs);
}

// ---- the kernel -------------------------------------------------------------------------------------------------------

template <typename Element, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksOfSm)
    gemm_all_reduce_one_shot_sentinel(const __grid_constant__ Params params) {
  extern __shared__ uint8_t window[];
  __shared__ Call call;
  static_assert(sizeof(Call) <= kStaticBytes);
  const TpoGemmAllReduceDecodeArgs& args = params.args;
  const Memory<Shape> memory(window, args.stages);
  const Work<Shape> work(args);
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) - Shape::kDataThreads / 32;  // < 0: computing
  const bool is_producer = role == 0 && threadIdx.x % 32 == 0;

  // 0. stream: before the block has met, and, if told so, before the kernel before has ended
  int ahead = 0;
  if (is_producer) {
    init_barriers(memory, args.splits);
    ahead = load_ahead(params, memory, work);
  }
  __syncwarp();
  cluster_barrier_relaxed();  // the barriers' inits have been published
  wait_for_kernels_before();  // by every thread: what it reads may be theirs, and what it writes they may still read

  Status status = kOk;
  Vec total[Shape::kVecs];
  if (role == 0) {
    if (is_producer) load_stages(params, memory, work, ahead);
  } else if (role == 1) {
    status = watch_call(args, memory, work, &call);
  } else {
    // 1. multiply, and put the parts of K together
    float d[Shape::kCols / 2];
    multiply<Element>(memory, work, threadIdx.x / 128, d);
    share_sums(memory, args, d);
    const Vecs<Shape> vecs(args, work);
    Vec own[Shape::kVecs];
    read_partial<Element>(memory, args, vecs, own);
    barrier_wait(memory.called(), 0);
    if (!call.failed) {
      // 2. push, 3. receive and add
      push(args.sum, call, vecs, own);
      status = receive_and_add<Element>(args, call, vecs, own, total);
    }
  }
  // 4. store, once the headers are known to agree too
  const bool agreed = __syncthreads_and(status == kOk) && !call.failed;
  if (role < 0) {
    store(args, Vecs<Shape>(args, work), total, agreed);
  }
  if (args.splits > 1) cluster_barrier_relaxed();  // no block ends while another reads its sums
  // 5. all of out, if this call failed here; if the group had failed before it, every block knows by itself
  if (!agreed && !call.failed) spoil(args.sum.out, args.sum.n_elems);
}

// ---- the launcher -----------------------------------------------------------------------------------------------------

using Kernel = void (*)(Params);

struct Variant {
  Kernel kernels[2];  // by dtype
  int cols, tile_rows, threads, stage_bytes, stages_for_pair;
};

template <int kCols, int kGroups>
constexpr Variant variant() {
  using S = Shape<kCols, kGroups>;
  return Variant{{gemm_all_reduce_one_shot_sentinel<Bf16, S>, gemm_all_reduce_one_shot_sentinel<Fp16, S>},
                 S::kCols,
                 S::kTileRows,
                 S::kThreads,
                 S::kStageBytes,
                 S::kStagesForPair};
}

constexpr Variant kVariants[] = {variant<8, 1>(),  variant<16, 1>(),  variant<32, 1>(),
                                 variant<64, 1>(), variant<128, 1>(), variant<8, 2>(),
                                 variant<16, 2>(), variant<32, 2>(),  variant<64, 2>()};

const Variant* variant_for(const TpoGemmAllReduceDecodeArgs& args) {
  for (const Variant& variant : kVariants) {
    if (args.M <= variant.cols && args.tile_rows == variant.tile_rows) return &variant;
  }
  return nullptr;
}

int shared_bytes(const Variant& variant, int stages) {
  return kAlignmentBytes + stages * (variant.stage_bytes + 16) + 16;
}

int tiles_of(const TpoGemmAllReduceDecodeArgs& args) { return (args.N + args.tile_rows - 1) / args.tile_rows; }

bool is_aligned_to(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// What api.h asks of the arguments.
bool is_sound(const TpoGemmAllReduceDecodeArgs& args, const Variant& variant) {
  const TpoAllReduceArgs& sum = args.sum;
  const bool known = sum.world_size >= 2 && sum.world_size <= kMaxWorld && sum.rank >= 0 && sum.rank < sum.world_size &&
                     (sum.dtype == 0 || sum.dtype == 1) && args.start >= 0 && args.start <= TPO_START_WEIGHTS_AHEAD;
  const bool strided = args.K > 0 && args.a_stride >= args.K && args.b_stride >= args.K && args.a_stride % 8 == 0 &&
                       args.b_stride % 8 == 0 && is_aligned_to(args.a, 16) && is_aligned_to(args.b, 16);
  const int splits = args.splits;
  const bool shaped = (splits == 1 || splits == 2 || splits == 4 || splits == 8) && args.stages >= kMinStages &&
                      args.stages <= kMaxStages && shared_bytes(variant, args.stages) <= 232448 - kStaticBytes;
  const int64_t slot_bytes = int64_t{tiles_of(args)} * args.tile_rows * args.M * 2;
  const bool fits = sum.n_elems == int64_t{args.M} * args.N && sum.sentinel_bytes % kVecBytes == 0 &&
                    slot_bytes <= sum.sentinel_bytes;
  return known && strided && shaped && fits;
}

}  // namespace
}  // namespace tpo

#pragma GCC visibility push(default)

extern "C" int tpo_gemm_all_reduce_decode(const TpoGemmAllReduceDecodeArgs* given, void* cuda_stream) {
  using namespace tpo;
  if (given->M < 0 || given->N < 0) return cudaErrorInvalidValue;
  if (given->M == 0 || given->N == 0) return cudaSuccess;
  const Variant* variant = variant_for(*given);
  if (variant == nullptr) return cudaErrorInvalidValue;
  Params params;
  params.args = *given;
  TpoGemmAllReduceDecodeArgs& args = params.args;
  if (args.stages == 0) args.stages = variant->stages_for_pair;
  if (!is_sound(args, *variant)) return cudaErrorInvalidValue;
  const Matrix a{args.a, args.M, args.K, args.a_stride, args.sum.dtype};
  const Matrix b{args.b, args.N, args.K, args.b_stride, args.sum.dtype};
  if (const cudaError_t error = make_map(&params.a, a, variant->cols)) return error;
  if (const cudaError_t error = make_map(&params.b, b, kGroupRows)) return error;

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(args.splits), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = args.start != TPO_START_IN_ORDER;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(tiles_of(args) * args.splits);
  config.blockDim = dim3(variant->threads);
  config.dynamicSmemBytes = shared_bytes(*variant, args.stages);
  config.stream = static_cast<cudaStream_t>(cuda_stream);
  config.attrs = attributes;
  config.numAttrs = args.start == TPO_START_IN_ORDER ? 1 : 2;
  void* parameters[] = {&params};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(variant->kernels[args.sum.dtype]), parameters);
}

extern "C" int tpo_gemm_all_reduce_decode_prepare(void) {
  using namespace tpo;
  for (const Variant& variant : kVariants) {
    for (const Kernel kernel : variant.kernels) {  // which loads it, too
      const cudaError_t error = cudaFuncSetAttribute(
          reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, 232448 - kStaticBytes);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

#pragma GCC visibility pop
