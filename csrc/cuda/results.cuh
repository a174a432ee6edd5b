// The results beside tokens, status and the tokens' logprobs: the first tokens of the order and their logprobs,
// ranks, what there is of the ids that the caller has named, and the kept set. Calls that ask for any of them have
// kernels of their own, see has_more().
//
// A list has the codes of an order: of the kept set, and then, for raw logprobs, of step 1's logits. Both are all
// codes of a row that are at least threshold_; for the second list the row's logits are made those of step 1.
//
// The first tokens of the order are the candidates, if these hold so many. Otherwise a range is guessed from the
// threads' maxima; where that has too few tokens or too many, ranges are found by histograms, each below the one
// before.
// A token's rank is counted among the candidates if they hold all tokens before it, and otherwise by a pass over
// the row.
#ifndef LLM_SAMPLING_CUDA_RESULTS_CUH_
#define LLM_SAMPLING_CUDA_RESULTS_CUH_

#include <math.h>
#include <stdint.h>

#include "candidates.cuh"
#include "draw.cuh"
#include "passes.cuh"
#include "row_sampler.cuh"
#include "select.cuh"

namespace llm_sampling {

// In place of the code of an id: it is no token, or the order does not have it. No code is that low.
constexpr uint64_t kPaddingCode = kNoCode;
constexpr uint64_t kUnlistedCode = 1;

// Remembers the mass of the kept set, which draw() may take out of the candidates, and other numbers for which there
// are no registers.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::keep_mass() {
  const bool is_listed = kIsSplit || in_candidates_;
  const int64_t mass = is_greedy() ? kLargestMass : is_listed ? mass_from(threshold_) : total_mass_;
  if (threadIdx.x != 0) return;
  shared_.order.kept_mass = mass;
  shared_.order.raw_m = raw_m_;
  shared_.order.raw_log_sum = raw_log_sum_;
  shared_.order.number = 0;
}

// Writes the results of a row whose tokens have been drawn. All threads of the cluster are here.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::write_more() {
  if (!has_all_tokens()) return write_no_more(shared_.parameters.row);
  if (is_greedy()) hold_first();
  if (args_.kept.mask != nullptr) write_mask();
  if (wants_processed(args_)) {
    write_first<false>();
    write_ids<false>();
  }
  // The code for both lists is there twice: in a loop over them, much would be worked out before it, and there are
  // no registers to keep that in.
  if constexpr (!kIsSplit) {
    if (wants_raw(args_)) {
      list_raw();
      write_first<true>();
      write_ids<true>();
    }
  }
  cluster_.sync();  // other blocks may still read this one's copy, and the history
}

// Whether all draws have a token. All blocks agree on it.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ bool RowSampler<kDtype, kLayout, kMore>::has_all_tokens() {
  cluster_.sync();
  const int64_t* tokens = args_.tokens + shared_.parameters.row * args_.num_samples;
  uint64_t lacks[1] = {0};
  for (int i = static_cast<int>(threadIdx.x); i < args_.num_samples; i += kThreads) {
    lacks[0] |= read_once(tokens[i]) < 0 ? 1 : 0;
  }
  cluster_.combine(lacks, Larger());
  return lacks[0] == 0;
}

// Makes the token of a greedy row the only candidate. It has all of the mass.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::hold_first() {
  if (threadIdx.x == 0) {
    shared_.sorted[0] = threshold_;
    shared_.candidates = {threshold_, 1, 0, 0, false};
  }
  in_candidates_ = true;
  __syncthreads();
}

// Makes the row's logits those of step 1, and the order that of all of them. A copy is made anew, because it has
// -inf in place of marked tokens' logits.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::list_raw() {
  threshold_ = kLowestCode;
  in_candidates_ = false;
  if (row_.is_plain) return;  // they are, and the candidates are those of this order too
  cluster_.sync();            // no block reads this one's copy any more
  row_.is_plain = true;
  row_.bias_count = 0;
  row_.allowed = row_.seen = {nullptr};
  row_.has_list = false;
  is_scored_ = false;
#pragma unroll
  for (int half = 0; half < kMaxima; ++half) largest_[half] = -kInfinity;
  if (threadIdx.x == 0) shared_.candidates.count = 0;
  if (kCopied) {
    copy_logits<1>(vecs());
    wait_for_copies();
  }
  __syncthreads();
  find_maxima<true>();
}

// ---- the first tokens of the order, and the size of the kept set ----

// The logprob of a token with this logit.
template <int kDtype, Layout kLayout, bool kMore>
template <bool kRaw>
__device__ __forceinline__ float RowSampler<kDtype, kLayout, kMore>::logprob_of(float x) const {
  const Order& order = shared_.order;
  if (kRaw) return (x == order.raw_m ? 0.0f : x - order.raw_m) - order.raw_log_sum;
  return logf(static_cast<float>(mass_of(x)) / static_cast<float>(order.kept_mass));
}

// Counts the codes of the order, and finds the last of them if `has_last`.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::survey(bool has_last) {
  uint64_t count[1] = {0};
  uint64_t lowest[1] = {0};  // all of its bits inverted
  if (kIsSplit || in_candidates_) {
    count[0] = static_cast<uint64_t>(count_from(threshold_));
    if (count[0] > 0) lowest[0] = ~shared_.sorted[count[0] - 1];
  } else {
    const Threshold threshold(threshold_);
    over_tiles(static_cast<uint32_t>(threshold_ >> 20), [&](int, int vec, const float (&x)[kVec]) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const int id = row_.first_id(vec) + i;
        if (!threshold.is_reached(x[i], id)) continue;
        ++count[0];
        const uint64_t inverted = ~code_of(x[i], id);
        lowest[0] = has_last && inverted > lowest[0] ? inverted : lowest[0];
      }
    });
    cluster_.combine(count, Add());
    if (has_last) cluster_.combine(lowest, Larger());
  }
  if (threadIdx.x == 0) {
    shared_.order.number = static_cast<int>(count[0]);
    shared_.order.last = ~lowest[0];
  }
  __syncthreads();
}

// Writes the first tokens of the order and their logprobs; of the kept set, also its ids, its ends, its count and
// its mass.
template <int kDtype, Layout kLayout, bool kMore>
template <bool kRaw>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::write_first() {
  enum {
    kPresent,
    kGuess,
    kRanges
  };  // the candidates as they are, those of a guess, those of ranges
  const LlmSamplingLogprobs& out = kRaw ? args_.raw : args_.processed;
  const LlmSamplingKept& kept = args_.kept;
  const int own = cluster_.rank() * kThreads + static_cast<int>(threadIdx.x);
  const int threads = cluster_.blocks() * kThreads;
  const int top = out.top_ids != nullptr ? args_.num_top_logprobs : 0;
  const int most = !kRaw && kept.ids != nullptr ? static_cast<int>(kept.max_ids) : 0;
  const bool has_first = !kRaw && (kept.first_id != nullptr || kept.first_logit != nullptr);
  const bool has_last = !kRaw && (kept.last_id != nullptr || kept.last_logit != nullptr);
  if (!kRaw && (has_last || kept.ids != nullptr || kept.counts != nullptr)) survey(has_last);
  const int number = kRaw ? 0 : shared_.order.number;
  const int kept_ids = number <= most ? number : 0;  // how many are listed
  int wanted = top > kept_ids ? top : kept_ids;      // tokens
  if (has_first && wanted == 0) wanted = 1;
  int listed = 0;
  uint64_t high = first_code(order_key(m_) + 1);  // what is listed is from here on
#pragma unroll 1
  for (int step = kPresent; listed < wanted && high > threshold_; ++step) {
    if constexpr (!kIsSplit) {
      Range range = {kNoCode, high, listed, 0};
      if (step == kGuess) {
        Filters filters = this->filters();
        filters.max_kept = wanted;
        filters.has_top_k = true;
        if (!guess_range(filters, 0, range)) continue;
      } else if (step >= kRanges) {
        const int left = wanted - listed;
        if (threadIdx.x == 0) shared_.appended = 0;
        const auto over_row = [&](uint64_t low, const auto& visit) { over_codes(low, visit); };
        range.low = narrow(
            threshold_,
            high,
            left < kMaxCandidates ? left : kMaxCandidates,
            kMaxCandidates,
            over_row
        );
      }
      if (step != kPresent) collect(range);
      high = range.low;
    }
    const Candidates& candidates = shared_.candidates;
    const bool follows = candidates.count > 0 && candidates.count_above == listed;
    if (step < kRanges) {  // these list everything or nothing
      const bool is_all = candidates.is_last || candidates.low <= threshold_;
      if (!follows || !(is_all || candidates.count >= wanted)) {
        high = first_code(order_key(m_) + 1);
        if (kIsSplit) break;
        continue;
      }
    }
    const int found = follows ? count_from(threshold_) : 0;
    if (found == 0) break;  // somebody has overwritten the row
    const int64_t row = shared_.parameters.row;
#pragma unroll 1
    for (int i = own; i < found && listed + i < wanted; i += threads) {
      const uint64_t code = shared_.sorted[i];
      const int place = listed + i;
      if (place < top) {
        out.top_ids[row * top + place] = id_of(code);
        out.top_logprobs[row * top + place] = logprob_of<kRaw>(logit_of(code));
      }
      if constexpr (!kRaw) {
        if (place < kept_ids) kept.ids[row * most + place] = id_of(code);
        if (place != 0) continue;
        if (kept.first_id != nullptr) kept.first_id[row] = id_of(code);
        if (kept.first_logit != nullptr) kept.first_logit[row] = logit_of(code);
      }
    }
    listed += found;
    if (step < kRanges) break;
  }

  const int64_t row = shared_.parameters.row;
  if (listed > wanted) listed = wanted;
#pragma unroll 1
  for (int i = own + listed; i < top; i += threads) {
    out.top_ids[row * top + i] = -1;
    out.top_logprobs[row * top + i] = kNan;
  }
  if constexpr (!kRaw) {
#pragma unroll 1
    for (int i = own + (kept_ids < listed ? kept_ids : listed); i < most; i += threads) {
      kept.ids[row * most + i] = -1;
    }
    if (own != 0) return;
    const uint64_t last = shared_.order.last;
    if (kept.counts != nullptr) kept.counts[row] = number;
    if (kept.total != nullptr) kept.total[row] = shared_.order.kept_mass;
    if (listed == 0 && kept.first_id != nullptr) kept.first_id[row] = -1;
    if (listed == 0 && kept.first_logit != nullptr) kept.first_logit[row] = kNan;
    if (kept.last_id != nullptr) kept.last_id[row] = number > 0 ? id_of(last) : -1;
    if (kept.last_logit != nullptr) kept.last_logit[row] = number > 0 ? logit_of(last) : kNan;
  }
}

// A bit for each token of the kept set. A vec has 8 of them, and four lanes a word; where the row does not begin
// with a vec, a word is of two groups of lanes.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::write_mask() {
  const int words = (row_.vocab_size + 31) / 32;
  int32_t* mask = args_.kept.mask + shared_.parameters.row * words;
  const int own = cluster_.rank() * kThreads + static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int i = own; i < words; i += cluster_.blocks() * kThreads) mask[i] = 0;
  cluster_.sync();
  if (kIsSplit || in_candidates_) {
    const int count = cluster_.rank() == 0 ? count_from(threshold_) : 0;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const int id = id_of(shared_.sorted[i]);
      atomicOr(mask + (id >> 5), static_cast<int32_t>(1u << (id & 31)));
    }
  } else {
    const Threshold threshold(threshold_);
    over_tiles(static_cast<uint32_t>(threshold_ >> 20), [&](int, int vec, const float (&x)[kVec]) {
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        bits |= threshold.is_reached(x[i], row_.first_id(vec) + i) ? 1u << i : 0;
      }
      bits <<= threadIdx.x % 4 * kVec;
      bits |= __shfl_xor_sync(kWholeWarp, bits, 1);
      bits |= __shfl_xor_sync(kWholeWarp, bits, 2);
      if (threadIdx.x % 4 != 0 || bits == 0) return;
      // Ids before the row have no bits, and the division rounds their word to -1.
      const int first = row_.first_id(vec);
      const int word = first >> 5;
      const uint32_t lower = bits << (first & 31);
      const uint32_t upper = (first & 31) != 0 ? bits >> (32 - (first & 31)) : 0;
      if (lower != 0) atomicOr(mask + word, static_cast<int32_t>(lower));
      if (upper != 0) atomicOr(mask + word + 1, static_cast<int32_t>(upper));
    });
  }
}

// ---- the drawn tokens and the ids that the caller has named ----

// The code of a drawn token, or of an id that the caller has named, which come after them.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ uint64_t
RowSampler<kDtype, kLayout, kMore>::code_of_item(int64_t item) const {
  const int64_t row = shared_.parameters.row;
  const int64_t draws = args_.num_samples;
  const int64_t id = item < draws
                         ? read_once(args_.tokens[row * draws + item])
                         : read_once(args_.token_ids[row * args_.token_ids_stride + item - draws]);
  if (id < 0 || id >= row_.vocab_size) return kPaddingCode;
  uint64_t code = kUnlistedCode;
  if constexpr (kIsSplit) {
#pragma unroll 1
    for (int i = 0; i < shared_.candidates.count; ++i) {
      if (id_of(shared_.sorted[i]) == id) code = shared_.sorted[i];
    }
  } else {
    const int vec = static_cast<int>(id + row_.shift) / kVec;
    float x[kVec];
    process_any(vec, x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const bool is_it = row_.first_id(vec) + i == id && x[i] > -kInfinity;
      code = is_it ? code_of(x[i], static_cast<int>(id)) : code;
    }
  }
  return code >= threshold_ ? code : kUnlistedCode;
}

// Replaces codes by the numbers of the order's codes that are at least that. It needs the same codes in all threads.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::count_reaching(
    uint64_t (&codes)[kCounted]
) {
  static_assert(kCounted == 4, "two numbers share an integer");
  uint64_t lowest = ~uint64_t{0};
#pragma unroll
  for (int i = 0; i < kCounted; ++i) {
    lowest = codes[i] >= kLowestCode && codes[i] < lowest ? codes[i] : lowest;
  }
  const Threshold thresholds[kCounted] =
      {Threshold(codes[0]), Threshold(codes[1]), Threshold(codes[2]), Threshold(codes[3])};
  uint32_t counts[kCounted] = {0, 0, 0, 0};
  over_tiles(static_cast<uint32_t>(lowest >> 20), [&](int, int vec, const float (&x)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const int id = row_.first_id(vec) + i;
#pragma unroll
      for (int j = 0; j < kCounted; ++j) counts[j] += thresholds[j].is_reached(x[i], id) ? 1 : 0;
    }
  });
  uint64_t sums[2] = {
      counts[0] | static_cast<uint64_t>(counts[1]) << 32,
      counts[2] | static_cast<uint64_t>(counts[3]) << 32
  };
  cluster_.combine(sums, Add());
#pragma unroll
  for (int i = 0; i < kCounted; ++i) codes[i] = static_cast<uint32_t>(sums[i / 2] >> (i % 2 * 32));
}

// Writes the ranks and the masses of the drawn tokens, and logprobs, ranks and masses of the ids that the caller
// has named. First those that need no pass; then, kCounted at a time, the ranks that do.
template <int kDtype, Layout kLayout, bool kMore>
template <bool kRaw>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::write_ids() {
  const LlmSamplingLogprobs& out = kRaw ? args_.raw : args_.processed;
  const LlmSamplingKept& kept = args_.kept;
  const int64_t row = shared_.parameters.row;
  const int64_t draws = args_.num_samples;
  const int64_t ids = args_.num_token_ids;
  const bool has_ids =
      out.id_ranks != nullptr || out.id_logprobs != nullptr || (!kRaw && kept.id_masses != nullptr);
  const bool has_draws = out.ranks != nullptr || (!kRaw && kept.masses != nullptr);
  const int64_t begin = has_draws ? 0 : draws;
  const int64_t end = has_ids ? draws + ids : draws;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (bool by_pass = false;; by_pass = true) {
    const int step = by_pass ? kCounted : cluster_.blocks() * kThreads;
    const int own = by_pass ? thread : cluster_.rank() * kThreads + thread;
    bool is_left = false;  // a rank, for a pass
#pragma unroll 1
    for (int64_t first = begin; first < end; first += step) {
      const int64_t item = first + own;
      const bool is_own = own < step && item < end;
      const uint64_t code = is_own ? code_of_item(item) : kPaddingCode;
      const bool is_listed = code > kUnlistedCode;
      int rank = is_listed ? 0 : -1;
      if constexpr (!kIsSplit) {
        if (by_pass) {
          uint64_t counts[kCounted];
          if (thread < kCounted) shared_.order.counted[thread] = code;
          __syncthreads();
#pragma unroll
          for (int i = 0; i < kCounted; ++i) counts[i] = shared_.order.counted[i];
          cluster_.broadcast(counts);
          count_reaching(counts);
#pragma unroll
          for (int i = 0; i < kCounted; ++i) {
            if (is_listed && i == thread) rank = static_cast<int>(counts[i]);
          }
        }
      }
      if (!is_own || (by_pass && cluster_.rank() != 0)) continue;
      const Candidates& candidates = shared_.candidates;
      if (rank == 0 && candidates.count > 0 && candidates.count_above == 0 &&
          code >= candidates.low) {
        rank = count_leading(candidates.count, [&](int i) { return shared_.sorted[i] >= code; });
      }
      const bool is_drawn = item < draws;
      int32_t* to = is_drawn ? out.ranks : out.id_ranks;
      const int64_t place = is_drawn ? row * draws + item : row * ids + item - draws;
      if (to != nullptr) to[place] = rank;
      is_left |= to != nullptr && rank == 0;
      if (by_pass) continue;
      if constexpr (!kRaw) {
        int64_t* masses = is_drawn ? kept.masses : kept.id_masses;
        if (masses != nullptr) masses[place] = is_listed ? mass_of(logit_of(code)) : 0;
      }
      if (is_drawn || out.id_logprobs == nullptr) continue;
      const float other = code == kPaddingCode ? kNan : -kInfinity;
      out.id_logprobs[place] = is_listed ? logprob_of<kRaw>(logit_of(code)) : other;
    }
    if (kIsSplit || by_pass) break;
    uint64_t left[1] = {is_left ? 1u : 0u};
    cluster_.combine(left, Larger());
    if (left[0] == 0) break;
  }
}

// ---- a row without a token ----

// Fills the `size` values of a row with one.
template <int kDtype, Layout kLayout, bool kMore>
template <typename T>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::fill(
    T* values,
    int64_t row,
    int64_t size,
    T value
) const {
  if (values == nullptr) return;
#pragma unroll 1
  for (int64_t i = cluster_.rank() * kThreads + static_cast<int>(threadIdx.x); i < size;
       i += cluster_.blocks() * kThreads) {
    values[row * size + i] = value;
  }
}

template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::fill_lists(
    const LlmSamplingLogprobs& of,
    int64_t row
) const {
  fill(of.ranks, row, args_.num_samples, -1);
  fill(of.top_ids, row, args_.num_top_logprobs, -1);
  fill(of.top_logprobs, row, args_.num_top_logprobs, kNan);
  fill(of.id_logprobs, row, args_.num_token_ids, kNan);
  fill(of.id_ranks, row, args_.num_token_ids, -1);
}

template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::write_no_more(
    int64_t row
) const {
  fill_lists(args_.processed, row);
  fill_lists(args_.raw, row);
  const LlmSamplingKept& kept = args_.kept;
  fill(kept.counts, row, 1, 0);
  fill(kept.total, row, 1, int64_t{0});
  fill(kept.masses, row, args_.num_samples, int64_t{0});
  fill(kept.id_masses, row, args_.num_token_ids, int64_t{0});
  fill(kept.mask, row, (args_.vocab_size + 31) / 32, 0);
  fill(kept.ids, row, kept.max_ids, -1);
  fill(kept.first_id, row, 1, -1);
  fill(kept.first_logit, row, 1, kNan);
  fill(kept.last_id, row, 1, -1);
  fill(kept.last_logit, row, 1, kNan);
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_RESULTS_CUH_
