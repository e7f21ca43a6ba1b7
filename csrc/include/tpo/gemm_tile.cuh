// Where the tiles of a product lie, and how a consumer warpgroup hands one over: bias, and rounding into staging.
#pragma once

#include "tpo/gemm_block.cuh"

namespace tpo {

// Tiles are numbered by clusters: the kCluster tiles of one have one number. row_tiles, col_tiles: clusters.
struct TileGrid {
  int row_tiles, col_tiles;
  int group_rows;  // so many row_tiles are walked through together, column by column, so that b stays in L2

  __host__ __device__ int tiles() const { return row_tiles * col_tiles; }
};

struct Tile {
  int row, col;  // of its first element
};

template <typename Shape>
__device__ __forceinline__ Tile tile_of(const TileGrid& grid, int tile_id, uint32_t rank_in_cluster) {
  const int group_tiles = grid.group_rows * grid.col_tiles;
  const int first_row = tile_id / group_tiles * grid.group_rows;
  const int rows = min(grid.group_rows, grid.row_tiles - first_row);
  const int in_group = tile_id % group_tiles;
  const int row_tile = first_row + in_group % rows;
  const PlaceInCluster<Shape> place(rank_in_cluster);
  return Tile{(row_tile * Shape::kClusterRows + place.row) * Shape::kTileM,
              (in_group / rows * Shape::kClusterCols + place.col) * Shape::kTileN};
}

// bias: N elements, 4-byte aligned; the tile begins at column `col`.
template <typename Element, typename Shape>
__device__ __forceinline__ void add_bias(float (&sum)[Shape::kFragment], const void* bias, int N, int col) {
  const int own_col = col + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < Shape::kTileN / 8; ++j) {
    if (own_col + 8 * j >= N) continue;
    const float2 pair = Element::unpack(__ldg(static_cast<const uint32_t*>(bias) + own_col / 2 + 4 * j));
    sum[4 * j] += pair.x;
    sum[4 * j + 1] += pair.y;
    sum[4 * j + 2] += pair.x;
    sum[4 * j + 3] += pair.y;
  }
}

// Of this lane: where its row of 16 bytes lies in a box, for columns 16 * pair .. of the box.
__device__ __forceinline__ uint32_t fragment_offset(int pair) {
  const uint32_t lane = threadIdx.x % 32;
  return swizzled_offset(threadIdx.x / 32 % 4 * 16 + lane % 16, 2 * pair + lane / 16);
}

// Round columns 64 * chunk .. of the fragment into a box of staging. A warp writes its own 16 rows.
template <typename Element, int kFragment>
__device__ __forceinline__ void stage_chunk(const float (&sum)[kFragment], int chunk, uint32_t box) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const float* d = sum + 32 * chunk + 8 * pair;
    store_fragments(box + fragment_offset(pair), Element::pack(float2{d[0], d[1]}), Element::pack(float2{d[2], d[3]}),
                    Element::pack(float2{d[4], d[5]}), Element::pack(float2{d[6], d[7]}));
  }
}

// The way back: add what a box holds to columns 64 * chunk .. of the fragment. A warp reads its own 16 rows.
template <typename Element, int kFragment>
__device__ __forceinline__ void add_chunk(float (&sum)[kFragment], int chunk, uint32_t box) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    float* d = sum + 32 * chunk + 8 * pair;
    uint32_t words[4];
    load_fragments(words, box + fragment_offset(pair));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 added = Element::unpack(words[i]);
      d[2 * i] += added.x;
      d[2 * i + 1] += added.y;
    }
  }
}

}  // namespace tpo
