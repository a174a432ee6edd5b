// The CPU kernel with several callers at once, for ThreadSanitizer. They share the library and the logits;
// each has rows and state of its own, on one, two, three or five threads. The results of a call must equal,
// bit for bit, those of the same call alone on one thread. The exit status is 0 if they do.
//
// Compiled with -DOPENMP the process has GOMP_parallel, as it has with torch, implemented here with threads
// that the sanitizer understands. With -DRACE the callers wrongly share their rows and state.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "../../../csrc/llm_sampling.h"
#include "parameters.h"
#include "result_arrays.h"

#ifdef OPENMP
static std::atomic<int> teams{0};

extern "C" __attribute__((visibility("default"))) void GOMP_parallel(
    void (*work)(void*),
    void* data,
    unsigned threads,
    unsigned
) {
  ++teams;
  std::vector<std::thread> team;
  for (unsigned i = 1; i < threads; ++i) team.emplace_back(work, data);
  work(data);
  for (std::thread& thread : team) thread.join();
}
#endif

namespace {

constexpr int64_t kVocabSize = 40000;
constexpr int64_t kWords = kVocabSize / 32;
constexpr int kSteps = 2;

struct Kind {
  int64_t rows;
  bool flat;        // false: few tokens have most of the mass
  Filters filters;  // penalties have a history
  bool masked, filtered;
  bool results;  // kTokens or kAll
  int32_t samples;
};

// What a call returns besides filtered logits.
constexpr bool kTokens = false, kAll = true;

// Calls that together take every path of the kernel, for one row, which is split over threads, and for
// several rows.
constexpr Kind kKinds[] = {
    {1, true, {0.8f, 0, 1.0f, 0.0f, 1, 1.0f, 0.0f}, false, false, kTokens, 1},
    {1, true, {0.8f, 0, 1.0f, 0.0f, 1, 1.0f, 0.1f}, true, true, kAll, 1},
    {1, true, {0.8f, 0, 0.9f, 0.0f, 1, 1.0f, 0.0f}, false, true, kAll, 7},
    {1, true, {0.8f, 0, 0.1f, 0.0f, 30000, 1.0f, 0.0f}, false, true, kAll, 1},
    {1, true, {0.8f, 0, 1.0f, 1e-9f, 1, 1.2f, 0.0f}, false, true, kAll, 1},
    {1, false, {0.8f, 0, 0.9f, 0.0f, 1, 1.2f, 0.1f}, true, false, kAll, 1},
    {1, false, {0.8f, 50, 0.9f, 0.05f, 1, 1.2f, 0.1f}, false, true, kAll, 1},
    {1, false, {0.8f, 1, 1.0f, 0.0f, 1, 0.8f, 0.0f}, true, false, kTokens, 1},
    {3, true, {0.8f, 0, 0.9f, 0.0f, 1, 1.2f, 0.1f}, false, true, kAll, 1},
    {8, false, {0.8f, 50, 0.9f, 0.05f, 1, 1.2f, 0.1f}, true, false, kAll, 1},
    {8, true, {0.8f, 0, 1.0f, 0.0f, 1, 1.0f, 0.0f}, false, false, kAll, 3},
};
constexpr int kKindCount = sizeof(kKinds) / sizeof(kKinds[0]);

// The rows and the state of one caller.
struct Step {
  Parameters parameters;
  std::vector<int32_t> slots, mask, seen, counts, status, token_ids;
  std::vector<int64_t> lengths, tokens;
  std::vector<float> filtered;
  ResultArrays others;
  LlmSamplingArgs args = {};

  Step(const Kind& kind, const std::vector<float>& logits, int32_t threads)
      : parameters(kind.rows, kind.filters),
        mask(kind.rows * kWords, 0x5fffffff),
        seen(kind.rows * kWords, 0x11111111),
        counts(kind.rows * kVocabSize, 1),
        status(kind.rows, -1),
        token_ids({0, -1, kVocabSize / 2, kVocabSize - 1, kVocabSize}),
        lengths(kind.rows, 0),
        tokens(kind.rows * kind.samples, -1),
        filtered(kind.filtered ? kind.rows * kVocabSize : 0, 1.0f) {
    for (int32_t row = 0; row < kind.rows; ++row) slots.push_back(row);
    args.struct_size = sizeof(args);
    args.version = LLM_SAMPLING_ABI_VERSION;
    args.rows = kind.rows;
    args.vocab_size = kVocabSize;
    args.num_samples = kind.samples;
    args.advance = LLM_SAMPLING_ADVANCE_ALWAYS;
    args.num_threads = threads;
    args.logits = logits.data();
    args.logits_stride = kVocabSize;
    parameters.put_into(args);
    if (kind.masked) {
      args.allowed_mask = mask.data();
      args.allowed_mask_stride = kWords;
    }
    if (kind.filters.has_history()) {
      args.seen = seen.data();
      args.seen_stride = kWords;
      args.counts = counts.data();
      args.counts_stride = kVocabSize;
      args.lengths = lengths.data();
      args.slots = slots.data();
      args.num_slots = kind.rows;
    }
    args.tokens = tokens.data();
    args.status = status.data();
    args.filtered = kind.filtered ? filtered.data() : nullptr;
    args.filtered_stride = kVocabSize;
    if (kind.results == kTokens) return;
    args.num_top_logprobs = 20;
    args.kept.max_ids = 100;
    args.token_ids = token_ids.data();
    args.num_token_ids = static_cast<int64_t>(token_ids.size());
    others.add_all(args);
    others.put_into(args);
  }

  // Runs kSteps steps and returns the bits of all their results; nothing if a step fails.
  std::vector<int64_t> run() {
    std::vector<int64_t> results;
    const auto append = [&](const auto& values) {
      for (const auto value : values) {
        int64_t bits = 0;
        std::memcpy(&bits, &value, sizeof(value));
        results.push_back(bits);
      }
    };
    for (int step = 0; step < kSteps; ++step) {
      if (llm_sampling_cpu(&args) != LLM_SAMPLING_OK) return {};
      append(tokens);
      append(status);
      append(filtered);
      for (const std::vector<uint8_t>& bytes : others.bytes()) append(bytes);
    }
    return results;
  }
};

std::vector<float> make_logits(bool flat) {
  std::vector<float> logits(8 * kVocabSize);
  uint32_t state = 1;
  for (float& x : logits) {
    state = state * 1664525u + 1013904223u;
    const float uniform = static_cast<float>((state >> 8) + 1) * 0x1p-24f;
    x = flat ? 3.0f * uniform : -1.6f * std::log(uniform);
  }
  if (!flat) logits[kVocabSize / 2] = std::nanf("");  // a NaN, which any thread may find
  return logits;
}

}  // namespace

int main() {
  const std::vector<float> flat = make_logits(true), steep = make_logits(false);
  const auto make = [&](int kind, int32_t threads) {
    return std::make_unique<Step>(kKinds[kind], kKinds[kind].flat ? flat : steep, threads);
  };
  std::vector<std::vector<int64_t>> alone;
  for (int kind = 0; kind < kKindCount; ++kind) alone.push_back(make(kind, 1)->run());

  constexpr int kCallers = 6;
  constexpr int32_t kThreads[] = {5, 3, 1, 2};
  std::atomic<int> failures{0};
  std::vector<std::thread> callers;
#ifdef RACE
  const std::unique_ptr<Step> shared = make(0, 1);
#endif
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      for (int i = 0; i < kKindCount; ++i) {
        const int kind = (i + caller / 2) % kKindCount;
#ifdef RACE
        const std::vector<int64_t> results = shared->run();
#else
        const std::vector<int64_t> results = make(kind, kThreads[(caller + i) % 4])->run();
#endif
        if (results.empty() || results != alone[kind]) ++failures;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
#ifdef OPENMP
  if (teams == 0) {
    std::printf("OpenMP was not used\n");
    ++failures;
  }
#endif
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
