// Sixteen bytes at a time: eight bf16 or fp16 elements, how they travel, and how they are added.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tpo {

using Vec = uint4;  // 8 elements of 2 bytes
constexpr int kVecElems = 8;
constexpr int kVecBytes = 16;

// Two negative zeros: what a slot holds while nothing has arrived. No sender writes it, see `without_negative_zero`.
constexpr uint32_t kSentinel = 0x80008000u;
constexpr uint32_t kNan = 0x7fff7fffu;  // two NaNs, in bf16 and in fp16

__device__ __forceinline__ Vec splat(uint32_t word) { return Vec{word, word, word, word}; }

// To a peer. Relaxed, system scope: each 32-bit word arrives whole, the words of a vector in any order.
__device__ __forceinline__ void push_relaxed(void* to, Vec v) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// What a peer may be writing at this moment. Relaxed, system scope: never from a cache that the peer does not reach.
__device__ __forceinline__ Vec poll_relaxed(const void* from) {
  Vec v;
  asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

// To our own memory, in the usual weak order.
__device__ __forceinline__ void put(void* to, Vec v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ bool holds_sentinel(Vec v) {
  return v.x == kSentinel || v.y == kSentinel || v.z == kSentinel || v.w == kSentinel;
}

// -0.0 becomes +0.0, so that no word of data can be taken for the sentinel.
__device__ __forceinline__ Vec without_negative_zero(Vec v) {
  return Vec{v.x & ~__vcmpeq2(v.x, kSentinel), v.y & ~__vcmpeq2(v.y, kSentinel), v.z & ~__vcmpeq2(v.z, kSentinel),
             v.w & ~__vcmpeq2(v.w, kSentinel)};
}

__device__ __forceinline__ bool is_aligned(const void* array) {
  return reinterpret_cast<uintptr_t>(array) % kVecBytes == 0;
}

// Vector `index` of an array of n elements that starts anywhere. Elements past the end are zeros.
__device__ __forceinline__ Vec load_vec(const void* array, int index, int64_t n) {
  const uint16_t* from = static_cast<const uint16_t*>(array) + int64_t{kVecElems} * index;
  const int64_t left = n - int64_t{kVecElems} * index;
  if (left >= kVecElems && is_aligned(array)) return *reinterpret_cast<const Vec*>(from);
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < left ? from[2 * i] : 0u;
    const uint32_t high = 2 * i + 1 < left ? from[2 * i + 1] : 0u;
    word[i] = low | high << 16;
  }
  return Vec{word[0], word[1], word[2], word[3]};
}

__device__ __forceinline__ void store_vec(void* array, int index, int64_t n, Vec v) {
  uint16_t* to = static_cast<uint16_t*>(array) + int64_t{kVecElems} * index;
  const int64_t left = n - int64_t{kVecElems} * index;
  if (left >= kVecElems && is_aligned(array)) {
    *reinterpret_cast<Vec*>(to) = v;
    return;
  }
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (2 * i < left) to[2 * i] = static_cast<uint16_t>(word[i]);
    if (2 * i + 1 < left) to[2 * i + 1] = static_cast<uint16_t>(word[i] >> 16);
  }
}

// Two elements in a word, the first in its low half.
struct Bf16 {
  static __device__ __forceinline__ float2 unpack(uint32_t word) {
    return float2{__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  static __device__ __forceinline__ uint32_t pack(float2 pair) {
    const __nv_bfloat162 rounded = __float22bfloat162_rn(pair);
    return *reinterpret_cast<const uint32_t*>(&rounded);
  }
};

struct Fp16 {
  static __device__ __forceinline__ float2 unpack(uint32_t word) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
  }
  static __device__ __forceinline__ uint32_t pack(float2 pair) {
    const __half2 rounded = __float22half2_rn(pair);
    return *reinterpret_cast<const uint32_t*>(&rounded);
  }
};

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return float2{a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float2 operator*(float2 a, float2 b) { return float2{a.x * b.x, a.y * b.y}; }

// The elements of a vector in f32.
struct Wide {
  float2 x, y, z, w;
};

__device__ __forceinline__ Wide operator+(Wide a, Wide b) { return Wide{a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
__device__ __forceinline__ Wide operator*(Wide a, Wide b) { return Wide{a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }
__device__ __forceinline__ Wide operator*(Wide a, float b) {
  const float2 both{b, b};
  return a * Wide{both, both, both, both};
}

template <typename Element>
__device__ __forceinline__ Wide widen(Vec v) {
  return Wide{Element::unpack(v.x), Element::unpack(v.y), Element::unpack(v.z), Element::unpack(v.w)};
}

template <typename Element>
__device__ __forceinline__ Vec narrow(Wide v) {
  return Vec{Element::pack(v.x), Element::pack(v.y), Element::pack(v.z), Element::pack(v.w)};
}

// Sum of one vector of each rank: f32, in rank order.
template <typename Element, int kWorld>
__device__ __forceinline__ Wide sum_wide(const Vec (&from)[kWorld]) {
  Wide total = widen<Element>(from[0]);
#pragma unroll
  for (int r = 1; r < kWorld; ++r) total = total + widen<Element>(from[r]);
  return total;
}

// The same, rounded once.
template <typename Element, int kWorld>
__device__ __forceinline__ Vec sum_vecs(const Vec (&from)[kWorld]) {
  return narrow<Element>(sum_wide<Element, kWorld>(from));
}

}  // namespace tpo
