// The checks that a compiled backend makes before it starts, and the meaning of its return codes.
#ifndef LLM_SAMPLING_VALIDATE_H_
#define LLM_SAMPLING_VALIDATE_H_

#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "llm_sampling.h"
#include "semantics.h"

namespace llm_sampling {

// Copies the caller's struct, which may be that of an older version of this header: the fields that the
// caller does not know become zero, which is "off".
inline int32_t read_struct(const LlmSamplingArgs* args, LlmSamplingArgs& own) {
  constexpr uint32_t kFirstSize = sizeof(LlmSamplingArgs);  // the size in version 1; never changes
  if (args == nullptr || args->version != LLM_SAMPLING_ABI_VERSION ||
      args->struct_size < kFirstSize || args->struct_size > sizeof(LlmSamplingArgs)) {
    return LLM_SAMPLING_BAD_STRUCT;
  }
  memcpy(&own, args, args->struct_size);
  return LLM_SAMPLING_OK;
}

// True if the pointer is NULL or a multiple of its type's alignment.
template <typename T>
inline bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(T) == 0;
}

// Whether holds(pointer) is true for the pointer of every parameter that a call must have. A new parameter
// is added here, and the range of its values in check_values.
template <typename F>
inline bool all_parameters(const LlmSamplingArgs& a, const F& holds) {
  return holds(a.temperature) && holds(a.top_k) && holds(a.top_p) && holds(a.min_p) &&
         holds(a.min_p_cut) && holds(a.repetition_penalty) && holds(a.frequency_penalty) &&
         holds(a.presence_penalty) && holds(a.min_tokens_to_keep);
}

// Whether the size in bytes of `rows` rows of `width` elements, `stride` elements apart, fits an int64.
inline bool is_addressable(int64_t rows, int64_t stride, int64_t width) {
  constexpr int64_t kMost = INT64_MAX / 8;
  return width <= kMost && (rows <= 1 || stride <= (kMost - width) / (rows - 1));
}

// Checks everything that can be checked without following a pointer.
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
  if (a.logits == nullptr || !all_parameters(a, [](const auto* p) { return p != nullptr; })) {
    return LLM_SAMPLING_NULL_POINTER;
  }
  const bool aligned_logits = a.dtype == LLM_SAMPLING_FLOAT32
                                  ? is_aligned(static_cast<const float*>(a.logits))
                                  : is_aligned(static_cast<const uint16_t*>(a.logits));
  if (!(aligned_logits && all_parameters(a, [](const auto* p) { return is_aligned(p); }) &&
        is_aligned(a.seed) && is_aligned(a.position) && is_aligned(a.logit_bias_offsets) &&
        is_aligned(a.logit_bias_ids) && is_aligned(a.logit_bias_values) &&
        is_aligned(a.allowed_mask) && is_aligned(a.seen) && is_aligned(a.counts) &&
        is_aligned(a.lengths) && is_aligned(a.slots) && is_aligned(a.tokens) &&
        is_aligned(a.logprobs) && is_aligned(a.status) && is_aligned(a.filtered))) {
    return LLM_SAMPLING_MISALIGNED;
  }
  const int64_t words = (a.vocab_size + 31) / 32;
  // A stride of 0 repeats one row, which is allowed for inputs only.
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

// Checks what the pointers of a struct that check_struct accepts point to: bias offsets, slots, and the
// range of every parameter. It reads the arrays, so they must be in host memory.
inline int32_t check_values(const LlmSamplingArgs& a) {
  if (a.logit_bias_offsets != nullptr) {
    const int64_t* offsets = a.logit_bias_offsets;
    if (offsets[0] < 0 || !std::is_sorted(offsets, offsets + a.rows + 1))
      return LLM_SAMPLING_BAD_SIZE;
    if (offsets[a.rows] > 0 && (a.logit_bias_ids == nullptr || a.logit_bias_values == nullptr)) {
      return LLM_SAMPLING_NULL_POINTER;
    }
  }
  for (int64_t row = 0; a.seen != nullptr && row < a.rows; ++row) {
    if (a.slots[row] < 0 || a.slots[row] >= a.num_slots) return LLM_SAMPLING_BAD_SIZE;
  }
  // Each comparison is false for NaN.
  const auto is_within = [](float x, float least, float most) { return x >= least && x <= most; };
  for (int64_t row = 0; row < a.rows; ++row) {
    if (!(is_within(a.temperature[row], 0.0f, -kLowest) &&
          is_within(a.top_p[row], 0.0f, 1.0f) &&  // a tiny top_p may have been rounded to 0
          is_within(a.min_p[row], 0.0f, 1.0f) && a.min_p_cut[row] >= 0.0f &&
          a.repetition_penalty[row] > 0.0f && a.repetition_penalty[row] < kInfinity &&
          is_within(a.frequency_penalty[row], -2.0f, 2.0f) &&
          is_within(a.presence_penalty[row], -2.0f, 2.0f) && a.min_tokens_to_keep[row] >= 1)) {
      return LLM_SAMPLING_BAD_PARAMETER;
    }
  }
  return LLM_SAMPLING_OK;
}

// What a return code means; never NULL.
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
