// The list of step 5a: the tokens of a row whose logits the rules that look at the sequence lower, each with the
// amount that is subtracted. llm_sampling/sequence_rules.py says the same in slow and simple code.
//
// All rules but the bad words ask, for each earlier place of a text, how many ids before it are the last ids of
// the text. The Z algorithm answers that for all places of the reversed text, in time linear in its length.
#ifndef LLM_SAMPLING_CPU_SEQUENCE_RULES_H_
#define LLM_SAMPLING_CPU_SEQUENCE_RULES_H_

#include <algorithm>
#include <cstdint>

#include "../semantics.h"
#include "../sequence_rules.h"
#include "buffer.h"

namespace llm_sampling {
namespace {

// Prompt and output of a row: the ids of a text, and those that come after them for this call.
class RowIds {
 public:
  // Ids of `extra` outside of the vocabulary are padding; there are at most LLM_SAMPLING_MAX_EXTRA_OUTPUT.
  RowIds(
      const int32_t* text,
      int64_t length,
      const int32_t* extra,
      int64_t num_extra,
      const VocabSlice& slice
  )
      : text_(text), length_(length), size_(length), slice_(slice) {
    for (int64_t i = 0; i < num_extra; ++i) {
      const int32_t id = read_once(extra[i]);
      if (slice.is_id(id)) extra_[size_++ - length_] = id;
    }
  }
  int64_t size() const { return size_; }
  int64_t num_extra() const { return size_ - length_; }
  // The id that `following` ids come after, up to the row's end; -1 if it is outside of the vocabulary.
  int32_t from_end(int64_t following) const {
    const int64_t place = size_ - 1 - following;
    if (place >= length_) return extra_[place - length_];
    const int32_t id = read_once(text_[place]);
    return slice_.is_id(id) ? id : -1;
  }
  // Whether these are the last ids of the row, its last `following` ids left out.
  bool end_with(const int32_t* ids, int64_t count, int64_t following) const {
    if (count > size_ - following) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (from_end(following + i) != read_once(ids[count - 1 - i])) return false;
    }
    return true;
  }

 private:
  const int32_t* text_;
  int64_t length_;
  int64_t size_;
  VocabSlice slice_;
  int32_t extra_[LLM_SAMPLING_MAX_EXTRA_OUTPUT];
};

// Makes the list of one row after another, and keeps the memory for it.
class PenaltyList {
 public:
  // The list of a row: rising places of logits, and what is subtracted from their logits; infinity bans a token.
  const int32_t* ids() const { return ids_; }
  const float* amounts() const { return amounts_; }
  int64_t size() const { return size_; }

  // `output_length` is that of the row's output, without the extra ids.
  void make(
      const SequenceRules& rules,
      const RowIds& text,
      int64_t output_length,
      const VocabSlice& slice
  ) {
    const bool has_dry = rules.dry_multiplier != 0.0f;
    const int64_t of_dry =
        has_dry ? last_of(text.size(), rules.dry_penalty_last_n, rules.dry_penalty_last_n < 0) : 0;
    const int32_t ngram = rules.no_repeat_ngram_size;
    const int64_t of_ngrams =
        ngram > 0
            ? last_of(text.size(), rules.no_repeat_ngram_window, rules.no_repeat_ngram_window <= 0)
            : 0;
    const int64_t window = std::max(of_dry, of_ngrams);
    int32_t* last = last_.at_least(window);  // the last ids, in reverse
    matches_.at_least(window);
    start(slice, window + (rules.sequences.end - rules.sequences.begin));
    for (int64_t i = 0; i < window; ++i) last[i] = text.from_end(i);
    if (of_dry > 0 || ngram > 1) match(last, window);
    if (of_dry > 0) apply_dry(rules, text, last, of_dry);
    if (ngram == 1) {
      for (int64_t i = 0; i < of_ngrams; ++i) ban(last[i]);
    } else {
      const int32_t* matches = matches_.at_least(0);
      for (int64_t i = 1; i < of_ngrams; ++i) {
        if (std::min<int64_t>(matches[i], of_ngrams - i) >= ngram - 1) ban(last[i - 1]);
      }
    }
    const bool is_short = output_length < rules.min_tokens - text.num_extra();
    rules.sequences.each([&](int32_t kind, const int32_t* ids, int64_t count) {
      if (kind == LLM_SAMPLING_BAD_WORD && count > 0 && text.end_with(ids, count - 1, 0)) {
        ban(read_once(ids[count - 1]));
      }
      for (int64_t i = 0; kind == LLM_SAMPLING_STOP_IDS && is_short && i < count; ++i)
        ban(read_once(ids[i]));
    });
    finish(rules);
  }

 private:
  // How large a part of a text the last `count` ids are.
  static int64_t last_of(int64_t size, int32_t count, bool is_all) {
    return is_all ? size : std::min<int64_t>(size, count);
  }

  // Takes memory for at most so many tokens, before there are levels, which must be 0 after an exception too.
  void start(const VocabSlice& slice, int64_t most) {
    if (slice.size > levels_.size()) {
      std::fill_n(levels_.at_least(slice.size), slice.size, uint16_t{0});
    }
    slice_ = slice;
    ids_ = id_memory_.at_least(std::min(most, slice.size));
    amounts_ = amount_memory_.at_least(std::min(most, slice.size));
    size_ = 0;
  }

  // Finds, for each place i > 0 of the reversed text, how many ids from there on are its first ones.
  void match(const int32_t* last, int64_t size) {
    int32_t* matches = matches_.at_least(size);
    int64_t begin = 0, end = 0;  // of the match that reaches farthest
    for (int64_t i = 1; i < size; ++i) {
      int64_t length = i < end ? std::min<int64_t>(matches[i - begin], end - i) : 0;
      if (i + length >= end) {
        while (i + length < size && last[length] == last[i + length]) ++length;
        begin = i;
        end = i + length;
      }
      matches[i] = static_cast<int32_t>(length);
    }
  }

  void apply_dry(
      const SequenceRules& rules,
      const RowIds& text,
      const int32_t* last,
      int64_t size
  ) {
    const int64_t allowed = std::max(rules.dry_allowed_length, 1);
    const int32_t* matches = matches_.at_least(0);
    int64_t most = 0;
    for (int64_t i = 1; i < size; ++i) {
      most = std::max<int64_t>(most, std::min<int64_t>(matches[i], size - i));
    }
    most = std::min(most, allowed + kMaxExcess);
    if (most < allowed) return;
    most = count_after_breaker(rules.sequences, text, last, std::min(most, size), size);
    if (most < allowed) return;
    const Sequences alone = single_breakers(rules.sequences);
    for (int64_t i = 1; i < size; ++i) {
      const int64_t length = std::min({int64_t{matches[i]}, size - i, most});
      if (length < allowed || is_breaker(alone, last[i - 1])) continue;
      raise(last[i - 1], static_cast<uint16_t>(length - allowed + 1));
    }
  }

  // How many ids follow the last complete breaker among the last `size` ids; `most` if that is more.
  static int64_t count_after_breaker(
      const Sequences& sequences,
      const RowIds& text,
      const int32_t* last,
      int64_t most,
      int64_t size
  ) {
    for (int64_t following = 0; following < most; ++following) {
      bool is_end = false;
      sequences.each([&](int32_t kind, const int32_t* ids, int64_t count) {
        if (kind == LLM_SAMPLING_BREAKER_IDS) {
          is_end |= std::binary_search(ids, ids + count, last[following]);
        } else if (kind == LLM_SAMPLING_BREAKER && count > 0 && count <= size - following) {
          is_end |= text.end_with(ids, count, following);
        }
      });
      if (is_end) return following;
    }
    return most;
  }

  static bool is_breaker(const Sequences& sequences, int32_t id) {
    bool is_one = false;
    sequences.each([&](int32_t kind, const int32_t* ids, int64_t count) {
      is_one |= kind == LLM_SAMPLING_BREAKER_IDS && std::binary_search(ids, ids + count, id);
    });
    return is_one;
  }

  static constexpr uint16_t kBan = UINT16_MAX;

  void ban(int32_t id) { raise(id, kBan); }

  // A level is 0 for what is not listed, 1 and more for what DRY lowers, and kBan.
  void raise(int32_t id, uint16_t level) {
    const int32_t place = slice_.place_of(id);
    if (place < 0) return;
    uint16_t& own = levels_.at_least(0)[place];
    if (own == 0) ids_[size_++] = place;
    own = std::max(own, level);
  }

  // Sorts the list, replaces levels by amounts, and clears the levels.
  void finish(const SequenceRules& rules) {
    std::sort(ids_, ids_ + size_);
    uint16_t* levels = levels_.at_least(0);
    float of_level[kMaxExcess + 2];
    int known = 1;
    of_level[1] = rules.dry_multiplier;
    for (int64_t i = 0; i < size_; ++i) {
      const uint16_t level = levels[ids_[i]];
      levels[ids_[i]] = 0;
      if (level == kBan) {
        amounts_[i] = kInfinity;
        continue;
      }
      for (; known < level; ++known) {
        of_level[known + 1] = std::min(of_level[known] * rules.dry_base, kMaxAmount);
      }
      amounts_[i] = of_level[level];
    }
  }

  Buffer<int32_t> last_, matches_, id_memory_;
  Buffer<uint16_t> levels_;
  Buffer<float> amount_memory_;
  VocabSlice slice_ = {};
  int32_t* ids_ = nullptr;
  float* amounts_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_SEQUENCE_RULES_H_
