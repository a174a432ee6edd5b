// Two loops over a tile that are written by hand for x86-64, since the compiler's own code for them
// bounds the kernel. Each has its definition beside it, in plain C++, which all other CPUs run.
#ifndef LLM_SAMPLING_CPU_SIMD_X86_H_
#define LLM_SAMPLING_CPU_SIMD_X86_H_

#include <algorithm>
#include <cstdint>

#include "tile.h"

// With LLM_SAMPLING_VERSIONS all versions are compiled and the CPU chooses when the library is loaded;
// without it the one that the build is for.
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

// ---- Which of a tile's values lie in a band, as bits -----------------------------------------------
// The compiler makes shifts and ORs of a loop over bits.

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

// ---- The maxima of a tile's groups -----------------------------------------------------------------
// And sums of its values, 2 * kGroups of them, added to `sums`: one is NaN if a value is. The compiler
// loads each value twice, and the pass is bound by its loads.

#ifdef LLM_SAMPLING_V4
LLM_SAMPLING_VERSION("arch=x86-64-v4")
void tile_maxima(const float* y, float* group, float* sums) {
  static_assert(kGroups == 16, "a group is a lane");
  const __m512 nothing = _mm512_set1_ps(-kInfinity);
  __m512 top[4] = {nothing, nothing, nothing, nothing};
  __m512 sum[2] = {_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16)};
  for (int begin = 0; begin < kTile; begin += 64) {
    __m512 x[4];
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_loadu_ps(y + begin + i * 16);
      asm("" : "+v"(x[i]));                  // in a register, for both of its uses
      top[i] = _mm512_max_ps(x[i], top[i]);  // the second where one is NaN
    }
    sum[0] = _mm512_add_ps(sum[0], _mm512_add_ps(x[0], x[1]));
    sum[1] = _mm512_add_ps(sum[1], _mm512_add_ps(x[2], x[3]));
  }
  const __m512 first = _mm512_max_ps(top[0], top[1]);
  _mm512_storeu_ps(group, _mm512_max_ps(first, _mm512_max_ps(top[2], top[3])));
  _mm512_storeu_ps(sums, sum[0]);
  _mm512_storeu_ps(sums + 16, sum[1]);
}
#endif

INLINE void plain_tile_maxima(const float* y, float* group, float* sums) {
  alignas(64) float top[kGroups * 2];
  for (int j = 0; j < kGroups * 2; ++j) top[j] = -kInfinity;
  for (int k = 0; k < kTile; k += kGroups * 8) {  // four steps at once, in order of memory
    for (int j = 0; j < kGroups * 2; ++j) {
      const float x0 = y[k + j];
      const float x1 = y[k + j + kGroups * 2];
      const float x2 = y[k + j + kGroups * 4];
      const float x3 = y[k + j + kGroups * 6];
      float best = top[j];
      best = x0 > best ? x0 : best;
      best = x1 > best ? x1 : best;
      best = x2 > best ? x2 : best;
      best = x3 > best ? x3 : best;
      top[j] = best;
      sums[j] += (x0 + x1) + (x2 + x3);
    }
  }
  for (int j = 0; j < kGroups; ++j) group[j] = std::max(top[j], top[j + kGroups]);
}

#ifdef LLM_SAMPLING_V3
LLM_SAMPLING_VERSION("arch=x86-64-v3")
void tile_maxima(const float* y, float* group, float* sums) { plain_tile_maxima(y, group, sums); }
#endif

#if defined(LLM_SAMPLING_VERSIONS) || !(defined(LLM_SAMPLING_V4) || defined(LLM_SAMPLING_V3))
LLM_SAMPLING_VERSION("default")
void tile_maxima(const float* y, float* group, float* sums) { plain_tile_maxima(y, group, sums); }
#endif

}  // namespace
}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_SIMD_X86_H_
