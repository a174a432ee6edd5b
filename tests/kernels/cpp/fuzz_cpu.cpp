// A fuzz test of the CPU kernel. On valid batches every result must equal that of the steps of
// docs/semantics.md, done one by one with a sort, and every change of a history that of the ids, one by one.
// Structs that break the contract must give their return code, and nothing may be written. Histories that
// cannot be must do no harm. tests/kernels/fuzz.sh builds it with libFuzzer; compiled with -DREPLAY it runs
// the inputs in the files that it is given.
//
// An input is read from its first byte on and continues with zeros past its end, so every input is a valid
// description of a batch, and a change of one byte is a small change of the batch. Rows are too long to be
// stored in an input: a few bytes choose a shape, a seed and some values.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "../../../csrc/cpu/sample.cpp"
#include "noise.h"
#include "result_arrays.h"

using namespace llm_sampling;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::abort();
}

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  template <typename T>
  T take() {
    T value = {};
    const size_t there = std::min(sizeof(T), size_);
    std::memcpy(&value, data_, there);
    data_ += there;
    size_ -= there;
    return value;
  }
  int64_t below(int64_t limit) { return take<uint8_t>() % limit; }
  template <typename T, size_t n>
  T one_of(const T (&values)[n]) {
    return values[take<uint8_t>() % n];
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

constexpr float kFloats[] = {
    0.0f,
    -0.0f,
    1.0f,
    -1.0f,
    0.5f,
    2.0f,
    -20.0f,
    30.0f,
    1e-40f,
    -1e-40f,
    3e38f,
    kLowest,
    0x1p-126f,
    88.0f,
    kInfinity,
    -kInfinity,
    0.25f,
    -3.0f,
    1.0000001f,
    0.9999999f,
    100.0f,
    1e-3f,
    __builtin_nanf(""),
    -kLowest,
};

// A value that a bias may have.
float to_bias(float x) {
  if (x != x) return -kInfinity;
  return x == -kInfinity ? x : std::min(std::max(x, -100.0f), 100.0f);
}

// A special value, or an arbitrary one.
float take_float(Bytes& bytes) {
  const uint8_t which = bytes.take<uint8_t>();
  return which < 200 ? kFloats[which % std::size(kFloats)] : bytes.take<float>();
}

// To float16 or bfloat16, rounded towards zero, which is good enough for an input.
uint16_t narrow(float x, int32_t dtype) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (dtype == LLM_SAMPLING_BFLOAT16) return static_cast<uint16_t>(bits >> 16);
  const uint32_t sign = bits >> 16 & 0x8000;
  const int32_t exponent = static_cast<int32_t>(bits >> 23 & 255) - 112;
  const uint32_t fraction = bits >> 13 & 1023;
  if (x != x) return 0x7e00;
  if (exponent >= 31) return static_cast<uint16_t>(sign | 0x7c00);
  if (exponent > 0)
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent) << 10 | fraction);
  return static_cast<uint16_t>(sign | fraction >> 4);  // not the nearest, but a subnormal
}

// The inputs of a batch, each in exactly the memory that the contract asks for.
struct Inputs {
  std::vector<float> logits;
  std::vector<uint16_t> narrow_logits;
  std::vector<float> temperature, top_p, min_p_cut, repetition, frequency, presence;
  std::vector<int32_t> top_k, at_least, slots;
  std::vector<int64_t> seed, offsets;
  std::vector<int32_t> bias_ids;
  std::vector<float> bias_values;
  std::vector<int32_t> mask;
  std::vector<int32_t> param_slots, bias_counts;
  std::vector<int64_t> prompt_lengths;
  std::vector<int32_t> windows, scope, extra, token_ids;
  std::vector<int64_t> text_prompt_lengths;
  std::vector<uint8_t> record;
  std::vector<float> dry_multiplier, dry_base;
  std::vector<int32_t> dry_allowed_length, dry_penalty_last_n, no_repeat_ngram_size;
  std::vector<int32_t> no_repeat_ngram_window, min_tokens, sequence_counts, sequences;
  std::vector<int64_t> sequence_offsets;
};

struct State {
  std::vector<int64_t> position, lengths, text_lengths;
  std::vector<int32_t> seen, counts, text;
  bool operator==(const State& other) const {
    return position == other.position && lengths == other.lengths && seen == other.seen &&
           counts == other.counts && text == other.text && text_lengths == other.text_lengths;
  }
};

// ---- Histories, id by id ---------------------------------------------------------------------------

bool has_bit(const int32_t* words, int64_t id) {
  return (static_cast<uint32_t>(words[id >> 5]) >> (id & 31) & 1) != 0;
}

void set_bit_of(int32_t* words, int64_t id) {
  words[id >> 5] = static_cast<int32_t>(static_cast<uint32_t>(words[id >> 5]) | 1u << (id & 31));
}

// Adds a number; what overflows wraps around.
template <typename T>
void plus(T& value, int64_t number) {
  value = static_cast<T>(static_cast<uint64_t>(value) + static_cast<uint64_t>(number));
}

// Writes the bits and counts of the last `window` ids, or of all if it is negative; what lies between two rows
// stays as it is.
void count_ids(
    const std::vector<int32_t>& ids,
    int64_t of_prompt,
    int64_t window,
    int64_t vocab_size,
    int32_t* seen,
    int32_t* counts
) {
  const int64_t length = static_cast<int64_t>(ids.size());
  std::fill_n(seen, (vocab_size + 31) / 32, 0);
  std::fill_n(counts, vocab_size, 0);
  for (int64_t place = 0; place < length; ++place) {
    if (window >= 0 && place < length - window) continue;
    const int32_t id = ids[static_cast<size_t>(place)];
    set_bit_of(seen, id);
    counts[id] += place >= of_prompt;
  }
}

constexpr int32_t kWindows[] = {-1, 0, 1, 2, 5, 64, 1000, INT32_MIN, INT32_MAX};
constexpr int64_t kTextLengths[] = {1, 2, 3, 5, 8, 70, 200};

// Values that lengths, numbers and windows cannot have, or that are at the ends of what they can.
template <typename T>
void make_hostile(Bytes& bytes, std::vector<T>& values, int64_t size) {
  constexpr int64_t kLeast = std::numeric_limits<T>::min(), kMost = std::numeric_limits<T>::max();
  for (T& value : values) {
    const int64_t some[] = {kLeast, -1, 0, 1, size - 1, size, size + 1, kMost};
    const int64_t which = bytes.below(16);
    if (which < static_cast<int64_t>(std::size(some))) value = static_cast<T>(some[which]);
  }
}

// Ids of which many are equal and some are outside of the vocabulary.
template <typename T>
void make_ids(Noise& noise, std::vector<T>& ids, int64_t vocab_size, bool all_valid) {
  T few[4];
  for (T& id : few) id = static_cast<T>(noise.below(vocab_size));
  const int64_t outside[] =
      {-1, vocab_size, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()};
  for (T& id : ids) {
    const uint64_t which = noise.below(uint64_t{8});
    id = which < 4 ? few[which] : static_cast<T>(noise.below(vocab_size));
    if (which == 7 && !all_valid) id = static_cast<T>(outside[noise.below(4)]);
  }
}

// A field of a struct, which may be one of a struct inside of it.
struct Field {
  size_t offset, size;
  bool is_pointer;
};

#define FIELD_OF(Struct, name)                                         \
  Field {                                                              \
    offsetof(Struct, name), sizeof(std::declval<Struct&>().name),      \
        std::is_pointer<decltype(std::declval<Struct&>().name)>::value \
  }
#define FIELD(name) FIELD_OF(LlmSamplingArgs, name)

// Floats are kept as bits, so that a NaN equals itself.
struct Outputs {
  std::vector<int64_t> tokens;
  std::vector<int32_t> status;
  std::vector<uint32_t> filtered;
  ResultArrays results;
  bool operator==(const Outputs& other) const {
    return tokens == other.tokens && status == other.status && filtered == other.filtered &&
           results.bytes() == other.results.bytes();
  }
};

void make_row(Bytes& bytes, float* x, int64_t size) {
  const int64_t shape = bytes.below(7);
  Noise noise(bytes.take<uint16_t>());
  const float scale = bytes.one_of({1.0f, 0.01f, 0.3f, 3.0f, 10.0f, 1e-38f, 1e37f});
  float palette[4] = {};
  if (shape == 5) {
    for (float& value : palette) value = take_float(bytes);
  }
  for (int64_t i = 0; i < size; ++i) {
    const float rank = static_cast<float>(i);
    switch (shape) {
      case 0:
        x[i] = noise.normal() * scale;
        break;
      case 1:
        x[i] = std::nearbyint(noise.normal() * 4.0f) * scale;
        break;  // ties
      case 2:
        x[i] = rank * scale;
        break;
      case 3:
        x[i] = -rank * scale;
        break;
      case 4:
        x[i] = noise.below(100) != 0 ? -kInfinity : noise.normal() * scale;
        break;
      case 5:
        x[i] = palette[noise.below(4)];
        break;
      default:
        x[i] = noise.below(size) < 20 ? 9.0f + noise.normal() : noise.normal() * scale;
    }
  }
  for (int64_t count = bytes.below(9); count > 0; --count) {
    x[bytes.take<uint16_t>() % size] = take_float(bytes);
  }
}

// The longest is split over several threads; most are short, for the fuzzer's speed.
constexpr int64_t kVocabSizes[] = {1,    2,    5,    7,    31,   32,   33,   64,   100,  200,  300,
                                   400,  500,  511,  512,  513,  600,  700,  800,  900,  1024, 1025,
                                   1300, 1500, 1600, 2048, 2049, 3000, 5000, 9001, 33000};

struct Case {
  LlmSamplingArgs args = {};
  Inputs inputs;
  State state;

  explicit Case(Bytes& bytes) {
    LlmSamplingArgs& a = args;
    a.struct_size = sizeof(a);
    a.version = LLM_SAMPLING_ABI_VERSION;
    a.vocab_size = bytes.one_of(kVocabSizes);
    a.rows = 1 + bytes.below(a.vocab_size < 5000 ? 4 : 2);
    a.dtype = static_cast<int32_t>(bytes.below(3));
    a.num_samples = 1 + static_cast<int32_t>(bytes.below(3));
    const uint8_t results = bytes.take<uint8_t>();
    a.advance = static_cast<int32_t>(bytes.below(3));
    a.num_threads = bytes.one_of({1, 2, 5});
    const uint8_t parts = bytes.take<uint8_t>();
    const uint8_t strides = bytes.take<uint8_t>();
    const size_t rows = static_cast<size_t>(a.rows);
    const int64_t words = (a.vocab_size + 31) / 32;

    a.logits_stride =
        strides & 1 ? a.vocab_size + (strides >> 1 & 1) : (strides & 2 ? 0 : a.vocab_size);
    inputs.logits.resize(extent(a.logits_stride, a.vocab_size));
    for (int64_t row = 0; row < a.rows; ++row) {
      make_row(bytes, inputs.logits.data() + row * a.logits_stride, a.vocab_size);
    }
    a.logits = inputs.logits.data();
    if (a.dtype != LLM_SAMPLING_FLOAT32) {
      for (float x : inputs.logits) inputs.narrow_logits.push_back(narrow(x, a.dtype));
      a.logits = inputs.narrow_logits.data();
    }

    for (size_t row = 0; row < rows; ++row) {
      Inputs& i = inputs;
      i.temperature.push_back(
          bytes.one_of({1.0f, 0.0f, 0.5f, 2.0f, 1e-30f, 1e30f, 0x1.715476p+0f, 0.7f})
      );
      i.top_k.push_back(bytes.one_of({0, 1, 2, 5, 50, 300, 1000, 1 << 30, -1}));
      i.top_p.push_back(
          bytes.one_of({1.0f, 0.9f, 0.5f, 0.99f, 0.01f, 0.0f, 0.500001f, 0.99999994f})
      );
      const float min_p = bytes.one_of({0.0f, 0.1f, 1.0f, 1e-6f, 1e-40f});
      const double cut = 0x1p-18 - std::log2(static_cast<double>(min_p));
      i.min_p_cut.push_back(min_p > 0.0f ? static_cast<float>(cut) : kInfinity);
      i.repetition.push_back(bytes.one_of({1.0f, 1.3f, 0.7f, 1e-30f, 1e30f}));
      i.frequency.push_back(bytes.one_of({0.0f, 0.5f, -0.5f, 2.0f, -2.0f, 1e-40f}));
      i.presence.push_back(bytes.one_of({0.0f, 0.5f, -0.5f, 2.0f, -2.0f}));
      i.at_least.push_back(bytes.one_of({1, 2, 40, 700, INT32_MAX}));
      i.seed.push_back(bytes.take<int64_t>());
      state.position.push_back(bytes.one_of<int64_t>({0, 1, INT64_MAX, -1, INT64_MIN, 77}));
    }
    point_to_parameters();

    if (parts & 1) {
      inputs.offsets.push_back(bytes.below(2));  // the first entry may belong to no row
      for (size_t row = 0; row < rows; ++row) {
        inputs.offsets.push_back(inputs.offsets.back() + bytes.below(8));
      }
      const int64_t bias_entries = inputs.offsets.back();
      for (int64_t entry = 0; entry < bias_entries; ++entry) {
        inputs.bias_ids.push_back(
            bytes.take<uint16_t>() % static_cast<int32_t>(a.vocab_size + 4) - 2
        );
        inputs.bias_values.push_back(to_bias(take_float(bytes)));
      }
      a.logit_bias_offsets = inputs.offsets.data();
      a.logit_bias_ids = inputs.bias_ids.data();
      a.logit_bias_values = inputs.bias_values.data();
      a.logit_bias_size = bias_entries;
    }
    if (parts & 2) {
      a.allowed_mask_stride = strides & 4 ? 0 : words + (strides >> 3 & 1);
      Noise noise(bytes.take<uint8_t>());
      const int64_t density = bytes.below(5);
      inputs.mask.resize(extent(a.allowed_mask_stride, words));
      for (int32_t& word : inputs.mask) word = make_word(noise, density);
      a.allowed_mask = inputs.mask.data();
    }
    if (parts & 4) {
      a.num_slots = a.rows + bytes.below(3);
      a.seen_stride = words + (strides >> 4 & 1);
      a.counts_stride = a.vocab_size + (strides >> 5 & 1);
      const size_t slots = static_cast<size_t>(a.num_slots);
      Noise noise(bytes.take<uint8_t>());
      const int64_t density = bytes.below(5);
      state.seen.resize(slots * static_cast<size_t>(a.seen_stride));
      for (int32_t& word : state.seen) word = make_word(noise, density);
      const int32_t most = bytes.one_of({1, 3, 1 << 25, INT32_MAX});
      state.counts.resize(slots * static_cast<size_t>(a.counts_stride));
      // Tokens that were not seen have counts too, which must not be read.
      for (int32_t& count : state.counts) count = static_cast<int32_t>(noise.below(most));
      state.lengths.resize(slots, 3);
      for (int64_t row = 0; row < a.rows; ++row) {
        inputs.slots.push_back(static_cast<int32_t>((row + strides) % a.num_slots));
      }
      a.slots = inputs.slots.data();
    }
    if (parts & 8) a.filtered_stride = a.vocab_size + (strides >> 6 & 1);
    if ((parts & 24) == 24) {  // filter_logits
      a.num_samples = 1;
      a.advance = 0;
    }
    draws = (parts & 24) != 24;
    filters = (parts & 8) != 0;
    ask_for_results(results);
    if (parts & 32) put_into_slots(bytes);
    if (parts & 64) {
      if (!inputs.slots.empty()) put_texts(bytes);
      inputs.scope.resize(inputs.temperature.size());
      for (int32_t& scope : inputs.scope) scope = static_cast<int32_t>(bytes.below(2));
      a.repetition_penalty_scope = inputs.scope.data();
      if (bytes.below(2) != 0) {
        for (size_t row = 0; row < rows; ++row) {
          inputs.record.push_back(bytes.one_of<uint8_t>({0, 1, 2, 255}));
        }
        a.record = inputs.record.data();
      }
    }
    if ((parts & 128) != 0 && !inputs.slots.empty()) put_rules(bytes);
  }

  // Chooses results, by chance or all of them, and the ids that some of them are for.
  void ask_for_results(uint8_t how) {
    if (how % 4 == 0) return;
    LlmSamplingArgs& a = args;
    Noise noise(how);
    constexpr int32_t kTops[] = {0, 1, 2, 5, 20, 300, LLM_SAMPLING_MAX_LISTED};
    constexpr int64_t kMostKept[] = {0, 1, 2, 30, 300, LLM_SAMPLING_MAX_LISTED};
    constexpr int64_t kIdNumbers[] = {0, 1, 3, 17};
    a.num_top_logprobs = kTops[noise.below(std::size(kTops))];
    a.kept.max_ids = kMostKept[noise.below(std::size(kMostKept))];
    a.num_token_ids = kIdNumbers[noise.below(std::size(kIdNumbers))];
    a.token_ids_stride = noise.below(3) == 0 ? 0 : a.num_token_ids + noise.below(2);
    inputs.token_ids.resize(extent(a.token_ids_stride, a.num_token_ids));
    make_ids(noise, inputs.token_ids, a.vocab_size, false);
    a.token_ids = inputs.token_ids.data();
    for (size_t i = 0; draws && i < kResultCount; ++i) {
      wanted[i] = how % 4 == 1 || noise.below(2) == 0;
      // The ids of a list and their logprobs go together.
      const bool is_pair = i > 0 && kResults[i].width == Width::kTop;
      if (is_pair && kResults[i - 1].width == Width::kTop) wanted[i] = wanted[i - 1];
    }
  }

  // Gives each slot of the history its ids in order, of which its bits and counts are made, and the rows ids
  // that count for this call alone.
  void put_texts(Bytes& bytes) {
    LlmSamplingArgs& a = args;
    const size_t slots = static_cast<size_t>(a.num_slots);
    const uint8_t parts = bytes.take<uint8_t>();
    Noise noise(bytes.take<uint8_t>());
    if ((parts & 3) != 0) {
      a.max_text_length = bytes.one_of(kTextLengths);
      state.text.resize(slots * static_cast<size_t>(a.max_text_length));
      make_ids(noise, state.text, a.vocab_size, true);
      for (size_t slot = 0; slot < slots; ++slot) {
        const int64_t most = a.max_text_length;
        const int64_t length = bytes.below(4) == 0 ? most : noise.below(most + 1);
        state.text_lengths.push_back(length);
        inputs.text_prompt_lengths.push_back(noise.below(length + 1));
        if (parts & 4) inputs.windows.push_back(bytes.one_of(kWindows));
      }
      a.text_prompt_lengths = inputs.text_prompt_lengths.data();
      if (parts & 4) a.windows = inputs.windows.data();
      for (size_t slot = 0; slot < slots; ++slot) count_text(state, slot);
    }
    if ((parts & 24) == 0) return;
    a.num_extra_output = bytes.one_of({1, 2, 5, 17, 64});
    inputs.extra.resize(static_cast<size_t>(a.rows * a.num_extra_output));
    make_ids(noise, inputs.extra, a.vocab_size, false);
    a.extra_output = inputs.extra.data();
    // An id that comes next makes the count of its token visible.
    for (int64_t slot = 0; slot < a.num_slots; ++slot) {
      for (int64_t id = 0; id < a.vocab_size; ++id) {
        if (has_bit(state.seen.data() + slot * a.seen_stride, id)) continue;
        state.counts[static_cast<size_t>(slot * a.counts_stride + id)] = 0;
      }
    }
  }

  // Gives the rows rules that look at the history, with token sequences of the ids of the texts.
  void put_rules(Bytes& bytes) {
    LlmSamplingArgs& a = args;
    Inputs& i = inputs;
    const uint8_t parts = bytes.take<uint8_t>();
    Noise noise(bytes.take<uint16_t>());
    const auto some_id = [&] {
      const uint64_t which = noise.below(uint64_t{9});
      if (which == 8) return noise.below(2) == 0 ? -1 : static_cast<int32_t>(a.vocab_size);
      if (which > 2 && !state.text.empty()) return state.text[noise.below(state.text.size())];
      return static_cast<int32_t>(noise.below(a.vocab_size));
    };
    if (parts & 1) i.sequence_offsets.push_back(bytes.below(2));  // an element may belong to no row
    i.sequences.resize(i.sequence_offsets.empty() ? 0 : static_cast<size_t>(i.sequence_offsets[0]));
    for (size_t index = 0; index < i.temperature.size(); ++index) {
      i.dry_multiplier.push_back(bytes.one_of({0.0f, 0.8f, 1.0f, 100.0f, 1e-40f}));
      i.dry_base.push_back(bytes.one_of({1.0f, 1.75f, 1.1f, 100.0f}));
      i.dry_allowed_length.push_back(bytes.one_of({1, 2, 3, 20, INT32_MAX}));
      i.dry_penalty_last_n.push_back(bytes.one_of({-1, 0, 1, 5, 100, INT32_MAX}));
      i.no_repeat_ngram_size.push_back(bytes.one_of({0, 1, 2, 3, INT32_MAX}));
      i.no_repeat_ngram_window.push_back(bytes.one_of({0, 1, 4, 100, INT32_MAX}));
      i.min_tokens.push_back(bytes.one_of({0, 1, 3, 4, 20, INT32_MAX}));
      if ((parts & 1) == 0) continue;
      int32_t owned = 0;
      for (int64_t records = bytes.below(5); records > 0; --records) {
        std::vector<int32_t> ids(static_cast<size_t>(1 + bytes.below(4)));
        for (int32_t& id : ids) id = some_id();
        const int32_t kind = static_cast<int32_t>(bytes.below(4));
        if (kind == LLM_SAMPLING_BREAKER_IDS) std::sort(ids.begin(), ids.end());
        i.sequences.push_back(kind);
        i.sequences.push_back(static_cast<int32_t>(ids.size()));
        i.sequences.insert(i.sequences.end(), ids.begin(), ids.end());
        owned += 2 + static_cast<int32_t>(ids.size());
      }
      i.sequence_counts.push_back(owned);
      // Where there are numbers of elements, those of two slots may have others between them.
      if ((parts & 2) != 0 && a.param_slots != nullptr) i.sequences.push_back(-9);
      i.sequence_offsets.push_back(static_cast<int64_t>(i.sequences.size()));
    }
    a.dry_multiplier = i.dry_multiplier.data();
    a.dry_base = i.dry_base.data();
    a.dry_allowed_length = i.dry_allowed_length.data();
    a.dry_penalty_last_n = i.dry_penalty_last_n.data();
    a.no_repeat_ngram_size = i.no_repeat_ngram_size.data();
    a.no_repeat_ngram_window = i.no_repeat_ngram_window.data();
    a.min_tokens = i.min_tokens.data();
    if ((parts & 1) == 0) return;
    a.sequence_offsets = i.sequence_offsets.data();
    a.sequences = i.sequences.data();
    a.sequences_size = static_cast<int64_t>(i.sequences.size());
    if ((parts & 2) != 0 && a.param_slots != nullptr) a.sequence_counts = i.sequence_counts.data();
  }

  std::vector<int32_t> text_of(const State& of, size_t slot) const {
    const int32_t* begin = of.text.data() + slot * static_cast<size_t>(args.max_text_length);
    return {begin, begin + of.text_lengths[slot]};
  }

  int64_t window_of_slot(size_t slot) const {
    return inputs.windows.empty() ? -1 : inputs.windows[slot];
  }

  // Makes bits and counts those of a slot's text.
  void count_text(State& of, size_t slot) const {
    count_ids(
        text_of(of, slot),
        inputs.text_prompt_lengths[slot],
        window_of_slot(slot),
        args.vocab_size,
        of.seen.data() + static_cast<int64_t>(slot) * args.seen_stride,
        of.counts.data() + static_cast<int64_t>(slot) * args.counts_stride
    );
  }

  // Gives the parameters to slots. What was the parameters of row r is now those of slot r, and there may be
  // more slots, which have those of the last row.
  void put_into_slots(Bytes& bytes) {
    LlmSamplingArgs& a = args;
    Inputs& i = inputs;
    a.num_param_slots = a.rows + bytes.below(3);
    const size_t slots = static_cast<size_t>(a.num_param_slots);
    const auto extend = [&](auto& values) { values.resize(slots, values.back()); };
    for (auto* values :
         {&i.temperature, &i.top_p, &i.min_p_cut, &i.repetition, &i.frequency, &i.presence}) {
      extend(*values);
    }
    extend(i.top_k);
    extend(i.at_least);
    extend(i.seed);
    point_to_parameters();
    const int32_t some[] = {-1, -2, static_cast<int32_t>(slots), INT32_MAX, 0, 0, 1};
    for (int64_t row = 0; row < a.rows; ++row) {
      const int64_t which = bytes.below(16);
      const bool is_own = which >= static_cast<int64_t>(std::size(some));
      i.param_slots.push_back(is_own ? static_cast<int32_t>(row) : some[which]);
    }
    a.param_slots = i.param_slots.data();
    if (a.logit_bias_offsets != nullptr) {
      i.offsets.resize(slots + 1, i.offsets.back());
      for (size_t slot = 0; slot < slots; ++slot) {
        const int64_t owned = i.offsets[slot + 1] - i.offsets[slot];
        i.bias_counts.push_back(static_cast<int32_t>(owned - std::min(owned, bytes.below(3))));
      }
      a.logit_bias_offsets = i.offsets.data();
      if (bytes.below(4) != 0) a.logit_bias_counts = i.bias_counts.data();
    }
    a.position_of = static_cast<int32_t>(bytes.below(3));
    if (a.position_of == LLM_SAMPLING_POSITION_OF_SLOT) extend(state.position);
    i.prompt_lengths.resize(slots, bytes.one_of<int64_t>({0, 1, 7, INT64_MIN}));
    a.prompt_lengths = i.prompt_lengths.data();
  }

  void point_to_parameters() {
    args.temperature = inputs.temperature.data();
    args.top_k = inputs.top_k.data();
    args.top_p = inputs.top_p.data();
    args.min_p_cut = inputs.min_p_cut.data();
    args.repetition_penalty = inputs.repetition.data();
    args.frequency_penalty = inputs.frequency.data();
    args.presence_penalty = inputs.presence.data();
    args.min_tokens_to_keep = inputs.at_least.data();
    args.seed = inputs.seed.data();
  }

  bool draws = true;
  bool filters = false;
  std::array<bool, kResultCount> wanted = {};

  size_t extent(int64_t stride, int64_t width) const {
    return static_cast<size_t>((args.rows - 1) * stride + width);
  }

  // Room for the results, filled with values that show what was not written.
  Outputs make_outputs() const {
    const size_t draws_of_all = static_cast<size_t>(args.rows * args.num_samples);
    Outputs out;
    if (draws) {
      out.tokens.assign(draws_of_all, -7);
      out.status.assign(static_cast<size_t>(args.rows), -7);
    }
    for (size_t i = 0; i < kResultCount; ++i) {
      if (wanted[i]) out.results.add(args, i);
    }
    if (filters) out.filtered.assign(extent(args.filtered_stride, args.vocab_size), 7);
    return out;
  }

  LlmSamplingArgs with(State& own, Outputs& out) const {
    LlmSamplingArgs a = args;
    a.position = own.position.data();
    if (!own.seen.empty()) {
      a.seen = own.seen.data();
      a.counts = own.counts.data();
      a.lengths = own.lengths.data();
    }
    if (!own.text.empty()) {
      a.text = own.text.data();
      a.text_lengths = own.text_lengths.data();
    }
    if (draws) {
      a.tokens = out.tokens.data();
      a.status = out.status.data();
    }
    out.results.put_into(a);
    if (filters) a.filtered = reinterpret_cast<float*>(out.filtered.data());
    return a;
  }

 private:
  static int32_t make_word(Noise& noise, int64_t density) {
    const uint64_t some = noise.next();
    const uint32_t bits[] = {
        static_cast<uint32_t>(some),
        static_cast<uint32_t>(some & some >> 32),
        0,
        ~0u,
        noise.below(20) == 0 ? 1u << (some & 31) : 0u
    };
    return static_cast<int32_t>(bits[density]);
  }
};

// ---- Valid batches: the steps, one by one --------------------------------------------------------

bool is_close(float value, double exact) {
  const float expected = static_cast<float>(exact);
  if (expected != expected || std::isinf(expected)) {
    return value == expected || (value != value && expected != expected);
  }
  return std::abs(value - expected) <= 1e-5f + 1e-6f * std::abs(expected);
}

bool is_same(float value, float expected) {
  return bit_cast<uint32_t>(value) == bit_cast<uint32_t>(expected);
}

// The index of a row's parameters; below 0 for a row that has none, -1 if it is padding.
int64_t index_of(const LlmSamplingArgs& a, int64_t row) {
  if (a.param_slots == nullptr) return row;
  const int64_t slot = a.param_slots[row];
  return slot >= -1 && slot < a.num_param_slots ? slot : -2;
}

// Calls holds(element) for each of a row's elements of a result that is wanted.
template <typename T, typename F>
bool all_of_row(const T* values, int64_t row, int64_t width, const F& holds) {
  if (values == nullptr) return true;
  return std::all_of(values + row * width, values + (row + 1) * width, holds);
}

// Compares the results of a row without a token with the definition.
void check_nothing(const LlmSamplingArgs& a, int64_t row, int32_t status) {
  for (int64_t i = 0; a.filtered != nullptr && i < a.vocab_size; ++i) {
    require(a.filtered[row * a.filtered_stride + i] == -kInfinity, "filtered logits of nothing");
  }
  if (a.tokens == nullptr) return;
  require(a.status[row] == status, "the status of nothing");
  const auto is_zero = [](int64_t value) { return value == 0; };
  const auto is_none = [](int64_t value) { return value == -1; };
  const auto is_nan = [](float value) { return value != value; };
  const int64_t draws = a.num_samples, top = a.num_top_logprobs, ids = a.num_token_ids;
  require(all_of_row(a.tokens, row, draws, is_none), "the tokens of nothing");
  for (const LlmSamplingLogprobs* of : {&a.processed, &a.raw}) {
    require(
        all_of_row(of->logprobs, row, draws, is_nan) && all_of_row(of->ranks, row, draws, is_none),
        "logprobs and ranks of nothing"
    );
    require(
        all_of_row(of->top_ids, row, top, is_none) &&
            all_of_row(of->top_logprobs, row, top, is_nan),
        "the list of nothing"
    );
    require(
        all_of_row(of->id_logprobs, row, ids, is_nan) &&
            all_of_row(of->id_ranks, row, ids, is_none),
        "logprobs and ranks of ids where there is nothing"
    );
  }
  const LlmSamplingKept& kept = a.kept;
  require(
      all_of_row(kept.counts, row, 1, is_zero) && all_of_row(kept.total, row, 1, is_zero) &&
          all_of_row(kept.masses, row, draws, is_zero) &&
          all_of_row(kept.id_masses, row, ids, is_zero) &&
          all_of_row(kept.mask, row, (a.vocab_size + 31) / 32, is_zero),
      "the numbers of a kept set of nothing"
  );
  require(
      all_of_row(kept.ids, row, kept.max_ids, is_none) &&
          all_of_row(kept.first_id, row, 1, is_none) && all_of_row(kept.last_id, row, 1, is_none) &&
          all_of_row(kept.first_logit, row, 1, is_nan) &&
          all_of_row(kept.last_logit, row, 1, is_nan),
      "the ids of a kept set of nothing"
  );
}

// The rank of each token of an order, from 1; -1 for those that are not in it.
std::vector<int32_t> ranks_of(const std::vector<int64_t>& order, int64_t vocab_size) {
  std::vector<int32_t> ranks(static_cast<size_t>(vocab_size), -1);
  int32_t rank = 0;
  for (int64_t id : order) ranks[static_cast<size_t>(id)] = ++rank;
  return ranks;
}

// Compares the logprobs of one kind with those of all tokens, of which `order` has those that have a rank.
void check_logprobs(
    const LlmSamplingArgs& a,
    const LlmSamplingLogprobs& of,
    int64_t row,
    const std::vector<int64_t>& order,
    const std::vector<double>& logprobs
) {
  const std::vector<int32_t> ranks = ranks_of(order, a.vocab_size);
  const int64_t draws = a.num_samples, top = a.num_top_logprobs, ids = a.num_token_ids;
  for (int64_t at = row * draws; at < (row + 1) * draws; ++at) {
    const size_t token = static_cast<size_t>(a.tokens[at]);
    require(of.logprobs == nullptr || is_close(of.logprobs[at], logprobs[token]), "logprob");
    require(of.ranks == nullptr || of.ranks[at] == ranks[token], "rank");
  }
  for (int64_t i = 0; of.top_ids != nullptr && i < top; ++i) {
    const bool is_there = i < static_cast<int64_t>(order.size());
    const int64_t id = is_there ? order[static_cast<size_t>(i)] : -1;
    const double logprob = is_there ? logprobs[static_cast<size_t>(id)] : NAN;
    require(of.top_ids[row * top + i] == id, "an id of the list");
    require(is_close(of.top_logprobs[row * top + i], logprob), "a logprob of the list");
  }
  for (int64_t i = 0; i < ids; ++i) {
    const int64_t id = a.token_ids[row * a.token_ids_stride + i], at = row * ids + i;
    const bool is_padding = id < 0 || id >= a.vocab_size;
    const double logprob = is_padding ? NAN : logprobs[static_cast<size_t>(id)];
    const int32_t rank = is_padding ? -1 : ranks[static_cast<size_t>(id)];
    require(of.id_logprobs == nullptr || is_close(of.id_logprobs[at], logprob), "logprob of an id");
    require(of.id_ranks == nullptr || of.id_ranks[at] == rank, "rank of an id");
  }
}

// Compares the results of a kept set with its tokens, in their order. w has the masses of all tokens, and x
// their logits.
void check_kept(
    const LlmSamplingArgs& a,
    int64_t row,
    const std::vector<int64_t>& order,
    const std::vector<int64_t>& w,
    const std::vector<float>& x
) {
  const LlmSamplingKept& kept = a.kept;
  const int64_t v = a.vocab_size, draws = a.num_samples, ids = a.num_token_ids;
  const int64_t count = static_cast<int64_t>(order.size());
  int64_t total = 0;
  std::vector<int32_t> mask(static_cast<size_t>((v + 31) / 32));
  for (int64_t id : order) {
    total += w[static_cast<size_t>(id)];
    set_bit_of(mask.data(), id);
  }
  require(kept.counts == nullptr || kept.counts[row] == count, "the number of kept tokens");
  require(kept.total == nullptr || kept.total[row] == total, "the mass of the kept set");
  for (int64_t at = row * draws; kept.masses != nullptr && at < (row + 1) * draws; ++at) {
    require(kept.masses[at] == w[static_cast<size_t>(a.tokens[at])], "the mass of a token");
  }
  for (int64_t i = 0; kept.id_masses != nullptr && i < ids; ++i) {
    const int64_t id = a.token_ids[row * a.token_ids_stride + i];
    const bool is_kept = id >= 0 && id < v && has_bit(mask.data(), id);
    const int64_t expected = is_kept ? w[static_cast<size_t>(id)] : 0;
    require(kept.id_masses[row * ids + i] == expected, "the mass of an id");
  }
  const int64_t words = static_cast<int64_t>(mask.size());
  require(
      kept.mask == nullptr || std::equal(mask.begin(), mask.end(), kept.mask + row * words),
      "the mask of kept tokens"
  );
  for (int64_t i = 0; kept.ids != nullptr && i < kept.max_ids; ++i) {
    const bool is_listed = count <= kept.max_ids && i < count;
    const int64_t expected = is_listed ? order[static_cast<size_t>(i)] : -1;
    require(kept.ids[row * kept.max_ids + i] == expected, "a kept id");
  }
  const size_t first = static_cast<size_t>(order.front()), last = static_cast<size_t>(order.back());
  require(kept.first_id == nullptr || kept.first_id[row] == order.front(), "the first kept id");
  require(kept.last_id == nullptr || kept.last_id[row] == order.back(), "the last kept id");
  require(
      kept.first_logit == nullptr || is_same(kept.first_logit[row], x[first]),
      "the first kept logit"
  );
  require(
      kept.last_logit == nullptr || is_same(kept.last_logit[row], x[last]),
      "the last kept logit"
  );
}

// Whether a row with parameters is to be recorded.
bool is_to_be_recorded(const LlmSamplingArgs& a, int64_t row) {
  return a.advance != LLM_SAMPLING_ADVANCE_NEVER && (a.record == nullptr || a.record[row] != 0);
}

// Which tokens a row's history has, as words of bits, and how often they are in its output, with the ids that
// count for one call.
struct Counted {
  std::vector<int32_t> seen, counts;

  Counted(const Case& batch, const LlmSamplingArgs& a, int64_t row)
      : seen(static_cast<size_t>((a.vocab_size + 31) / 32)),
        counts(static_cast<size_t>(a.vocab_size)) {
    const int64_t slot = a.slots[row];
    std::vector<int32_t> next;
    for (int64_t i = 0; i < a.num_extra_output; ++i) {
      const int32_t id = a.extra_output[row * a.num_extra_output + i];
      if (id >= 0 && id < a.vocab_size) next.push_back(id);
    }
    if (a.text != nullptr) {
      std::vector<int32_t> ids = batch.text_of(batch.state, static_cast<size_t>(slot));
      ids.insert(ids.end(), next.begin(), next.end());
      const int64_t of_prompt = a.text_prompt_lengths[slot];
      const int64_t window = batch.window_of_slot(static_cast<size_t>(slot));
      count_ids(ids, of_prompt, window, a.vocab_size, seen.data(), counts.data());
      return;
    }
    std::copy_n(a.seen + slot * a.seen_stride, seen.size(), seen.begin());
    std::copy_n(a.counts + slot * a.counts_stride, counts.size(), counts.begin());
    for (int32_t id : next) {
      set_bit_of(seen.data(), id);
      plus(counts[static_cast<size_t>(id)], 1);
    }
  }
};

// Whether a text without its last `following` ids, of which those from `begin` on count, ends with a sequence.
bool ends_with(
    const std::vector<int32_t>& text,
    size_t begin,
    size_t following,
    const std::vector<int32_t>& sequence
) {
  if (sequence.size() > text.size() - begin - following) return false;
  return std::equal(sequence.rbegin(), sequence.rend(), text.rbegin() + following);
}

// What the rules of a row subtract from which logits; infinity bans a token.
std::map<int32_t, float> list_of(const Case& batch, const LlmSamplingArgs& a, int64_t row) {
  const int64_t index = index_of(a, row);
  const size_t slot = static_cast<size_t>(a.slots[row]);
  std::vector<int32_t> text;
  if (a.text != nullptr) text = batch.text_of(batch.state, slot);
  int64_t output = a.lengths[slot];
  for (int64_t i = 0; i < a.num_extra_output; ++i) {
    const int32_t id = a.extra_output[row * a.num_extra_output + i];
    if (id < 0 || id >= a.vocab_size) continue;
    text.push_back(id);
    ++output;
  }
  const size_t size = text.size();
  std::map<int32_t, float> list;
  const auto lower = [&](int32_t id, float amount) {
    if (id >= 0 && id < a.vocab_size) list[id] = std::max(list[id], amount);
  };
  // How many ids up to the one at a place are the last ids of the text, of those from `begin` on.
  const auto match = [&](size_t place, size_t begin) {
    size_t length = 0;
    while (length <= place - begin && text[place - length] == text[size - 1 - length]) ++length;
    return length;
  };
  const auto begin_of = [&](int32_t last, bool is_all) {
    return is_all || static_cast<size_t>(last) > size ? 0 : size - static_cast<size_t>(last);
  };

  std::vector<std::pair<int32_t, std::vector<int32_t>>> records;
  if (a.sequence_offsets != nullptr) {
    const int64_t from = a.sequence_offsets[index];
    const int64_t end = a.sequence_counts != nullptr ? from + a.sequence_counts[index]
                                                     : a.sequence_offsets[index + 1];
    for (int64_t at = from; at < end; at += 2 + a.sequences[at + 1]) {
      const int32_t* ids = a.sequences + at + 2;
      records.push_back({a.sequences[at], {ids, ids + a.sequences[at + 1]}});
    }
  }
  const float multiplier = a.dry_multiplier[index];
  if (multiplier > 0.0f) {
    const int32_t last_n = a.dry_penalty_last_n[index];
    const size_t begin = begin_of(last_n, last_n < 0);
    const auto is_end = [&](size_t following) {
      for (const auto& [kind, ids] : records) {
        if (kind == LLM_SAMPLING_BREAKER && ends_with(text, begin, following, ids)) return true;
        for (int32_t id : ids) {
          if (kind == LLM_SAMPLING_BREAKER_IDS && ends_with(text, begin, following, {id})) {
            return true;
          }
        }
      }
      return false;
    };
    size_t room = 0;
    while (room < size - begin && !is_end(room)) ++room;
    const size_t allowed = static_cast<size_t>(a.dry_allowed_length[index]);
    for (size_t place = begin; place + 1 < size; ++place) {
      const size_t length = std::min(match(place, begin), room);
      const int32_t id = text[place + 1];
      const bool is_breaker = std::any_of(records.begin(), records.end(), [&](const auto& record) {
        const auto& [kind, ids] = record;
        return kind == LLM_SAMPLING_BREAKER_IDS &&
               std::find(ids.begin(), ids.end(), id) != ids.end();
      });
      if (length < allowed || is_breaker) continue;
      float amount = multiplier;
      for (size_t more = std::min<size_t>(length - allowed, 255); more > 0; --more) {
        amount = std::min(amount * a.dry_base[index], 0x1p100f);
      }
      lower(id, amount);
    }
  }
  const size_t ngram = static_cast<size_t>(a.no_repeat_ngram_size[index]);
  const int32_t window = a.no_repeat_ngram_window[index];
  const size_t begin = begin_of(window, window == 0);
  for (size_t place = begin; ngram > 0 && place < size; ++place) {
    const size_t length = place > begin ? match(place - 1, begin) : 0;
    if (length + 1 >= ngram) lower(text[place], kInfinity);
  }
  for (const auto& [kind, ids] : records) {
    if (kind == LLM_SAMPLING_BAD_WORD && ends_with(text, 0, 0, {ids.begin(), ids.end() - 1})) {
      lower(ids.back(), kInfinity);
    }
    for (int32_t id : ids) {
      if (kind == LLM_SAMPLING_STOP_IDS && output < a.min_tokens[index]) lower(id, kInfinity);
    }
  }
  return list;
}

// Compares the raw logprobs of a row with the softmax of its logits of step 1.
void check_raw_logprobs(const LlmSamplingArgs& a, int64_t row, const std::vector<float>& logits) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < a.vocab_size; ++i) {
    if (logits[i] > -kInfinity) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return logits[i] > logits[j];
  });
  const double most = logits[order[0]];
  // So that equal infinities are 0 below each other.
  const auto below = [&](int64_t i) { return logits[i] == most ? 0.0 : logits[i] - most; };
  double sum = 0;
  for (int64_t i : order) sum += std::exp(below(i));
  std::vector<double> logprobs(logits.size(), -HUGE_VAL);
  for (int64_t i : order) logprobs[i] = below(i) - std::log(sum);
  check_logprobs(a, a.raw, row, order, logprobs);
}

// Compares the results of one row with the definition.
void check_row(const Case& batch, const LlmSamplingArgs& a, const Outputs& out, int64_t row) {
  const int64_t v = a.vocab_size;
  const int64_t index = index_of(a, row);
  if (index < 0) {
    return check_nothing(a, row, index == -1 ? 0 : LLM_SAMPLING_STATUS_NO_CANDIDATE);
  }
  if (a.text != nullptr && is_to_be_recorded(a, row) &&
      a.text_lengths[a.slots[row]] >= a.max_text_length) {
    return check_nothing(a, row, LLM_SAMPLING_STATUS_TEXT_FULL);
  }
  std::vector<float> x(static_cast<size_t>(v));
  for (int64_t i = 0; i < v; ++i) {  // 1 widen
    const int64_t at = row * a.logits_stride + i;
    const uint16_t* narrow = static_cast<const uint16_t*>(a.logits);
    x[i] = a.dtype == LLM_SAMPLING_FLOAT32    ? static_cast<const float*>(a.logits)[at]
           : a.dtype == LLM_SAMPLING_BFLOAT16 ? widen_bfloat16(narrow[at])
                                              : widen_float16(narrow[at]);
  }
  const std::vector<float> raw = x;
  if (a.logit_bias_offsets != nullptr) {  // 2 bias, mask
    const int64_t begin = a.logit_bias_offsets[index];
    const int64_t end = a.logit_bias_counts != nullptr ? begin + a.logit_bias_counts[index]
                                                       : a.logit_bias_offsets[index + 1];
    for (int64_t e = begin; e < end; ++e) {
      const int32_t id = a.logit_bias_ids[e];
      const float bias = a.logit_bias_values[e];
      if (id >= 0 && id < v) x[id] = bias == -kInfinity ? -kInfinity : x[id] + bias;
    }
  }
  for (int64_t i = 0; a.allowed_mask != nullptr && i < v; ++i) {
    const int32_t word = a.allowed_mask[row * a.allowed_mask_stride + (i >> 5)];
    if ((static_cast<uint32_t>(word) >> (i & 31) & 1) == 0) x[i] = -kInfinity;
  }
  if (a.seen != nullptr) {  // 3 to 5 penalties
    const Counted counted(batch, a, row);
    const bool is_of_output =
        a.repetition_penalty_scope != nullptr && a.repetition_penalty_scope[index] == 1;
    for (int64_t i = 0; i < v; ++i) {
      if (!has_bit(counted.seen.data(), i)) continue;
      const int32_t count = counted.counts[static_cast<size_t>(i)];
      if (!is_of_output || count > 0) x[i] = repetition(x[i], a.repetition_penalty[index]);
      if (count <= 0) continue;
      x[i] = frequency(x[i], a.frequency_penalty[index], count);
      x[i] = x[i] - a.presence_penalty[index];
    }
  }
  if (a.dry_multiplier != nullptr) {  // 5a the list
    for (const auto& [id, amount] : list_of(batch, a, row)) {
      x[id] = amount == kInfinity ? -kInfinity : x[id] - amount;
    }
  }
  int32_t status = 0;
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < v; ++i) {  // 6 canonical
    if (x[i] != x[i]) {
      status |= LLM_SAMPLING_STATUS_NAN;
      x[i] = -kInfinity;
    }
    x[i] = x[i] + 0.0f;
    if (x[i] == kInfinity) status |= LLM_SAMPLING_STATUS_POS_INF;
    if (x[i] > -kInfinity) kept.push_back(i);
  }
  if (kept.empty()) return check_nothing(a, row, status | LLM_SAMPLING_STATUS_NO_CANDIDATE);
  std::stable_sort(kept.begin(), kept.end(), [&](int64_t i, int64_t j) {
    return x[i] > x[j];
  });  // 7 order

  const float temperature = a.temperature[index];
  const bool greedy = temperature == 0.0f;
  std::vector<int64_t> w(static_cast<size_t>(v));
  const auto keep = [&](size_t size, size_t at_least) {
    kept.resize(std::min(kept.size(), std::max(size, at_least)));
  };
  if (greedy) {  // 8 greedy
    keep(1, 1);
    w[kept[0]] = int64_t{1} << 42;
  } else {
    const size_t at_least = static_cast<size_t>(a.min_tokens_to_keep[index]);
    const float m = x[kept[0]];
    const float scale = depth_scale(temperature);
    for (int64_t i : kept) w[i] = whole_mass(depth(x[i], m, scale));  // 9 depth, 10 mass
    if (a.top_k[index] > 0) keep(static_cast<size_t>(a.top_k[index]), at_least);  // 11 top-k
    if (a.top_p[index] < 1.0f) {                                                  // 12 top-p
      int64_t z = 0, sum = 0;
      for (int64_t i : kept) z += w[i];
      const int64_t target = top_p_target(z, a.top_p[index]);
      size_t size = 0;
      while (sum < target) sum += w[kept[size++]];
      keep(size, at_least);
    }
    if (a.min_p_cut[index] < kInfinity) {  // 13 min-p
      size_t size = 0;
      while (size < kept.size() && depth(x[kept[size]], m, scale) <= a.min_p_cut[index]) ++size;
      keep(size, at_least);
    }
  }
  const std::vector<int64_t> order = kept;
  std::sort(kept.begin(), kept.end());

  if (a.filtered != nullptr) {
    std::vector<float> expected(static_cast<size_t>(v), -kInfinity);
    const float divisor = greedy ? 1.0f : temperature;
    const float m = x[order[0]];
    for (int64_t i : kept) {
      const float divided = std::isfinite(m / divisor) ? x[i] / divisor
                            : x[i] == m                ? 0.0f
                                                       : (x[i] - m) / divisor;
      expected[i] = std::max(divided, std::numeric_limits<float>::lowest());
    }
    const uint32_t* filtered = out.filtered.data() + row * a.filtered_stride;
    require(
        std::memcmp(filtered, expected.data(), static_cast<size_t>(v) * 4) == 0,
        "filtered logits"
    );
  }
  if (a.tokens == nullptr) return;
  require(a.status[row] == status, "status");
  int64_t s = 0;
  for (int64_t i : kept) s += w[i];
  for (int32_t draw = 0; draw < a.num_samples; ++draw) {  // 14 draw
    int64_t expected = -1;
    const uint64_t seed = static_cast<uint64_t>(a.seed[index]);
    const bool by_slot = a.position_of == LLM_SAMPLING_POSITION_OF_SLOT;
    uint64_t position = static_cast<uint64_t>(a.position[by_slot ? index : row]);
    if (a.position_of == LLM_SAMPLING_POSITION_OF_TEXT) {
      position = position + 1 - static_cast<uint64_t>(a.prompt_lengths[index]);
    }
    int64_t r = scaled_random(random_bits(seed, position, static_cast<uint32_t>(draw)), s);
    for (int64_t i : kept) {
      if ((r -= w[i]) < 0) {
        expected = i;
        break;
      }
    }
    require(a.tokens[row * a.num_samples + draw] == expected, "token");
  }
  check_kept(a, row, order, w, x);
  std::vector<double> logprobs(static_cast<size_t>(v), -HUGE_VAL);
  for (int64_t i : order) {
    logprobs[i] = std::log(static_cast<double>(w[i])) - std::log(static_cast<double>(s));
  }
  check_logprobs(a, a.processed, row, order, logprobs);
  check_raw_logprobs(a, row, raw);
}

// Whether the parameters belong to slots, and another row names a slot of this row.
bool shares_a_slot(const LlmSamplingArgs& a, int64_t row) {
  for (int64_t other = 0; a.param_slots != nullptr && other < a.rows; ++other) {
    if (other == row) continue;
    if (a.param_slots[other] == a.param_slots[row]) return true;
    if (a.seen != nullptr && a.slots[other] == a.slots[row]) return true;
  }
  return false;
}

// The state after the step of a batch whose results are in a.
State advanced(const Case& batch, const LlmSamplingArgs& a) {
  State after = batch.state;
  bool valid = true;
  for (int64_t row = 0; a.tokens != nullptr && row < a.rows; ++row) valid &= a.status[row] == 0;
  if (a.advance == LLM_SAMPLING_ADVANCE_NEVER) return after;
  if (a.advance == LLM_SAMPLING_ADVANCE_IF_ALL_VALID && !valid) return after;
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t token = a.tokens[row * a.num_samples];
    if (token < 0 || shares_a_slot(a, row) || !is_to_be_recorded(a, row)) continue;
    const int64_t place = a.position_of == LLM_SAMPLING_POSITION_OF_SLOT ? index_of(a, row) : row;
    if (a.position_of != LLM_SAMPLING_POSITION_OF_TEXT) {
      after.position[place] =
          static_cast<int64_t>(static_cast<uint64_t>(after.position[place]) + 1);
    }
    if (a.seen == nullptr) continue;
    const size_t slot = static_cast<size_t>(a.slots[row]);
    ++after.lengths[slot];
    if (a.text != nullptr) {
      int64_t& length = after.text_lengths[slot];
      after.text[slot * static_cast<size_t>(a.max_text_length) + static_cast<size_t>(length)] =
          static_cast<int32_t>(token);
      ++length;
      batch.count_text(after, slot);
      continue;
    }
    set_bit_of(after.seen.data() + a.slots[row] * a.seen_stride, token);
    plus(after.counts[a.slots[row] * a.counts_stride + token], 1);
  }
  return after;
}

void run_good(const Case& batch) {
  State own = batch.state;
  Outputs out = batch.make_outputs();
  const LlmSamplingArgs a = batch.with(own, out);
  require(llm_sampling_cpu(&a) == LLM_SAMPLING_OK, "a valid batch is accepted");
  State before = batch.state;
  LlmSamplingArgs given = batch.with(before, out);
  for (int64_t row = 0; row < a.rows; ++row) check_row(batch, given, out, row);
  require(own == advanced(batch, a), "the state after a step");

  // The gaps between rows must not be written.
  for (int64_t row = 0; batch.filters && row + 1 < a.rows; ++row) {
    for (int64_t i = a.vocab_size; i < a.filtered_stride; ++i) {
      require(
          out.filtered[row * a.filtered_stride + i] == 7,
          "the gaps between filtered rows are not written"
      );
    }
  }

  State again = batch.state;
  Outputs alone = batch.make_outputs();
  LlmSamplingArgs one = batch.with(again, alone);
  one.num_threads = a.num_threads == 1 ? 3 : 1;
  require(
      llm_sampling_cpu(&one) == LLM_SAMPLING_OK && alone == out && again == own,
      "another number of threads gives the same results"
  );
}

// ---- Structs that break the contract -------------------------------------------------------------

// The bytes of an input choose a field by its place here, so a new field takes the place of an old one or is
// the last: then the corpus keeps its meaning.
constexpr Field kFields[] = {
    FIELD(struct_size),
    FIELD(version),
    FIELD(rows),
    FIELD(vocab_size),
    FIELD(dtype),
    FIELD(num_samples),
    FIELD(num_top_logprobs),
    FIELD(advance),
    FIELD(num_threads),
    FIELD(position_of),
    FIELD(logits),
    FIELD(logits_stride),
    FIELD(temperature),
    FIELD(top_k),
    FIELD(top_p),
    FIELD(logit_bias_size),
    FIELD(min_p_cut),
    FIELD(repetition_penalty),
    FIELD(frequency_penalty),
    FIELD(presence_penalty),
    FIELD(min_tokens_to_keep),
    FIELD(seed),
    FIELD(position),
    FIELD(logit_bias_offsets),
    FIELD(logit_bias_ids),
    FIELD(logit_bias_values),
    FIELD(allowed_mask),
    FIELD(allowed_mask_stride),
    FIELD(seen),
    FIELD(seen_stride),
    FIELD(counts),
    FIELD(counts_stride),
    FIELD(lengths),
    FIELD(slots),
    FIELD(num_slots),
    FIELD(tokens),
    FIELD(processed.logprobs),
    FIELD(status),
    FIELD(filtered),
    FIELD(filtered_stride),
    FIELD(param_slots),
    FIELD(num_param_slots),
    FIELD(logit_bias_counts),
    FIELD(prompt_lengths),
    FIELD(text),
    FIELD(max_text_length),
    FIELD(text_lengths),
    FIELD(text_prompt_lengths),
    FIELD(windows),
    FIELD(record),
    FIELD(repetition_penalty_scope),
    FIELD(extra_output),
    FIELD(num_extra_output),
    FIELD(workspace),
    FIELD(workspace_bytes),
    FIELD(processed.ranks),
    FIELD(processed.top_ids),
    FIELD(processed.top_logprobs),
    FIELD(processed.id_logprobs),
    FIELD(processed.id_ranks),
    FIELD(raw.logprobs),
    FIELD(raw.ranks),
    FIELD(raw.top_ids),
    FIELD(raw.top_logprobs),
    FIELD(raw.id_logprobs),
    FIELD(raw.id_ranks),
    FIELD(kept.counts),
    FIELD(kept.total),
    FIELD(kept.masses),
    FIELD(kept.id_masses),
    FIELD(kept.mask),
    FIELD(kept.ids),
    FIELD(kept.first_id),
    FIELD(kept.first_logit),
    FIELD(kept.last_id),
    FIELD(kept.last_logit),
    FIELD(kept.max_ids),
    FIELD(token_ids),
    FIELD(token_ids_stride),
    FIELD(num_token_ids),
    FIELD(dry_multiplier),
    FIELD(dry_base),
    FIELD(dry_allowed_length),
    FIELD(dry_penalty_last_n),
    FIELD(no_repeat_ngram_size),
    FIELD(no_repeat_ngram_window),
    FIELD(min_tokens),
    FIELD(sequence_offsets),
    FIELD(sequence_counts),
    FIELD(sequences),
    FIELD(sequences_size),
    FIELD(first_id),
    FIELD(whole_vocab_size),
    FIELD(list_bits),
    FIELD(list_before),
    FIELD(list_counts),
    FIELD(list_amounts),
    FIELD(list_capacity),
};

#define UPDATE_FIELD(name) FIELD_OF(LlmSamplingUpdate, name)

constexpr Field kUpdateFields[] = {
    UPDATE_FIELD(struct_size),
    UPDATE_FIELD(version),
    UPDATE_FIELD(rows),
    UPDATE_FIELD(vocab_size),
    UPDATE_FIELD(kind),
    UPDATE_FIELD(id_bytes),
    UPDATE_FIELD(slots),
    UPDATE_FIELD(numbers),
    UPDATE_FIELD(ids),
    UPDATE_FIELD(ids_stride),
    UPDATE_FIELD(max_ids),
    UPDATE_FIELD(prompt_lengths),
    UPDATE_FIELD(position),
    UPDATE_FIELD(position_of),
    UPDATE_FIELD(reserved),
    UPDATE_FIELD(seen),
    UPDATE_FIELD(seen_stride),
    UPDATE_FIELD(counts),
    UPDATE_FIELD(counts_stride),
    UPDATE_FIELD(lengths),
    UPDATE_FIELD(num_slots),
    UPDATE_FIELD(text),
    UPDATE_FIELD(max_text_length),
    UPDATE_FIELD(text_lengths),
    UPDATE_FIELD(text_prompt_lengths),
    UPDATE_FIELD(windows),
};

// Whether all that the struct describes lies within the memory of the batch, which no callee can check.
bool is_within_memory(const Case& batch, const LlmSamplingArgs& a) {
  using Wide = __int128;
  const auto holds = [&](const void* pointer, Wide stride, Wide width, size_t there) {
    return pointer == nullptr ||
           (static_cast<Wide>(a.rows) - 1) * stride + width <= static_cast<Wide>(there);
  };
  const LlmSamplingArgs& was = batch.args;
  const Wide words = (static_cast<Wide>(a.vocab_size) + 31) / 32;
  const Wide was_words = (static_cast<Wide>(was.vocab_size) + 31) / 32;
  const size_t rows = static_cast<size_t>(was.rows);
  const size_t draws = rows * static_cast<size_t>(was.num_samples);
  const size_t elements = was.dtype == LLM_SAMPLING_FLOAT32 || a.dtype != LLM_SAMPLING_FLOAT32
                              ? batch.inputs.logits.size()
                              : batch.inputs.logits.size() / 2;
  const bool slots =
      a.seen == nullptr || (a.num_slots <= was.num_slots && a.seen_stride <= was.seen_stride &&
                            a.counts_stride <= was.counts_stride);
  const bool by_slot = a.position_of == LLM_SAMPLING_POSITION_OF_SLOT;
  const size_t positions = static_cast<size_t>(by_slot ? a.num_param_slots : a.rows);
  return a.rows <= was.rows && a.num_samples <= was.num_samples &&
         a.logit_bias_size <= was.logit_bias_size && a.sequences_size <= was.sequences_size &&
         a.num_param_slots <= was.num_param_slots && positions <= batch.state.position.size() &&
         (a.text == nullptr || a.max_text_length <= was.max_text_length) &&
         a.num_extra_output <= was.num_extra_output && a.num_top_logprobs <= was.num_top_logprobs &&
         a.kept.max_ids <= was.kept.max_ids && a.num_token_ids <= was.num_token_ids &&
         (a.kept.mask == nullptr || words <= was_words) &&
         holds(a.token_ids, a.token_ids_stride, a.num_token_ids, batch.inputs.token_ids.size()) &&
         holds(a.logits, a.logits_stride, a.vocab_size, elements) &&
         holds(a.allowed_mask, a.allowed_mask_stride, words, batch.inputs.mask.size()) &&
         holds(
             a.filtered,
             a.filtered_stride,
             a.vocab_size,
             batch.extent(was.filtered_stride, was.vocab_size)
         ) &&
         holds(a.tokens, a.num_samples, a.num_samples, draws) && slots;
}

// The most rows of a struct that are compared with each other one by one, which takes the square of their number.
constexpr int64_t kMostCompared = 64;

// The memory of a struct, row by row.
class Spans {
 public:
  template <typename T>
  void operator()(bool is_written, const T* pointer, int64_t rows, int64_t width, int64_t stride) {
    ++part_;
    const int64_t size = sizeof(T);
    for (int64_t row = 0; pointer != nullptr && width > 0 && row < rows; ++row) {
      const uintptr_t begin =
          reinterpret_cast<uintptr_t>(pointer) + static_cast<uintptr_t>(row * stride * size);
      spans_.push_back({part_, is_written, begin, begin + static_cast<uintptr_t>(width * size)});
    }
  }

  // Whether memory that is written shares a byte with other memory.
  bool share_a_byte() const {
    for (const Span& one : spans_) {
      for (const Span& two : spans_) {
        if (one.is_written && one.part != two.part && one.begin < two.end && two.begin < one.end) {
          return true;
        }
      }
    }
    return false;
  }

 private:
  struct Span {
    int part;
    bool is_written;
    uintptr_t begin, end;
  };
  std::vector<Span> spans_;
  int part_ = 0;
};

// Whether memory that is written shares a byte with other memory of the struct.
bool shares_a_byte(const LlmSamplingArgs& a) {
  Spans add;
  const int64_t v = a.vocab_size, words = (v + 31) / 32,
                slots = a.seen != nullptr ? a.num_slots : 0;
  const bool draws = a.tokens != nullptr, advances = a.advance != LLM_SAMPLING_ADVANCE_NEVER;
  const int64_t draws_of_all = draws ? a.rows * a.num_samples : 0;
  add(true, a.tokens, 1, draws_of_all, 0);
  add(true, a.status, 1, draws ? a.rows : 0, 0);
  for (const Result& result : kResults) {
    const int64_t size = a.rows * width_of(a, result) * static_cast<int64_t>(result.size);
    add(true, static_cast<const char*>(pointer_of(a, result)), 1, size, 0);
  }
  add(false, a.token_ids, a.rows, a.num_token_ids, a.token_ids_stride);
  add(true, a.filtered, a.rows, v, a.filtered_stride);
  const bool has_slots = a.param_slots != nullptr;
  const int64_t params = has_slots ? a.num_param_slots : a.rows;
  const bool by_slot = a.position_of == LLM_SAMPLING_POSITION_OF_SLOT;
  const bool has_texts = a.position_of == LLM_SAMPLING_POSITION_OF_TEXT;
  add(advances, a.position, 1, by_slot ? params : a.rows, 0);
  add(advances, a.seen, slots, words, a.seen_stride);
  add(advances, a.counts, slots, v, a.counts_stride);
  add(advances, a.lengths, 1, slots, 0);
  if (a.dtype == LLM_SAMPLING_FLOAT32) {
    add(false, static_cast<const float*>(a.logits), a.rows, v, a.logits_stride);
  } else {
    add(false, static_cast<const uint16_t*>(a.logits), a.rows, v, a.logits_stride);
  }
  add(false, a.allowed_mask, a.rows, words, a.allowed_mask_stride);
  add(false, a.temperature, 1, params, 0);
  add(false, a.top_k, 1, params, 0);
  add(false, a.top_p, 1, params, 0);
  add(false, a.min_p_cut, 1, params, 0);
  add(false, a.repetition_penalty, 1, params, 0);
  add(false, a.frequency_penalty, 1, params, 0);
  add(false, a.presence_penalty, 1, params, 0);
  add(false, a.min_tokens_to_keep, 1, params, 0);
  add(false, a.seed, 1, params, 0);
  add(false, a.param_slots, 1, a.rows, 0);
  add(false, a.logit_bias_counts, 1, params, 0);
  add(false, a.prompt_lengths, 1, has_texts ? params : 0, 0);
  const int64_t entries = a.logit_bias_offsets != nullptr ? a.logit_bias_size : 0;
  add(false, a.logit_bias_offsets, 1, params + (a.logit_bias_counts == nullptr), 0);
  add(false, a.logit_bias_ids, 1, entries, 0);
  add(false, a.logit_bias_values, 1, entries, 0);
  add(false, a.dry_multiplier, 1, params, 0);
  add(false, a.dry_base, 1, params, 0);
  add(false, a.dry_allowed_length, 1, params, 0);
  add(false, a.dry_penalty_last_n, 1, params, 0);
  add(false, a.no_repeat_ngram_size, 1, params, 0);
  add(false, a.no_repeat_ngram_window, 1, params, 0);
  add(false, a.min_tokens, 1, params, 0);
  add(false, a.sequence_offsets, 1, params + (a.sequence_counts == nullptr), 0);
  add(false, a.sequence_counts, 1, params, 0);
  add(false, a.sequences, 1, a.sequence_offsets != nullptr ? a.sequences_size : 0, 0);
  add(true, a.list_bits, a.rows, words, words);
  add(true, a.list_before, a.rows, words, words);
  add(true, a.list_counts, 1, a.rows, 0);
  add(true, a.list_amounts, a.rows, a.list_capacity, a.list_capacity);
  add(false, a.slots, 1, slots != 0 ? a.rows : 0, 0);
  const int64_t texts = a.text != nullptr ? slots : 0;
  add(advances, a.text, texts, a.max_text_length, a.max_text_length);
  add(advances, a.text_lengths, 1, texts, 0);
  add(false, a.text_prompt_lengths, 1, texts, 0);
  add(false, a.windows, 1, texts, 0);
  add(false, a.record, 1, advances ? a.rows : 0, 0);
  add(false, a.repetition_penalty_scope, 1, params, 0);
  add(false, a.extra_output, a.rows, a.num_extra_output, a.num_extra_output);
  add(true, static_cast<const uint64_t*>(a.workspace), 1, a.workspace_bytes / 8, 0);
  return add.share_a_byte();
}

bool shares_a_byte(const LlmSamplingUpdate& u) {
  Spans add;
  const int64_t v = u.vocab_size, words = (v + 31) / 32, slots = u.num_slots;
  const int64_t texts = u.text != nullptr ? slots : 0;
  add(true, u.position, 1, u.position_of == LLM_SAMPLING_POSITION_OF_SLOT ? slots : u.rows, 0);
  add(true, u.seen, slots, words, u.seen_stride);
  add(true, u.counts, slots, v, u.counts_stride);
  add(true, u.lengths, 1, slots, 0);
  add(true, u.text, texts, u.max_text_length, u.max_text_length);
  add(true, u.text_lengths, 1, texts, 0);
  add(true, u.text_prompt_lengths, 1, texts, 0);
  add(false, u.windows, 1, texts, 0);
  add(false, u.slots, 1, u.rows, 0);
  add(false, u.numbers, 1, u.rows, 0);
  add(false, u.prompt_lengths, 1, u.kind == LLM_SAMPLING_UPDATE_FILL ? u.rows : 0, 0);
  const int64_t with_ids = u.kind != LLM_SAMPLING_UPDATE_ROLLBACK ? u.rows : 0;
  if (u.id_bytes == 4) {
    add(false, static_cast<const int32_t*>(u.ids), with_ids, u.max_ids, u.ids_stride);
  } else {
    add(false, static_cast<const int64_t*>(u.ids), with_ids, u.max_ids, u.ids_stride);
  }
  return add.share_a_byte();
}

// What the slots of a struct that is otherwise accepted must give.
int32_t code_of_slots(const LlmSamplingArgs& a) {
  int32_t code = LLM_SAMPLING_OK;
  for (int64_t row = 0; a.seen != nullptr && row < a.rows; ++row) {
    if (index_of(a, row) < 0) continue;
    if (a.slots[row] < 0 || a.slots[row] >= a.num_slots) return LLM_SAMPLING_BAD_SIZE;
    for (int64_t other = 0; other < row; ++other) {
      const bool is_shared = a.param_slots == nullptr && a.slots[row] == a.slots[other];
      if (is_shared && a.advance != LLM_SAMPLING_ADVANCE_NEVER) code = LLM_SAMPLING_OVERLAP;
    }
  }
  return code;
}

int64_t take_number(Bytes& bytes, int64_t vocab_size) {
  const int64_t numbers[] = {
      0,
      1,
      -1,
      2,
      3,
      vocab_size,
      vocab_size - 1,
      INT32_MAX,
      INT32_MIN,
      INT64_MAX,
      INT64_MIN,
      1 << 20,
      (1 << 20) + 1,
      176
  };
  const uint8_t which = bytes.take<uint8_t>();
  return which < 200 ? numbers[which % std::size(numbers)] : bytes.take<int64_t>();
}

// Changes a few fields of a struct. Returns whether a pointer points to or near other memory now.
template <typename Struct, size_t n>
bool change_fields(Struct& own, const Field (&fields)[n], Bytes& bytes, int64_t vocab_size) {
  bool is_moved = false;
  for (int64_t changes = bytes.below(4); changes > 0; --changes) {
    const Field field = bytes.one_of(fields);
    char* at = reinterpret_cast<char*>(&own) + field.offset;
    int64_t value = 0;
    if (field.is_pointer) {
      std::memcpy(&value, at, field.size);
      const int64_t how = value == 0 ? 0 : bytes.below(4);
      if (how == 3) {  // to or near other memory of the batch
        const Field target = bytes.one_of(fields);
        int64_t there = 0;
        if (target.is_pointer) {
          std::memcpy(&there, reinterpret_cast<char*>(&own) + target.offset, target.size);
        }
        is_moved |= there != 0;
        value = there == 0 ? 0 : there + 4 * (static_cast<int8_t>(bytes.take<uint8_t>()));
      } else {
        value = how == 1 ? value + 1 : 0;  // not aligned, or NULL
        is_moved |= how == 1;              // a pointer to bytes is always aligned
      }
    } else {
      value = take_number(bytes, vocab_size);
    }
    std::memcpy(at, &value, field.size);
  }
  return is_moved;
}

void run_bad(Case& batch, Bytes& bytes) {
  const uint8_t what = bytes.take<uint8_t>();
  if ((what & 3) == 1 && !batch.inputs.slots.empty()) {
    batch.inputs.slots[what % batch.inputs.slots.size()] =
        static_cast<int32_t>(take_number(bytes, batch.args.vocab_size));
  }
  if ((what & 3) == 2 && !batch.inputs.offsets.empty()) {
    int64_t& offset = batch.inputs.offsets[what % batch.inputs.offsets.size()];
    offset = take_number(bytes, batch.args.vocab_size);
  }
  if ((what & 3) == 3) {
    Inputs& i = batch.inputs;
    std::vector<float>* floats[] = {
        &i.temperature,
        &i.top_p,
        &i.bias_values,
        &i.min_p_cut,
        &i.repetition,
        &i.frequency,
        &i.presence
    };
    std::vector<float>& changed = *floats[bytes.below(7)];
    const float value = take_float(bytes);
    if (!changed.empty()) changed.back() = value;
    i.at_least.back() = static_cast<int32_t>(take_number(bytes, batch.args.vocab_size));
    i.top_k.back() = static_cast<int32_t>(take_number(bytes, batch.args.vocab_size));
  }
  if ((what & 4) != 0 && !batch.state.text.empty()) {
    const int64_t most = batch.args.max_text_length;
    Noise noise(bytes.take<uint8_t>());
    make_ids(noise, batch.state.text, batch.args.vocab_size, false);
    make_hostile(bytes, batch.state.text_lengths, most);
    make_hostile(bytes, batch.inputs.text_prompt_lengths, most);
    make_hostile(bytes, batch.inputs.windows, most);
    make_hostile(bytes, batch.state.lengths, most);
  }
  if ((what & 12) == 12) make_hostile(bytes, batch.inputs.scope, 1);
  if ((what & 16) != 0 && batch.args.dry_multiplier != nullptr) {
    Inputs& i = batch.inputs;
    const int64_t size = batch.args.sequences_size;
    make_hostile(bytes, i.sequences, size);
    make_hostile(bytes, i.sequence_offsets, size);
    make_hostile(bytes, i.sequence_counts, size);
    for (auto* values :
         {&i.dry_allowed_length,
          &i.dry_penalty_last_n,
          &i.no_repeat_ngram_size,
          &i.no_repeat_ngram_window,
          &i.min_tokens}) {
      make_hostile(bytes, *values, batch.args.max_text_length);
    }
    (bytes.below(2) == 0 ? i.dry_base : i.dry_multiplier).back() = take_float(bytes);
  }

  State own = batch.state;
  Outputs out = batch.make_outputs();
  LlmSamplingArgs a = batch.with(own, out);
  const bool is_moved = change_fields(a, kFields, bytes, batch.args.vocab_size);
  const State before_state = own;
  const Outputs before = out;
  LlmSamplingArgs read = {};  // as the kernel reads a struct that may be shorter
  int32_t expected = read_struct(&a, read);
  if (expected == LLM_SAMPLING_OK) expected = check_struct(read);
  const int64_t compared = std::max(read.rows, read.seen != nullptr ? read.num_slots : 0);
  // A call without rows writes nothing.
  if (expected == LLM_SAMPLING_OK && read.rows != 0 && compared <= kMostCompared) {
    require(!shares_a_byte(read), "an overlap is found");
  }
  // What no callee can check.
  if (expected == LLM_SAMPLING_OK && (is_moved || !is_within_memory(batch, read))) return;
  if (expected == LLM_SAMPLING_OK) expected = code_of_slots(read);
  const int32_t code = llm_sampling_cpu(&a);
  require(
      expected == LLM_SAMPLING_OK || code == expected,
      "a struct that breaks the contract gives its code"
  );
  if (code != LLM_SAMPLING_OK) {
    require(own == before_state && out == before, "nothing is written after an error");
  }
}

// ---- Changes of histories by ids that were not drawn ---------------------------------------------

// A valid change, each array in exactly the memory that the contract asks for.
struct UpdateCase {
  LlmSamplingUpdate args = {};
  std::vector<int32_t> slots, numbers, prompt_lengths, ids, windows;
  std::vector<int64_t> long_ids;
  State state;
  std::vector<int64_t> text_prompt_lengths;

  explicit UpdateCase(Bytes& bytes) {
    LlmSamplingUpdate& u = args;
    u.struct_size = sizeof(u);
    u.version = LLM_SAMPLING_ABI_VERSION;
    u.vocab_size = bytes.one_of({1, 2, 31, 32, 33, 100, 513, 1300});
    u.kind = static_cast<int32_t>(bytes.below(3));
    u.id_bytes = bytes.one_of({4, 8});
    u.num_slots = 1 + bytes.below(5);
    u.max_ids = bytes.one_of({0, 1, 2, 5, 9, 80});
    u.position_of = static_cast<int32_t>(bytes.below(2));
    const uint8_t parts = bytes.take<uint8_t>();
    Noise noise(bytes.take<uint16_t>());
    const int64_t words = (u.vocab_size + 31) / 32;
    u.seen_stride = words + (parts & 1);
    u.counts_stride = u.vocab_size + (parts >> 1 & 1);
    u.ids_stride = parts & 4 ? u.max_ids + (parts >> 3 & 1) : (parts & 8 ? 0 : u.max_ids);
    const bool is_rollback = u.kind == LLM_SAMPLING_UPDATE_ROLLBACK;

    // Every slot that exists, in some order and most of the time; and some that do not.
    for (int32_t slot = 0; slot < u.num_slots; ++slot) {
      if (bytes.below(5) != 0) slots.push_back(slot);
    }
    for (int64_t more = bytes.below(3); more > 0; --more) {
      slots.push_back(bytes.one_of({-1, static_cast<int>(u.num_slots), INT32_MIN, INT32_MAX}));
    }
    for (size_t row = slots.size(); row > 1; --row)
      std::swap(slots[row - 1], slots[noise.below(row)]);
    u.rows = static_cast<int64_t>(slots.size());
    const size_t rows = slots.size();
    for (size_t row = 0; row < rows; ++row) {
      const int some[] = {0, 1, 2, 5, static_cast<int>(u.max_ids), -1, INT32_MIN, INT32_MAX};
      numbers.push_back(bytes.one_of(some));
      prompt_lengths.push_back(bytes.one_of(some));
    }
    u.slots = slots.data();
    u.numbers = numbers.data();
    if ((parts & 16) != 0) u.prompt_lengths = prompt_lengths.data();
    const size_t extent = rows == 0 || u.max_ids == 0 || is_rollback
                              ? 0
                              : static_cast<size_t>((u.rows - 1) * u.ids_stride + u.max_ids);
    if (u.id_bytes == 4) {
      ids.resize(extent);
      make_ids(noise, ids, u.vocab_size, false);
      u.ids = ids.data();
    } else {
      long_ids.resize(extent);
      make_ids(noise, long_ids, u.vocab_size, false);
      u.ids = long_ids.data();
    }

    const size_t all = static_cast<size_t>(u.num_slots);
    state.seen.resize(all * static_cast<size_t>(u.seen_stride), 7);
    state.counts.resize(all * static_cast<size_t>(u.counts_stride), 7);
    for (size_t slot = 0; slot < all; ++slot) {
      state.lengths.push_back(bytes.one_of<int64_t>({0, 3, INT64_MAX, INT64_MIN}));
    }
    if ((parts & 32) != 0 || is_rollback) {
      u.max_text_length = bytes.one_of(kTextLengths);
      state.text.resize(all * static_cast<size_t>(u.max_text_length));
      make_ids(noise, state.text, u.vocab_size, true);
      for (size_t slot = 0; slot < all; ++slot) {
        const int64_t length = noise.below(u.max_text_length + 1);
        state.text_lengths.push_back(length);
        text_prompt_lengths.push_back(noise.below(length + 1));
        if ((parts & 64) != 0) windows.push_back(bytes.one_of(kWindows));
      }
      if ((parts & 64) != 0) u.windows = windows.data();
      for (size_t slot = 0; slot < all; ++slot) count_text(state, text_prompt_lengths, slot);
    }
    if ((parts & 128) != 0) {
      const int64_t position = bytes.one_of<int64_t>({0, 77, INT64_MAX, INT64_MIN});
      state.position.resize(u.position_of == LLM_SAMPLING_POSITION_OF_SLOT ? all : rows, position);
    }
  }

  LlmSamplingUpdate with(State& own, std::vector<int64_t>& of_prompts) const {
    LlmSamplingUpdate u = args;
    if (!own.position.empty()) u.position = own.position.data();
    u.seen = own.seen.data();
    u.counts = own.counts.data();
    u.lengths = own.lengths.data();
    if (!own.text.empty()) {
      u.text = own.text.data();
      u.text_lengths = own.text_lengths.data();
      u.text_prompt_lengths = of_prompts.data();
    }
    return u;
  }

  int64_t id_at(int64_t row, int64_t i) const {
    const size_t place = static_cast<size_t>(row * args.ids_stride + i);
    return args.id_bytes == 4 ? ids[place] : long_ids[place];
  }

  int32_t* seen_of(State& of, size_t slot) const {
    return of.seen.data() + static_cast<int64_t>(slot) * args.seen_stride;
  }

  int32_t* counts_of(State& of, size_t slot) const {
    return of.counts.data() + static_cast<int64_t>(slot) * args.counts_stride;
  }

  // Makes bits and counts those of a slot's text.
  void count_text(State& of, const std::vector<int64_t>& of_prompts, size_t slot) const {
    const int32_t* begin = of.text.data() + slot * static_cast<size_t>(args.max_text_length);
    count_ids(
        {begin, begin + of.text_lengths[slot]},
        of_prompts[slot],
        windows.empty() ? -1 : windows[slot],
        args.vocab_size,
        seen_of(of, slot),
        counts_of(of, slot)
    );
  }
};

// Does to the state what the update of a row must do.
void update_row(
    const UpdateCase& batch,
    State& state,
    std::vector<int64_t>& of_prompts,
    int64_t row,
    size_t slot
) {
  const LlmSamplingUpdate& u = batch.args;
  const bool has_text = !state.text.empty(), fills = u.kind == LLM_SAMPLING_UPDATE_FILL;
  const int64_t number = batch.numbers[static_cast<size_t>(row)];
  int64_t grown = 0;
  if (u.kind == LLM_SAMPLING_UPDATE_ROLLBACK) {
    const int64_t output = state.text_lengths[slot] - of_prompts[slot];
    grown = -std::min(std::max<int64_t>(number, 0), output);
    state.text_lengths[slot] += grown;
  } else {
    if (fills) {
      state.lengths[slot] = 0;
      if (has_text) state.text_lengths[slot] = of_prompts[slot] = 0;
      if (!has_text) {
        std::fill_n(batch.seen_of(state, slot), (u.vocab_size + 31) / 32, 0);
        std::fill_n(batch.counts_of(state, slot), u.vocab_size, 0);
      }
    }
    for (int64_t i = 0; i < std::min(number, u.max_ids); ++i) {
      const int64_t id = batch.id_at(row, i);
      if (id < 0 || id >= u.vocab_size) continue;
      const bool is_prompt = fills && u.prompt_lengths != nullptr && i < u.prompt_lengths[row];
      if (has_text) {
        int64_t& length = state.text_lengths[slot];
        if (length == u.max_text_length) break;
        state.text[slot * static_cast<size_t>(u.max_text_length) + static_cast<size_t>(length)] =
            static_cast<int32_t>(id);
        ++length;
        of_prompts[slot] += is_prompt;
      } else {
        set_bit_of(batch.seen_of(state, slot), id);
        if (!is_prompt) plus(batch.counts_of(state, slot)[id], 1);
      }
      grown += !is_prompt;
    }
  }
  if (has_text) batch.count_text(state, of_prompts, slot);
  plus(state.lengths[slot], grown);
  if (state.position.empty()) return;
  const bool by_slot = u.position_of == LLM_SAMPLING_POSITION_OF_SLOT;
  int64_t& position = state.position[by_slot ? slot : static_cast<size_t>(row)];
  if (fills) position = 0;
  plus(position, grown);
}

void run_good_update(const UpdateCase& batch) {
  State own = batch.state, expected = batch.state;
  std::vector<int64_t> prompts = batch.text_prompt_lengths, expected_prompts = prompts;
  const LlmSamplingUpdate u = batch.with(own, prompts);
  require(llm_sampling_cpu_update(&u) == LLM_SAMPLING_OK, "a valid update is accepted");
  for (int64_t row = 0; row < u.rows; ++row) {
    const int32_t slot = u.slots[row];
    if (slot < 0 || slot >= u.num_slots) continue;
    update_row(batch, expected, expected_prompts, row, static_cast<size_t>(slot));
  }
  require(own == expected && prompts == expected_prompts, "the state after an update");
}

// Whether all that the struct describes lies within the memory of the case.
bool is_within_memory(const UpdateCase& batch, const LlmSamplingUpdate& u) {
  using Wide = __int128;
  const LlmSamplingUpdate& was = batch.args;
  const size_t there =
      was.id_bytes == 4 ? batch.ids.size() / (u.id_bytes == 4 ? 1 : 2) : batch.long_ids.size();
  const bool by_slot = u.position_of == LLM_SAMPLING_POSITION_OF_SLOT;
  const size_t positions = static_cast<size_t>(by_slot ? u.num_slots : u.rows);
  return u.rows <= was.rows && u.num_slots <= was.num_slots && u.vocab_size <= was.vocab_size &&
         u.seen_stride <= was.seen_stride && u.counts_stride <= was.counts_stride &&
         (u.position == nullptr || positions <= batch.state.position.size()) &&
         (u.text == nullptr || u.max_text_length <= was.max_text_length) &&
         (u.kind == LLM_SAMPLING_UPDATE_ROLLBACK || u.max_ids == 0 ||
          (static_cast<Wide>(u.rows) - 1) * u.ids_stride + u.max_ids <= static_cast<Wide>(there));
}

void run_bad_update(UpdateCase& batch, Bytes& bytes) {
  const uint8_t what = bytes.take<uint8_t>();
  const int64_t most = batch.args.max_text_length;
  if (what & 1) make_hostile(bytes, batch.slots, batch.args.num_slots);
  if (what & 2) make_hostile(bytes, batch.numbers, batch.args.max_ids);
  if (what & 4) make_hostile(bytes, batch.prompt_lengths, batch.args.max_ids);
  if (what & 8) make_hostile(bytes, batch.state.text_lengths, most);
  if (what & 16) make_hostile(bytes, batch.text_prompt_lengths, most);
  if (what & 32) make_hostile(bytes, batch.windows, most);
  if (what & 64) {
    Noise noise(bytes.take<uint8_t>());
    make_ids(noise, batch.state.text, batch.args.vocab_size, false);
  }
  State own = batch.state;
  std::vector<int64_t> prompts = batch.text_prompt_lengths;
  LlmSamplingUpdate u = batch.with(own, prompts);
  const bool is_moved = change_fields(u, kUpdateFields, bytes, batch.args.vocab_size);
  LlmSamplingUpdate read = {};
  int32_t expected = read_struct(&u, read);
  if (expected == LLM_SAMPLING_OK) expected = check_update(read);
  if (expected == LLM_SAMPLING_OK && std::max(read.rows, read.num_slots) <= kMostCompared) {
    require(read.rows == 0 || !shares_a_byte(read), "an overlap of an update is found");
  }
  // What no callee can check.
  if (expected == LLM_SAMPLING_OK && read.rows != 0 &&
      (is_moved || !is_within_memory(batch, read))) {
    return;
  }
  for (int64_t row = 0; expected == LLM_SAMPLING_OK && row < read.rows; ++row) {
    const int32_t slot = read.slots[row];
    const int32_t* end = read.slots + read.rows;
    if (slot < 0 || slot >= read.num_slots) continue;
    if (std::find(read.slots + row + 1, end, slot) != end) expected = LLM_SAMPLING_OVERLAP;
  }
  const int32_t code = llm_sampling_cpu_update(&u);
  require(code == expected, "an update that breaks the contract gives its code");
  if (code != LLM_SAMPLING_OK) {
    require(
        own == batch.state && prompts == batch.text_prompt_lengths,
        "nothing is written after an error of an update"
    );
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  const uint8_t first = bytes.take<uint8_t>();
  const bool good = first % 4 != 0;
  if (first >= 224) {
    UpdateCase update(bytes);
    if (good) {
      run_good_update(update);
    } else {
      run_bad_update(update, bytes);
    }
    return 0;
  }
  Case batch(bytes);
  if (good) {
    run_good(batch);
  } else {
    run_bad(batch, bytes);
  }
  return 0;
}

#ifdef REPLAY
int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    std::FILE* file = std::fopen(argv[i], "rb");
    require(file != nullptr, argv[i]);
    std::vector<uint8_t> data(1 << 16);
    data.resize(std::fread(data.data(), 1, data.size(), file));
    std::fclose(file);
    std::fprintf(stderr, "%s\n", argv[i]);
    LLVMFuzzerTestOneInput(data.data(), data.size());
  }
  std::printf("%d inputs\n", argc - 1);
  return 0;
}
#endif
