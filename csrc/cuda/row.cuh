// One row as a thread sees it: where its logits are, the codes of its tokens, and steps 1 to 6 of
// docs/semantics.md for a few tokens at a time.
//
// A vec is 8 neighbouring tokens whose logits begin at a multiple of 16 bytes of global memory. A row may
// begin anywhere, so its first vec and its last vec may reach beyond it: the ids of a vec begin at
// 8 * vec - shift.
#ifndef LLM_SAMPLING_CUDA_ROW_CUH_
#define LLM_SAMPLING_CUDA_ROW_CUH_

#include <math.h>
#include <stdint.h>

#include <type_traits>

#include "../llm_sampling.h"
#include "../semantics.h"
#include "cluster.cuh"
#include "launch.cuh"

namespace llm_sampling {

// ---- where the row is ----

// One bit per token, in global memory. The words are null where there are no bits to ask for.
struct Bits {
  const uint32_t* words;

  // The bits of a vec that begins at id `first`; 0 for ids outside the row.
  __device__ __forceinline__ unsigned of_vec(int first, int vocab_size) const {
    const int from = first > 0 ? first : 0;
    const int word = from >> 5;
    const int bit = from & 31;
    unsigned bits = words[word] >> bit;
    if (bit > 32 - kVec && (word + 1) * 32 < vocab_size) bits |= words[word + 1] << (32 - bit);
    bits = bits << (from - first) & 0xff;
    const int left = vocab_size - first;
    return left < kVec ? bits & ((1u << left) - 1) : bits;
  }

  // The bits of the 32 ids from `first` on, which may lie before the row; 0 for ids outside the row.
  __device__ __forceinline__ uint32_t word_at(int first, int vocab_size) const {
    const int word = first >> 5;
    const int bit = first & 31;
    uint32_t bits = word < 0 ? 0 : words[word] >> bit;
    if (bit > 0 && (word + 1) * 32 < vocab_size) bits |= words[word + 1] << (32 - bit);
    const int left = vocab_size - first;
    return left < 32 ? bits & ((1u << left) - 1) : bits;
  }
};

// The penalties of a row. That for repetition is negative where it is for the output alone: its sign is of no
// other use.
struct Penalties {
  float repetition, frequency, presence;
};

struct Row {
  const unsigned char* aligned;  // logits of vec 0, in global memory
  int shift;                     // tokens of vec 0 that lie before the row; they are not read
  int vocab_size;
  bool is_plain;  // no bias, no mask, no penalty and no list
  bool has_list;  // whether step 5a lowers tokens
  int bias_count;
  Bits allowed;  // the token bitmask; null words: all tokens are allowed
  Bits seen;     // tokens of prompt and output; null words: no penalty is on

  // Whether step 2 changes logits, so that other tokens than the seen ones change too.
  __device__ __forceinline__ bool has_bias_or_mask() const {
    return bias_count != 0 || allowed.words != nullptr;
  }
  // Whether steps 3 to 5a change logits.
  __device__ __forceinline__ bool has_marks() const { return seen.words != nullptr || has_list; }
  __device__ __forceinline__ int first_id(int vec) const { return vec * kVec - shift; }
  __device__ __forceinline__ bool is_whole(int vec) const {
    const int first = first_id(vec);
    return first >= 0 && first + kVec <= vocab_size;
  }
  __device__ __forceinline__ int vecs() const { return (vocab_size + shift + kVec - 1) / kVec; }
};

// The arrays of a block's copy of its part, in its shared memory. A word of bits covers four vecs; bits
// outside the row are 0. Marked are the tokens that steps 3 to 5a may change: where a penalty is on the seen
// ones, and those of the row's list.
struct Copy {
  unsigned char* logits;
  float* scores;      // logits of the marked tokens after step 5a; before that, their output counts
  uint32_t* allowed;  // bits
  uint32_t* marked;   // bits
  uint16_t* places;   // for each word of `marked`: the place in `scores` of its first marked token

  __device__ __forceinline__ Copy(unsigned char* base, int vecs, int logit_bytes) {
    logits = base;
    base += logits_bytes(vecs, logit_bytes);
    scores = reinterpret_cast<float*>(base);
    base += kMaxScores * 4;
    allowed = reinterpret_cast<uint32_t*>(base);
    base += bits_bytes(vecs);
    marked = reinterpret_cast<uint32_t*>(base);
    base += bits_bytes(vecs);
    places = reinterpret_cast<uint16_t*>(base);
  }
};

// ---- codes ----

constexpr uint32_t kLastId = (1u << 20) - 1;
constexpr uint64_t kLowestCode = static_cast<uint64_t>(0x00800000u) << 20;  // of any logit but -inf

// 7 order: larger x first, equal x by smaller id. A code is the order key of x above the inverted id, so
// a larger code comes earlier in the order, and a kept set is all codes that are at least a threshold.
// x must not be NaN.
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

// A code split into (logit, id), so that comparing a token with it takes three instructions.
struct Threshold {
  float x;
  int id;

  __device__ __forceinline__ explicit Threshold(uint64_t code)
      : x(logit_of(code)), id(id_of(code)) {}
  __device__ __forceinline__ bool is_reached(float other, int other_id) const {
    return other > x || (other == x && other_id <= id);
  }
};

// ---- steps 1 to 6 ----

template <int kDtype>
constexpr int kLogitBytes = kDtype == LLM_SAMPLING_FLOAT32 ? 4 : 2;

template <int kBytes>
using Unsigned = std::conditional_t<kBytes == 4, uint32_t, uint16_t>;

// The bits of -inf.
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

// 1 widen: the logits of a whole vec, by loads of 16 bytes.
template <int kDtype>
__device__ __forceinline__ void widen_8(const unsigned char* place, float (&x)[kVec]) {
  const uint4* from = reinterpret_cast<const uint4*>(place);
  const uint4 first = from[0];
  if constexpr (kDtype == LLM_SAMPLING_FLOAT32) {
    const uint4 second = from[1];
    const uint32_t bits[kVec] =
        {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = bit_cast<float>(bits[i]);
  } else {
    const uint32_t bits[kVec / 2] = {first.x, first.y, first.z, first.w};
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const uint16_t half = static_cast<uint16_t>(bits[i / 2] >> (16 * (i % 2)));
      x[i] = kDtype == LLM_SAMPLING_FLOAT16 ? widen_float16(half) : widen_bfloat16(half);
    }
  }
}

// 1 widen: the logits of any vec; -inf for ids outside the row, which a copy already contains.
template <int kDtype, bool kCopied>
__device__ __forceinline__ void load(
    const Row& row,
    const unsigned char* place,
    int vec,
    float (&x)[kVec]
) {
  if constexpr (kCopied) {
    widen_8<kDtype>(place, x);
  } else if (row.is_whole(vec)) {
    widen_8<kDtype>(place, x);
  } else {
    const int first = row.first_id(vec);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const bool inside = first + i >= 0 && first + i < row.vocab_size;
      x[i] = inside ? widen<kDtype>(place + i * kLogitBytes<kDtype>) : -kInfinity;
    }
  }
}

// 2 bias: of kCount tokens from id `first` on, some of which may lie outside the row. `bias_first` is the index
// of the row's first bias among the biases of all rows, in shared memory; it is read only where there are some.
template <int kCount>
__device__ __forceinline__ void add_bias(
    const LlmSamplingArgs& args,
    const Row& row,
    const int64_t& bias_first,
    int first,
    float (&x)[kCount]
) {
  if (row.bias_count == 0) return;
  const int32_t* ids = args.logit_bias_ids + bias_first;  // should be in rising order
  const float* values = args.logit_bias_values + bias_first;
  const int from = first < 0 ? 0 : first;
  const int end = first + kCount < row.vocab_size ? first + kCount : row.vocab_size;
#pragma unroll 1
  for (int next = count_leading(row.bias_count, [&](int i) { return ids[i] < from; });
       next < row.bias_count && ids[next] < end;
       ++next) {
    const uint32_t place = static_cast<uint32_t>(ids[next]) - static_cast<uint32_t>(first);
    const float value = values[next];
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) x[i] = i == place ? biased(x[i], value) : x[i];
  }
}

// 2 mask: keeps the logits whose bit is set and sets the others to -inf.
template <int kCount>
__device__ __forceinline__ void apply_mask(unsigned bits, float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = (bits >> i & 1) != 0 ? x[i] : -kInfinity;
}

// The penalties for a seen token that the output holds `count` times.
__device__ __forceinline__ float penalize(const Penalties& row, float x, int32_t count) {
  // 3 repetition penalty: prompt and output, or output
  if (row.repetition >= 0.0f || count > 0) x = repetition(x, fabsf(row.repetition));
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

#endif  // LLM_SAMPLING_CUDA_ROW_CUH_
