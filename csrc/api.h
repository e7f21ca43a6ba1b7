/* The whole C interface of libtpo_kernels.so. Plain C types; pointers and sizes are trusted: the ops check them.
 *
 * Launchers return a cudaError_t as int, 0 for success; tpo_error_string() names it. They enqueue on `cuda_stream` of
 * the calling thread's current device, allocate nothing, synchronise nothing, and may be captured in a CUDA graph.
 * The structs below are mirrored in Python, beside each launcher: a change to any raises TPO_ABI_VERSION in both.
 */
#pragma once

#include <stdint.h>

#define TPO_ABI_VERSION 10

#ifdef __cplusplus
extern "C" {
#endif

/* One symmetric arena of a group, and one call on it; the protocol: kernels/all_reduce_one_shot_sentinel.cu. */
typedef struct TpoAllReduceArgs {
  const void* x;             /* n_elems elements of this rank */
  void* out;                 /* n_elems elements, the sum over ranks; may be x itself, must not overlap it otherwise */
  const int64_t* base_table; /* device, world_size addresses: the arena of each rank as mapped in this process */
  int64_t* control;          /* device, words of this rank alone: see TpoControl */
  int64_t* record;           /* pinned host, device address; where a failure is described: see TpoRecord */
  int64_t n_elems;           /* any number; 2 * n_elems, rounded up to 16, must not exceed sentinel_bytes */
  int64_t sentinel_offset;   /* arena: 3 buffers x world_size slots of sentinel_bytes, all words 0x80008000 at first */
  int64_t sentinel_bytes;    /* one slot; a multiple of 16 */
  int64_t header_offset;     /* arena: word of source s and parity p at header_offset + (p * world_size + s) * 8 */
  int64_t done_offset;       /* arena: word of source s, epoch << 16, at done_offset + s * 8 */
  int64_t timeout_ns;        /* how long a wait may last; 0: for ever */
  int64_t call_hash;         /* 16 bits; equal on all ranks if they call the same thing */
  int32_t rank;
  int32_t world_size;   /* 1..8 */
  int32_t dtype;        /* 0 bf16, 1 fp16 */
  int32_t data_threads; /* of a block, one vector of 16 bytes each: a multiple of 32 up to 512; 0: chosen */
} TpoAllReduceArgs;

/* An all-reduce, a residual and an RMS norm; kernels/all_reduce_one_shot_sentinel_add_rms_norm.cu. All but pointers must
 * be equal on all ranks. */
typedef struct TpoAllReduceNormArgs {
  TpoAllReduceArgs sum; /* x: M x H; out: y, may be x itself; n_elems: M * H; data_threads is not looked at */
  const void* residual; /* M x H */
  const void* weight;   /* H elements */
  void* new_residual;   /* M x H; may be residual itself */
  float eps;
  int32_t M;
  int32_t H;              /* up to 8192; M * H * 2, with H rounded up to 8, must not exceed sentinel_bytes */
  int32_t launched_ahead; /* not 0: its blocks may come before the kernel before it on the stream has ended, and wait */
} TpoAllReduceNormArgs;

/* One reduce-scatter of elements; kernels/reduce_scatter_one_shot_sentinel.cu. */
typedef struct TpoReduceScatterArgs {
  TpoAllReduceArgs sum;   /* x: n_elems; out: this rank's, overlaps x nowhere; 2 * part, rounded up to 16, at most
                             sentinel_bytes; data_threads is not looked at */
  int64_t part;           /* elements that a rank owns, the last ones fewer; equal on all ranks */
  int32_t launched_ahead; /* 1: may begin, and then wait, while the kernel before it on the stream still runs */
} TpoReduceScatterArgs;

/* One GEMM + all-reduce for few rows; kernels/gemm_all_reduce_one_shot_sentinel.cu. All but a, b, bias, out and `start`
 * must be equal on all ranks. */
typedef struct TpoGemmAllReduceDecodeArgs {
  TpoAllReduceArgs sum; /* out: M x N, contiguous; n_elems: M * N; x and data_threads are not looked at */
  const void* a;        /* M x K of this rank; 16-byte aligned */
  const void* b;        /* N x K of this rank; 16-byte aligned */
  const void* bias;     /* N elements, or null; any alignment */
  int64_t a_stride;     /* elements between rows, multiples of 8 */
  int64_t b_stride;
  int32_t M, N, K;   /* M up to 128; M * N * 2, with N rounded up to tile_rows, must not exceed sentinel_bytes */
  int32_t tile_rows; /* of b, of a tile: 64, or 128 with M up to 64 */
  int32_t splits;    /* parts of K, one a block of a cluster: 1, 2, 4 or 8 */
  int32_t stages;    /* of 64 elements of K, 3..32 as far as shared memory reaches; 0: so that an SM holds two blocks */
  int32_t start;     /* TpoStart */
} TpoGemmAllReduceDecodeArgs;

/* How a call begins, seen from the kernels before it on the stream. */
enum TpoStart {
  TPO_START_IN_ORDER = 0,       /* after they have ended */
  TPO_START_LAUNCHED_AHEAD = 1, /* its blocks may come earlier, and then wait */
  TPO_START_WEIGHTS_AHEAD = 2   /* and load of b meanwhile, which none of these kernels may write */
};

/* Indices into `control`, which starts as zeros. */
enum TpoControl {
  TPO_CONTROL_EPOCH = 0,           /* number of the last call of the group on this rank, whatever its kernel */
  TPO_CONTROL_ARRIVED = 1,         /* blocks of the running call that have read the words here; 0 between calls */
  TPO_CONTROL_SENTINEL_BUFFER = 2, /* buffer of the next call of the sentinel kernel: 0, 1, 2, 0, ... */
  TPO_CONTROL_SENTINEL_BYTES = 3,  /* bytes a slot held in the previous one */
  TPO_CONTROL_FAILED = 4,          /* not 0: every wait ends at once, outputs are NaN */
  TPO_CONTROL_REPORTER = 5,        /* 0 until one thread has taken it upon itself to write the record */
  TPO_CONTROL_LEFT = 6,            /* blocks of the running call that have ended with `leave` */
  TPO_CONTROL_STAGED = 7,          /* the last call that ended with `leave`: its `done` lets peers use staging again */
  TPO_CONTROL_TURNS_BEGUN = 16,    /* turns of sending that blocks have taken, in all calls */
  TPO_CONTROL_TURNS_ENDED = 17     /* the same number between calls */
};

/* Indices into `record`, which starts as zeros. */
enum TpoRecord {
  TPO_RECORD_ABORT = 0, /* written by the host: bit 0 ends all waits, bit TPO_RECORD_ABORT_PEER + r those for rank r */
  TPO_RECORD_STATE = 1, /* 0 nothing, 2 complete */
  TPO_RECORD_CODE = 2,  /* TpoFailure */
  TPO_RECORD_OP = 3,    /* 1 gemm_all_reduce, 2 gemm_reduce_scatter, 3 all_reduce; with a norm behind it: 4 and 5 */
  TPO_RECORD_RANK = 4,
  TPO_RECORD_PEER = 5,
  TPO_RECORD_TILE = 6,
  TPO_RECORD_WANTED = 7, /* the header word that was waited for: epoch << 16 | call hash */
  TPO_RECORD_SEEN = 8    /* the peer's header word as last seen */
};

enum { TPO_RECORD_ABORT_PEER = 8 }; /* a bit of the abort word, not an index */

enum TpoFailure { TPO_FAILURE_TIMEOUT = 1, TPO_FAILURE_MISMATCH = 2, TPO_FAILURE_ABORTED = 3 };

/* out[M, N] = a[M, K] @ b[N, K].T (+ bias); kernels/gemm.cu. Strides in elements, multiples of 8 and not less than a row;
 * a, b, out 16-byte aligned. out overlaps no input. */
typedef struct TpoGemmArgs {
  const void* a;
  const void* b;
  void* out;
  const void* bias; /* N elements, 4-byte aligned; null: none */
  int64_t a_stride;
  int64_t b_stride;
  int64_t out_stride;
  int32_t M;
  int32_t N;          /* even */
  int32_t K;          /* at least 1 */
  int32_t dtype;      /* 0 bf16, 1 fp16 */
  int32_t schedule;   /* TpoGemmSchedule; any gives the same bits */
  int32_t group_rows; /* rows of cluster tiles that are walked through together; at least 1 */
} TpoGemmArgs;

/* Tile of a block; PAIR: two blocks share their columns of b; QUAD: two by two blocks share b, and a; ROW: two blocks share
 * their rows of a; PING_PONG: see tpo/gemm_block.cuh. The tiles of a pair or a quad together have 256 rows (ping-pong:
 * 128). TWO_STAGINGS: see tpo/gemm_collective.cuh. */
enum TpoGemmSchedule {
  TPO_GEMM_128X256_PAIR = 0,
  TPO_GEMM_PING_PONG_64X256_PAIR = 1, /* tpo_gemm alone */
  TPO_GEMM_128X128_PAIR = 2,
  TPO_GEMM_128X128_PAIR_TWO_STAGINGS = 3, /* not tpo_gemm, and so from here on */
  TPO_GEMM_128X128_ROW_TWO_STAGINGS = 4,  /* reduce-scatter alone */
  TPO_GEMM_128X64_ROW_TWO_STAGINGS = 5,   /* reduce-scatter alone */
  TPO_GEMM_128X256_PAIR_ADD =
      6, /* tpo_gemm_all_reduce_one_shot and tpo_gemm_reduce_scatter_add alone, as those below */
  TPO_GEMM_128X128_PAIR_ADD = 7,             /* all-reduce alone */
  TPO_GEMM_128X128_PAIR_TWO_STAGINGS_ADD = 8 /* reduce-scatter alone */
};

/* What a thread of a block did, for how long and for which tile of whom; clocks as %globaltimer has them. Zeros: nothing. */
typedef struct TpoTraceInterval {
  int64_t begin_ns;
  int64_t end_ns;
  int32_t step; /* TpoTraceStep */
  int32_t owner;
  int32_t tile;
  int32_t unused;
} TpoTraceInterval;

enum TpoTraceRole {
  TPO_TRACE_CONSUMER = 0, /* the first of the warpgroups that multiply */
  TPO_TRACE_COURIER = 1,
  TPO_TRACE_COLLECTOR = 2, /* all-reduce only */
  TPO_TRACE_FETCHER = 3,   /* two stagings only */
  TPO_TRACE_ROLES = 4
};

enum TpoTraceStep {
  TPO_TRACE_MULTIPLY = 1,
  TPO_TRACE_AWAIT_STAGING = 2, /* consumer, fetcher: the tile before is still being read from there */
  TPO_TRACE_AWAIT_PARTIAL = 3, /* consumer: it is not in staging yet */
  TPO_TRACE_ADD = 4,
  TPO_TRACE_STAGE = 5,
  TPO_TRACE_AWAIT_TILE = 6, /* courier: the consumers are not there yet */
  TPO_TRACE_AWAIT_FLAG = 7, /* courier, fetcher: of a peer's partial */
  TPO_TRACE_SEND = 8,       /* courier: until it has been read from staging */
  TPO_TRACE_PUBLISH = 9,    /* courier: until it has been written, and the flag */
  TPO_TRACE_AWAIT_SUM = 10, /* collector */
  TPO_TRACE_COPY = 11,      /* collector */
  TPO_TRACE_AWAIT_TURN = 12 /* courier: other blocks are sending */
};

/* The same product, summed over ranks: kernels/gemm_reduce_scatter_push.cu, kernels/gemm_all_reduce_two_shot_push.cu. K is
 * that of one rank. gemm.out: M rows, or this rank's rows [rank * c, min(M, (rank + 1) * c)), c = ceil(M / world_size), of
 * a reduce-scatter. Offsets and bytes are of the arena, as in memory/layout.py. */
typedef struct TpoGemmCollectiveArgs {
  TpoGemmArgs gemm;
  const int64_t* base_table; /* device, world_size addresses: the arena of each rank as mapped in this process */
  int64_t* control;          /* device, words of this rank alone: see TpoControl */
  int64_t* record;           /* pinned host, device address: see TpoRecord */
  int64_t header_offset;
  int64_t done_offset;
  int64_t partial_flags_offset; /* tile_slots words each */
  int64_t result_flags_offset;
  int64_t tile_slots;
  int64_t staging_offset; /* world_size - 1 slots */
  int64_t staging_slot_bytes;
  int64_t result_offset; /* all-reduce only */
  int64_t result_bytes;
  int64_t timeout_ns; /* how long a wait may last; 0: for ever */
  int64_t call_hash;  /* 16 bits; equal on all ranks if they call the same thing */
  int32_t rank;
  int32_t world_size;  /* 2..8 */
  int32_t blocks;      /* launch at most so many; at least those of a cluster */
  int32_t lead_tiles;  /* own tiles begin after so many pairs of tiles of each peer; 0: after all. Equal on all ranks */
  int32_t piece_bytes; /* of a tile that goes to a peer, two on their way at a time: a multiple of 16, at least 256 */
  int32_t senders;     /* so many blocks send a tile at a time, in the order in which they have one; 0: all */
  int32_t start;       /* TpoStart, but not TPO_START_WEIGHTS_AHEAD */
  TpoTraceInterval* trace; /* device, zeros: blocks x TPO_TRACE_ROLES x trace_intervals; bf16 alone. Null: no trace */
  int64_t trace_intervals;
} TpoGemmCollectiveArgs;

int tpo_abi_version(void);
const char* tpo_error_string(int error);

/* Loads the kernels for groups of world_size ranks onto the calling thread's current device. To be called before the
 * first launch: CUDA would else load them then, which may wait for a running kernel that waits for us. An error says
 * why the device cannot run them, such as machine code for another architecture. */
int tpo_prepare(int world_size);

/* out = sum over ranks of x, through the sentinel region. n_elems = 0 launches nothing. */
int tpo_all_reduce_one_shot_sentinel(const TpoAllReduceArgs* args, void* cuda_stream);

/* Loads the kernels of tpo_all_reduce_one_shot_sentinel_add_rms_norm for groups of world_size ranks, 2..8. */
int tpo_all_reduce_one_shot_sentinel_add_rms_norm_prepare(int world_size);

/* new_residual = sum over ranks of x + residual; y = its RMS norm. M = 0 or H = 0 launches nothing. */
int tpo_all_reduce_one_shot_sentinel_add_rms_norm(const TpoAllReduceNormArgs* args, void* cuda_stream);

/* Loads the kernels of the next function onto the current device, as tpo_prepare; world_size from 2 on. */
int tpo_reduce_scatter_prepare(int world_size);

/* out = this rank's part of the sum over ranks of x, through the sentinel region. n_elems = 0 launches nothing. */
int tpo_reduce_scatter_one_shot_sentinel(const TpoReduceScatterArgs* args, void* cuda_stream);

/* Loads the kernels of tpo_gemm_all_reduce_decode onto the current device, and lets them have their shared memory. */
int tpo_gemm_all_reduce_decode_prepare(void);

/* out = sum over ranks of a @ b.T, plus bias, through the sentinel region. M = 0 or N = 0 launches nothing. */
int tpo_gemm_all_reduce_decode(const TpoGemmAllReduceDecodeArgs* args, void* cuda_stream);

/* Loads the kernels of tpo_gemm onto the calling thread's current device; to be called before the first launch there. */
int tpo_gemm_prepare(void);

/* M = 0 or N = 0 launches nothing. */
int tpo_gemm(const TpoGemmArgs* args, void* cuda_stream);

/* Load their kernels onto the calling thread's current device; to be called before the first launch there. */
int tpo_gemm_reduce_scatter_prepare(void);
int tpo_gemm_all_reduce_prepare(void);

/* M = 0 or N = 0 launches nothing. cudaErrorInvalidValue, too, where the arena has no room for the tiles. */
int tpo_gemm_reduce_scatter(const TpoGemmCollectiveArgs* args, void* cuda_stream);
int tpo_gemm_all_reduce(const TpoGemmCollectiveArgs* args, void* cuda_stream);

/* The same between two ranks, where the copy engine adds: kernels/gemm_all_reduce_one_shot_push.cu,
 * kernels/gemm_reduce_scatter_push_add.cu. cudaErrorInvalidValue, too, for another world_size. lead_tiles is not looked at
 * by the first. */
int tpo_gemm_all_reduce_one_shot_prepare(void);
int tpo_gemm_reduce_scatter_add_prepare(void);
int tpo_gemm_all_reduce_one_shot(const TpoGemmCollectiveArgs* args, void* cuda_stream);
int tpo_gemm_reduce_scatter_add(const TpoGemmCollectiveArgs* args, void* cuda_stream);

#ifdef __cplusplus
}
#endif
