// Three loops over a tile, written with intrinsics for x86-64, because the compiler's code for them would
// limit the kernel's speed. Beside each is the same loop in plain C++, which is its definition and what other CPUs
// run.
#ifndef LLM_SAMPLING_CPU_SIMD_X86_H_
#define LLM_SAMPLING_CPU_SIMD_X86_H_

#include <algorithm>
#include <cstdint>

#include "tile.h"

// With LLM_SAMPLING_VERSIONS every version is compiled and the CPU chooses when the library is loaded;
// without it only the version of the build's own instruction set is compiled.
#ifdef LLM_SAMPLING_VERSIONS
#define LLM_SAMPLING_VERSION(name) __attribute__((target(name)))
#else
#define LLM_SAMPLING_VERSION(name)
#endif
#if defined(LLM_SAMPLING_VERSIONS) || defined(__AVX512F__)
#define LLM_SAMPLING_V4
#endif
#if defined(LLM_SAMPLING_VERSIONS) || (defined(__AVX2__) && !defined(__AVX512F__))
#define LLM_SAMPLING_V3
#endif
#if defined(LLM_SAMPLING_VERSIONS) || (defined(__SSE4_1__) && !defined(__AVX2__))
#define LLM_SAMPLING_V2
#endif
#if defined(LLM_SAMPLING_V4) || defined(LLM_SAMPLING_V3) || defined(LLM_SAMPLING_V2)
#include <immintrin.h>
#endif
#if defined(LLM_SAMPLING_VERSIONS) || \
    !(defined(LLM_SAMPLING_V4) || defined(LLM_SAMPLING_V3) || defined(LLM_SAMPLING_V2))
#define LLM_SAMPLING_PLAIN
#endif

namespace llm_sampling {
namespace {

// ---- band_bits: bit j of the result is set if low <= y[j] <= high ----------------------------------
// By hand because the compiler turns the loop over bits into shifts and ORs, not into compare masks.

#ifdef LLM_SAMPLING_V4
LLM_SAMPLING_VERSION("arch=x86-64-v4")
void band_bits(const float* y, float low, float high, uint64_t* inside) {
  const __m512 least = _mm512_set1_ps(low);
  const __m512 most = _mm512_set1_ps(high);
  const bool is_open = high == kInfinity;
  for (int word = 0; word < kTile / 64; ++word) {
    __mmask16 part[4];
    for (int i = 0; i < 4; ++i) {
      const __m512 x = _mm512_loadu_ps(y + word * 64 + i * 16);
      part[i] = _mm512_cmp_ps_mask(x, least, _CMP_GE_OQ);
      if (!is_open) part[i] = _mm512_mask_cmp_ps_mask(part[i], x, most, _CMP_LE_OQ);
    }
    const __mmask32 first = _mm512_kunpackw(part[1], part[0]);
    inside[word] = _mm512_kunpackd(_mm512_kunpackw(part[3], part[2]), first);
  }
}
#endif

#ifdef LLM_SAMPLING_V3
LLM_SAMPLING_VERSION("arch=x86-64-v3")
void band_bits(const float* y, float low, float high, uint64_t* inside) {
  const __m256 least = _mm256_set1_ps(low);
  const __m256 most = _mm256_set1_ps(high);
  for (int word = 0; word < kTile / 64; ++word) {
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) {
      const __m256 x = _mm256_loadu_ps(y + word * 64 + i * 8);
      const __m256 above = _mm256_cmp_ps(x, least, _CMP_GE_OQ);
      const __m256 below = _mm256_cmp_ps(x, most, _CMP_LE_OQ);
      const int both = _mm256_movemask_ps(_mm256_and_ps(above, below));
      bits |= static_cast<uint64_t>(both) << i * 8;
    }
    inside[word] = bits;
  }
}
#endif

#ifdef LLM_SAMPLING_V2
LLM_SAMPLING_VERSION("arch=x86-64-v2")
void band_bits(const float* y, float low, float high, uint64_t* inside) {
  const __m128 least = _mm_set1_ps(low);
  const __m128 most = _mm_set1_ps(high);
  for (int word = 0; word < kTile / 64; ++word) {
    uint64_t bits = 0;
    for (int i = 15; i >= 0; --i) {
      const __m128 x = _mm_loadu_ps(y + word * 64 + i * 4);
      const __m128 both = _mm_and_ps(_mm_cmple_ps(least, x), _mm_cmple_ps(x, most));
      bits = bits << 4 | static_cast<uint64_t>(_mm_movemask_ps(both));
    }
    inside[word] = bits;
  }
}
#endif

#ifdef LLM_SAMPLING_PLAIN
LLM_SAMPLING_VERSION("default")
void band_bits(const float* y, float low, float high, uint64_t* inside) {
  for (int word = 0; word < kTile / 64; ++word) {
    const float* x = y + word * 64;
    uint64_t bits = 0;
    for (int j = 0; j < 64; ++j) {
      bits |= static_cast<uint64_t>((x[j] >= low) & (x[j] <= high)) << j;
    }
    inside[word] = bits;
  }
}
#endif

// ---- tile_maxima: the maximum of each stripe of a tile, NaN ignored ---------------------------------
// It also adds the tile's logits to the 2 * kStripes elements of `sums`, one of which becomes NaN if a logit
// is NaN. By hand because the compiler loads each logit twice, and loads limit the speed of this pass.

#ifdef LLM_SAMPLING_V4
LLM_SAMPLING_VERSION("arch=x86-64-v4")
void tile_maxima(const float* y, float* stripe_max, float* sums) {
  static_assert(kStripes == 16, "a stripe is a lane of a 512-bit vector");
  const __m512 nothing = _mm512_set1_ps(-kInfinity);
  __m512 top[4] = {nothing, nothing, nothing, nothing};
  __m512 sum[2] = {_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16)};
  for (int begin = 0; begin < kTile; begin += 64) {
    __m512 x[4];
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_loadu_ps(y + begin + i * 16);
      asm("" : "+v"(x[i]));                  // loaded once, into a register, for both uses
      top[i] = _mm512_max_ps(x[i], top[i]);  // top[i] if x[i] is NaN
    }
    sum[0] = _mm512_add_ps(sum[0], _mm512_add_ps(x[0], x[1]));
    sum[1] = _mm512_add_ps(sum[1], _mm512_add_ps(x[2], x[3]));
  }
  const __m512 first = _mm512_max_ps(top[0], top[1]);
  _mm512_storeu_ps(stripe_max, _mm512_max_ps(first, _mm512_max_ps(top[2], top[3])));
  _mm512_storeu_ps(sums, sum[0]);
  _mm512_storeu_ps(sums + 16, sum[1]);
}
#endif

INLINE void plain_tile_maxima(const float* y, float* stripe_max, float* sums) {
  alignas(64) float top[kStripes * 2];
  for (int j = 0; j < kStripes * 2; ++j) top[j] = -kInfinity;
  for (int k = 0; k < kTile; k += kStripes * 8) {  // four vectors at once, in memory order
    for (int j = 0; j < kStripes * 2; ++j) {
      const float x0 = y[k + j];
      const float x1 = y[k + j + kStripes * 2];
      const float x2 = y[k + j + kStripes * 4];
      const float x3 = y[k + j + kStripes * 6];
      float best = top[j];
      best = x0 > best ? x0 : best;
      best = x1 > best ? x1 : best;
      best = x2 > best ? x2 : best;
      best = x3 > best ? x3 : best;
      top[j] = best;
      sums[j] += (x0 + x1) + (x2 + x3);
    }
  }
  for (int j = 0; j < kStripes; ++j) stripe_max[j] = std::max(top[j], top[j + kStripes]);
}

#ifdef LLM_SAMPLING_V3
LLM_SAMPLING_VERSION("arch=x86-64-v3")
void tile_maxima(const float* y, float* stripe_max, float* sums) {
  plain_tile_maxima(y, stripe_max, sums);
}
#endif

#if defined(LLM_SAMPLING_VERSIONS) || !(defined(LLM_SAMPLING_V4) || defined(LLM_SAMPLING_V3))
LLM_SAMPLING_VERSION("default")
void tile_maxima(const float* y, float* stripe_max, float* sums) {
  plain_tile_maxima(y, stripe_max, sums);
}
#endif

// ---- masked_tile_maxima: tile_maxima of the allowed tokens alone, as if the others were -inf ---------
// By hand because the compiler's code for testing 32 bits takes longer than the maxima.

#ifdef LLM_SAMPLING_V4
LLM_SAMPLING_VERSION("arch=x86-64-v4")
void masked_tile_maxima(const float* y, const uint32_t* allowed, float* stripe_max, float* sums) {
  const __m512 nothing = _mm512_set1_ps(-kInfinity);
  __m512 top[2] = {nothing, nothing};
  __m512 sum[2] = {_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16)};
  for (int word = 0; word < kMaskWords; ++word) {
    for (int i = 0; i < 2; ++i) {
      const __mmask16 bits = static_cast<__mmask16>(allowed[word] >> i * 16);
      const __m512 x = _mm512_mask_blend_ps(bits, nothing, _mm512_loadu_ps(y + word * 32 + i * 16));
      top[i] = _mm512_max_ps(x, top[i]);
      sum[i] = _mm512_add_ps(sum[i], x);
    }
  }
  _mm512_storeu_ps(stripe_max, _mm512_max_ps(top[0], top[1]));
  _mm512_storeu_ps(sums, sum[0]);
  _mm512_storeu_ps(sums + 16, sum[1]);
}
#endif

#ifdef LLM_SAMPLING_V3
LLM_SAMPLING_VERSION("arch=x86-64-v3")
void masked_tile_maxima(const float* y, const uint32_t* allowed, float* stripe_max, float* sums) {
  const __m256 nothing = _mm256_set1_ps(-kInfinity);
  const __m256i first = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  __m256i to_sign[4];  // shifts by which a token's bit becomes the sign that blendv tests
  __m256 top[4];
  __m256 sum[4];
  for (int i = 0; i < 4; ++i) {
    to_sign[i] = _mm256_sub_epi32(first, _mm256_set1_epi32(i * 8));
    top[i] = nothing;
    sum[i] = _mm256_setzero_ps();
  }
  for (int word = 0; word < kMaskWords; word += 2) {
    for (int i = 0; i < 8; ++i) {
      const __m256i bits = _mm256_set1_epi32(static_cast<int32_t>(allowed[word + i / 4]));
      const __m256 is_allowed = _mm256_castsi256_ps(_mm256_sllv_epi32(bits, to_sign[i % 4]));
      const __m256 all = _mm256_loadu_ps(y + word * 32 + i * 8);
      const __m256 x = _mm256_blendv_ps(nothing, all, is_allowed);
      top[i % 4] = _mm256_max_ps(x, top[i % 4]);  // top[i % 4] if x is NaN
      sum[i % 4] = _mm256_add_ps(sum[i % 4], x);
    }
  }
  _mm256_storeu_ps(stripe_max, _mm256_max_ps(top[0], top[2]));
  _mm256_storeu_ps(stripe_max + 8, _mm256_max_ps(top[1], top[3]));
  const __m256 both = _mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3]));
  _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), both));
}
#endif

#ifdef LLM_SAMPLING_V2
// For each byte of a mask 8 bytes: all ones where a token is banned.
struct BannedBytes {
  uint64_t of[256];

  constexpr BannedBytes() : of() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int j = 0; j < 8; ++j) {
        if ((byte >> j & 1) == 0) of[byte] |= uint64_t{0xff} << 8 * j;
      }
    }
  }
};
constexpr BannedBytes kBannedBytes;

LLM_SAMPLING_VERSION("arch=x86-64-v2")
void masked_tile_maxima(const float* y, const uint32_t* allowed, float* stripe_max, float* sums) {
  __m128 top[4];
  __m128 sum[4];
  for (int i = 0; i < 4; ++i) {
    top[i] = _mm_set1_ps(-kInfinity);
    sum[i] = _mm_loadu_ps(sums + i * 4);
  }
  alignas(16) float copy[kTile];
  if (bit_cast<uintptr_t>(y) % 16 != 0) {  // an operand in memory must be aligned
    std::copy_n(y, kTile, copy);
    y = copy;
  }
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(allowed);
  for (int word = 0; word < kMaskWords; ++word) {
    for (int i = 0; i < 8; ++i) {
      const uint64_t& eight = kBannedBytes.of[bytes[word * 4 + i / 2]];
      int32_t four;
      memcpy(&four, reinterpret_cast<const char*>(&eight) + i % 2 * 4, 4);
      const __m128 banned = _mm_castsi128_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four)));
      const __m128 x = _mm_load_ps(y + word * 32 + i * 4);
      // A banned token becomes NaN, and the maximum top[i % 4].
      top[i % 4] = _mm_max_ps(_mm_or_ps(banned, x), top[i % 4]);
      sum[i % 4] = _mm_add_ps(sum[i % 4], x);
    }
  }
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_ps(sums + i * 4, sum[i]);
    _mm_storeu_ps(stripe_max + i * 4, top[i]);
  }
}
#endif

#ifdef LLM_SAMPLING_PLAIN
LLM_SAMPLING_VERSION("default")
void masked_tile_maxima(const float* y, const uint32_t* allowed, float* stripe_max, float* sums) {
  alignas(64) float top[kStripes * 2];
  for (int j = 0; j < kStripes * 2; ++j) top[j] = -kInfinity;
  for (int word = 0; word < kMaskWords; ++word) {
    const uint32_t bits = allowed[word];
    for (int j = 0; j < kStripes * 2; ++j) {
      const float all = y[word * 32 + j];
      const float x = (bits & kBit[j]) != 0 ? all : -kInfinity;
      top[j] = x > top[j] ? x : top[j];
      sums[j] += x;
    }
  }
  for (int j = 0; j < kStripes; ++j) stripe_max[j] = std::max(top[j], top[j + kStripes]);
}
#endif

}  // namespace
}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_SIMD_X86_H_
