// The results of a call besides tokens, status and filtered logits, for the test programs.
#ifndef LLM_SAMPLING_TESTS_RESULT_ARRAYS_H_
#define LLM_SAMPLING_TESTS_RESULT_ARRAYS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "../../../csrc/llm_sampling.h"

// How many elements of a result each row has.
enum class Width { kOne, kDraws, kTop, kIds, kListed, kWords };

struct Result {
  size_t offset, size;  // of its pointer in the struct, and of an element
  Width width;
};

#define RESULT(name, width) \
  Result { offsetof(LlmSamplingArgs, name), sizeof(*std::declval<LlmSamplingArgs&>().name), width }

constexpr Result kResults[] = {
    RESULT(processed.logprobs, Width::kDraws),  RESULT(processed.ranks, Width::kDraws),
    RESULT(processed.top_ids, Width::kTop),     RESULT(processed.top_logprobs, Width::kTop),
    RESULT(processed.id_logprobs, Width::kIds), RESULT(processed.id_ranks, Width::kIds),
    RESULT(raw.logprobs, Width::kDraws),        RESULT(raw.ranks, Width::kDraws),
    RESULT(raw.top_ids, Width::kTop),           RESULT(raw.top_logprobs, Width::kTop),
    RESULT(raw.id_logprobs, Width::kIds),       RESULT(raw.id_ranks, Width::kIds),
    RESULT(kept.counts, Width::kOne),           RESULT(kept.total, Width::kOne),
    RESULT(kept.masses, Width::kDraws),         RESULT(kept.id_masses, Width::kIds),
    RESULT(kept.mask, Width::kWords),           RESULT(kept.ids, Width::kListed),
    RESULT(kept.first_id, Width::kOne),         RESULT(kept.first_logit, Width::kOne),
    RESULT(kept.last_id, Width::kOne),          RESULT(kept.last_logit, Width::kOne),
};
constexpr size_t kResultCount = sizeof(kResults) / sizeof(kResults[0]);

inline int64_t width_of(const LlmSamplingArgs& args, const Result& result) {
  switch (result.width) {
    case Width::kOne:
      return 1;
    case Width::kDraws:
      return args.num_samples;
    case Width::kTop:
      return args.num_top_logprobs;
    case Width::kIds:
      return args.num_token_ids;
    case Width::kListed:
      return args.kept.max_ids;
    default:
      return (args.vocab_size + 31) / 32;
  }
}

inline void* pointer_of(const LlmSamplingArgs& args, const Result& result) {
  void* pointer;
  std::memcpy(&pointer, reinterpret_cast<const char*>(&args) + result.offset, sizeof(pointer));
  return pointer;
}

// The memory of results, each in exactly the bytes that the contract asks for.
class ResultArrays {
 public:
  // Gives a result its memory, filled with bytes that the kernel does not write.
  void add(const LlmSamplingArgs& args, size_t result) {
    const int64_t elements = args.rows * width_of(args, kResults[result]);
    bytes_[result].assign(static_cast<size_t>(elements) * kResults[result].size, 0x55);
  }

  void add_all(const LlmSamplingArgs& args) {
    for (size_t result = 0; result < kResultCount; ++result) add(args, result);
  }

  void put_into(LlmSamplingArgs& args) {
    for (size_t result = 0; result < kResultCount; ++result) {
      if (bytes_[result].empty()) continue;
      void* pointer = bytes_[result].data();
      char* place = reinterpret_cast<char*>(&args) + kResults[result].offset;
      std::memcpy(place, &pointer, sizeof(pointer));
    }
  }

  // Bytes, so that a NaN equals itself.
  const std::array<std::vector<uint8_t>, kResultCount>& bytes() const { return bytes_; }

 private:
  std::array<std::vector<uint8_t>, kResultCount> bytes_;
};

#endif  // LLM_SAMPLING_TESTS_RESULT_ARRAYS_H_
