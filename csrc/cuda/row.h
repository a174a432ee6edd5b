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

// A bit for each token, in global memory; null words: none are asked about.
struct Bits {
  const uint32_t* words;

  // Those of eight ids, of which some may lie before or after the row: 0 there.
  __device__ __forceinline__ unsigned of(int first, int vocab_size) const {
    const int from = first > 0 ? first : 0;
    const int word = from >> 5;
    const int bit = from & 31;
    unsigned bits = words[word] >> bit;
    if (bit > 32 - kGroup && (word + 1) * 32 < vocab_size) bits |= words[word + 1] << (32 - bit);
    bits = bits << (from - first) & 0xff;
    const int left = vocab_size - first;
    return left < kGroup ? bits & ((1u << left) - 1) : bits;
  }

  // Those of 32 ids, of which the first may lie before the row.
  __device__ __forceinline__ uint32_t word_of(int first, int vocab_size) const {
    const int word = first >> 5;
    const int bit = first & 31;
    uint32_t bits = word < 0 ? 0 : words[word] >> bit;
    if (bit > 0 && (word + 1) * 32 < vocab_size) bits |= words[word + 1] << (32 - bit);
    const int left = vocab_size - first;
    return left < 32 ? bits & ((1u << left) - 1) : bits;
  }
};

struct Row {
  const unsigned char* aligned;  // logits of group 0, in global memory
  int shift;                     // how many of them lie before the row, and are not read
  int vocab_size;
  bool is_plain;       // no bias, no mask, no history
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

// -inf
template <int kDtype>
constexpr auto kLowestBits = static_cast<Unsigned<kLogitBytes<kDtype>>>(
    kDtype == LLM_SAMPLING_FLOAT32   ? 0xff800000u
    : kDtype == LLM_SAMPLING_FLOAT16 ? 0xfc00u
                                     : 0xff80u
);

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

// 1 widen: a group's logits, -inf where the row is not; in a copy they are there.
template <int kDtype, bool kCopied>
__device__ __forceinline__ void load(
    const Row& row,
    const unsigned char* place,
    int group,
    float (&x)[kGroup]
) {
  if constexpr (kCopied) {
    widen_8<kDtype>(place, x);
  } else if (row.is_whole(group)) {
    widen_8<kDtype>(place, x);
  } else {
    const int first = row.first_id(group);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const bool inside = first + i >= 0 && first + i < row.vocab_size;
      x[i] = inside ? widen<kDtype>(place + i * kLogitBytes<kDtype>) : -kInfinity;
    }
  }
}

// Where a block has the copies of its part, in its shared memory. A word has the bits of four groups, 0
// where the row is not.
struct Copy {
  unsigned char* logits;
  float* scores;      // after step 5, of seen tokens; before that, their counts
  uint32_t* allowed;  // bits
  uint32_t* seen;     // bits
  uint16_t* places;   // of a word: where the scores of its tokens begin

  __device__ __forceinline__ Copy(unsigned char* base, int groups, int logit_bytes) {
    logits = base;
    base += logits_bytes(groups, logit_bytes);
    scores = reinterpret_cast<float*>(base);
    base += kScored * 4;
    allowed = reinterpret_cast<uint32_t*>(base);
    base += bits_bytes(groups);
    seen = reinterpret_cast<uint32_t*>(base);
    base += bits_bytes(groups);
    places = reinterpret_cast<uint16_t*>(base);
  }
};

// 2 bias: of so many tokens from an id on, of which some may lie before or after the row.
template <int kCount>
__device__ __forceinline__ void add_bias(
    const LlmSamplingArgs& args,
    const Row& row,
    int first,
    float (&x)[kCount]
) {
  if (row.bias_count == 0) return;
  const int32_t* ids = args.logit_bias_ids + row.bias_first;  // in order
  const float* values = args.logit_bias_values + row.bias_first;
  const int from = first < 0 ? 0 : first;
  const int end = first + kCount < row.vocab_size ? first + kCount : row.vocab_size;
#pragma unroll 1
  for (int next = count_while(row.bias_count, [&](int i) { return ids[i] < from; });
       next < row.bias_count && ids[next] < end;
       ++next) {
    const int place = ids[next] - first;
    const float value = values[next];
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = i == place ? x[i] + value : x[i];
  }
}

// 2 mask: leaves what has a bit; -inf is what has none.
template <int kCount>
__device__ __forceinline__ void leave(unsigned bits, float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = (bits >> i & 1) != 0 ? x[i] : -kInfinity;
}

// Of a token that was seen, and how often it is in the output.
__device__ __forceinline__ float penalize(const Row& row, float x, int32_t count) {
  // 3 repetition penalty: prompt and output
  x = repetition(x, row.repetition);
  // 4 frequency penalty, 5 presence penalty: output
  if (count > 0) {
    x = frequency(x, row.frequency, count);
    x = x - row.presence;
  }
  return x;
}

// 6 canonical
__device__ __forceinline__ float canonical(float x) { return x != x ? -kInfinity : x + 0.0f; }

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_ROW_H_
