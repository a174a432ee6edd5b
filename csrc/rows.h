// Where a call keeps what belongs to a row: its parameters, its position and its biases. For host and device.
//
// What these functions read may not have been checked, or may have changed since: whatever it is, the
// result lies inside of the arrays whose sizes the struct states.
#ifndef LLM_SAMPLING_ROWS_H_
#define LLM_SAMPLING_ROWS_H_

#include <stdint.h>

#include "llm_sampling.h"
#include "semantics.h"

namespace llm_sampling {

LLM_SAMPLING_FN int64_t limited(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

// What parameter_index returns for a row that has no parameters.
constexpr int64_t kPadding = -1;
constexpr int64_t kNoSuchSlot = -2;

// The index of a row's parameters: the row's own, or its slot.
LLM_SAMPLING_FN int64_t parameter_index(const LlmSamplingArgs& args, int64_t row) {
  if (args.param_slots == nullptr) return row;
  const int64_t slot = read_once(args.param_slots[row]);
  return slot >= kPadding && slot < args.num_param_slots ? slot : kNoSuchSlot;
}

// The status of a row without parameters.
LLM_SAMPLING_FN int32_t status_of_nothing(int64_t index) {
  return index == kPadding ? 0 : int32_t{LLM_SAMPLING_STATUS_NO_CANDIDATE};
}

// The slot of the history that a row has.
LLM_SAMPLING_FN int64_t history_slot(const LlmSamplingArgs& args, int64_t row) {
  return limited(read_once(args.slots[row]), 0, args.num_slots - 1);
}

// The place of a row's position; `index` is that of its parameters.
LLM_SAMPLING_FN int64_t* position_place(const LlmSamplingArgs& args, int64_t row, int64_t index) {
  return args.position + (args.position_of == LLM_SAMPLING_POSITION_OF_SLOT ? index : row);
}

// How many tokens a row's request has produced.
LLM_SAMPLING_FN uint64_t position(const LlmSamplingArgs& args, int64_t row, int64_t index) {
  const auto found = static_cast<uint64_t>(*position_place(args, row, index));
  if (args.position_of != LLM_SAMPLING_POSITION_OF_TEXT) return found;
  return found + 1 - static_cast<uint64_t>(args.prompt_lengths[index]);
}

// A part of an array; its size fits an int32.
struct Entries {
  int64_t begin, count;
};

// The part that belongs to an index of the parameters: from its offset on, `counts` of it, or up to the next
// offset where there are no counts.
LLM_SAMPLING_FN Entries
entries_of(const int64_t* offsets, const int32_t* counts, int64_t size, int64_t index) {
  Entries entries = {0, 0};
  if (offsets == nullptr) return entries;
  entries.begin = limited(read_once(offsets[index]), 0, size);
  const int64_t end =
      counts != nullptr ? entries.begin + read_once(counts[index]) : read_once(offsets[index + 1]);
  entries.count = limited(limited(end, entries.begin, size) - entries.begin, 0, INT32_MAX);
  return entries;
}

LLM_SAMPLING_FN Entries bias_entries(const LlmSamplingArgs& args, int64_t index) {
  const int64_t size = args.logit_bias_size;
  return entries_of(args.logit_bias_offsets, args.logit_bias_counts, size, index);
}

LLM_SAMPLING_FN Entries sequence_entries(const LlmSamplingArgs& args, int64_t index) {
  return entries_of(args.sequence_offsets, args.sequence_counts, args.sequences_size, index);
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_ROWS_H_
