// Where the results of one row go, and what a row without a token gets.
#ifndef LLM_SAMPLING_CPU_RESULTS_H_
#define LLM_SAMPLING_CPU_RESULTS_H_

#include <algorithm>
#include <cstdint>

#include "../llm_sampling.h"
#include "../semantics.h"

namespace llm_sampling {
namespace {

// The pointers of one row; NULL for a result that is not wanted.
struct RowResults {
  int64_t* tokens;
  int32_t* status;
  float* filtered;
  LlmSamplingLogprobs processed, raw;
  LlmSamplingKept kept;
  const int32_t* token_ids;
  int64_t draws, top, ids, words;

  // Writes all but the filtered logits of a row that has no token.
  void write_nothing() const {
    fill(tokens, draws, int64_t{-1});
    for (const LlmSamplingLogprobs& of : {processed, raw}) {
      fill(of.logprobs, draws, kNan);
      fill(of.ranks, draws, -1);
      fill(of.top_ids, top, -1);
      fill(of.top_logprobs, top, kNan);
      fill(of.id_logprobs, ids, kNan);
      fill(of.id_ranks, ids, -1);
    }
    fill(kept.counts, 1, 0);
    fill(kept.total, 1, int64_t{0});
    fill(kept.masses, draws, int64_t{0});
    fill(kept.id_masses, ids, int64_t{0});
    fill(kept.mask, words, 0);
    fill(kept.ids, kept.max_ids, -1);
    fill(kept.first_id, 1, -1);
    fill(kept.first_logit, 1, kNan);
    fill(kept.last_id, 1, -1);
    fill(kept.last_logit, 1, kNan);
  }

 private:
  template <typename T>
  static void fill(T* values, int64_t size, T value) {
    if (values != nullptr) std::fill_n(values, size, value);
  }
};

template <typename T>
T* advanced(T* pointer, int64_t elements) {
  return pointer == nullptr ? nullptr : pointer + elements;
}

inline bool is_wanted(const LlmSamplingLogprobs& of) {
  return of.logprobs != nullptr || of.ranks != nullptr || of.top_ids != nullptr ||
         of.id_logprobs != nullptr || of.id_ranks != nullptr;
}

inline bool has_ends(const LlmSamplingKept& kept) {
  return kept.first_id != nullptr || kept.first_logit != nullptr || kept.last_id != nullptr ||
         kept.last_logit != nullptr;
}

// Apart from the masses of the tokens, which are written when they are drawn.
inline bool is_wanted(const LlmSamplingKept& kept) {
  return kept.counts != nullptr || kept.total != nullptr || kept.id_masses != nullptr ||
         kept.mask != nullptr || kept.ids != nullptr || has_ends(kept);
}

inline RowResults find_results(const LlmSamplingArgs& args, int64_t row) {
  RowResults results = {};
  results.filtered = advanced(args.filtered, row * args.filtered_stride);
  if (args.tokens == nullptr) return results;
  const int64_t draws = args.num_samples, top = args.num_top_logprobs, ids = args.num_token_ids;
  results.draws = draws;
  results.top = top;
  results.ids = ids;
  results.words = (args.vocab_size + 31) / 32;
  results.tokens = args.tokens + row * draws;
  results.status = args.status + row;
  results.token_ids = advanced(args.token_ids, row * args.token_ids_stride);
  const auto of_row = [=](const LlmSamplingLogprobs& of) {
    return LlmSamplingLogprobs{
        advanced(of.logprobs, row * draws),
        advanced(of.ranks, row * draws),
        advanced(of.top_ids, row * top),
        advanced(of.top_logprobs, row * top),
        advanced(of.id_logprobs, row * ids),
        advanced(of.id_ranks, row * ids),
    };
  };
  results.processed = of_row(args.processed);
  results.raw = of_row(args.raw);
  const LlmSamplingKept& kept = args.kept;
  results.kept = {
      advanced(kept.counts, row),
      advanced(kept.total, row),
      advanced(kept.masses, row * draws),
      advanced(kept.id_masses, row * ids),
      advanced(kept.mask, row * results.words),
      advanced(kept.ids, row * kept.max_ids),
      advanced(kept.first_id, row),
      advanced(kept.first_logit, row),
      advanced(kept.last_id, row),
      advanced(kept.last_logit, row),
      kept.max_ids,
  };
  return results;
}

}  // namespace
}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_RESULTS_H_
