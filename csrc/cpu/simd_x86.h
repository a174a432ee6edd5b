// Two loops over a tile, written with intrinsics for x86-64, because the compiler's code for them would limit
// the kernel's speed. Beside each is the same loop in plain C++, which is its definition and what other CPUs
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
#if defined(LLM_SAMPLING_V4) || defined(LLM_SAMPLING_V3)
#include <immintrin.h>
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

#if defined(LLM_SAMPLING_VERSIONS) || !(defined(LLM_SAMPLING_V4) || defined(LLM_SAMPLING_V3))
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

}  // namespace
}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_SIMD_X86_H_
