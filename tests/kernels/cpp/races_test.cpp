// The CPU kernel while another thread overwrites the memory that it reads, which no caller should do. A race
// may change a token. It must not make the kernel leave the memory of the struct, which AddressSanitizer sees,
// run for ever, or return a token, an id or a rank that no row has.
//
//   races_test logits SECONDS SEED ONE_IN     overwrites the logits alone
//   races_test few SECONDS SEED ONE_IN        overwrites a few bfloat16 logits now and then
//   races_test all SECONDS SEED ONE_IN        also mask, history, texts, biases, slots, parameters, rules and ids
//   races_test results SECONDS SEED ONE_IN    overwrites logits, and tokens and status as they are written
//
// Of the combinations of parameters, sizes, dtypes and threads every ONE_IN-th is run, for SECONDS in all.
// The exit status is 0 if all results are well-formed; "N calls" is then printed.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../../../csrc/llm_sampling.h"
#include "noise.h"
#include "parameters.h"
#include "result_arrays.h"

namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");
constexpr int64_t kRows = 3;
constexpr int64_t kMaxTextLength = 200;  // more than twice as many ids as may count for one call

const std::vector<int64_t> kTextLengths = {kMaxTextLength / 2, kMaxTextLength - 1, 0};

// What a call asks for.
struct Kind {
  const char* name;
  Filters filters;  // penalties have a history
  bool biased, masked, filtered;
  bool results;  // kTokens or kAll
  int32_t samples;
  bool by_slot = false;  // whether the parameters belong to slots
  bool has_text =
      false;  // whether ids are kept in order, with windows, and some count for one call
  bool has_rules = false;  // whether rows have rules that look at the text, which repeats itself
};

// What a call returns besides filtered logits.
constexpr bool kTokens = false, kAll = true;

constexpr Kind kKinds[] = {
    {"greedy", {0.0f, 0, 1.0f, 0.0f, 1, 1.0f, 0.0f}, false, false, false, kTokens, 1},
    {"greedy, penalised", {0.0f, 0, 1.0f, 0.0f, 1, 1.2f, 0.1f}, false, false, true, kAll, 1},
    {"no filter", {0.8f, 0, 1.0f, 0.0f, 1, 1.0f, 0.0f}, false, false, false, kAll, 3},
    {"a bias", {0.8f, 0, 1.0f, 0.0f, 1, 1.0f, 0.0f}, true, false, true, kAll, 1},
    {"top-k", {0.8f, 40, 1.0f, 0.0f, 1, 1.0f, 0.0f}, false, false, false, kTokens, 1},
    {"top-k, penalised", {0.8f, 40, 0.9f, 0.0f, 1, 1.2f, 0.1f}, false, false, true, kAll, 2},
    {"top-p", {0.8f, 0, 0.9f, 0.0f, 1, 1.0f, 0.0f}, false, false, false, kTokens, 1},
    {"top-p, raw", {0.8f, 0, 0.5f, 0.0f, 1, 1.0f, 0.0f}, false, false, true, kAll, 3},
    {"top-p, hot", {1e3f, 0, 0.99f, 0.0f, 1, 1.0f, 0.0f}, false, false, false, kAll, 2},
    {"top-p, many", {0.8f, 0, 0.1f, 0.0f, 3000, 1.0f, 0.0f}, false, false, true, kAll, 1},
    {"top-p, min-p", {0.8f, 0, 0.9f, 0.1f, 5, 1.0f, 0.0f}, false, false, false, kAll, 1},
    {"min-p", {0.8f, 0, 1.0f, 0.1f, 1, 1.0f, 0.0f}, false, false, false, kAll, 1},
    {"min-p, flat", {1e3f, 0, 1.0f, 1e-3f, 1, 1.0f, 0.0f}, false, false, true, kAll, 1},
    {"all", {1.3f, 400, 0.9f, 0.01f, 3, 0.8f, -0.5f}, true, true, true, kAll, 2},
    {"all but top-k", {0.7f, 0, 0.9f, 0.01f, 3, 1.2f, 0.5f}, true, true, true, kAll, 2},
    {"top-k, by slot", {0.8f, 40, 1.0f, 0.0f, 1, 1.0f, 0.0f}, false, false, true, kAll, 1, true},
    {"all, by slot", {1.3f, 400, 0.9f, 0.01f, 3, 0.8f, -0.5f}, true, true, true, kAll, 2, true},
    {"text", {0.8f, 0, 0.9f, 0.0f, 1, 1.2f, 0.1f}, false, false, true, kTokens, 1, false, true},
    {"text, top-k",
     {0.8f, 40, 1.0f, 0.0f, 1, 1.2f, 0.1f},
     false,
     true,
     false,
     kAll,
     1,
     false,
     true},
    {"text, by slot", {1.3f, 0, 0.9f, 0.0f, 1, 0.8f, -0.5f}, true, true, true, kAll, 2, true, true},
    {"rules",
     {0.8f, 40, 0.9f, 0.0f, 1, 1.2f, 0.0f},
     false,
     false,
     true,
     kAll,
     1,
     false,
     true,
     true},
    {"rules, by slot",
     {1.3f, 0, 0.9f, 0.0f, 1, 0.8f, -0.5f},
     true,
     true,
     true,
     kAll,
     2,
     true,
     true,
     true},
};

// One row of logits for the writer to choose from.
std::vector<float> make_pattern(int which, size_t size, Noise& noise) {
  std::vector<float> x(size);
  for (float& value : x) {
    const float normal = noise.normal();
    switch (which) {
      case 0:
        value = normal * 3.0f;
        break;
      case 1:
        value = normal * 0.1f;  // flat
        break;
      case 2:
        value = normal * 0.1f + 4.0f;  // above the maximum of the one before
        break;
      case 3:
        value = normal - 60.0f;  // without mass below the others
        break;
      case 4:
        value = std::nearbyint(normal * 2.0f);  // ties
        break;
      case 5:
        value = 1.0f;
        break;
      case 6:
        value = -kInfinity;
        break;
      case 7:
        value = kNan;
        break;
      case 8: {
        constexpr float kSpecial[] = {kNan, kInfinity, -kInfinity, 3e38f, -3e38f, 1e-40f, 0, -0.0f};
        value = noise.below(50) == 0 ? kSpecial[noise.below(8)] : normal;
        break;
      }
      default:
        value = noise.below(200) == 0 ? 9.0f + normal : normal;  // few have most of the mass
    }
  }
  return x;
}
constexpr int kPatterns = 10;

// The rows and the state of a call, each array in exactly the memory that the contract asks for.
struct Batch {
  int64_t vocab_size, words;
  bool narrow;
  std::vector<std::vector<float>> patterns;
  std::vector<std::vector<uint16_t>> narrow_patterns;
  Parameters parameters;
  std::vector<float> logits, values;
  std::vector<uint16_t> narrow_logits;
  std::vector<int32_t> slots, mask, seen, counts, ids, status, param_slots, bias_counts;
  std::vector<int32_t> text, windows, extra, scope, token_ids;
  std::vector<float> dry_multiplier, dry_base;
  std::vector<int32_t> dry_allowed_length, dry_penalty_last_n, no_repeat_ngram_size;
  std::vector<int32_t> no_repeat_ngram_window, min_tokens, sequences, sequence_counts;
  std::vector<int64_t> sequence_offsets;
  std::vector<uint8_t> record;
  std::vector<int64_t> lengths, offsets, tokens, text_lengths, text_prompt_lengths;
  std::vector<float> filtered;
  ResultArrays others;
  LlmSamplingArgs args = {};

  Batch(const Kind& kind, int64_t vocab_size, bool narrow, int32_t threads, Noise& noise)
      : vocab_size(vocab_size),
        words((vocab_size + 31) / 32),
        narrow(narrow),
        parameters(kRows, kind.filters),
        status(kRows),
        tokens(kRows * kind.samples),
        filtered(kind.filtered ? kRows * (vocab_size + 1) - 1 : 0) {
    for (int which = 0; which < kPatterns; ++which) {
      patterns.push_back(make_pattern(which, static_cast<size_t>(vocab_size), noise));
      std::vector<uint16_t> half;
      for (float x : patterns.back()) half.push_back(to_bfloat16(x));
      narrow_patterns.push_back(half);
    }
    for (int64_t row = 0; row < kRows; ++row) {
      const std::vector<float>& x = patterns[row];
      const std::vector<uint16_t>& half = narrow_patterns[row];
      if (narrow) {
        narrow_logits.insert(narrow_logits.end(), half.begin(), half.end());
      } else {
        logits.insert(logits.end(), x.begin(), x.end());
      }
    }
    args.struct_size = sizeof(args);
    args.version = LLM_SAMPLING_ABI_VERSION;
    args.rows = kRows;
    args.vocab_size = vocab_size;
    args.dtype = narrow ? LLM_SAMPLING_BFLOAT16 : LLM_SAMPLING_FLOAT32;
    args.num_samples = kind.samples;
    args.advance = LLM_SAMPLING_ADVANCE_ALWAYS;
    args.num_threads = threads;
    args.logits = narrow ? static_cast<const void*>(narrow_logits.data()) : logits.data();
    args.logits_stride = vocab_size;
    parameters.put_into(args);
    if (kind.biased) {
      constexpr int64_t kEntries = 20;  // of a row; those of the last row do not ascend
      for (int64_t row = 0; row <= kRows; ++row) offsets.push_back(row * kEntries);
      for (int64_t i = 0; i < kRows * kEntries; ++i) {
        const int64_t at = i % kEntries * vocab_size / kEntries;
        ids.push_back(static_cast<int32_t>(i < 2 * kEntries ? at : vocab_size - 1 - at));
        values.push_back(noise.normal());
      }
      args.logit_bias_offsets = offsets.data();
      args.logit_bias_ids = ids.data();
      args.logit_bias_values = values.data();
      args.logit_bias_size = static_cast<int64_t>(ids.size());
    }
    if (kind.by_slot) {
      param_slots = {1, 2, 0};
      bias_counts = {20, 0, 7};
      args.param_slots = param_slots.data();
      args.num_param_slots = kRows;
      args.logit_bias_counts = bias_counts.data();
      args.position_of = LLM_SAMPLING_POSITION_OF_SLOT;
    }
    if (kind.masked) {
      mask.assign(kRows * words, 0x5fffffff);
      args.allowed_mask = mask.data();
      args.allowed_mask_stride = words;
    }
    if (kind.filters.has_history()) {
      seen.assign(kRows * words, 0x11111111);
      counts.assign(kRows * vocab_size, 1);
      lengths.assign(kRows, 0);
      slots = {2, 0, 1};
      args.seen = seen.data();
      args.seen_stride = words;
      args.counts = counts.data();
      args.counts_stride = vocab_size;
      args.lengths = lengths.data();
      args.slots = slots.data();
      args.num_slots = kRows;
    }
    if (kind.has_text) {
      const int64_t ids_of_text = kind.has_rules ? 3 : vocab_size;
      for (int64_t i = 0; i < kRows * kMaxTextLength; ++i) {
        text.push_back(static_cast<int32_t>(noise.below(ids_of_text)));
      }
      for (int64_t i = 0; i < kRows * LLM_SAMPLING_MAX_EXTRA_OUTPUT; ++i) {
        extra.push_back(static_cast<int32_t>(noise.below(vocab_size)));
      }
      text_lengths = kTextLengths;
      text_prompt_lengths = {3, kMaxTextLength - 1, 0};
      windows = {-1, kMaxTextLength, 70};
      record = {1, 1, 0};
      scope = {0, 1, 0};
      args.text = text.data();
      args.max_text_length = kMaxTextLength;
      args.text_lengths = text_lengths.data();
      args.text_prompt_lengths = text_prompt_lengths.data();
      args.windows = windows.data();
      args.record = record.data();
      args.repetition_penalty_scope = scope.data();
      args.extra_output = extra.data();
      args.num_extra_output = LLM_SAMPLING_MAX_EXTRA_OUTPUT;
    }
    if (kind.has_rules) {
      dry_multiplier = {0.8f, 0.0f, 100.0f};
      dry_base = {1.75f, 1.0f, 1.1f};
      dry_allowed_length = {2, 1, 1};
      dry_penalty_last_n = {-1, 5, 64};
      no_repeat_ngram_size = {0, 3, 1};
      no_repeat_ngram_window = {0, 50, 7};
      min_tokens = {0, 9, 1000};
      const std::vector<int32_t> records = {
          LLM_SAMPLING_BREAKER_IDS,
          2,
          2,
          5,  //
          LLM_SAMPLING_BREAKER,
          2,
          0,
          1,  //
          LLM_SAMPLING_BAD_WORD,
          3,
          1,
          1,
          2,  //
          LLM_SAMPLING_STOP_IDS,
          3,
          6,
          2,
          400,  //
      };
      sequence_offsets.push_back(0);
      for (int64_t row = 0; row < kRows; ++row) {
        sequences.insert(sequences.end(), records.begin(), records.end());
        sequence_offsets.push_back(static_cast<int64_t>(sequences.size()));
      }
      args.dry_multiplier = dry_multiplier.data();
      args.dry_base = dry_base.data();
      args.dry_allowed_length = dry_allowed_length.data();
      args.dry_penalty_last_n = dry_penalty_last_n.data();
      args.no_repeat_ngram_size = no_repeat_ngram_size.data();
      args.no_repeat_ngram_window = no_repeat_ngram_window.data();
      args.min_tokens = min_tokens.data();
      args.sequence_offsets = sequence_offsets.data();
      args.sequences = sequences.data();
      args.sequences_size = static_cast<int64_t>(sequences.size());
      if (kind.by_slot) {
        sequence_counts.assign(kRows, static_cast<int32_t>(records.size()));
        args.sequence_counts = sequence_counts.data();
      }
    }
    args.tokens = tokens.data();
    args.status = status.data();
    args.filtered = kind.filtered ? filtered.data() : nullptr;
    args.filtered_stride = vocab_size + 1;
    if (kind.results == kTokens) return;
    args.num_top_logprobs = 30;
    args.kept.max_ids = 300;
    args.num_token_ids = 4;
    for (int64_t i = 0; i < kRows * args.num_token_ids; ++i) {
      token_ids.push_back(static_cast<int32_t>(noise.below(vocab_size)));
    }
    args.token_ids = token_ids.data();
    args.token_ids_stride = args.num_token_ids;
    others.add_all(args);
    others.put_into(args);
  }

  static uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return static_cast<uint16_t>(bits >> 16);
  }
};

// ---- The writer ----------------------------------------------------------------------------------

// Overwrites a part of a row, or all of it. TSan's suppression names this function: the race on the logits is
// the one that ThreadSanitizer must not report.
__attribute__((noinline)) void overwrite_logits(Batch& batch, Noise& noise, size_t most) {
  const size_t v = static_cast<size_t>(batch.vocab_size);
  const size_t row = noise.below(kRows);
  const size_t which = noise.below(kPatterns);
  size_t begin = 0, count = v;
  if (noise.below(2) == 0) {
    begin = noise.below(v);
    count = 1 + noise.below(v - begin);
  }
  count = std::min(count, most);
  // One by one, because ThreadSanitizer does not always know who called memcpy.
  for (size_t at = begin; at < begin + count; ++at) {
    if (batch.narrow) {
      volatile uint16_t* to = batch.narrow_logits.data() + row * v;
      to[at] = batch.narrow_patterns[which][at];
    } else {
      volatile float* to = batch.logits.data() + row * v;
      to[at] = batch.patterns[which][at];
    }
  }
}

// Gives some elements bad values for a moment, and then the old ones again, so that many calls pass the checks
// and meet the bad values after them.
template <typename T, size_t n>
void disturb(std::vector<T>& values, const T (&bad)[n], Noise& noise) {
  if (values.empty()) return;
  const std::vector<T> before = values;
  for (size_t changes = 1 + noise.below(values.size()); changes > 0; --changes) {
    *const_cast<volatile T*>(&values[noise.below(values.size())]) = bad[noise.below(n)];
  }
  for (size_t wait = noise.below(20000); wait > 0; --wait) asm volatile("");
  for (size_t i = 0; i < values.size(); ++i) *const_cast<volatile T*>(&values[i]) = before[i];
}

void overwrite_others(Batch& b, Noise& noise) {
  const int32_t v = static_cast<int32_t>(b.vocab_size);
  const int64_t entries = static_cast<int64_t>(b.ids.size());
  const int32_t words[] = {0, -1, static_cast<int32_t>(noise.next()), 1 << 31};
  const int32_t numbers[] = {0, 1, -1, 2, 100, v - 1, v, INT32_MAX, INT32_MIN};
  const int32_t slots[] = {0, 1, 2, 3, -1, 1 << 20, INT32_MAX, INT32_MIN};
  const int32_t ids[] = {0, v / 2, v - 1, v, v + 600, -1, -600, INT32_MAX, INT32_MIN};
  const int64_t offsets[] = {0, 5, entries, entries + 1, 1 << 20, -1, INT64_MAX, INT64_MIN};
  const float floats[] = {0.0f, 1.0f, -1.0f, 1e-30f, 1e30f, 1e-40f, kNan, kInfinity, -kInfinity};
  constexpr int64_t kMost = kMaxTextLength;
  const int64_t lengths[] =
      {0, 5, 100, kMost - 1, kMost, kMost + 1, 1 << 20, -1, INT64_MAX, INT64_MIN};
  const int32_t windows[] = {0, 1, 63, 64, 65, 128, kMost, 1 << 20, -1, INT32_MAX, INT32_MIN};
  const uint8_t records[] = {0, 1, 255};
  const int32_t scopes[] = {0, 1};  // others are refused
  const int64_t numbers_there = static_cast<int64_t>(b.sequences.size());
  const int32_t records_there[] =
      {0, 1, 2, 3, 4, 5, -1, static_cast<int32_t>(numbers_there), 400, INT32_MAX, INT32_MIN};
  const int64_t sequence_offsets[] = {
      0,
      1,
      numbers_there - 1,
      numbers_there,
      numbers_there + 1,
      1 << 20,
      -1,
      INT64_MAX,
      INT64_MIN
  };
  switch (noise.below(b.text.empty() ? 18 : b.sequences.empty() ? 25 : 35)) {
    case 0:
      return disturb(b.mask, words, noise);
    case 1:
      return disturb(b.seen, words, noise);
    case 2:
      return disturb(b.counts, numbers, noise);
    case 3:
      return disturb(b.ids, ids, noise);
    case 4:
      return disturb(b.values, floats, noise);
    case 5:
      return disturb(b.offsets, offsets, noise);
    case 6:
      return disturb(b.slots, slots, noise);
    case 7:
      return disturb(b.parameters.temperature, floats, noise);
    case 8:
      return disturb(b.parameters.top_p, floats, noise);
    case 9:
      return disturb(b.parameters.min_p_cut, floats, noise);
    case 10:
      return disturb(b.parameters.repetition_penalty, floats, noise);
    case 11:
      return disturb(b.parameters.frequency_penalty, floats, noise);
    case 12:
      return disturb(b.parameters.presence_penalty, floats, noise);
    case 13:
      return disturb(b.parameters.top_k, numbers, noise);
    case 14:
      return disturb(b.param_slots, slots, noise);
    case 15:
      return disturb(b.bias_counts, numbers, noise);
    case 16:
      return disturb(b.token_ids, ids, noise);
    case 18:
      return disturb(b.text, ids, noise);
    case 19:
      return disturb(b.text_lengths, lengths, noise);
    case 20:
      return disturb(b.text_prompt_lengths, lengths, noise);
    case 21:
      return disturb(b.windows, windows, noise);
    case 22:
      return disturb(b.extra, ids, noise);
    case 23:
      return disturb(b.record, records, noise);
    case 24:
      return disturb(b.scope, scopes, noise);
    case 25:
      return disturb(b.dry_multiplier, floats, noise);
    case 26:
      return disturb(b.dry_base, floats, noise);
    case 27:
      return disturb(b.dry_allowed_length, numbers, noise);
    case 28:
      return disturb(b.dry_penalty_last_n, numbers, noise);
    case 29:
      return disturb(b.no_repeat_ngram_size, numbers, noise);
    case 30:
      return disturb(b.no_repeat_ngram_window, numbers, noise);
    case 31:
      return disturb(b.min_tokens, numbers, noise);
    case 32:
      return disturb(b.sequences, records_there, noise);
    case 33:
      return disturb(b.sequence_offsets, sequence_offsets, noise);
    case 34:
      return disturb(b.sequence_counts, numbers, noise);
    default:
      return disturb(b.parameters.min_tokens_to_keep, numbers, noise);
  }
}

// Overwrites results that the kernel reads again.
void overwrite_results(Batch& b, Noise& noise) {
  const int64_t v = b.vocab_size;
  const int64_t tokens[] = {0, v / 2, v - 1, v, v + 600, -1, -600, INT64_MAX, INT64_MIN};
  const int32_t numbers[] = {0, 1, 2, -1, INT32_MAX, INT32_MIN};
  if (noise.below(4) == 0) return disturb(b.status, numbers, noise);
  disturb(b.tokens, tokens, noise);
}

// ---- The caller ----------------------------------------------------------------------------------

[[noreturn]] void fail(const Kind& kind, const Batch& batch, const char* what) {
  std::printf("FAILED: %s: %s, V = %ld\n", what, kind.name, static_cast<long>(batch.vocab_size));
  std::fflush(stdout);
  std::_Exit(1);
}

// Whether all elements of a row of a result are in least .. most.
template <typename T>
bool is_within(const T* values, int64_t row, int64_t width, int64_t least, int64_t most) {
  const T* begin = values + row * width;
  return std::all_of(begin, begin + width, [=](T x) { return x >= least && x <= most; });
}

// Checks that a row's ids, ranks, numbers and masses are some that a row can have.
void check_results(const Kind& kind, const Batch& batch, int64_t row) {
  const LlmSamplingArgs& a = batch.args;
  const int64_t v = a.vocab_size, draws = a.num_samples, ids = a.num_token_ids;
  for (const LlmSamplingLogprobs* of : {&a.processed, &a.raw}) {
    if (!is_within(of->ranks, row, draws, -1, v) || !is_within(of->id_ranks, row, ids, -1, v)) {
      fail(kind, batch, "no rank of the row");
    }
    if (!is_within(of->top_ids, row, a.num_top_logprobs, -1, v - 1)) {
      fail(kind, batch, "no id of the row in a list");
    }
  }
  const LlmSamplingKept& kept = a.kept;
  constexpr int64_t kMostMass = int64_t{1} << 42;
  if (!is_within(kept.counts, row, 1, 0, v) || !is_within(kept.total, row, 1, 0, v * kMostMass) ||
      !is_within(kept.masses, row, draws, 0, kMostMass) ||
      !is_within(kept.id_masses, row, ids, 0, kMostMass)) {
    fail(kind, batch, "no number or mass of the row");
  }
  if (!is_within(kept.ids, row, kept.max_ids, -1, v - 1) ||
      !is_within(kept.first_id, row, 1, -1, v - 1) || !is_within(kept.last_id, row, 1, -1, v - 1)) {
    fail(kind, batch, "no id of the row in the kept set");
  }
  const uint32_t last = static_cast<uint32_t>(kept.mask[(row + 1) * batch.words - 1]);
  if (v % 32 != 0 && last >> v % 32 != 0) fail(kind, batch, "a bit past the vocabulary");
}

// With `is_valid` nothing but logits and results changes. Tokens and status that another thread has overwritten
// are not looked at.
void call(const Kind& kind, Batch& batch, bool is_valid, bool has_own_tokens) {
  constexpr int64_t kUntouched = -7;
  std::fill(batch.tokens.begin(), batch.tokens.end(), kUntouched);
  std::fill(batch.status.begin(), batch.status.end(), -7);
  if (kind.has_text) batch.text_lengths = kTextLengths;  // so that not all of them are full soon
  for (int64_t row = 1; kind.filtered && row < kRows; ++row) {
    batch.filtered[row * (batch.vocab_size + 1) - 1] = 7.0f;  // between two rows
  }
  const int32_t code = llm_sampling_cpu(&batch.args);
  if (code != LLM_SAMPLING_OK) {
    if (is_valid) fail(kind, batch, llm_sampling_error(code));
    if (code != LLM_SAMPLING_BAD_PARAMETER && code != LLM_SAMPLING_BAD_SIZE &&
        code != LLM_SAMPLING_OVERLAP) {
      fail(kind, batch, llm_sampling_error(code));
    }
    for (int64_t token : batch.tokens) {
      if (token != kUntouched) fail(kind, batch, "a token is written after an error");
    }
    return;
  }
  for (int64_t row = 0; kind.results == kAll && row < kRows; ++row) {
    check_results(kind, batch, row);
  }
  for (int64_t row = 0; has_own_tokens && row < kRows; ++row) {
    const int32_t status = batch.status[row];
    const bool is_full = status == LLM_SAMPLING_STATUS_TEXT_FULL;
    if (status < 0 || (status > 7 && !(is_full && kind.has_text))) {
      fail(kind, batch, "an unknown status");
    }
    for (int32_t sample = 0; sample < kind.samples; ++sample) {
      const int64_t token = batch.tokens[row * kind.samples + sample];
      if (token < -1 || token >= batch.vocab_size) fail(kind, batch, "no token of the row");
      bool has_none = is_full || (status & LLM_SAMPLING_STATUS_NO_CANDIDATE) != 0;
      if (kind.by_slot && status == 0) has_none = token == -1;  // the row has become padding
      if (has_none != (token == -1)) fail(kind, batch, "token and status do not agree");
    }
  }
  for (int64_t row = 1; kind.filtered && row < kRows; ++row) {
    if (batch.filtered[row * (batch.vocab_size + 1) - 1] != 7.0f) {
      fail(kind, batch, "the gap between filtered rows is written");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const bool all = std::string(argv[1]) == "all";
  const bool few = std::string(argv[1]) == "few";
  const bool results = std::string(argv[1]) == "results";
  Noise noise(std::strtoull(argv[3], nullptr, 10));
  struct Combination {
    const Kind* kind;
    int64_t vocab_size;
    bool narrow;
    int32_t threads;
  };
  std::vector<Combination> combinations;
  for (const Kind& kind : kKinds) {
    for (int64_t vocab_size : {7, 513, 5000, 40000}) {
      for (bool narrow : {false, true}) {
        for (int32_t threads : {1, 3}) combinations.push_back({&kind, vocab_size, narrow, threads});
      }
    }
  }
  const size_t one_in = std::strtoull(argv[4], nullptr, 10);
  using Clock = std::chrono::steady_clock;
  const std::chrono::duration<double> whole(std::strtod(argv[2], nullptr));
  const auto slice = std::chrono::duration_cast<Clock::duration>(
      whole * static_cast<double>(one_in) / static_cast<double>(combinations.size())
  );
  long calls = 0;
  for (size_t i = 0; i < combinations.size(); i += one_in) {
    const Combination& c = combinations[i];
    if (few && !c.narrow) continue;
    Batch batch(*c.kind, c.vocab_size, c.narrow, c.threads, noise);
    std::atomic<bool> is_over{false};
    std::thread writer([&, seed = noise.next()] {
      Noise own(seed);
      while (!is_over.load(std::memory_order_relaxed)) {
        overwrite_logits(batch, own, few ? 4 : SIZE_MAX);
        // ThreadSanitizer takes long for each access in a race, and must see some.
        if (few) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        if (all) overwrite_others(batch, own);
        if (results) overwrite_results(batch, own);
      }
    });
    const auto end = Clock::now() + slice;
    do {
      call(*c.kind, batch, !all, !results);
      ++calls;
    } while (Clock::now() < end);
    is_over.store(true, std::memory_order_relaxed);
    writer.join();
  }
  std::printf("%ld calls\n", calls);
  return 0;
}
