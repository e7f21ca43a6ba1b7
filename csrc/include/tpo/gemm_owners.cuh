// Who owns which tiles of a sum over ranks, and the order in which a block computes them.
#pragma once

#include "api.h"
#include "tpo/gemm_tile.cuh"

namespace tpo {

// A tile that a block computes. Tiles are numbered within their owner, and blocks of a cluster have neighbouring numbers.
struct Work {
  int owner;
  int tile;     // 0 .. tiles_per_owner * kCluster - 1
  Tile in_sum;  // where it lies in the owner's out
  int row_a;    // its first row in a
};

// Rank r owns the rows [r * rows_per_owner, (r + 1) * rows_per_owner) of M. An owner without rows has its first tile all
// the same, of zeros that nobody stores: every rank hears from every peer in every call, on which other kernels rely.
struct RowOwners {
  TileGrid grid;  // of one owner
  int M, rows_per_owner;

  __host__ __device__ int tiles_per_owner() const { return grid.tiles(); }

  template <typename Shape>
  __device__ __forceinline__ bool find(int owner, int number, uint32_t rank_in_cluster, Work* work) const {
    work->owner = owner;
    work->tile = number * Shape::kCluster + static_cast<int>(rank_in_cluster);
    work->in_sum = tile_of<Shape>(grid, number, rank_in_cluster);
    work->row_a = owner * rows_per_owner + work->in_sum.row;
    return number == 0 || tile_of<Shape>(grid, number, 0).row < rows_of(owner);  // equal in the blocks of a cluster
  }

  __host__ __device__ int rows_of(int owner) const {
    const int rows = M - owner * rows_per_owner;
    return rows < 0 ? 0 : rows < rows_per_owner ? rows : rows_per_owner;
  }
};

// The tiles of the whole product are dealt out in runs of the order in which they are walked. Rank 0 has one at least: each
// rank gets its sum, which rank 0 has sent after it has heard from every other.
struct TileOwners {
  TileGrid grid;
  int run;

  __host__ __device__ int tiles_per_owner() const { return run; }

  template <typename Shape>
  __device__ __forceinline__ bool find(int owner, int number, uint32_t rank_in_cluster, Work* work) const {
    const int tile_id = owner * run + number;
    if (tile_id >= grid.tiles()) return false;
    work->owner = owner;
    work->tile = number * Shape::kCluster + static_cast<int>(rank_in_cluster);
    work->in_sum = tile_of<Shape>(grid, tile_id, rank_in_cluster);
    work->row_a = work->in_sum.row;
    return true;
  }
};

// Between two ranks: both compute every tile of the whole product, in one order. Rank 0 counts as the owner.
struct SharedTiles {
  TileGrid grid;
};

// What is computed in a step: which tile (`number`) of the rank that comes how many after ours (returned; world_size:
// ourselves). run: tiles of an owner.
// lead = 0: all tiles of the next rank, then of the one after it, ..., our own last.
// Else so many of each peer's, then in turn one of each peer's and one of our own, then what is left of our own: pushes are
// spread over the whole call.
// wave: steps that are computed at a time. Where it is a multiple of world_size, a block would always compute for the same
// rank: from wave to wave those of a round change places, so that each block pushes and adds by turns.
// In any case our own tile n stands behind the tile n that any peer computes for us, in steps that all ranks count alike,
// though their waves may differ: a round is behind by `lead` rounds, at least one.
__host__ __device__ __forceinline__ int turn_of(int step, int run, int world_size, int lead, int wave, int* number) {
  const int peers = world_size - 1;
  if (lead == 0 || lead >= run) {
    *number = step % run;
    return 1 + step / run;
  }
  if (step < lead * peers) {
    *number = step / peers;
    return 1 + step % peers;
  }
  step -= lead * peers;
  const int rounds = run - lead;
  if (step >= rounds * world_size) {
    *number = step - rounds * peers;
    return world_size;
  }
  const int round = step / world_size;
  const int shift = wave % world_size == 0 ? round * world_size / wave : 0;
  const int turn = 1 + (step + shift) % world_size;
  *number = round + (turn == world_size ? 0 : lead);
  return turn;
}

// Steps of a call, in all blocks together. Where owners have unequal numbers of tiles, nothing is computed in some.
template <typename Owners>
__host__ __device__ __forceinline__ int steps_of(const Owners& owners, int world_size) {
  return world_size * owners.tiles_per_owner();
}

__host__ __device__ __forceinline__ int steps_of(const SharedTiles& tiles, int) { return tiles.grid.tiles(); }

template <typename Shape, typename Owners>
__device__ __forceinline__ bool find_step(const Owners& owners, const TpoGemmCollectiveArgs& args, int step, int wave,
                                          uint32_t rank_in_cluster, Work* work) {
  int number;
  const int turn = turn_of(step, owners.tiles_per_owner(), args.world_size, args.lead_tiles, wave, &number);
  return owners.template find<Shape>((args.rank + turn) % args.world_size, number, rank_in_cluster, work);
}

template <typename Shape>
__device__ __forceinline__ bool find_step(const SharedTiles& tiles, const TpoGemmCollectiveArgs&, int step, int,
                                          uint32_t rank_in_cluster, Work* work) {
  work->owner = 0;
  work->tile = step * Shape::kCluster + static_cast<int>(rank_in_cluster);
  work->in_sum = tile_of<Shape>(tiles.grid, step, rank_in_cluster);
  work->row_a = work->in_sum.row;
  return true;
}

// The tiles of a block, in the same order for each of its roles.
template <typename Shape, typename Owners>
class Itinerary {
 public:
  __device__ Itinerary(const Owners& owners, const TpoGemmCollectiveArgs& args, uint32_t rank_in_cluster)
      : owners_(owners), args_(args), rank_in_cluster_(rank_in_cluster), step_(blockIdx.x / Shape::kCluster) {}

  __device__ __forceinline__ bool next(Work* work) {
    bool found = false;
    while (!found && !is_over()) {
      found = find_step<Shape>(owners_, args_, step_, clusters(), rank_in_cluster_, work);
      step_ += clusters();
    }
    return found;
  }

  // No other tile comes. Where it is false, steps may be left in which no owner has a tile.
  __device__ __forceinline__ bool is_over() const { return step_ >= steps_of(owners_, args_.world_size); }

 private:
  __device__ __forceinline__ int clusters() const { return gridDim.x / Shape::kCluster; }

  const Owners& owners_;
  const TpoGemmCollectiveArgs& args_;
  uint32_t rank_in_cluster_;
  int step_;
};

}  // namespace tpo
