// Launching what is built on gemm_collective.cuh.
#pragma once

#include <algorithm>

#include "tpo/gemm_collective.cuh"
#include "tpo/gemm_launch.cuh"

namespace tpo {

constexpr int kMaxWorldOfGemm = 8;

// What api.h asks of TpoGemmCollectiveArgs; room in the arena is another question.
inline bool is_sound(const TpoGemmCollectiveArgs& args) {
  return is_sound(args.gemm) && args.world_size >= 2 && args.world_size <= kMaxWorldOfGemm && args.rank >= 0 &&
         args.rank < args.world_size && args.blocks > 0 && args.lead_tiles >= 0 && args.piece_bytes >= 256 &&
         args.piece_bytes % 16 == 0 && args.senders >= 0 &&
         (args.start == TPO_START_IN_ORDER || args.start == TPO_START_LAUNCHED_AHEAD);
}

// Whether each of an owner's peers can stage its tiles, and raise a flag for each.
template <typename Shape>
bool has_room(const TpoGemmCollectiveArgs& args, int tiles_per_owner) {
  const int64_t tiles = int64_t{tiles_per_owner} * Shape::kCluster;
  return tiles * Shape::kTileBytes <= args.staging_slot_bytes && tiles * args.world_size <= args.tile_slots;
}

// out_rows: of this rank's out; none of them is stored where there are none.
template <typename Shape, typename Owners>
cudaError_t launch_collective(void (*kernel)(CollectiveParams<Owners>), CollectiveParams<Owners>* params, int out_rows,
                              cudaStream_t stream) {
  const TpoGemmArgs& gemm = params->args.gemm;
  const Matrix a{gemm.a, gemm.M, gemm.K, gemm.a_stride, gemm.dtype};
  const Matrix b{gemm.b, gemm.N, gemm.K, gemm.b_stride, gemm.dtype};
  const void* somewhere = out_rows > 0 ? gemm.out : gemm.a;  // a map of nothing cannot be made
  const Matrix out{somewhere, std::max(out_rows, 1), gemm.N, gemm.out_stride, gemm.dtype};
  if (const cudaError_t error = make_map(&params->a, a, Shape::kRowsOfALoaded)) return error;
  if (const cudaError_t error = make_map(&params->b, b, Shape::kRowsOfBLoaded)) return error;
  if (const cudaError_t error = make_map(&params->out, out, kRowsOfWarpgroup)) return error;
  params->k_blocks = divide_up(gemm.K, kTileK);
  const int tiles = steps_of(params->owners, params->args.world_size);
  const int room = std::min(params->args.blocks / Shape::kCluster, resident_clusters<Shape>(kernel));
  if (room == 0) return cudaErrorInvalidConfiguration;
  const bool ahead = params->args.start != TPO_START_IN_ORDER;
  return launch_clusters<Shape>(kernel, std::min(tiles, room), params, stream, ahead);
}

// By TpoGemmSchedule; null where a schedule is not for these kernels.
struct CollectiveVariant {
  cudaError_t (*launch[2])(const TpoGemmCollectiveArgs&, cudaStream_t);  // by dtype
  cudaError_t (*prepare[2])();
  cudaError_t (*launch_traced)(const TpoGemmCollectiveArgs&, cudaStream_t);  // bf16
  cudaError_t (*prepare_traced)();
};

// Host<Element, Shape>: how one kernel is launched and prepared.
template <template <typename, typename> class Host, typename Shape>
constexpr CollectiveVariant variant() {
  using Traced = typename Shape::Traced;
  return CollectiveVariant{{Host<Bf16, Shape>::launch, Host<Fp16, Shape>::launch},
                           {Host<Bf16, Shape>::prepare, Host<Fp16, Shape>::prepare},
                           Host<Bf16, Traced>::launch,
                           Host<Bf16, Traced>::prepare};
}

inline int launch_variant(const CollectiveVariant* variants, int count, const TpoGemmCollectiveArgs& args,
                          void* cuda_stream) {
  const int schedule = args.gemm.schedule;
  const bool known = schedule >= 0 && schedule < count && variants[schedule].launch[0] != nullptr;
  if (!known || !is_sound(args)) return cudaErrorInvalidValue;
  if (args.gemm.M == 0 || args.gemm.N == 0) return cudaSuccess;
  if (args.trace != nullptr) {
    if (args.gemm.dtype != 0 || args.trace_intervals <= 0) return cudaErrorInvalidValue;
    if (const cudaError_t error = variants[schedule].prepare_traced()) return error;
    return variants[schedule].launch_traced(args, static_cast<cudaStream_t>(cuda_stream));
  }
  return variants[schedule].launch[args.gemm.dtype](args, static_cast<cudaStream_t>(cuda_stream));
}

inline cudaError_t prepare_variants(const CollectiveVariant* variants, int count) {
  for (int i = 0; i < count; ++i) {
    for (const auto prepare : variants[i].prepare) {
      if (prepare == nullptr) continue;
      if (const cudaError_t error = prepare()) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace tpo
