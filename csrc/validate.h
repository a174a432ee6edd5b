// What every compiled backend checks before it starts, and what its return codes mean.
#ifndef LLM_SAMPLING_VALIDATE_H_
#define LLM_SAMPLING_VALIDATE_H_

#include <stdint.h>
#include <string.h>

#include "llm_sampling.h"

namespace llm_sampling {

// A caller's struct, which may be of an older version: fields that it does not know are off.
inline int32_t read_struct(const LlmSamplingArgs* args, LlmSamplingArgs& own) {
  constexpr uint32_t kFirstSize = sizeof(LlmSamplingArgs);  // that of version 1, for good
  if (args == nullptr || args->version != LLM_SAMPLING_ABI_VERSION ||
      args->struct_size < kFirstSize || args->struct_size > sizeof(LlmSamplingArgs)) {
    return LLM_SAMPLING_BAD_STRUCT;
  }
  memcpy(&own, args, args->struct_size);
  return LLM_SAMPLING_OK;
}

template <typename T>
inline bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(T) == 0;
}

// Whether so many rows of `width` elements, `stride` apart, have sizes in bytes that an int64 holds.
inline bool is_addressable(int64_t rows, int64_t stride, int64_t width) {
  constexpr int64_t kMost = INT64_MAX / 8;
  return width <= kMost && (rows <= 1 || stride <= (kMost - width) / (rows - 1));
}

// LLM_SAMPLING_OK as far as the struct itself tells: no pointer is followed.
inline int32_t check_struct(const LlmSamplingArgs& a) {
  if (a.rows < 0 || a.vocab_size < 1 || a.vocab_size > LLM_SAMPLING_MAX_VOCAB_SIZE ||
      a.num_samples < 1 || a.num_threads < 1 ||
      !is_addressable(a.rows, a.num_samples, a.num_samples)) {
    return LLM_SAMPLING_BAD_SIZE;
  }
  if (a.dtype < LLM_SAMPLING_FLOAT32 || a.dtype > LLM_SAMPLING_BFLOAT16 ||
      a.logprobs_mode < LLM_SAMPLING_LOGPROBS_NONE || a.logprobs_mode > LLM_SAMPLING_LOGPROBS_RAW ||
      a.advance < LLM_SAMPLING_ADVANCE_NEVER || a.advance > LLM_SAMPLING_ADVANCE_IF_ALL_VALID ||
      a.reserved != 0) {
    return LLM_SAMPLING_BAD_OPTION;
  }
  if (a.rows == 0) return LLM_SAMPLING_OK;
  const bool draws = a.tokens != nullptr;
  const bool advances = a.advance != LLM_SAMPLING_ADVANCE_NEVER;
  const bool wants_logprobs = a.logprobs_mode != LLM_SAMPLING_LOGPROBS_NONE;
  if (!draws && (advances || wants_logprobs || a.filtered == nullptr))
    return LLM_SAMPLING_NULL_POINTER;
  if (draws && (a.status == nullptr || a.seed == nullptr || a.position == nullptr)) {
    return LLM_SAMPLING_NULL_POINTER;
  }
  if (wants_logprobs && a.logprobs == nullptr) return LLM_SAMPLING_NULL_POINTER;
  for (const void* pointer :
       {a.logits,
        static_cast<const void*>(a.temperature),
        static_cast<const void*>(a.top_k),
        static_cast<const void*>(a.top_p),
        static_cast<const void*>(a.min_p),
        static_cast<const void*>(a.min_p_cut),
        static_cast<const void*>(a.repetition_penalty),
        static_cast<const void*>(a.frequency_penalty),
        static_cast<const void*>(a.presence_penalty),
        static_cast<const void*>(a.min_tokens_to_keep)}) {
    if (pointer == nullptr) return LLM_SAMPLING_NULL_POINTER;
  }
  const bool aligned_logits = a.dtype == LLM_SAMPLING_FLOAT32
                                  ? is_aligned(static_cast<const float*>(a.logits))
                                  : is_aligned(static_cast<const uint16_t*>(a.logits));
  if (!(aligned_logits && is_aligned(a.temperature) && is_aligned(a.top_k) && is_aligned(a.top_p) &&
        is_aligned(a.min_p) && is_aligned(a.min_p_cut) && is_aligned(a.repetition_penalty) &&
        is_aligned(a.frequency_penalty) && is_aligned(a.presence_penalty) &&
        is_aligned(a.min_tokens_to_keep) && is_aligned(a.seed) && is_aligned(a.position) &&
        is_aligned(a.logit_bias_offsets) && is_aligned(a.logit_bias_ids) &&
        is_aligned(a.logit_bias_values) && is_aligned(a.allowed_mask) && is_aligned(a.seen) &&
        is_aligned(a.counts) && is_aligned(a.lengths) && is_aligned(a.slots) &&
        is_aligned(a.tokens) && is_aligned(a.logprobs) && is_aligned(a.status) &&
        is_aligned(a.filtered))) {
    return LLM_SAMPLING_MISALIGNED;
  }
  const int64_t words = (a.vocab_size + 31) / 32;
  // a stride of 0 repeats a row, which only what is read may do
  if (a.logits_stride < 0 || a.allowed_mask_stride < 0 ||
      (a.filtered != nullptr && a.filtered_stride < a.vocab_size) ||
      !is_addressable(a.rows, a.logits_stride, a.vocab_size) ||
      !is_addressable(a.rows, a.allowed_mask_stride, words) ||
      !is_addressable(a.rows, a.filtered_stride, a.vocab_size)) {
    return LLM_SAMPLING_BAD_STRIDE;
  }
  if (a.seen != nullptr) {
    if (a.counts == nullptr || a.lengths == nullptr || a.slots == nullptr) {
      return LLM_SAMPLING_NULL_POINTER;
    }
    if (a.seen_stride < words || a.counts_stride < a.vocab_size ||
        !is_addressable(a.num_slots, a.seen_stride, words) ||
        !is_addressable(a.num_slots, a.counts_stride, a.vocab_size)) {
      return LLM_SAMPLING_BAD_STRIDE;
    }
  }
  return LLM_SAMPLING_OK;
}

inline const char* error_text(int32_t code) {
  switch (code) {
    case LLM_SAMPLING_OK:
      return "success";
    case LLM_SAMPLING_BAD_STRUCT:
      return "the args struct is NULL or of another size or version than this library's";
    case LLM_SAMPLING_BAD_SIZE:
      return "rows, vocab_size, num_samples, num_threads, a slot or a bias offset is out of range";
    case LLM_SAMPLING_BAD_OPTION:
      return "dtype, logprobs_mode or advance has an unknown value";
    case LLM_SAMPLING_NULL_POINTER:
      return "a pointer that is needed is NULL";
    case LLM_SAMPLING_BAD_STRIDE:
      return "a stride is negative or too large, or rows that are written overlap";
    case LLM_SAMPLING_MISALIGNED:
      return "a pointer is not aligned to its type";
    case LLM_SAMPLING_BAD_PARAMETER:
      return "a row's sampling parameter is out of range";
    case LLM_SAMPLING_OUT_OF_MEMORY:
      return "out of memory";
    default:
      return "unknown code";
  }
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_VALIDATE_H_
