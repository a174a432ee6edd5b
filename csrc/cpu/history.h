// How the CPU kernel changes histories, by the tokens that it has drawn and by ids from elsewhere, and what
// ids that count for one call alone make of them.
#ifndef LLM_SAMPLING_CPU_HISTORY_H_
#define LLM_SAMPLING_CPU_HISTORY_H_

#include <stdint.h>

#include <algorithm>
#include <type_traits>

#include "../history.h"
#include "../llm_sampling.h"

namespace llm_sampling {

// Adds a number. What overflows wraps around, as in torch.
template <typename T>
void add_to(T& value, int64_t number) {
  using Unsigned = std::make_unsigned_t<T>;
  value = static_cast<T>(static_cast<Unsigned>(value) + static_cast<Unsigned>(number));
}

inline void set_bit(uint32_t* words, int32_t id) { words[id >> 5] |= 1u << (id & 31); }

inline void clear_bit(uint32_t* words, int32_t id) { words[id >> 5] &= ~(1u << (id & 31)); }

inline uint32_t* seen_words(const SlotHistory& history) {
  return reinterpret_cast<uint32_t*>(history.seen);
}

// Makes the ids at `to` count instead of those at `from`.
inline void move_window(const SlotHistory& history, Places from, Places to) {
  bool any_left = false;
  for (int64_t place = from.begin; place < from.end; ++place) {
    if (to.has(place)) {
      place = to.end - 1;  // all up to there stay
      continue;
    }
    const int32_t id = text_id(history, place);
    if (id < 0) continue;
    clear_bit(seen_words(history), id);
    if (place >= history.prompt_length) add_to(history.counts[id], -1);
    any_left = true;
  }
  for (int64_t place = to.begin; place < to.end; ++place) {
    const bool is_new = !from.has(place);
    if (!is_new && !any_left) {
      place = from.end - 1;
      continue;
    }
    const int32_t id = text_id(history, place);
    if (id < 0) continue;
    set_bit(seen_words(history), id);  // an id that has left at one place may be at another
    if (is_new && place >= history.prompt_length) add_to(history.counts[id], 1);
  }
}

// Records the token that a row has drawn.
inline void record(const SlotHistory& history, int32_t token) {
  if (history.text == nullptr) {
    set_bit(seen_words(history), token);
    add_to(history.counts[token], 1);
  } else {
    const int64_t length = text_length(history);
    if (length == history.max_text_length) return;  // another thread has filled it
    history.text[length] = token;
    *history.text_length = length + 1;
    move_window(history, window_of(history, length), window_of(history, length + 1));
  }
  add_to(*history.length, 1);
}

// The change of one row's history.
class RowUpdate {
 public:
  RowUpdate(const LlmSamplingUpdate& update, int64_t row, int64_t slot)
      : update_(update), row_(row), slot_(slot), history_(slot_history(update, slot)) {}

  void run() {
    if (update_.kind == LLM_SAMPLING_UPDATE_ROLLBACK) return roll_back();
    const bool fills = update_.kind == LLM_SAMPLING_UPDATE_FILL;
    if (fills) clear();
    add_ids(fills && update_.prompt_lengths != nullptr ? update_.prompt_lengths[row_] : 0);
  }

 private:
  void clear() {
    const int64_t words = (update_.vocab_size + 31) / 32;
    std::fill_n(history_.seen, words, 0);
    std::fill_n(history_.counts, update_.vocab_size, 0);
    *history_.length = 0;
    if (update_.position != nullptr) position() = 0;
    if (history_.text == nullptr) return;
    *history_.text_length = history_.prompt_length = update_.text_prompt_lengths[slot_] = 0;
  }

  // Adds the row's ids, of which the first `of_prompt` are the prompt's.
  void add_ids(int64_t of_prompt) {
    const int64_t number = limited(update_.numbers[row_], 0, update_.max_ids);
    const int64_t before = history_.text == nullptr ? 0 : text_length(history_);
    int64_t length = before;
    int64_t output = 0;
    for (int64_t i = 0; i < number; ++i) {
      const int64_t id = id_at(i);
      if (id < 0 || id >= update_.vocab_size) continue;
      const bool is_output = i >= of_prompt;
      if (history_.text == nullptr) {
        set_bit(seen_words(history_), static_cast<int32_t>(id));
        if (is_output) add_to(history_.counts[id], 1);
      } else {
        if (length == history_.max_text_length) break;
        history_.text[length] = static_cast<int32_t>(id);
        ++length;
        history_.prompt_length += !is_output;
      }
      output += is_output;
    }
    if (history_.text != nullptr) {
      if (of_prompt > 0) update_.text_prompt_lengths[slot_] = history_.prompt_length;
      *history_.text_length = length;
      move_window(history_, window_of(history_, before), window_of(history_, length));
    }
    grow_output(output);
  }

  void roll_back() {
    const int64_t before = text_length(history_);
    const int64_t output = before - limited(history_.prompt_length, 0, before);
    const int64_t number = limited(update_.numbers[row_], 0, output);
    *history_.text_length = before - number;
    move_window(history_, window_of(history_, before), window_of(history_, before - number));
    grow_output(-number);
  }

  void grow_output(int64_t number) {
    add_to(*history_.length, number);
    if (update_.position != nullptr) add_to(position(), number);
  }

  int64_t& position() const {
    return update_.position[update_.position_of == LLM_SAMPLING_POSITION_OF_SLOT ? slot_ : row_];
  }

  int64_t id_at(int64_t i) const {
    const int64_t place = row_ * update_.ids_stride + i;
    return update_.id_bytes == 4 ? static_cast<const int32_t*>(update_.ids)[place]
                                 : static_cast<const int64_t*>(update_.ids)[place];
  }

  const LlmSamplingUpdate& update_;
  const int64_t row_;
  const int64_t slot_;
  SlotHistory history_;
};

inline void update(const LlmSamplingUpdate& update) {
  for (int64_t row = 0; row < update.rows; ++row) {
    const int64_t slot = update.slots[row];
    if (slot >= 0 && slot < update.num_slots) RowUpdate(update, row, slot).run();
  }
}

// The tokens whose count is another one than in the history, since ids come next in the row's output for
// one call alone. They move the window, so that other ids may leave it.
class Replaced {
 public:
  // Finds these tokens, and sets or clears their bits in `seen`, a copy of the history's bits.
  void find(const SlotHistory& history, const int32_t* ids, int64_t size, uint32_t* seen) {
    const int64_t length = history.text == nullptr ? 0 : text_length(history);
    int32_t next[LLM_SAMPLING_MAX_EXTRA_OUTPUT];
    int64_t valid = 0;
    for (int64_t i = 0; i < size; ++i) {
      const int32_t id = read_once(ids[i]);
      if (id >= 0 && id < history.vocab_size) next[valid++] = id;
    }
    const Places from = window_of(history, length);
    const Places to = window_of(history, length + valid);
    const Places leaving = {from.begin, std::min(length, to.begin)};

    int32_t* last = std::copy_n(next, valid, ids_);
    for (int64_t place = leaving.begin; place < leaving.end; ++place) {
      const int32_t id = text_id(history, place);
      if (id >= 0) *last++ = id;
    }
    std::sort(ids_, last);
    size_ = std::unique(ids_, last) - ids_;

    for (int64_t i = 0; i < size_; ++i) {
      const int32_t id = ids_[i];
      counts_[i] = read_once(history.counts[id]);
      for (int64_t place = leaving.begin; place < leaving.end; ++place) {
        const bool is_output = place >= history.prompt_length;
        if (is_output && text_id(history, place) == id) add_to(counts_[i], -1);
      }
      bool is_seen = history.window < 0;
      for (int64_t place = to.begin; place < length && !is_seen; ++place) {
        is_seen = text_id(history, place) == id;
      }
      for (int64_t j = std::max<int64_t>(to.begin - length, 0); j < valid; ++j) {
        if (next[j] != id) continue;
        is_seen = true;
        add_to(counts_[i], 1);
      }
      if (is_seen) {
        set_bit(seen, id);
      } else {
        clear_bit(seen, id);
      }
    }
  }

  // Replaces the count of a token, if it is another one.
  void replace(uint32_t id, int32_t& count) const {
    const int32_t* found = std::lower_bound(ids_, ids_ + size_, static_cast<int32_t>(id));
    if (found != ids_ + size_ && *found == static_cast<int32_t>(id)) count = counts_[found - ids_];
  }

  // Replaces counts of the tokens begin + indices[i], whose indices ascend, in counts[i].
  void replace(int64_t begin, const int32_t* indices, int64_t size, int32_t* counts) const {
    const int32_t* found = std::lower_bound(ids_, ids_ + size_, static_cast<int32_t>(begin));
    for (int64_t i = 0; i < size && found != ids_ + size_; ++i) {
      const int64_t id = begin + indices[i];
      while (found != ids_ + size_ && *found < id) ++found;
      if (found != ids_ + size_ && *found == id) counts[i] = counts_[found - ids_];
    }
  }

 private:
  int32_t ids_[2 * LLM_SAMPLING_MAX_EXTRA_OUTPUT];  // ascending
  int32_t counts_[2 * LLM_SAMPLING_MAX_EXTRA_OUTPUT];
  int64_t size_ = 0;
};

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_HISTORY_H_
