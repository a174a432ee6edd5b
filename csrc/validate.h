// The checks that a compiled backend makes before it starts, and the meaning of its return codes.
#ifndef LLM_SAMPLING_VALIDATE_H_
#define LLM_SAMPLING_VALIDATE_H_

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <new>

#include "llm_sampling.h"
#include "rows.h"
#include "semantics.h"
#include "sequence_rules.h"

namespace llm_sampling {

// Copies the caller's struct, which may be that of an older version of this header: the fields that the
// caller does not know become zero, which is "off".
inline int32_t read_struct(const LlmSamplingArgs* args, LlmSamplingArgs& own) {
  // The least size of this version.
  constexpr uint32_t kFirstSize = offsetof(LlmSamplingArgs, param_slots);
  if (args == nullptr) return LLM_SAMPLING_BAD_STRUCT;
  const uint32_t size = read_once(args->struct_size);
  if (args->version != LLM_SAMPLING_ABI_VERSION || size < kFirstSize || size > sizeof(own)) {
    return LLM_SAMPLING_BAD_STRUCT;
  }
  memcpy(&own, args, size);
  return LLM_SAMPLING_OK;
}

inline int32_t read_struct(const LlmSamplingUpdate* update, LlmSamplingUpdate& own) {
  if (update == nullptr || update->struct_size != sizeof(own) ||
      update->version != LLM_SAMPLING_ABI_VERSION) {
    return LLM_SAMPLING_BAD_STRUCT;
  }
  memcpy(&own, update, sizeof(own));
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
  return holds(a.temperature) && holds(a.top_k) && holds(a.top_p) && holds(a.min_p_cut) &&
         holds(a.repetition_penalty) && holds(a.frequency_penalty) && holds(a.presence_penalty) &&
         holds(a.min_tokens_to_keep);
}

// Whether holds(pointer) is true for the pointer of every parameter of the rules that look at the history. A call
// has all of these pointers or none.
template <typename F>
inline bool all_rules(const LlmSamplingArgs& a, const F& holds) {
  return holds(a.dry_multiplier) && holds(a.dry_base) && holds(a.dry_allowed_length) &&
         holds(a.dry_penalty_last_n) && holds(a.no_repeat_ngram_size) &&
         holds(a.no_repeat_ngram_window) && holds(a.min_tokens);
}

// Whether the size in bytes of `rows` rows of `width` elements, `stride` elements apart, fits an int64. So does
// that of one row more, as the bias offsets have.
inline bool is_addressable(int64_t rows, int64_t stride, int64_t width) {
  constexpr int64_t kMost = INT64_MAX / 16;
  return width <= kMost && (rows <= 1 || stride <= (kMost - width) / (rows - 1));
}

// The memory that a pointer of the struct points to: `rows` rows of `width` bytes, `stride` bytes apart. Where
// there is none, it begins and ends at 0.
struct Region {
  uintptr_t begin, end;
  int64_t rows, width, stride;
};

template <typename T>
Region region(const T* pointer, int64_t rows, int64_t width, int64_t stride) {
  constexpr int64_t kSize = sizeof(T);
  if (pointer == nullptr || rows <= 0 || width <= 0) return {};
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  const int64_t size = ((rows - 1) * stride + width) * kSize;
  // One row has no stride, and the one that the caller gives may be too large to be multiplied.
  const int64_t stride_in_bytes = rows == 1 ? 0 : stride * kSize;
  return {begin, begin + static_cast<uintptr_t>(size), rows, width * kSize, stride_in_bytes};
}

template <typename T>
Region region(const T* pointer, int64_t size) {
  return region(pointer, 1, size, size);
}

// Whether two regions, the ranges of whose addresses overlap, share a byte. Rows that lie between each other's
// are told apart if they have the same stride, or one region has a single row; otherwise the answer is yes.
inline bool share_a_byte(const Region& a, const Region& b) {
  if (a.begin > b.begin) return share_a_byte(b, a);
  if (a.rows == 1) return true;
  const bool same_stride = b.rows == 1 || a.stride == b.stride;
  if (!same_stride || a.stride < a.width || a.stride < b.width) return true;
  const auto distance =
      static_cast<int64_t>((b.begin - a.begin) % static_cast<uintptr_t>(a.stride));
  return distance < a.width || distance + b.width > a.stride;
}

// The memory of a call. What is written comes first.
class Regions {
 public:
  void add(const Region& region) {
    if (region.begin != region.end) of_[count_++] = region;  // most calls have few of them
  }

  void add(std::initializer_list<Region> regions) {
    for (const Region& region : regions) add(region);
  }

  int count() const { return count_; }

  // Whether one of the first `written` regions shares a byte with another region.
  bool overlap(int written) const {
    for (int w = 0; w < written; ++w) {
      for (int other = w + 1; other < count_; ++other) {
        if (of_[other].begin >= of_[w].end || of_[other].end <= of_[w].begin) continue;
        if (share_a_byte(of_[w], of_[other])) return true;
      }
    }
    return false;
  }

 private:
  Region of_[96];
  int count_ = 0;
};

// Calls visit(pointer, width) for every result besides tokens, status and filtered logits; each row has `width`
// elements of it.
template <typename F>
void over_results(const LlmSamplingArgs& a, const F& visit) {
  const int64_t draws = a.num_samples, ids = a.num_token_ids, top = a.num_top_logprobs;
  for (const LlmSamplingLogprobs* of : {&a.processed, &a.raw}) {
    visit(of->logprobs, draws);
    visit(of->ranks, draws);
    visit(of->top_ids, top);
    visit(of->top_logprobs, top);
    visit(of->id_logprobs, ids);
    visit(of->id_ranks, ids);
  }
  const int64_t one = 1, words = (a.vocab_size + 31) / 32;
  visit(a.kept.counts, one);
  visit(a.kept.total, one);
  visit(a.kept.masses, draws);
  visit(a.kept.id_masses, ids);
  visit(a.kept.mask, words);
  visit(a.kept.ids, a.kept.max_ids);
  visit(a.kept.first_id, one);
  visit(a.kept.first_logit, one);
  visit(a.kept.last_id, one);
  visit(a.kept.last_logit, one);
}

// Whether memory that a call writes overlaps other memory of the call.
inline bool has_overlap(const LlmSamplingArgs& a) {
  const int64_t v = a.vocab_size;
  const int64_t words = (v + 31) / 32;
  const bool has_history = a.seen != nullptr;
  const int64_t slots = has_history ? a.num_slots : 0;
  const int64_t slots_with_text = a.text != nullptr ? slots : 0;
  const bool advances = a.advance != LLM_SAMPLING_ADVANCE_NEVER;
  const int64_t entries = a.logit_bias_offsets != nullptr ? a.logit_bias_size : 0;
  const bool by_slot = a.param_slots != nullptr;
  const int64_t params = by_slot ? a.num_param_slots : a.rows;
  const bool has_text = a.position_of == LLM_SAMPLING_POSITION_OF_TEXT;
  Regions regions;
  over_results(a, [&](const auto* result, int64_t width) {
    if (result != nullptr) regions.add(region(result, a.rows * width));
  });
  regions.add({
      region(a.tokens, a.tokens != nullptr ? a.rows * a.num_samples : 0),
      region(a.status, a.tokens != nullptr ? a.rows : 0),
      region(a.filtered, a.rows, v, a.filtered_stride),
      region(a.list_bits, a.rows * words),
      region(a.list_before, a.rows * words),
      region(a.list_counts, a.rows),
      region(a.list_amounts, a.rows * a.list_capacity),
      region(static_cast<const uint64_t*>(a.workspace), a.workspace_bytes / 8),
  });
  const int written = regions.count();
  regions.add({
      region(a.position, a.position_of == LLM_SAMPLING_POSITION_OF_SLOT ? params : a.rows),
      region(a.seen, slots, words, a.seen_stride),
      region(a.counts, slots, v, a.counts_stride),
      region(a.lengths, slots),
      region(a.text, slots_with_text, a.max_text_length, a.max_text_length),
      region(a.text_lengths, slots_with_text),
  });
  const int written_or_advanced = regions.count();
  regions.add({
      region(a.text_prompt_lengths, slots_with_text),
      region(a.windows, slots_with_text),
      region(a.record, advances ? a.rows : 0),
      a.dtype == LLM_SAMPLING_FLOAT32
          ? region(static_cast<const float*>(a.logits), a.rows, v, a.logits_stride)
          : region(static_cast<const uint16_t*>(a.logits), a.rows, v, a.logits_stride),
      region(a.allowed_mask, a.rows, words, a.allowed_mask_stride),
      region(a.temperature, params),
      region(a.top_k, params),
      region(a.top_p, params),
      region(a.min_p_cut, params),
      region(a.repetition_penalty, params),
      region(a.repetition_penalty_scope, params),
      region(a.extra_output, a.rows * a.num_extra_output),
      region(a.frequency_penalty, params),
      region(a.presence_penalty, params),
      region(a.min_tokens_to_keep, params),
      region(a.seed, params),
      region(a.logit_bias_offsets, params + (a.logit_bias_counts == nullptr)),
      region(a.logit_bias_counts, params),
      region(a.param_slots, a.rows),
      region(a.prompt_lengths, has_text ? params : 0),
      region(a.logit_bias_ids, entries),
      region(a.logit_bias_values, entries),
      region(a.slots, has_history ? a.rows : 0),
      region(a.token_ids, a.rows, a.num_token_ids, a.token_ids_stride),
      region(a.sequence_offsets, params + (a.sequence_counts == nullptr)),
      region(a.sequence_counts, params),
      region(a.sequences, a.sequence_offsets != nullptr ? a.sequences_size : 0),
  });
  all_rules(a, [&](const auto* rule) {
    regions.add(region(rule, params));
    return true;
  });
  return regions.overlap(advances ? written_or_advanced : written);
}

inline bool has_overlap(const LlmSamplingUpdate& u) {
  const int64_t words = (u.vocab_size + 31) / 32;
  const bool by_slot = u.position_of == LLM_SAMPLING_POSITION_OF_SLOT;
  const bool has_ids = u.kind != LLM_SAMPLING_UPDATE_ROLLBACK;
  const int64_t slots_with_text = u.text != nullptr ? u.num_slots : 0;
  Regions regions;
  regions.add({
      region(u.position, by_slot ? u.num_slots : u.rows),
      region(u.seen, u.num_slots, words, u.seen_stride),
      region(u.counts, u.num_slots, u.vocab_size, u.counts_stride),
      region(u.lengths, u.num_slots),
      region(u.text, slots_with_text, u.max_text_length, u.max_text_length),
      region(u.text_lengths, slots_with_text),
      region(u.text_prompt_lengths, slots_with_text),
  });
  const int written = regions.count();
  regions.add({
      region(u.windows, slots_with_text),
      region(u.slots, u.rows),
      region(u.numbers, u.rows),
      region(u.prompt_lengths, u.kind == LLM_SAMPLING_UPDATE_FILL ? u.rows : 0),
      u.id_bytes == 4 ? region(
                            static_cast<const int32_t*>(u.ids),
                            has_ids ? u.rows : 0,
                            u.max_ids,
                            u.ids_stride
                        )
                      : region(
                            static_cast<const int64_t*>(u.ids),
                            has_ids ? u.rows : 0,
                            u.max_ids,
                            u.ids_stride
                        ),
  });
  return regions.overlap(written);
}

// Checks the histories of a call that has some, without following a pointer. Args is LlmSamplingArgs or
// LlmSamplingUpdate.
template <typename Args>
int32_t check_history(const Args& a) {
  if (a.counts == nullptr || a.lengths == nullptr) return LLM_SAMPLING_NULL_POINTER;
  if (a.num_slots < 1) return LLM_SAMPLING_BAD_SIZE;
  const int64_t words = (a.vocab_size + 31) / 32;
  if (a.seen_stride < words || a.counts_stride < a.vocab_size ||
      !is_addressable(a.num_slots, a.seen_stride, words) ||
      !is_addressable(a.num_slots, a.counts_stride, a.vocab_size)) {
    return LLM_SAMPLING_BAD_STRIDE;
  }
  if (a.text == nullptr) {
    return a.windows == nullptr ? LLM_SAMPLING_OK : LLM_SAMPLING_NULL_POINTER;
  }
  if (a.text_lengths == nullptr || a.text_prompt_lengths == nullptr) {
    return LLM_SAMPLING_NULL_POINTER;
  }
  if (a.max_text_length < 1 || !is_addressable(a.num_slots, a.max_text_length, a.max_text_length)) {
    return LLM_SAMPLING_BAD_SIZE;
  }
  return LLM_SAMPLING_OK;
}

// Whether the logits are some of the ids of a vocabulary.
inline bool is_slice(const LlmSamplingArgs& a) {
  if (a.whole_vocab_size == 0) return a.first_id == 0;
  return a.first_id >= 0 && a.whole_vocab_size <= LLM_SAMPLING_MAX_VOCAB_SIZE &&
         a.first_id <= a.whole_vocab_size - a.vocab_size;
}

// Checks everything that can be checked without following a pointer.
inline int32_t check_struct(const LlmSamplingArgs& a) {
  if (a.rows < 0 || a.vocab_size < 1 || a.vocab_size > LLM_SAMPLING_MAX_VOCAB_SIZE ||
      a.num_samples < 1 || a.num_threads < 1 || a.logit_bias_size < 0 || a.num_extra_output < 0 ||
      a.num_extra_output > LLM_SAMPLING_MAX_EXTRA_OUTPUT || a.workspace_bytes < 0 ||
      !is_addressable(a.rows, a.num_samples, a.num_samples) ||
      !is_addressable(a.rows, a.num_extra_output, a.num_extra_output) || a.num_top_logprobs < 0 ||
      a.num_top_logprobs > LLM_SAMPLING_MAX_LISTED || a.kept.max_ids < 0 ||
      a.kept.max_ids > LLM_SAMPLING_MAX_LISTED || a.num_token_ids < 0 ||
      !is_addressable(a.rows, a.num_token_ids, a.num_token_ids) ||
      !is_addressable(1, a.workspace_bytes, a.workspace_bytes) ||
      !is_addressable(1, a.logit_bias_size, a.logit_bias_size) || a.list_capacity < 0 ||
      !is_addressable(a.rows, a.list_capacity, a.list_capacity) || a.sequences_size < 0 ||
      !is_addressable(1, a.sequences_size, a.sequences_size) || !is_slice(a)) {
    return LLM_SAMPLING_BAD_SIZE;
  }
  if (a.dtype < LLM_SAMPLING_FLOAT32 || a.dtype > LLM_SAMPLING_BFLOAT16 ||
      a.advance < LLM_SAMPLING_ADVANCE_NEVER || a.advance > LLM_SAMPLING_ADVANCE_IF_ALL_VALID ||
      a.position_of < LLM_SAMPLING_POSITION_OF_ROW ||
      a.position_of > LLM_SAMPLING_POSITION_OF_TEXT) {
    return LLM_SAMPLING_BAD_OPTION;
  }
  if (a.rows == 0) return LLM_SAMPLING_OK;
  const bool by_slot = a.param_slots != nullptr;
  const bool has_text = a.position_of == LLM_SAMPLING_POSITION_OF_TEXT;
  // Everything else that belongs to slots needs them.
  if (!by_slot && (a.position_of != LLM_SAMPLING_POSITION_OF_ROW ||
                   a.logit_bias_counts != nullptr || a.sequence_counts != nullptr)) {
    return LLM_SAMPLING_BAD_OPTION;
  }
  if (by_slot && (a.num_param_slots < 1 || a.num_param_slots > INT32_MAX)) {
    return LLM_SAMPLING_BAD_SIZE;
  }
  const bool draws = a.tokens != nullptr;
  const bool advances = a.advance != LLM_SAMPLING_ADVANCE_NEVER;
  bool has_results = false, are_addressable = true;
  uintptr_t addresses = 0;
  over_results(a, [&](const auto* result, int64_t width) {
    has_results |= result != nullptr;
    are_addressable &= result == nullptr || is_addressable(a.rows, width, width);
    // Results of 8 bytes must be aligned to 8, all others to 4.
    addresses |= reinterpret_cast<uintptr_t>(result) * (8 / sizeof(*result));
  });
  if (!are_addressable) return LLM_SAMPLING_BAD_SIZE;
  if (!draws && (advances || has_results || a.filtered == nullptr)) {
    return LLM_SAMPLING_NULL_POINTER;
  }
  if (draws && (a.status == nullptr || a.seed == nullptr || a.position == nullptr)) {
    return LLM_SAMPLING_NULL_POINTER;
  }
  for (const LlmSamplingLogprobs* of : {&a.processed, &a.raw}) {
    if ((of->top_ids == nullptr) != (of->top_logprobs == nullptr)) return LLM_SAMPLING_NULL_POINTER;
  }
  if (a.num_token_ids > 0 && a.token_ids == nullptr) return LLM_SAMPLING_NULL_POINTER;
  if (draws && has_text && a.prompt_lengths == nullptr) return LLM_SAMPLING_NULL_POINTER;
  if (a.logits == nullptr || !all_parameters(a, [](const auto* p) { return p != nullptr; })) {
    return LLM_SAMPLING_NULL_POINTER;
  }
  const bool aligned_logits = a.dtype == LLM_SAMPLING_FLOAT32
                                  ? is_aligned(static_cast<const float*>(a.logits))
                                  : is_aligned(static_cast<const uint16_t*>(a.logits));
  if (!(aligned_logits && all_parameters(a, [](const auto* p) { return is_aligned(p); }) &&
        is_aligned(a.seed) && is_aligned(a.position) && is_aligned(a.logit_bias_offsets) &&
        is_aligned(a.logit_bias_ids) && is_aligned(a.logit_bias_values) &&
        is_aligned(a.logit_bias_counts) && is_aligned(a.param_slots) &&
        is_aligned(a.prompt_lengths) && is_aligned(a.allowed_mask) && is_aligned(a.seen) &&
        is_aligned(a.counts) && is_aligned(a.lengths) && is_aligned(a.slots) &&
        is_aligned(a.tokens) && is_aligned(a.status) && is_aligned(a.token_ids) &&
        addresses % 8 == 0 && is_aligned(a.filtered) && is_aligned(a.text) &&
        is_aligned(a.text_lengths) && is_aligned(a.text_prompt_lengths) && is_aligned(a.windows) &&
        is_aligned(a.repetition_penalty_scope) && is_aligned(a.extra_output) &&
        all_rules(a, [](const auto* p) { return is_aligned(p); }) &&
        is_aligned(a.sequence_offsets) && is_aligned(a.sequence_counts) &&
        is_aligned(a.sequences) && is_aligned(a.list_bits) && is_aligned(a.list_before) &&
        is_aligned(a.list_counts) && is_aligned(a.list_amounts) &&
        is_aligned(static_cast<const uint64_t*>(a.workspace)))) {
    return LLM_SAMPLING_MISALIGNED;
  }
  if (a.logit_bias_offsets != nullptr && a.logit_bias_size > 0 &&
      (a.logit_bias_ids == nullptr || a.logit_bias_values == nullptr)) {
    return LLM_SAMPLING_NULL_POINTER;
  }
  if (a.dry_multiplier != nullptr) {
    const bool has_all = all_rules(a, [](const auto* p) { return p != nullptr; });
    const bool has_sequences =
        a.sequence_offsets == nullptr || a.sequences_size == 0 || a.sequences != nullptr;
    if (!has_all || !has_sequences || a.seen == nullptr) return LLM_SAMPLING_NULL_POINTER;
  }
  const int64_t words = (a.vocab_size + 31) / 32;
  // A stride of 0 repeats one row, which is allowed for inputs only.
  if (a.logits_stride < 0 || a.allowed_mask_stride < 0 || a.token_ids_stride < 0 ||
      !is_addressable(a.rows, a.token_ids_stride, a.num_token_ids) ||
      (a.filtered != nullptr && a.filtered_stride < a.vocab_size) ||
      !is_addressable(a.rows, a.logits_stride, a.vocab_size) ||
      !is_addressable(a.rows, a.allowed_mask_stride, words) ||
      !is_addressable(a.rows, a.filtered_stride, a.vocab_size)) {
    return LLM_SAMPLING_BAD_STRIDE;
  }
  if (a.seen != nullptr) {
    if (a.slots == nullptr) return LLM_SAMPLING_NULL_POINTER;
    const int32_t code = check_history(a);
    if (code != LLM_SAMPLING_OK) return code;
  } else if (a.text != nullptr || a.extra_output != nullptr) {
    return LLM_SAMPLING_NULL_POINTER;
  }
  if (a.num_extra_output > 0 && a.extra_output == nullptr) return LLM_SAMPLING_NULL_POINTER;
  return has_overlap(a) ? LLM_SAMPLING_OVERLAP : LLM_SAMPLING_OK;
}

// Checks what a call with rules must have beside what check_struct accepts for its lists to be made: memory.
inline int32_t check_lists(const LlmSamplingArgs& a) {
  if (a.rows == 0) return LLM_SAMPLING_OK;
  if (a.list_bits == nullptr || a.list_before == nullptr || a.list_counts == nullptr ||
      a.list_amounts == nullptr) {
    return LLM_SAMPLING_NULL_POINTER;
  }
  const bool is_enough = a.list_capacity >= std::min(a.vocab_size, most_places(a));
  return is_enough ? LLM_SAMPLING_OK : LLM_SAMPLING_BAD_SIZE;
}

// Checks everything of a change of histories that can be checked without following a pointer.
inline int32_t check_update(const LlmSamplingUpdate& u) {
  const bool has_ids = u.kind != LLM_SAMPLING_UPDATE_ROLLBACK;
  if (u.rows < 0 || u.vocab_size < 1 || u.vocab_size > LLM_SAMPLING_MAX_VOCAB_SIZE ||
      (has_ids && u.max_ids < 0) || !is_addressable(u.rows, 1, 1)) {
    return LLM_SAMPLING_BAD_SIZE;
  }
  if (u.kind < LLM_SAMPLING_UPDATE_APPEND || u.kind > LLM_SAMPLING_UPDATE_ROLLBACK ||
      (u.position_of != LLM_SAMPLING_POSITION_OF_ROW &&
       u.position_of != LLM_SAMPLING_POSITION_OF_SLOT) ||
      (has_ids && u.id_bytes != 4 && u.id_bytes != 8) || u.reserved != 0) {
    return LLM_SAMPLING_BAD_OPTION;
  }
  if (u.rows == 0) return LLM_SAMPLING_OK;
  if (u.slots == nullptr || u.numbers == nullptr || u.seen == nullptr ||
      (has_ids && u.max_ids > 0 && u.ids == nullptr) || (!has_ids && u.text == nullptr)) {
    return LLM_SAMPLING_NULL_POINTER;
  }
  const int32_t code = check_history(u);
  if (code != LLM_SAMPLING_OK) return code;
  if (has_ids && (u.ids_stride < 0 || !is_addressable(u.rows, u.ids_stride, u.max_ids))) {
    return LLM_SAMPLING_BAD_STRIDE;
  }
  const bool aligned_ids = u.id_bytes == 4 ? is_aligned(static_cast<const int32_t*>(u.ids))
                                           : is_aligned(static_cast<const int64_t*>(u.ids));
  if (!((aligned_ids || !has_ids) && is_aligned(u.slots) && is_aligned(u.numbers) &&
        is_aligned(u.prompt_lengths) && is_aligned(u.position) && is_aligned(u.seen) &&
        is_aligned(u.counts) && is_aligned(u.lengths) && is_aligned(u.text) &&
        is_aligned(u.text_lengths) && is_aligned(u.text_prompt_lengths) && is_aligned(u.windows))) {
    return LLM_SAMPLING_MISALIGNED;
  }
  return has_overlap(u) ? LLM_SAMPLING_OVERLAP : LLM_SAMPLING_OK;
}

// Checks that no two rows name the same slot, of those that are in 0 .. num_slots - 1. The slots must be in
// host memory.
inline int32_t check_named_once(const int32_t* slots, int64_t rows, int64_t num_slots) {
  bool is_rising = true;
  for (int64_t row = 1; row < rows; ++row) is_rising &= slots[row - 1] < slots[row];
  if (is_rising) return LLM_SAMPLING_OK;
  const std::unique_ptr<int32_t[]> sorted(new (std::nothrow) int32_t[static_cast<size_t>(rows)]);
  if (sorted == nullptr) return LLM_SAMPLING_OUT_OF_MEMORY;
  int32_t* end = std::copy_if(slots, slots + rows, sorted.get(), [&](int32_t slot) {
    return slot >= 0 && slot < num_slots;
  });
  std::sort(sorted.get(), end);
  const bool is_shared = std::adjacent_find(sorted.get(), end) != end;
  return is_shared ? LLM_SAMPLING_OVERLAP : LLM_SAMPLING_OK;
}

// Checks that every slot of the history is in range and, where each row has parameters of its own and
// advances, that no two rows share one.
inline int32_t check_slots(const LlmSamplingArgs& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    if (parameter_index(a, row) < 0) continue;
    if (a.slots[row] < 0 || a.slots[row] >= a.num_slots) return LLM_SAMPLING_BAD_SIZE;
  }
  if (a.param_slots != nullptr || a.advance == LLM_SAMPLING_ADVANCE_NEVER) return LLM_SAMPLING_OK;
  return check_named_once(a.slots, a.rows, a.num_slots);
}

// Finds the part [begin, end) of an array that belongs to index `i` of the parameters, as entries_of in rows.h
// does. Returns false if it does not lie inside of the array.
inline bool find_part(
    const int64_t* offsets,
    const int32_t* counts,
    int64_t size,
    int64_t i,
    int64_t& begin,
    int64_t& end
) {
  begin = read_once(offsets[i]);
  if (begin < 0 || begin > size) return false;
  end = counts != nullptr ? begin + read_once(counts[i]) : read_once(offsets[i + 1]);
  return end >= begin && end <= size;
}

// Checks the rules of a row that look at the history; `i` is the index of its parameters.
inline int32_t check_rules(const LlmSamplingArgs& a, int64_t i) {
  if (!(a.dry_multiplier[i] >= 0.0f && a.dry_multiplier[i] <= 100.0f && a.dry_base[i] >= 1.0f &&
        a.dry_base[i] <= 100.0f && a.dry_allowed_length[i] >= 1 && a.dry_penalty_last_n[i] >= -1 &&
        a.no_repeat_ngram_size[i] >= 0 && a.no_repeat_ngram_window[i] >= 0 &&
        a.min_tokens[i] >= 0)) {
    return LLM_SAMPLING_BAD_PARAMETER;
  }
  if (a.sequence_offsets == nullptr) return LLM_SAMPLING_OK;
  int64_t begin, end;
  if (!find_part(a.sequence_offsets, a.sequence_counts, a.sequences_size, i, begin, end)) {
    return LLM_SAMPLING_BAD_SIZE;
  }
  for (int64_t at = begin; at < end;) {
    if (end - at < 2) return LLM_SAMPLING_BAD_PARAMETER;
    const int32_t kind = read_once(a.sequences[at]), count = read_once(a.sequences[at + 1]);
    if (kind < LLM_SAMPLING_BREAKER_IDS || kind > LLM_SAMPLING_STOP_IDS || count < 1 ||
        count > end - at - 2) {
      return LLM_SAMPLING_BAD_PARAMETER;
    }
    at += 2 + count;
  }
  return LLM_SAMPLING_OK;
}

// Checks what the pointers of a struct that check_struct accepts point to: slots, offsets, biases, sequences,
// and the range of every parameter. It reads the arrays, so they must be in host memory.
inline int32_t check_values(const LlmSamplingArgs& a) {
  if (a.seen != nullptr) {
    const int32_t code = check_slots(a);
    if (code != LLM_SAMPLING_OK) return code;
  }
  // Each comparison is false for NaN.
  const auto is_within = [](float x, float least, float most) { return x >= least && x <= most; };
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t i = parameter_index(a, row);
    if (i < 0) continue;
    if (!(is_within(a.temperature[i], 0.0f, -kLowest) &&
          is_within(a.top_p[i], 0.0f, 1.0f) &&  // a tiny top_p may have been rounded to 0
          a.min_p_cut[i] >= 0.0f && a.repetition_penalty[i] > 0.0f &&
          a.repetition_penalty[i] < kInfinity && is_within(a.frequency_penalty[i], -2.0f, 2.0f) &&
          is_within(a.presence_penalty[i], -2.0f, 2.0f) && a.min_tokens_to_keep[i] >= 1)) {
      return LLM_SAMPLING_BAD_PARAMETER;
    }
    if (a.repetition_penalty_scope != nullptr && (a.repetition_penalty_scope[i] & ~1) != 0) {
      return LLM_SAMPLING_BAD_PARAMETER;
    }
    if (a.dry_multiplier != nullptr) {
      const int32_t code = check_rules(a, i);
      if (code != LLM_SAMPLING_OK) return code;
    }
    if (a.logit_bias_offsets == nullptr) continue;
    int64_t begin, end;
    if (!find_part(a.logit_bias_offsets, a.logit_bias_counts, a.logit_bias_size, i, begin, end)) {
      return LLM_SAMPLING_BAD_SIZE;
    }
    for (int64_t entry = begin; entry < end; ++entry) {
      const float value = a.logit_bias_values[entry];
      if (!(is_within(value, -100.0f, 100.0f) || value == -kInfinity)) {
        return LLM_SAMPLING_BAD_PARAMETER;
      }
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
      return "the struct is NULL or of another size or version than this library's";
    case LLM_SAMPLING_BAD_SIZE:
      return "rows, vocab_size, num_samples, num_threads, num_slots, num_param_slots, "
             "logit_bias_size, sequences_size, first_id, whole_vocab_size, list_capacity, "
             "max_text_length, num_extra_output, num_token_ids, num_top_logprobs, workspace_bytes, "
             "max_ids, a slot or an offset is out of range";
    case LLM_SAMPLING_BAD_OPTION:
      return "dtype, advance, kind, id_bytes, position_of or reserved has an "
             "unknown value, or one that needs param_slots";
    case LLM_SAMPLING_NULL_POINTER:
      return "a pointer that is needed is NULL";
    case LLM_SAMPLING_BAD_STRIDE:
      return "a stride is negative or too large, or rows that are written overlap";
    case LLM_SAMPLING_MISALIGNED:
      return "a pointer is not aligned to its type";
    case LLM_SAMPLING_BAD_PARAMETER:
      return "a row's sampling parameter, a bias or a record of sequences is out of range";
    case LLM_SAMPLING_OUT_OF_MEMORY:
      return "out of memory";
    case LLM_SAMPLING_OVERLAP:
      return "memory that is written overlaps other memory, or rows that advance share a slot";
    default:
      return "unknown code";
  }
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_VALIDATE_H_
