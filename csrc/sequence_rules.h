// Where a call keeps the rules of a row that look at its history. llm_sampling/sequence_rules.py says what they
// are. For host and device.
//
// What these functions read may not have been checked, or may have changed since: whatever it is, the
// result lies inside of the arrays whose sizes the struct states.
#ifndef LLM_SAMPLING_SEQUENCE_RULES_H_
#define LLM_SAMPLING_SEQUENCE_RULES_H_

#include <stdint.h>

#include "llm_sampling.h"
#include "rows.h"
#include "semantics.h"

namespace llm_sampling {

constexpr int32_t kMaxExcess = 255;  // a match longer than allowed by more counts as longer by this
constexpr float kMaxAmount = 0x1p100f;

// Records, one after the other: a kind, the number of ids, and the ids.
struct Sequences {
  const int32_t* begin;
  const int32_t* end;

  // Calls visit(kind, ids, count) for each record. What another thread may have made of it stays inside.
  template <typename Visit>
  LLM_SAMPLING_FN void each(const Visit& visit) const {
    for (const int32_t* at = begin; end - at >= 2;) {
      const int32_t kind = read_once(at[0]);
      const int64_t count = limited(read_once(at[1]), 0, end - at - 2);
      visit(kind, at + 2, count);
      at += 2 + count;
    }
  }
};

// The records from the first to the last one that has breakers of a single id: there may be thousands of others.
LLM_SAMPLING_FN Sequences single_breakers(const Sequences& sequences) {
  Sequences found = {sequences.end, sequences.end};
  sequences.each([&](int32_t kind, const int32_t* ids, int64_t count) {
    if (kind != LLM_SAMPLING_BREAKER_IDS) return;
    if (found.begin == sequences.end) found.begin = ids - 2;
    found.end = ids + count;
  });
  return found;
}

// Which ids of the vocabulary a row has logits of. All others take part in matches, and have no place in a list.
struct VocabSlice {
  int64_t first_id;
  int64_t size;        // logits of the row
  int64_t vocab_size;  // of the whole vocabulary

  LLM_SAMPLING_FN bool is_id(int32_t id) const { return id >= 0 && id < vocab_size; }
  // The logit of an id, or -1.
  LLM_SAMPLING_FN int32_t place_of(int32_t id) const {
    const int64_t place = id - first_id;
    return place >= 0 && place < size ? static_cast<int32_t>(place) : -1;
  }
};

LLM_SAMPLING_FN VocabSlice vocab_slice(const LlmSamplingArgs& args) {
  const bool is_all = args.whole_vocab_size == 0;
  return {args.first_id, args.vocab_size, is_all ? args.vocab_size : args.whole_vocab_size};
}

// The rules of a row.
struct SequenceRules {
  float dry_multiplier, dry_base;
  int32_t dry_allowed_length, dry_penalty_last_n;
  int32_t no_repeat_ngram_size, no_repeat_ngram_window;
  int32_t min_tokens;
  Sequences sequences;
};

// How many ids the text of a row may have: those that a slot can keep, and those of a call.
LLM_SAMPLING_FN int64_t most_places(const LlmSamplingArgs& args) {
  return (args.text != nullptr ? args.max_text_length : 0) + LLM_SAMPLING_MAX_EXTRA_OUTPUT;
}

// The rules of a row; `index` is that of its parameters.
LLM_SAMPLING_FN SequenceRules read_rules(const LlmSamplingArgs& args, int64_t index) {
  const Entries entries = sequence_entries(args, index);
  const int32_t* sequences = args.sequences + entries.begin;
  const float multiplier = read_once(args.dry_multiplier[index]);
  return {
      multiplier > 0.0f ? multiplier : 0.0f,
      read_once(args.dry_base[index]),
      read_once(args.dry_allowed_length[index]),
      read_once(args.dry_penalty_last_n[index]),
      read_once(args.no_repeat_ngram_size[index]),
      read_once(args.no_repeat_ngram_window[index]),
      read_once(args.min_tokens[index]),
      {sequences, sequences + entries.count},
  };
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_SEQUENCE_RULES_H_
