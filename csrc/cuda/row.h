// One row for one thread: where its logits are, and steps 1 to 6 of eight of them at a time.
//
// A group is eight tokens whose logits begin at a multiple of 16 bytes of global memory. The first group
// and the last may reach beyond the row: so ids are from 8 * group - shift on.
#ifndef LLM_SAMPLING_CUDA_ROW_H_
#define LLM_SAMPLING_CUDA_ROW_H_

#include <stdint.h>

#include "../llm_sampling.h"
#include "../semantics.h"
#include "device.h"
#include "launch.h"

namespace llm_sampling {

constexpr uint32_t kLastId = (1u << 20) - 1;
constexpr uint64_t kLowestCode = static_cast<uint64_t>(0x00800000u) << 20;  // of every candidate

struct Row {
  const unsigned char* aligned;  // logits of group 0, in global memory
  int shift;                     // how many of them lie before the row, and are not read
  int vocab_size;
  const int32_t* bias_ids;  // in order
  const float* bias_values;
  int bias_count;
  const uint32_t* allowed;  // null: all are
  const uint32_t* seen;     // null: no penalty is on
  const int32_t* counts;
  float repetition, frequency, presence;

  __device__ __forceinline__ int first_id(int group) const { return group * kGroup - shift; }
  __device__ __forceinline__ bool is_whole(int group) const {
    const int first = first_id(group);
    return first >= 0 && first + kGroup <= vocab_size;
  }
  __device__ __forceinline__ int groups() const {
    return (vocab_size + shift + kGroup - 1) / kGroup;
  }
};

template <int kDtype>
constexpr int kLogitBytes = kDtype == LLM_SAMPLING_FLOAT32 ? 4 : 2;

// 7 order: larger x first, equal x by smaller id. A kept set is all codes from one on.
__device__ __forceinline__ uint64_t first_code(uint32_t key) {
  return static_cast<uint64_t>(key) << 20;
}
__device__ __forceinline__ uint64_t code_of(float x, int id) {
  return first_code(order_key(x)) | (static_cast<uint32_t>(id) ^ kLastId);
}
__device__ __forceinline__ float logit_of(uint64_t code) {
  return from_order_key(static_cast<uint32_t>(code >> 20));
}
__device__ __forceinline__ int id_of(uint64_t code) {
  return static_cast<int>((static_cast<uint32_t>(code) & kLastId) ^ kLastId);
}

// The bits of eight ids, of which some may lie before or after the row.
__device__ __forceinline__ unsigned bits_of(const uint32_t* words, int first, int vocab_size) {
  const int from = first > 0 ? first : 0;
  const int word = from >> 5;
  const int bit = from & 31;
  unsigned bits = words[word] >> bit;
  if (bit > 32 - kGroup && (word + 1) * 32 < vocab_size) bits |= words[word + 1] << (32 - bit);
  return bits << (from - first) & 0xff;
}

template <int kDtype>
__device__ __forceinline__ float widen(const unsigned char* place) {
  if constexpr (kDtype == LLM_SAMPLING_FLOAT32) {
    return *reinterpret_cast<const float*>(place);
  } else if constexpr (kDtype == LLM_SAMPLING_FLOAT16) {
    return widen_float16(*reinterpret_cast<const uint16_t*>(place));
  } else {
    return widen_bfloat16(*reinterpret_cast<const uint16_t*>(place));
  }
}

// 1 widen: eight logits by loads of 16 bytes.
template <int kDtype>
__device__ __forceinline__ void widen_8(const unsigned char* place, float (&x)[kGroup]) {
  const uint4* from = reinterpret_cast<const uint4*>(place);
  const uint4 first = from[0];
  if constexpr (kDtype == LLM_SAMPLING_FLOAT32) {
    const uint4 second = from[1];
    const uint32_t bits[kGroup] =
        {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = bit_cast<float>(bits[i]);
  } else {
    const uint32_t bits[kGroup / 2] = {first.x, first.y, first.z, first.w};
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const uint16_t half = static_cast<uint16_t>(bits[i / 2] >> (16 * (i % 2)));
      x[i] = kDtype == LLM_SAMPLING_FLOAT16 ? widen_float16(half) : widen_bfloat16(half);
    }
  }
}

// 1 widen: a group's logits, -inf where the row is not. ``place`` is where they are: a copy, or the row.
template <int kDtype, bool kCopied>
__device__ __forceinline__ void load(
    const Row& row,
    const unsigned char* place,
    int group,
    float (&x)[kGroup]
) {
  const int first = row.first_id(group);
  const bool is_whole = row.is_whole(group);
  if (kCopied || is_whole) widen_8<kDtype>(place, x);
  if (is_whole) return;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const bool inside = first + i >= 0 && first + i < row.vocab_size;
    if (!inside) {
      x[i] = -kInfinity;
    } else if (!kCopied) {
      x[i] = widen<kDtype>(place + i * kLogitBytes<kDtype>);
    }
  }
}

// Steps 1 to 6 of a group: -inf for what is no candidate. True if a NaN was seen.
template <int kDtype, bool kCopied>
__device__ __forceinline__ bool process(
    const Row& row,
    const unsigned char* place,
    int group,
    float (&x)[kGroup]
) {
  load<kDtype, kCopied>(row, place, group, x);
  const int first = row.first_id(group);
  // 2 bias, mask
  if (row.bias_count > 0) {
    const int from = first < 0 ? 0 : first;
    for (int next = count_while(row.bias_count, [&](int i) { return row.bias_ids[i] < from; });
         next < row.bias_count && row.bias_ids[next] < first + kGroup &&
         row.bias_ids[next] < row.vocab_size;
         ++next) {
      const int place_of_id = row.bias_ids[next] - first;
      const float value = row.bias_values[next];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x[i] = i == place_of_id ? x[i] + value : x[i];
    }
  }
  if (row.allowed != nullptr) {
    const unsigned allowed = bits_of(row.allowed, first, row.vocab_size);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = (allowed >> i & 1) != 0 ? x[i] : -kInfinity;
  }
  if (row.seen != nullptr) {
    const unsigned seen = bits_of(row.seen, first, row.vocab_size);
    if (seen != 0) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if ((seen >> i & 1) == 0 || first + i < 0 || first + i >= row.vocab_size) continue;
        // 3 repetition penalty: prompt and output
        x[i] = repetition(x[i], row.repetition);
        // 4 frequency penalty, 5 presence penalty: output
        const int32_t count = row.counts[first + i];
        if (count > 0) {
          x[i] = frequency(x[i], row.frequency, count);
          x[i] = x[i] - row.presence;
        }
      }
    }
  }
  // 6 canonical
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const bool is_nan = x[i] != x[i];
    has_nan |= is_nan;
    x[i] = is_nan ? -kInfinity : x[i] + 0.0f;
  }
  return has_nan;
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_ROW_H_
