// The CPU kernel. The arithmetic is in ../semantics.h, and steps have the numbers of docs/semantics.md.
// tile.h: the logits of a row after steps 1 to 5. passes.h: the vectorised loops over tiles (three of them in
// simd_x86.h). select.h: selection among candidates, and estimates. thread_pool.h: threads.
//
// Work: one thread owns a row; if there are fewer rows than threads, each row is split over threads by tiles.
// A row is read in tiles of 512 tokens. Steps 1 to 5 write a tile to 2 KiB of the stack, or read it in place
// if they change nothing. There is no copy of the row. A mask takes no copy: maxima are of the allowed tokens,
// and masses and lists of candidates are cut to them. A tile without an allowed token is not read.
//
// Passes over the row:
//   maxima       Every row: the maximum of each tile and of each of its 16 stripes (tokens with the same
//                j mod 16).
//   (no other)   Greedy, and top-k: the k-th largest stripe maximum is a lower bound of the k-th largest
//                logit, so only the few tiles that reach it are read again. If the penalties can only lower
//                logits, the maxima are taken before them, and only candidates are penalised.
//   mass         Top-p, or no filter: the mass of every tile, exact in two int32 halves.
//   split mass   Top-p on a flat row, where the nucleus is a large part of the vocabulary: also the mass
//                above an estimate of the threshold.
//   band         The same row: the tokens between this estimate and another one on the threshold's other
//                side.
// What is left is a short list of candidates in token-id order. A bisection with exact counts, or a radix
// select with exact masses, finds the threshold among them, in linear time whatever the ties.
//
// A kept set is a prefix of the order, so its Threshold (a logit, and the last id that is kept among its
// equals) describes it. Estimates choose only where to look: every decision is made on exact integers.
//
// Hazards: NaN is not replaced by -inf, so every comparison is written such that NaN is not kept. Loops
// marked LLM_SAMPLING_CLONES are vectorised by the compiler, once per instruction set. This file needs the
// flags -ffp-contract=off -fno-trapping-math -fno-math-errno.
//
// Another thread may wrongly change the caller's memory during a call, so that two passes see different
// values, and even two loads of one pass do. Such a race may change a token, and make a maximum or a candidate
// NaN. It must not make the kernel leave the memory of the struct or run for ever. So what becomes an index or
// a count is loaded by read_once and brought into its range again, no pass relies on what another one found
// in the logits, and maxima, candidates and masses, once taken, are in memory of the kernel's own.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>

#include "../history.h"
#include "../llm_sampling.h"
#include "../rows.h"
#include "../semantics.h"
#include "../validate.h"
#include "buffer.h"
#include "history.h"
#include "passes.h"
#include "results.h"
#include "select.h"
#include "sequence_rules.h"
#include "thread_pool.h"
#include "tile.h"

namespace llm_sampling {
namespace {

struct Bias {
  int32_t id;
  float value;
};

// The scratch memory of a thread, kept from call to call.
struct Workspace {
  Buffer<float> stripe_max, tile_max, maxima, probe_depth, probe_mass, candidate_x, bias_values;
  Buffer<int64_t> tile_mass, tile_kept, candidate_w, weights;
  Buffer<Bias> biases;
  Buffer<uint32_t> candidate_id, keys, seen;
  Buffer<uint64_t> codes;
  Buffer<int32_t> bias_ids, bins;
  Histogram histogram;
  Replaced replaced;
  PenaltyList list;
};

// One row's parameters of steps 8 and 11 to 14. Those of steps 2 to 5 and 9 are in its Row.
struct RowParams {
  float temperature;
  int64_t top_k;  // the number of tokens that step 8 or 11 keeps; 0 if that is all of them
  float top_p;
  float depth_cut;  // infinity if no filter by depth is on
  int64_t min_tokens_to_keep;
  uint64_t seed, position;  // 0 if no token is drawn

  bool is_greedy() const { return temperature == 0.0f; }
};

// The values, which are at `index`, were checked, but may have changed since.
RowParams read_params(const LlmSamplingArgs& args, int64_t row, int64_t index) {
  RowParams params = {};
  params.temperature = read_once(args.temperature[index]);
  params.top_p = std::max(read_once(args.top_p[index]), 0.0f);
  params.depth_cut = depth_cut(args, index);
  params.min_tokens_to_keep = std::max(read_once(args.min_tokens_to_keep[index]), 1);
  const int64_t top_k = read_once(args.top_k[index]);
  if (params.is_greedy()) {
    params.top_k = 1;
  } else if (top_k > 0) {
    const int64_t k = std::max(top_k, params.min_tokens_to_keep);
    params.top_k = k < args.vocab_size ? k : 0;
  }
  if (args.tokens != nullptr) {
    params.seed = static_cast<uint64_t>(args.seed[index]);
    params.position = position(args, row, index);
  }
  return params;
}

// ---- One row -------------------------------------------------------------------------------------

// A token with its logit.
struct Ranked {
  float x;
  int64_t id;
};

class RowSampler {
 public:
  // `index` is that of the row's parameters.
  RowSampler(
      const LlmSamplingArgs& args,
      int64_t row,
      int64_t index,
      Workspace& workspace,
      int threads
  )
      : args_(args),
        ws_(workspace),
        threads_(threads),
        params_(read_params(args, row, index)),
        results_(find_results(args, row)),
        row_(make_row(row, index)),
        tiles_(row_.tiles()) {}

  // Writes the row's results. The state, which is positions and histories, is left to `advance`.
  void run() {
    if (!find_kept_penalising_late()) {
      find_maxima(row_);
      find_kept();
    }
    if (mass_ == 0) keep_nothing();
    if (results_.filtered != nullptr) write_filtered_logits();
    if (results_.tokens == nullptr) return;
    draw();
    if ((status_ & LLM_SAMPLING_STATUS_NO_CANDIDATE) == 0) {
      if (is_wanted(results_.processed)) write_processed();
      if (is_wanted(results_.kept)) write_kept_set();
      if (is_wanted(results_.raw)) write_raw();  // the last one: it changes the row
    }
    *results_.status = status_;
  }

 private:
  Row make_row(int64_t row, int64_t index);
  void list_tokens(int64_t number, int64_t index, Row& row);
  void find_maxima(const Row& row);
  bool find_kept_penalising_late();
  void find_kept();
  float lowest_within_depth() const;

  void keep_nothing();
  void keep_best();
  void keep_top_k();
  void keep_first_of_row(int64_t count);
  void keep_from(float lowest_kept);
  void keep_every_token();
  void keep_top_p(float lowest_kept);
  void keep_flat_nucleus(float guess, float lowest_kept);
  void keep_candidates();

  float bound_of_kth_logit(int64_t k);
  void clear_candidates();
  Threshold last_candidate() const;
  int64_t gather(const Row& row, float from, float to = kInfinity);
  void drop_below(float bound);
  void drop_after(CandidateThreshold threshold);
  void drop_after_first(int64_t count);
  int64_t weigh_candidates();
  CandidateThreshold threshold_of_mass(int64_t target);
  void filter_candidates(int64_t target, float lowest_kept);

  int64_t total(const int64_t* tile_mass) const;
  int64_t mass_of_row();
  int64_t count_until(Threshold threshold);

  void write_filtered_logits();
  void draw();
  void draw_nothing();
  void write_processed();
  void write_kept_set();
  void write_kept_mask();
  void write_kept_ends();
  void write_raw();
  template <typename F>
  void write_lists(const LlmSamplingLogprobs& out, const F& logprob);
  bool find_listed(int64_t id, float& x);
  int32_t rank(Ranked token);
  int64_t list_first(int64_t count);

  // Calls part(begin, end) for ranges of tiles that together are all tiles, on all threads.
  template <typename F>
  void over_tiles(const F& part);

  const LlmSamplingArgs& args_;
  Workspace& ws_;
  const int threads_;
  const RowParams params_;
  const RowResults results_;

  Row row_;
  const int64_t tiles_;
  int32_t status_ = 0;
  float* stripe_max_ = nullptr;
  float* tile_max_ = nullptr;
  Candidates candidates_ = {};

  // The kept set: its threshold, its mass, and how the mass is distributed. Either the candidates are the
  // kept set and have their masses, or tile_kept_ is the kept mass of each tile.
  Threshold threshold_ = {};
  int64_t mass_ = 0;
  bool candidates_are_kept_ = false;
  int64_t* tile_kept_ = nullptr;
  // Whether the candidates are the first tokens of the order, up to first_end_.
  bool candidates_are_first_ = false;
  Threshold first_end_ = {};
};

template <typename F>
void RowSampler::over_tiles(const F& part) {
  constexpr int64_t kLeastTiles = 16;  // fewer are not worth another thread
  // More parts than threads, so that a thread that starts late still finds work.
  const int64_t wanted = threads_ > 1 ? 4 * threads_ : 1;
  const int64_t parts = std::min<int64_t>(wanted, std::max<int64_t>(1, tiles_ / kLeastTiles));
  struct Context {
    const F& part;
    int64_t tiles, parts;
  } context{part, tiles_, parts};
  ThreadPool::run(
      parts,
      threads_,
      [](void* opaque, int64_t i) {
        const Context& c = *static_cast<Context*>(opaque);
        c.part(c.tiles * i / c.parts, c.tiles * (i + 1) / c.parts);
      },
      &context
  );
}

Row RowSampler::make_row(int64_t number, int64_t index) {
  Row row = {};
  const int64_t element_size = args_.dtype == LLM_SAMPLING_FLOAT32 ? 4 : 2;
  row.logits = static_cast<const char*>(args_.logits) + number * args_.logits_stride * element_size;
  row.dtype = args_.dtype;
  row.vocab_size = args_.vocab_size;
  row.scale = depth_scale(params_.temperature);

  const Entries entries = bias_entries(args_, index);
  row.bias_count = entries.count;
  if (entries.count > 0) {
    row.bias_ids = args_.logit_bias_ids + entries.begin;
    row.bias_values = args_.logit_bias_values + entries.begin;
    if (!std::is_sorted(row.bias_ids, row.bias_ids + row.bias_count)) {
      Bias* biases = ws_.biases.at_least(row.bias_count);
      int32_t* ids = ws_.bias_ids.at_least(row.bias_count);
      float* values = ws_.bias_values.at_least(row.bias_count);
      // A sort must not compare ids that may change, so they are copied first.
      for (int64_t i = 0; i < row.bias_count; ++i)
        biases[i] = {row.bias_ids[i], row.bias_values[i]};
      std::stable_sort(biases, biases + row.bias_count, [](const Bias& a, const Bias& b) {
        return a.id < b.id;
      });
      for (int64_t i = 0; i < row.bias_count; ++i) {
        ids[i] = biases[i].id;
        values[i] = biases[i].value;
      }
      row.bias_ids = ids;
      row.bias_values = values;
    }
  }
  if (args_.allowed_mask != nullptr) {
    row.allowed =
        reinterpret_cast<const uint32_t*>(args_.allowed_mask + number * args_.allowed_mask_stride);
  }
  row.repetition_penalty = args_.repetition_penalty[index];
  row.frequency_penalty = args_.frequency_penalty[index];
  row.presence_penalty = args_.presence_penalty[index];
  const bool penalised = row.repetition_penalty != 1.0f || row.frequency_penalty != 0.0f ||
                         row.presence_penalty != 0.0f;
  if (args_.seen != nullptr && penalised) {
    const SlotHistory history = slot_history(args_, history_slot(args_, number));
    row.seen = reinterpret_cast<const uint32_t*>(history.seen);
    row.is_of_output =
        args_.repetition_penalty_scope != nullptr && args_.repetition_penalty_scope[index] != 0;
    if (row.frequency_penalty != 0.0f || row.presence_penalty != 0.0f || row.is_of_output) {
      row.counts = history.counts;
    }
    if (args_.extra_output != nullptr) {
      const int64_t words = (row.vocab_size + 31) / 32;
      uint32_t* seen = ws_.seen.at_least(words);
      std::copy_n(row.seen, words, seen);
      const int64_t ids = args_.num_extra_output;
      ws_.replaced.find(history, args_.extra_output + number * ids, ids, seen);
      row.seen = seen;
      row.replaced = &ws_.replaced;
    }
  }
  if (args_.dry_multiplier != nullptr) list_tokens(number, index, row);
  row.settle();
  return row;
}

// Makes the list of step 5a, and points the row at it.
void RowSampler::list_tokens(int64_t number, int64_t index, Row& row) {
  const SlotHistory history = slot_history(args_, history_slot(args_, number));
  const int64_t length = history.text != nullptr ? text_length(history) : 0;
  const int64_t extras = args_.extra_output != nullptr ? args_.num_extra_output : 0;
  const int32_t* extra = args_.extra_output + number * extras;
  const VocabSlice slice = vocab_slice(args_);
  const RowIds ids(history.text, length, extra, extras, slice);
  ws_.list.make(read_rules(args_, index), ids, read_once(*history.length), slice);
  row.listed_ids = ws_.list.ids();
  row.listed_amounts = ws_.list.amounts();
  row.listed_count = ws_.list.size();
}

// Finds the maxima of stripes, tiles and the row, and whether a logit is NaN.
void RowSampler::find_maxima(const Row& row) {
  stripe_max_ = ws_.stripe_max.at_least(tiles_ * kStripes);
  tile_max_ = ws_.tile_max.at_least(tiles_);
  std::atomic<bool> nan{false};
  over_tiles([&](int64_t begin, int64_t end) {
    const auto scan = row.allowed == nullptr ? scan_maxima : scan_masked_maxima;
    if (scan(row, begin, end, stripe_max_, tile_max_) && has_nan(row, begin, end)) {
      nan.store(true, std::memory_order_relaxed);
    }
  });
  if (nan.load(std::memory_order_relaxed)) status_ |= LLM_SAMPLING_STATUS_NAN;
  row_.m = find_max(tile_max_, tiles_) + 0.0f;  // -0.0 becomes +0.0
}

// Steps 3 to 13 if top-k is on and the penalties can only lower logits, as the list of step 5a always does. A
// token's logit before both is then an upper bound of its logit after them. So only the tokens whose logit was
// at or above some bound become candidates, and only they are penalised. If k of them are still at or above the
// bound, the first k of the order are among them. The cost does not grow with the history. Returns false, with
// nothing kept, if the conditions do not hold or too many tokens would have to be tried.
bool RowSampler::find_kept_penalising_late() {
  const int64_t k = params_.top_k;
  const bool lowers = row_.seen != nullptr && row_.repetition_penalty >= 1.0f &&
                      row_.frequency_penalty >= 0.0f && row_.presence_penalty >= 0.0f;
  if (k == 0 || !lowers) return false;

  Row unpenalised = row_;
  unpenalised.seen = nullptr;
  unpenalised.settle();
  find_maxima(unpenalised);  // with the list, under whose bans a NaN is not seen
  Row unlisted = unpenalised;
  unlisted.listed_count = 0;
  unlisted.settle();
  for (int64_t tried = k + k / 4 + 16; tried <= row_.vocab_size / 8; tried *= 4) {
    const float bound = bound_of_kth_logit(tried);
    gather(unlisted, bound);
    penalise_candidates(row_, candidates_.x, candidates_.id, candidates_.size);
    lower_candidates(row_, candidates_.x, candidates_.id, candidates_.size);
    drop_below(bound);
    if (candidates_.size < k && bound > kLowest) continue;
    if (candidates_.size == 0) return true;
    float least;
    find_min_max(candidates_.x, candidates_.size, least, row_.m);
    row_.m += 0.0f;  // -0.0 becomes +0.0
    if (row_.m == kInfinity) status_ |= LLM_SAMPLING_STATUS_POS_INF;
    keep_top_k();
    return true;
  }
  return false;
}

// Steps 7 to 13.
void RowSampler::find_kept() {
  if (row_.m == -kInfinity) return;
  if (row_.m == kInfinity) status_ |= LLM_SAMPLING_STATUS_POS_INF;

  if (params_.top_k == 1) return keep_best();
  if (params_.top_k > 0) {
    gather(row_, bound_of_kth_logit(params_.top_k));
    return keep_top_k();
  }
  const float lowest_kept = lowest_within_depth();
  if (params_.top_p < 1.0f) {
    keep_top_p(lowest_kept);
  } else if (lowest_kept > kLowest) {
    keep_from(lowest_kept);
  } else {
    keep_every_token();
  }
}

// Step 13 as a bound on logits: the lowest logit within the depth, or kLowest if no filter by depth is on.
float RowSampler::lowest_within_depth() const {
  if (!(params_.depth_cut < kInfinity)) return kLowest;
  uint32_t inside = order_key(row_.m);
  uint32_t outside = order_key(kLowest) - 1;
  while (inside - outside > 1) {
    const uint32_t middle = outside + (inside - outside) / 2;
    const float d = depth(from_order_key(middle), row_.m, row_.scale);
    (d <= params_.depth_cut ? inside : outside) = middle;
  }
  return from_order_key(inside);
}

int64_t RowSampler::total(const int64_t* tile_mass) const {
  int64_t sum = 0;
  for (int64_t tile = 0; tile < tiles_; ++tile) sum += tile_mass[tile];
  return sum;
}

// ---- Kept sets: which tokens are kept, by the filters that are on ----------------------------------

// What a row keeps without mass: it has no candidate, or a race has taken those that it had.
void RowSampler::keep_nothing() {
  status_ |= LLM_SAMPLING_STATUS_NO_CANDIDATE;
  threshold_ = {kInfinity, -1};
  mass_ = 0;
}

// Step 8, and top-k of 1: the smallest id among the largest logits.
void RowSampler::keep_best() {
  const int64_t tile = std::find(tile_max_, tile_max_ + tiles_, row_.m) - tile_max_;
  clear_candidates();
  const int64_t found = append_band(row_, tile, row_.m, row_.m, candidates_.x, candidates_.id, 0);
  candidates_.size = std::min<int64_t>(found, 1);
  keep_candidates();
}

// Steps 11 to 13 if top-k is on and the first k of the order are among the candidates.
void RowSampler::keep_top_k() {
  drop_after_first(params_.top_k);
  if (params_.is_greedy()) return keep_candidates();
  const int64_t target = params_.top_p < 1.0f ? top_p_target(weigh_candidates(), params_.top_p) : 0;
  filter_candidates(target, lowest_within_depth());
}

// The first `count` tokens of the order, whichever filters are on.
void RowSampler::keep_first_of_row(int64_t count) {
  gather(row_, bound_of_kth_logit(count));
  drop_after_first(count);
  keep_candidates();
}

// Step 14 without filters.
void RowSampler::keep_every_token() {
  tile_kept_ = ws_.tile_kept.at_least(tiles_);
  over_tiles([&](int64_t begin, int64_t end) {
    scan_mass(row_, begin, end, tile_max_, tile_kept_);
  });
  threshold_ = {kLowest, kEveryId};
  mass_ = total(tile_kept_);
}

// If more stripes than this reach a bound, a pass over the tiles costs less than a list of candidates.
constexpr int64_t kMostListed = 1024;

// Step 13 if it keeps fewer tokens than the other filters, or is the only one.
void RowSampler::keep_from(float lowest_kept) {
  const int64_t at_least = params_.min_tokens_to_keep;
  const int64_t stripes = count_stripes(stripe_max_, tile_max_, tiles_, lowest_kept);
  if (stripes <= kMostListed || at_least > stripes) {
    if (gather(row_, lowest_kept) >= at_least) return keep_candidates();
    return keep_first_of_row(at_least);
  }
  const Threshold threshold = {lowest_kept, kEveryId};
  threshold_ = threshold;
  tile_kept_ = ws_.tile_kept.at_least(tiles_);
  over_tiles([&](int64_t begin, int64_t end) {
    scan_kept_mass(row_, begin, end, threshold, tile_max_, tile_kept_);
  });
  mass_ = total(tile_kept_);
}

// The candidates are the kept set.
void RowSampler::keep_candidates() {
  candidates_are_kept_ = candidates_are_first_ = true;
  mass_ = weigh_candidates();
  if (mass_ > 0) threshold_ = first_end_ = last_candidate();
}

// ---- Kept sets: the nucleus of a row without top-k -------------------------------------------------

// Step 12, and step 13 after it.
void RowSampler::keep_top_p(float lowest_kept) {
  const float top_p = params_.top_p;
  if (tiles_ == 1) {
    gather(row_, kLowest);
    return filter_candidates(top_p_target(weigh_candidates(), top_p), lowest_kept);
  }

  const int64_t size = tiles_ * kStripes;
  const int64_t most_listed = std::min<int64_t>(kMostListed, size / 2);
  float* probe_depth = ws_.probe_depth.at_least(2 * size);
  float* probe_mass = ws_.probe_mass.at_least(2 * size);
  Probe probe = {{}, {probe_depth, probe_depth + size}, {probe_mass, probe_mass + size}, 0, 0, 0};
  take_probe(row_, stripe_max_, probe);
  Histogram& histogram = ws_.histogram;
  histogram.fill(probe, ws_.bins.at_least(size));
  if (probe.maxima < 0.5 * probe.total) {  // a flat row
    const double goal = static_cast<double>(top_p) * probe.total;
    return keep_flat_nucleus(histogram.logit_by_mass_above(row_, goal), lowest_kept);
  }
  // Few tokens have most of the mass, so the nucleus is probably short, and the mass outside of it is known
  // accurately.
  const double outside = (1.0 - static_cast<double>(top_p)) * probe.total;
  float bound = histogram.logit_by_mass_below(row_, 0.5 * outside);
  if (count_stripes(stripe_max_, tile_max_, tiles_, bound) > most_listed) {
    return keep_flat_nucleus(histogram.logit_by_mass_below(row_, outside), lowest_kept);
  }
  const int64_t target = top_p_target(mass_of_row(), top_p);
  const int64_t at_least = params_.min_tokens_to_keep;
  if (at_least > 1) bound = std::min(bound, bound_of_kth_logit(at_least));
  // If the estimate was too high, try the best 64 tokens, then more and more.
  for (int64_t tried = 64;; tried *= 8) {
    gather(row_, bound);
    if (weigh_candidates() >= target || bound == kLowest) {
      return filter_candidates(target, lowest_kept);
    }
    bound = std::min(bound, bound_of_kth_logit(tried));
  }
}

int64_t RowSampler::mass_of_row() {
  int64_t* tile_mass = ws_.tile_mass.at_least(tiles_);
  over_tiles([&](int64_t begin, int64_t end) {
    scan_mass(row_, begin, end, tile_max_, tile_mass);
  });
  return total(tile_mass);
}

// Steps 12 and 13 if the nucleus is large. One pass takes the row's mass and the mass at or above `guess`, an
// estimate of the threshold.
void RowSampler::keep_flat_nucleus(float guess, float lowest_kept) {
  int64_t* tile_mass = ws_.tile_mass.at_least(tiles_);
  tile_kept_ = ws_.tile_kept.at_least(tiles_);
  over_tiles([&](int64_t begin, int64_t end) {
    scan_split_mass(row_, begin, end, guess, tile_max_, tile_mass, tile_kept_);
  });
  const int64_t target = top_p_target(total(tile_mass), params_.top_p);
  const int64_t above = total(tile_kept_);

  // The candidates are the tokens between the guess and a second estimate on the threshold's other side. The
  // histogram gives it, from the mass by which the guess is wrong and a margin that grows until it suffices.
  const bool is_lower = above < target;  // the threshold is below the guess
  const double wrong_by = std::abs(static_cast<double>(target) - static_cast<double>(above));
  const double of_a_token = static_cast<double>(mass(depth(guess, row_.m, row_.scale)));
  const double estimated = ws_.histogram.mass_above(row_, guess);
  int64_t goal = 0;  // the mass that the kept candidates must reach
  for (double margin = 0.25;; margin *= 4) {
    if (margin > 10) {  // the probe was misleading: every token becomes a candidate
      gather(row_, kLowest);
      return filter_candidates(target, lowest_kept);
    }
    const double step = (1 + margin) * wrong_by + 32 * margin * of_a_token;
    const float far =
        ws_.histogram.logit_by_mass_above(row_, is_lower ? estimated + step : estimated - step);
    const float below_guess = std::max(kLowest, std::nextafter(guess, -kInfinity));
    const float from = is_lower ? std::min(far, below_guess) : guess;
    const float to = is_lower ? below_guess : std::max(far, guess);
    gather(row_, from, to);
    const int64_t between = weigh_candidates();
    goal = is_lower ? target - above : target - (above - between);
    if (goal >= 1 && goal <= between) break;
  }

  CandidateThreshold threshold = threshold_of_mass(goal);
  threshold_ = {from_order_key(threshold.key), -1};
  for (int64_t i = 0; i < candidates_.size; ++i) {
    const bool kept = threshold.keeps(candidates_.x[i]);
    // tile_kept_ is the mass at or above the guess. Below it, add the candidates that are kept; above it,
    // subtract those that are not.
    tile_kept_[candidates_.id[i] / kTile] +=
        (is_lower ? candidates_.w[i] : -candidates_.w[i]) * (kept == is_lower);
    if (kept & (candidates_.x[i] == threshold_.value)) threshold_.last_id = candidates_.id[i];
  }
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    // After a race more may have been subtracted than there was.
    tile_kept_[tile] = std::max<int64_t>(tile_kept_[tile], 0);
  }
  mass_ = total(tile_kept_);

  // A token's mass is at most 2^42, so the kept set has at least target / 2^42 tokens. Mostly that is enough,
  // and they need not be counted.
  const int64_t at_least = params_.min_tokens_to_keep;
  if (at_least > target >> 42 && count_until(threshold_) < at_least)
    return keep_first_of_row(at_least);
  if (lowest_kept > threshold_.value) keep_from(lowest_kept);
}

// How many tokens of the row come up to a threshold in the order.
int64_t RowSampler::count_until(Threshold threshold) {
  std::atomic<int64_t> sum{0};
  over_tiles([&](int64_t begin, int64_t end) {
    sum.fetch_add(
        scan_kept_count(row_, begin, end, threshold, tile_max_),
        std::memory_order_relaxed
    );
  });
  return sum.load(std::memory_order_relaxed);
}

// ---- Candidates ------------------------------------------------------------------------------------

// A lower bound of the row's k-th largest logit, from the maxima: about the k-th largest stripe maximum.
float RowSampler::bound_of_kth_logit(int64_t k) {
  if (k > tiles_ * kStripes) return kLowest;
  const int64_t slack = 4 + k / 4;  // this many tokens too many cost less than an exact bound
  float bound = kLowest;
  if (k <= tiles_) {
    // The k-th largest tile maximum is a lower bound too, and leaves fewer tiles to look at.
    bound = std::max(bound, bound_kth_largest(tile_max_, tiles_, k, slack).value());
    if (count_stripes(stripe_max_, tile_max_, tiles_, bound) <= k + slack) return bound;
  }
  float* maxima = ws_.maxima.at_least(tiles_ * kStripes);
  int64_t size = 0;
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    if (!(tile_max_[tile] >= bound)) continue;
    std::copy_n(stripe_max_ + tile * kStripes, kStripes, maxima + size);
    size += kStripes;
  }
  return size < k ? bound : std::max(bound, bound_kth_largest(maxima, size, k, slack).value());
}

// No candidates, with room for all tokens of the row.
void RowSampler::clear_candidates() {
  candidates_.x = ws_.candidate_x.at_least(row_.vocab_size);
  candidates_.id = ws_.candidate_id.at_least(row_.vocab_size);
  candidates_.w = nullptr;
  candidates_.size = 0;
  candidates_are_first_ = false;
}

// Lists the tokens with from <= logit <= to as the candidates, and returns how many there are.
int64_t RowSampler::gather(const Row& row, float from, float to) {
  clear_candidates();
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    if (!(tile_max_[tile] >= from)) continue;
    candidates_.size =
        append_band(row, tile, from, to, candidates_.x, candidates_.id, candidates_.size);
  }
  return candidates_.size;
}

// The last candidate of the order. There must be one.
Threshold RowSampler::last_candidate() const {
  Threshold last;
  float most;
  find_min_max(candidates_.x, candidates_.size, last.value, most);
  int64_t i = candidates_.size - 1;
  while (candidates_.x[i] > last.value) --i;
  last.last_id = candidates_.id[i];
  return last;
}

// Drops the candidates below a bound. Masses have to be computed again.
void RowSampler::drop_below(float bound) {
  int64_t size = 0;
  for (int64_t i = 0; i < candidates_.size; ++i) {
    const bool kept = candidates_.x[i] >= bound;
    candidates_.x[size] = candidates_.x[i];
    candidates_.id[size] = candidates_.id[i];
    size += kept;
  }
  candidates_.size = size;
  candidates_.w = nullptr;
}

// Drops the candidates that come after a threshold in the order.
void RowSampler::drop_after(CandidateThreshold threshold) {
  int64_t size = 0;
  for (int64_t i = 0; i < candidates_.size; ++i) {
    const bool kept = threshold.keeps(candidates_.x[i]);
    candidates_.x[size] = candidates_.x[i];
    candidates_.id[size] = candidates_.id[i];
    if (candidates_.w != nullptr) candidates_.w[size] = candidates_.w[i];
    size += kept;
  }
  candidates_.size = size;
}

// Drops all candidates but the first `count` of the order.
void RowSampler::drop_after_first(int64_t count) {
  if (candidates_.size <= count) return;
  const RankBound last = bound_kth_largest(candidates_.x, candidates_.size, count, 0);
  if (last.count == count) return drop_below(last.value());
  const int64_t above =
      count_at_least(candidates_.x, candidates_.size, from_order_key(last.key + 1));
  drop_after({last.key, count - above});
}

// Computes the candidates' masses unless they are known, and returns their sum.
int64_t RowSampler::weigh_candidates() {
  if (candidates_.w == nullptr) {
    candidates_.w = ws_.candidate_w.at_least(candidates_.size);
    candidate_masses(row_, candidates_.x, candidates_.size, candidates_.w);
  }
  int64_t sum = 0;
  for (int64_t i = 0; i < candidates_.size; ++i) sum += candidates_.w[i];
  return sum;
}

// The threshold of the shortest prefix of the candidates' order whose mass is at least the target, or that has
// all their mass if there is less. Without mass nothing is kept.
CandidateThreshold RowSampler::threshold_of_mass(int64_t target) {
  target = std::min(target, weigh_candidates());
  if (target < 1) return {UINT32_MAX, 0};
  uint32_t* keys = ws_.keys.at_least(candidates_.size);
  int64_t* weights = ws_.weights.at_least(candidates_.size);
  for (int64_t i = 0; i < candidates_.size; ++i) keys[i] = order_key(candidates_.x[i]);
  std::copy(candidates_.w, candidates_.w + candidates_.size, weights);
  const MassReached reached = select_by_mass(keys, weights, candidates_.size, target);
  const float value = from_order_key(reached.key);
  const int64_t each = static_cast<int64_t>(mass(depth(value, row_.m, row_.scale)));
  return {reached.key, (reached.missing + each - 1) / each};
}

// Steps 12 (if target > 0) and 13 (if lowest_kept > kLowest) on the candidates, which are a prefix of the
// order. Their mass must reach the target and their number min_tokens_to_keep, unless they are all tokens.
void RowSampler::filter_candidates(int64_t target, float lowest_kept) {
  const int64_t at_least = params_.min_tokens_to_keep;
  if (target > 0) {
    const CandidateThreshold threshold = threshold_of_mass(target);
    int64_t kept = threshold.ties;
    for (int64_t i = 0; i < candidates_.size; ++i) {
      kept += order_key(candidates_.x[i]) > threshold.key;
    }
    if (kept >= at_least) {
      drop_after(threshold);
    } else {
      drop_after_first(at_least);
    }
  }
  if (lowest_kept > kLowest) {
    int64_t kept = 0;
    for (int64_t i = 0; i < candidates_.size; ++i) kept += candidates_.x[i] >= lowest_kept;
    if (kept >= at_least) {
      drop_after({order_key(lowest_kept), kept});
    } else {
      drop_after_first(at_least);
    }
  }
  keep_candidates();
}

// ---- Step 14 and the results -----------------------------------------------------------------------

void RowSampler::write_filtered_logits() {
  const float divisor = params_.is_greedy() ? 1.0f : params_.temperature;
  over_tiles([&](int64_t begin, int64_t end) {
    write_filtered(row_, begin, end, threshold_, divisor, results_.filtered);
  });
}

void RowSampler::draw_nothing() {
  status_ |= LLM_SAMPLING_STATUS_NO_CANDIDATE;
  results_.write_nothing();
}

void RowSampler::draw() {
  if ((status_ & LLM_SAMPLING_STATUS_NO_CANDIDATE) != 0) return draw_nothing();
  // A part is a candidate or a tile; its running mass is the mass of all parts up to it.
  const int64_t parts = candidates_are_kept_ ? candidates_.size : tiles_;
  const int64_t* part_mass = candidates_are_kept_ ? candidates_.w : tile_kept_;
  int64_t* running_mass = ws_.weights.at_least(parts);
  int64_t sum = 0;
  for (int64_t i = 0; i < parts; ++i) running_mass[i] = sum += part_mass[i];

  for (int32_t sample = 0; sample < args_.num_samples; ++sample) {
    const uint64_t random =
        random_bits(params_.seed, params_.position, static_cast<uint32_t>(sample));
    int64_t r = scaled_random(random, mass_);
    const int64_t part = std::upper_bound(running_mass, running_mass + parts, r) - running_mass;
    int64_t token;
    int64_t w = part_mass[part];
    if (candidates_are_kept_) {
      token = candidates_.id[part];
    } else {
      alignas(64) float tile_w[kTile + 1];
      tile_kept_masses(row_, part, threshold_, tile_w);
      tile_w[kTile] = 0x1p62f;  // ends the loop if the tile has less mass than before
      r -= running_mass[part] - w;
      int j = 0;
      while (r >= (w = static_cast<int64_t>(tile_w[j]))) r -= w, ++j;
      if (j == kTile) return draw_nothing();
      token = part * kTile + j;
    }
    results_.tokens[sample] = token;
    if (results_.kept.masses != nullptr) results_.kept.masses[sample] = w;
    if (results_.processed.logprobs != nullptr) {
      const double share = std::log(static_cast<double>(w)) - std::log(static_cast<double>(mass_));
      results_.processed.logprobs[sample] = static_cast<float>(share);
    }
  }
}

// ---- Lists, ranks, and the kept set ----------------------------------------------------------------

// They are those of the tokens of row_ that threshold_ keeps. The candidates are looked at first: where they
// are the first tokens of the order, they mostly are all that is asked for.

// Returns whether a token has a rank, and if so sets x to its logit.
bool RowSampler::find_listed(int64_t id, float& x) {
  if (id < 0 || id >= row_.vocab_size) return false;
  if (candidates_are_first_) {
    uint32_t* end = candidates_.id + candidates_.size;
    const uint32_t* place = std::lower_bound(candidates_.id, end, static_cast<uint32_t>(id));
    if (place != end && *place == id) {
      x = candidates_.x[place - candidates_.id] + 0.0f;
      return threshold_.keeps(x, id);
    }
    if (candidates_are_kept_) return false;
  }
  alignas(64) float buffer[kTile];
  x = read_once(load_tile(row_, id / kTile, buffer)[id % kTile]) + 0.0f;
  return threshold_.keeps(x, id);
}

int32_t RowSampler::rank(Ranked token) {
  if (!(candidates_are_first_ && first_end_.keeps(token.x, token.id))) {
    return static_cast<int32_t>(count_until({token.x, token.id}));
  }
  int32_t rank = 1;
  for (int64_t i = 0; i < candidates_.size; ++i) {
    const float x = candidates_.x[i];
    rank += (x > token.x) | ((x == token.x) & (candidates_.id[i] < token.id));
  }
  return rank;
}

// Leaves the first tokens of the order, `count` or all there are, in ws_.codes: their order keys, then their
// ids with all bits inverted, so that larger codes come first. Returns how many they are.
int64_t RowSampler::list_first(int64_t count) {
  if (count == 0) return 0;
  if (!candidates_are_first_ || (candidates_.size < count && !candidates_are_kept_)) {
    gather(row_, std::max(bound_of_kth_logit(count), threshold_.value));
    if (candidates_.size == 0) return 0;  // another thread has changed the row
    drop_after_first(count);
    candidates_are_first_ = true;
    first_end_ = last_candidate();
  }
  uint64_t* codes = ws_.codes.at_least(candidates_.size);
  int64_t size = 0;
  for (int64_t i = 0; i < candidates_.size; ++i) {
    const uint32_t id = candidates_.id[i];
    codes[size] = uint64_t{order_key(candidates_.x[i])} << 32 | ~id;
    size += threshold_.keeps(candidates_.x[i], id);
  }
  count = std::min(count, size);
  const auto comes_first = std::greater<uint64_t>();
  if (4 * count < size) {
    std::partial_sort(codes, codes + count, codes + size, comes_first);
  } else {
    std::sort(codes, codes + size, comes_first);
  }
  return count;
}

// Writes the first tokens of the order, the ranks of the tokens, and what there is of the ids that the caller
// has named. logprob(x) is the logprob of a logit.
template <typename F>
void RowSampler::write_lists(const LlmSamplingLogprobs& out, const F& logprob) {
  const int64_t top = out.top_ids != nullptr ? results_.top : 0;
  const int64_t listed = list_first(top);
  for (int64_t i = 0; i < top; ++i) {
    const uint64_t code = i < listed ? ws_.codes.at_least(0)[i] : 0;
    const float x = from_order_key(static_cast<uint32_t>(code >> 32));
    out.top_ids[i] = i < listed ? static_cast<int32_t>(~static_cast<uint32_t>(code)) : -1;
    out.top_logprobs[i] = i < listed ? logprob(x) : kNan;
  }
  for (int64_t i = 0; out.ranks != nullptr && i < results_.draws; ++i) {
    const int64_t token = read_once(results_.tokens[i]);  // another thread may overwrite it
    float x;
    out.ranks[i] = find_listed(token, x) ? rank({x, token}) : -1;
  }
  const bool has_ids = out.id_logprobs != nullptr || out.id_ranks != nullptr;
  for (int64_t i = 0; has_ids && i < results_.ids; ++i) {
    const int64_t id = read_once(results_.token_ids[i]);
    const bool is_padding = id < 0 || id >= row_.vocab_size;
    float x;
    const bool is_listed = find_listed(id, x);
    if (out.id_logprobs != nullptr) {
      out.id_logprobs[i] = is_listed ? logprob(x) : is_padding ? kNan : -kInfinity;
    }
    if (out.id_ranks != nullptr) out.id_ranks[i] = is_listed ? rank({x, id}) : -1;
  }
}

void RowSampler::write_processed() {
  const double log_mass = std::log(static_cast<double>(mass_));
  write_lists(results_.processed, [&](float x) {
    const double w = static_cast<double>(mass(depth(x, row_.m, row_.scale)));
    return static_cast<float>(std::log(w) - log_mass);
  });
}

// Lists are those of step 1's logits, and logprobs those of their masses at temperature 1.
void RowSampler::write_raw() {
  Row& row = row_;
  candidates_are_kept_ = false;
  threshold_ = {kLowest, kEveryId};
  if (!row.is_raw()) {
    candidates_are_first_ = false;
    row.bias_count = 0;
    row.allowed = row.seen = nullptr;
    row.listed_count = 0;
    row.settle();
    over_tiles([&](int64_t begin, int64_t end) {
      scan_maxima(row, begin, end, stripe_max_, tile_max_);
    });
    row.m = find_max(tile_max_, tiles_) + 0.0f;
  }
  row.scale = depth_scale(1.0f);
  const double log_mass = std::log(static_cast<double>(mass_of_row())) - 42.0 * std::log(2.0);
  const auto logprob = [&](float x) {
    const double below = x == row.m ? 0.0 : static_cast<double>(x) - static_cast<double>(row.m);
    return static_cast<float>(below - log_mass);
  };
  const LlmSamplingLogprobs& out = results_.raw;
  for (int64_t i = 0; out.logprobs != nullptr && i < results_.draws; ++i) {
    float x;
    const bool is_listed = find_listed(read_once(results_.tokens[i]), x);
    out.logprobs[i] = is_listed ? logprob(x) : -kInfinity;
  }
  write_lists(out, logprob);
}

void RowSampler::write_kept_set() {
  const LlmSamplingKept& out = results_.kept;
  if (out.total != nullptr) *out.total = mass_;
  for (int64_t i = 0; out.id_masses != nullptr && i < results_.ids; ++i) {
    float x;
    const bool is_kept = find_listed(read_once(results_.token_ids[i]), x);
    out.id_masses[i] = is_kept ? static_cast<int64_t>(mass(depth(x, row_.m, row_.scale))) : 0;
  }
  if (out.mask != nullptr) write_kept_mask();
  if (out.counts != nullptr || out.ids != nullptr) {
    const int64_t count = candidates_are_kept_ ? candidates_.size : count_until(threshold_);
    if (out.counts != nullptr) *out.counts = static_cast<int32_t>(count);
    const int64_t listed = out.ids != nullptr && count <= out.max_ids ? list_first(count) : 0;
    for (int64_t i = 0; out.ids != nullptr && i < out.max_ids; ++i) {
      const uint64_t code = i < listed ? ws_.codes.at_least(0)[i] : 0;
      out.ids[i] = i < listed ? static_cast<int32_t>(~static_cast<uint32_t>(code)) : -1;
    }
  }
  if (has_ends(out)) write_kept_ends();
}

void RowSampler::write_kept_mask() {
  auto* mask = reinterpret_cast<uint32_t*>(results_.kept.mask);
  if (!candidates_are_kept_) {
    return over_tiles([&](int64_t begin, int64_t end) {
      scan_kept_bits(row_, begin, end, threshold_, tile_max_, mask);
    });
  }
  std::fill_n(mask, results_.words, 0);
  for (int64_t i = 0; i < candidates_.size; ++i) {
    mask[candidates_.id[i] >> 5] |= uint32_t{1} << (candidates_.id[i] & 31);
  }
}

// The first and the last token that is kept.
void RowSampler::write_kept_ends() {
  const LlmSamplingKept& out = results_.kept;
  Threshold last = threshold_;
  if (last.last_id == kEveryId) last = find_last(row_, threshold_.value, tile_max_, tiles_);
  if (out.last_id != nullptr) *out.last_id = static_cast<int32_t>(last.last_id);
  if (out.last_logit != nullptr) *out.last_logit = last.value + 0.0f;
  if (!candidates_are_kept_) gather(row_, row_.m);
  const int64_t size = candidates_.size;
  const int64_t first = std::find(candidates_.x, candidates_.x + size, row_.m) - candidates_.x;
  const bool is_found = first < size;  // unless another thread has changed the row
  if (out.first_id != nullptr) {
    *out.first_id = is_found ? static_cast<int32_t>(candidates_.id[first]) : -1;
  }
  if (out.first_logit != nullptr) *out.first_logit = row_.m;
}

// ---- The batch -----------------------------------------------------------------------------------

// How many rows of a call name each slot: none, one, or more. It is counted where rows with the parameters of
// slots are to be advanced.
class Uses {
 public:
  // Returns false if there is no memory.
  bool count(const LlmSamplingArgs& args) {
    if (args.param_slots == nullptr || args.advance == LLM_SAMPLING_ADVANCE_NEVER) return true;
    if (!count(args.param_slots, args.rows, args.num_param_slots, of_parameters_)) return false;
    return args.seen == nullptr || args.slots == args.param_slots ||
           count(args.slots, args.rows, args.num_slots, of_history_);
  }

  // Whether no other row names a slot of this row; `index` is that of its parameters.
  bool is_alone(const LlmSamplingArgs& args, int64_t row, int64_t index) const {
    if (of_parameters_ == nullptr) return true;
    if (of_parameters_[static_cast<size_t>(index)] != 1) return false;
    return of_history_ == nullptr || of_history_[static_cast<size_t>(history_slot(args, row))] == 1;
  }

 private:
  using Counts = std::unique_ptr<uint8_t[]>;  // at most 2 each

  static bool count(const int32_t* slots, int64_t rows, int64_t size, Counts& counts) {
    counts.reset(new (std::nothrow) uint8_t[static_cast<size_t>(size)]());
    if (counts == nullptr) return false;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t slot = read_once(slots[row]);
      if (slot < 0 || slot >= size) continue;
      uint8_t& of_slot = counts[static_cast<size_t>(slot)];
      of_slot = static_cast<uint8_t>(of_slot + (of_slot < 2));
    }
    return true;
  }

  Counts of_parameters_, of_history_;
};

// Adds every row's token to its history and 1 to its position. Rows that share a slot are left out.
void advance(const LlmSamplingArgs& args, const Uses& uses) {
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t token = read_once(args.tokens[row * args.num_samples]);
    if (token < 0 || token >= args.vocab_size || !is_recorded(args, row)) continue;
    const int64_t index = parameter_index(args, row);
    if (index < 0 || !uses.is_alone(args, row, index)) continue;
    if (args.position_of != LLM_SAMPLING_POSITION_OF_TEXT) {
      add_to(*position_place(args, row, index), 1);
    }
    if (args.seen == nullptr) continue;
    record(slot_history(args, history_slot(args, row)), static_cast<int32_t>(token));
  }
}

// Writes the results of a row that draws nothing.
void write_nothing(const LlmSamplingArgs& args, int64_t row, int32_t status) {
  const RowResults results = find_results(args, row);
  if (results.filtered != nullptr) std::fill_n(results.filtered, args.vocab_size, -kInfinity);
  if (results.tokens == nullptr) return;
  results.write_nothing();
  *results.status = status;
}

// The rows of a batch, as tasks for threads.
struct Batch {
  const LlmSamplingArgs& args;
  int threads_per_row;
  std::atomic<bool> out_of_memory{false};

  void run_row(int64_t row) noexcept {
    const int64_t index = parameter_index(args, row);
    if (index < 0) return write_nothing(args, row, status_of_nothing(index));
    if (is_text_full(args, row)) return write_nothing(args, row, LLM_SAMPLING_STATUS_TEXT_FULL);
    static thread_local Workspace workspace;
    try {
      RowSampler(args, row, index, workspace, threads_per_row).run();
    } catch (const std::bad_alloc&) {
      out_of_memory.store(true, std::memory_order_relaxed);
    }
  }
};

int32_t run(const LlmSamplingArgs& args) {
  int32_t code = check_struct(args);
  if (code != LLM_SAMPLING_OK || args.rows == 0) return code;
  code = check_values(args);
  if (code != LLM_SAMPLING_OK) return code;
  Uses uses;
  if (!uses.count(args)) return LLM_SAMPLING_OUT_OF_MEMORY;
  const DefaultFloats floats;
  constexpr int64_t kLeastTokens = 32768;  // fewer are not worth a second thread, in torch neither
  // More threads are of no use, and OpenMP ends the process if it cannot start them.
  static const int most_threads =
      4 * std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const bool is_small = args.rows < kLeastTokens && args.rows * args.vocab_size < kLeastTokens;
  const int threads = is_small ? 1 : std::min(args.num_threads, most_threads);
  const bool split_rows = args.rows < threads;
  Batch batch{args, split_rows ? threads : 1};
  if (split_rows) {
    for (int64_t row = 0; row < args.rows; ++row) batch.run_row(row);
  } else {
    ThreadPool::run(
        args.rows,
        threads,
        [](void* context, int64_t row) { static_cast<Batch*>(context)->run_row(row); },
        &batch
    );
  }
  if (batch.out_of_memory.load()) return LLM_SAMPLING_OUT_OF_MEMORY;
  const auto is_valid = [](int32_t status) { return status == 0; };
  if (args.advance == LLM_SAMPLING_ADVANCE_ALWAYS ||
      (args.advance == LLM_SAMPLING_ADVANCE_IF_ALL_VALID &&
       std::all_of(args.status, args.status + args.rows, is_valid))) {
    advance(args, uses);
  }
  return LLM_SAMPLING_OK;
}

}  // namespace
}  // namespace llm_sampling

extern "C" {

__attribute__((visibility("default"))) int32_t llm_sampling_cpu(const LlmSamplingArgs* args) {
  LlmSamplingArgs own = {};
  const int32_t code = llm_sampling::read_struct(args, own);
  return code != LLM_SAMPLING_OK ? code : llm_sampling::run(own);
}

__attribute__((visibility("default"))) int32_t
llm_sampling_cpu_update(const LlmSamplingUpdate* update) {
  LlmSamplingUpdate own = {};
  int32_t code = llm_sampling::read_struct(update, own);
  if (code == LLM_SAMPLING_OK) code = llm_sampling::check_update(own);
  if (code == LLM_SAMPLING_OK) {
    code = llm_sampling::check_named_once(own.slots, own.rows, own.num_slots);
  }
  if (code == LLM_SAMPLING_OK) llm_sampling::update(own);
  return code;
}

__attribute__((visibility("default"))) void llm_sampling_cpu_forked(void) {
  llm_sampling::ThreadPool::forked();
}

__attribute__((visibility("default"))) uint32_t llm_sampling_abi_version(void) {
  return LLM_SAMPLING_ABI_VERSION;
}

__attribute__((visibility("default"))) uint32_t llm_sampling_args_size(void) {
  return sizeof(LlmSamplingArgs);
}

__attribute__((visibility("default"))) uint32_t llm_sampling_update_size(void) {
  return sizeof(LlmSamplingUpdate);
}

__attribute__((visibility("default"))) const char* llm_sampling_error(int32_t code) {
  return llm_sampling::error_text(code);
}

}  // extern "C"
