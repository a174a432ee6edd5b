// What a slot of the history holds, and where the window lies whose ids count. For host and device.
//
// What these functions read may not have been checked, or may have changed since: whatever it is, the
// result lies inside of the arrays whose sizes the struct states.
#ifndef LLM_SAMPLING_HISTORY_H_
#define LLM_SAMPLING_HISTORY_H_

#include <stdint.h>

#include "llm_sampling.h"
#include "rows.h"
#include "semantics.h"

namespace llm_sampling {

// The history of one slot. A slot without a text has no window.
struct SlotHistory {
  int32_t* seen;
  int32_t* counts;
  int64_t* length;  // of the output
  int32_t* text;    // nullptr if ids are not kept in order
  int64_t* text_length;
  int64_t max_text_length;
  int64_t prompt_length;  // how many ids of the text are the prompt's
  int64_t window;         // how many of the last ids count; negative: all do
  int64_t vocab_size;
};

// Args is LlmSamplingArgs or LlmSamplingUpdate.
template <typename Args>
LLM_SAMPLING_FN SlotHistory slot_history(const Args& args, int64_t slot) {
  SlotHistory history = {};
  history.seen = args.seen + slot * args.seen_stride;
  history.counts = args.counts + slot * args.counts_stride;
  history.length = args.lengths + slot;
  history.window = -1;
  history.vocab_size = args.vocab_size;
  if (args.text != nullptr) {
    history.text = args.text + slot * args.max_text_length;
    history.text_length = args.text_lengths + slot;
    history.max_text_length = args.max_text_length;
    history.prompt_length = read_once(args.text_prompt_lengths[slot]);
    if (args.windows != nullptr) history.window = read_once(args.windows[slot]);
  }
  return history;
}

// How many ids the text has.
LLM_SAMPLING_FN int64_t text_length(const SlotHistory& history) {
  return limited(read_once(*history.text_length), 0, history.max_text_length);
}

// The id at a place of the text, or -1 if it is outside of the vocabulary.
LLM_SAMPLING_FN int32_t text_id(const SlotHistory& history, int64_t place) {
  const int32_t id = read_once(history.text[place]);
  return id >= 0 && id < history.vocab_size ? id : -1;
}

// The places [begin, end) of a text.
struct Places {
  int64_t begin, end;

  LLM_SAMPLING_FN bool has(int64_t place) const { return place >= begin && place < end; }
};

// The places whose ids count, in a text of this length.
LLM_SAMPLING_FN Places window_of(const SlotHistory& history, int64_t length) {
  const bool is_all = history.window < 0 || history.window > length;
  return {is_all ? 0 : length - history.window, length};
}

// Whether a row is to be recorded.
LLM_SAMPLING_FN bool is_recorded(const LlmSamplingArgs& args, int64_t row) {
  return args.advance != LLM_SAMPLING_ADVANCE_NEVER &&
         (args.record == nullptr || read_once(args.record[row]) != 0);
}

// Whether a row is to be recorded and its text has no room for one more id.
LLM_SAMPLING_FN bool is_text_full(const LlmSamplingArgs& args, int64_t row) {
  return args.text != nullptr && is_recorded(args, row) &&
         read_once(args.text_lengths[history_slot(args, row)]) >= args.max_text_length;
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_HISTORY_H_
