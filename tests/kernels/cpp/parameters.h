// The parameters of the rows of a call, for the test programs that call the CPU kernel on several threads.
#ifndef LLM_SAMPLING_TESTS_PARAMETERS_H_
#define LLM_SAMPLING_TESTS_PARAMETERS_H_

#include <cmath>
#include <cstdint>
#include <vector>

#include "../../../csrc/llm_sampling.h"

// What every row of a call asks for.
struct Filters {
  float temperature;
  int32_t top_k;
  float top_p, min_p;
  int32_t min_tokens_to_keep;
  float repetition_penalty, frequency_penalty;

  bool has_history() const { return repetition_penalty != 1.0f || frequency_penalty != 0.0f; }
};

struct Parameters {
  std::vector<float> temperature, top_p, min_p_cut;
  std::vector<float> repetition_penalty, frequency_penalty, presence_penalty;
  std::vector<int32_t> top_k, min_tokens_to_keep;
  std::vector<int64_t> seed, position;

  // The seed of a row is its index.
  Parameters(size_t rows, const Filters& all)
      : temperature(rows, all.temperature),
        top_p(rows, all.top_p),
        min_p_cut(rows, all.min_p > 0.0f ? 0x1p-18f - std::log2(all.min_p) : HUGE_VALF),
        repetition_penalty(rows, all.repetition_penalty),
        frequency_penalty(rows, all.frequency_penalty),
        presence_penalty(rows, 0.0f),
        top_k(rows, all.top_k),
        min_tokens_to_keep(rows, all.min_tokens_to_keep),
        position(rows, 0) {
    for (size_t row = 0; row < rows; ++row) seed.push_back(static_cast<int64_t>(row));
  }

  void put_into(LlmSamplingArgs& args) {
    args.temperature = temperature.data();
    args.top_k = top_k.data();
    args.top_p = top_p.data();
    args.min_p_cut = min_p_cut.data();
    args.repetition_penalty = repetition_penalty.data();
    args.frequency_penalty = frequency_penalty.data();
    args.presence_penalty = presence_penalty.data();
    args.min_tokens_to_keep = min_tokens_to_keep.data();
    args.seed = seed.data();
    args.position = position.data();
  }
};

#endif  // LLM_SAMPLING_TESTS_PARAMETERS_H_
