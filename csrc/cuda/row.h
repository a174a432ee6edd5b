// One row for one thread: where its logits are, and steps 1 to 6 of eight of them at a time.
//
// A group is eight tokens whose logits begin at a multiple of 16 bytes of global memory. The first group
// and the last may reach beyond the row: so ids are from 8 * group - shift on.
#ifndef LLM_SAMPLING_CUDA_ROW_H_
#define LLM_SAMPLING_CUDA_ROW_H_

#include <stdint.h>

#include <type_traits>

#include "../llm_sampling.h"
#include "../semantics.h"
#include "device.h"
#include "launch.h"

namespace llm_sampling {

constexpr uint32_t kLastId = (1u << 20) - 1;
constexpr uint64_t kLowestCode = static_cast<uint64_t>(0x00800000u) << 20;  // of every candidate

// Bits of tokens from one of 32 on; null words: none are asked about.
struct Bits {
  const uint32_t* words;
  int first_word;

  // Those of eight ids, of which some may lie before or after the row: 0 there.
  __device__ __forceinline__ unsigned of(int first, int vocab_size) const {
    const int from = first > 0 ? first : 0;
    const int word = from >> 5;
    const int bit = from & 31;
    const uint32_t* place = words + (word - first_word);
    unsigned bits = *place >> bit;
    if (bit > 32 - kGroup && (word + 1) * 32 < vocab_size) bits |= place[1] << (32 - bit);
    bits = bits << (from - first) & 0xff;
    const int left = vocab_size - first;
    return left < kGroup ? bits & ((1u << left) - 1) : bits;
  }
};

struct Row {
  const unsigned char* aligned;  // logits of group 0, in global memory
  int shift;                     // how many of them lie before the row, and are not read
  int vocab_size;
  int64_t bias_first;  // of the biases of all rows
  int bias_count;
  Bits allowed;           // null: all are
  Bits seen;              // null: no penalty is on
  const int32_t* counts;  // null: only the repetition penalty is
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

// 7 order: larger x first, equal x by smaller id. A kept set is all codes from one on. For what is no NaN.
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

// A code taken apart, so that a token is held against it in three instructions.
struct Bound {
  float x;
  int id;

  __device__ __forceinline__ explicit Bound(uint64_t code) : x(logit_of(code)), id(id_of(code)) {}
  __device__ __forceinline__ bool is_reached(float other, int other_id) const {
    return other > x || (other == x && other_id <= id);
  }
};

template <int kBytes>
using Unsigned = std::conditional_t<kBytes == 4, uint32_t, uint16_t>;

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

// Steps 1 to 6 of a group: -inf for what is no candidate. True if a NaN was seen. ``count_of(id)`` is asked
// for each token that was seen, in their order.
template <int kDtype, bool kCopied, typename CountOf>
__device__ __forceinline__ bool process(
    const LlmSamplingArgs& args,
    const Row& row,
    const unsigned char* place,
    int group,
    float (&x)[kGroup],
    const CountOf& count_of
) {
  load<kDtype, kCopied>(row, place, group, x);
  const int first = row.first_id(group);
  // 2 bias, mask
  if (row.bias_count > 0) {
    const int32_t* ids = args.logit_bias_ids + row.bias_first;  // in order
    const float* values = args.logit_bias_values + row.bias_first;
    const int from = first < 0 ? 0 : first;
    const int end = first + kGroup < row.vocab_size ? first + kGroup : row.vocab_size;
#pragma unroll 1
    for (int next = count_while(row.bias_count, [&](int i) { return ids[i] < from; });
         next < row.bias_count && ids[next] < end;
         ++next) {
      const int place_of_id = ids[next] - first;
      const float value = values[next];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x[i] = i == place_of_id ? x[i] + value : x[i];
    }
  }
  if (row.allowed.words != nullptr) {
    const unsigned allowed = row.allowed.of(first, row.vocab_size);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = (allowed >> i & 1) != 0 ? x[i] : -kInfinity;
  }
  if (row.seen.words != nullptr) {
    // few are: a loop is shorter than eight times its body
#pragma unroll 1
    for (unsigned seen = row.seen.of(first, row.vocab_size); seen != 0; seen &= seen - 1) {
      const int next = __ffs(static_cast<int>(seen)) - 1;
      float value = 0.0f;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) value = i == next ? x[i] : value;
      // 3 repetition penalty: prompt and output
      value = repetition(value, row.repetition);
      // 4 frequency penalty, 5 presence penalty: output
      const int32_t count = row.counts != nullptr ? count_of(first + next) : 0;
      if (count > 0) {
        value = frequency(value, row.frequency, count);
        value = value - row.presence;
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x[i] = i == next ? value : x[i];
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
