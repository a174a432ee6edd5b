// Steps 11 to 13: the threshold of the kept set, from the candidates where they hold it, otherwise by a
// search of the row.
#ifndef LLM_SAMPLING_CUDA_SELECT_CUH_
#define LLM_SAMPLING_CUDA_SELECT_CUH_

#include <math.h>
#include <stdint.h>

#include "candidates.cuh"
#include "passes.cuh"
#include "row_sampler.cuh"

namespace llm_sampling {

// How many of the first tokens of the order top-p is assumed to need, at first and at the second attempt.
constexpr int kFewTokens = 64;
constexpr int kMoreTokens = 192;

// Worked out anew at each use, because there are no registers to keep it in.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ Filters RowSampler<kDtype, kLayout, kMore>::filters() const {
  return Filters(shared_.parameters, row_.vocab_size);
}

// Finds the threshold of the kept set, and the masses from which draw() chooses if the candidates do not
// hold that set.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::find_kept() {
  scale_ = depth_scale(shared_.parameters.temperature);
  threshold_ = kLowestCode;
  // First the mass of all tokens, then that of the kept ones: a loop, so that weigh() is inlined once.
#pragma unroll 1
  for (bool all = true;; all = false) {
    if (!all) find_thresholds();
    const Filters filters = this->filters();
    if (all ? filters.need_total() : !in_candidates_) weigh();
    if (!all || filters.are_off()) return;
  }
}

// Finds each filter's threshold; the largest is that of the kept set. No filter leaves fewer than
// min_tokens_to_keep.
//
// Each filter asks the candidates for the code at which a count or a mass is reached; if they do not hold
// it, others are collected first. The steps are iterations of one loop, so that search() and collect()
// are inlined once.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::find_thresholds() {
  enum {
    kCollectFew,  // guesses which of the first tokens of the order the filters need
    kTopK,
    kCollectMore,  // guesses again, more of them, where top-p needs them
    kTopP,
    kKeepMinimum,  // the depth cut, and min_tokens_to_keep for it and for top-p
    kSteps
  };
  uint64_t top_k_threshold = kLowestCode;
  uint64_t threshold = kLowestCode;  // of top-p and of the depth cut
#pragma unroll 1
  for (int step = kCollectFew; step < kSteps; ++step) {
    const Filters filters = this->filters();
    const bool by_mass = step == kCollectMore || step == kTopP;
    int64_t target = filters.max_kept;
    if (step == kTopK && !filters.has_top_k) continue;
    if (by_mass) {  // 12 top-p
      if (!filters.has_top_p) continue;
      if (filters.has_top_k) {
        if (step == kCollectMore) continue;
        total_mass_ = mass_from(top_k_threshold);
      }
      target = top_p_target(total_mass_, filters.top_p);
    }
    if (step == kKeepMinimum) {
      if (filters.has_depth_cut) {  // 13 min-p
        const uint64_t deepest = code_at_depth(filters.depth_cut);
        threshold = threshold > deepest ? threshold : deepest;
      }
      if (filters.min_kept == 1 || threshold <= top_k_threshold) continue;
      target = filters.min_kept;
    }
    Range range;
    // Whether the present candidates stay: they hold the answer, or no candidates are likely to.
    bool stay = step != kCollectFew && has_threshold(target, by_mass);
    if constexpr (kIsSplit) {
      // A split row's other tokens are in other blocks: this block will sample the row alone.
      if (step != kCollectFew && !stay) return;
    } else if (!stay) {
      if (step == kCollectFew || step == kCollectMore) {
        stay = !guess_range(filters, step == kCollectFew ? kFewTokens : kMoreTokens, range);
      } else {
        range = search(target, by_mass, top_k_threshold);
      }
      if (!stay) collect(range);
    }
    if (step == kCollectFew || step == kCollectMore) continue;
    const uint64_t code = threshold_at(target, by_mass, top_k_threshold);
    if (step == kTopK) top_k_threshold = code;  // 11 top-k
    if (step == kTopP) threshold = code;
    if (step == kKeepMinimum) threshold = threshold < code ? threshold : code;
  }
  threshold_ = threshold > top_k_threshold ? threshold : top_k_threshold;
  const Candidates& candidates = shared_.candidates;
  in_candidates_ = candidates.count > 0 && candidates.count_above == 0 &&
                   (candidates.is_last || threshold_ >= candidates.low);
}

// 13 min-p: the code of the last token whose depth is at most the cut, or a code between that token's and
// the next one's.
template <int kDtype, Layout kLayout, bool kMore>
__device__ uint64_t RowSampler<kDtype, kLayout, kMore>::code_at_depth(float depth_cut) const {
  const Candidates& candidates = shared_.candidates;
  if (candidates.count > 0 && candidates.count_above == 0) {
    const int inside = count_leading_by_warp(candidates.count, [&](int i) {
      return depth_of(logit_of(shared_.sorted[i])) <= depth_cut;
    });
    if (inside > 0 && inside < candidates.count) return shared_.sorted[inside - 1];
  }
  return first_code(key_at_depth(depth_cut));
}

// The lowest key whose depth is at most the cut. The depth grows as the key falls, so each lane tries
// another key and the warp narrows the range by a factor of 33 in each iteration.
template <int kDtype, Layout kLayout, bool kMore>
__device__ uint32_t RowSampler<kDtype, kLayout, kMore>::key_at_depth(float depth_cut) const {
  // The key sought is among the `size` keys that end at `inside`.
  uint32_t inside = order_key(m_);
  uint32_t size = inside - static_cast<uint32_t>(kLowestCode >> 20) + 1;
  while (size > 1) {
    const uint32_t step = size / (kWarpSize + 1) + 1;
    const uint32_t down = (threadIdx.x % kWarpSize + 1) * step;
    const bool is_inside = down < size && depth_of(from_order_key(inside - down)) <= depth_cut;
    const uint32_t passed = static_cast<uint32_t>(__popc(__ballot_sync(kWholeWarp, is_inside)));
    inside -= passed * step;
    size -= passed * step;
    size = size < step ? size : step;
  }
  return inside;
}

// Finds a range of the order that is short enough for the candidates and in which the target, a count or
// a mass, is reached. A probe of the row chooses three codes; each pass counts and weighs the tokens that
// reach them, which narrows the range, and the next three codes split that range.
//
// Every pass but the first narrows the range, whatever it counts, so the search ends. All blocks search the
// same range, because the pivots of the first pass are those of block 0.
template <int kDtype, Layout kLayout, bool kMore>
__device__ Range
RowSampler<kDtype, kLayout, kMore>::search(int64_t target, bool by_mass, uint64_t lowest) {
  uint64_t first[3];
  probe(target, by_mass, lowest, first);
  cluster_.broadcast(first);
  if (threadIdx.x == 0) {
    const Range range = {lowest, first_code(order_key(m_) + 1), 0, 0};
    shared_.search = {range, row_.vocab_size, {first[0], first[1], first[2]}};
  }
  __syncthreads();
  const Range& range = shared_.search.range;
  const uint64_t (&pivots)[3] = shared_.search.pivots;
  while (shared_.search.count - range.count_above > kMaxCandidates &&
         range.high - range.low > kMaxCandidates) {
    const Threshold thresholds[3] = {
        Threshold(pivots[0]),
        Threshold(pivots[1]),
        Threshold(pivots[2])
    };
    uint64_t sums[4] = {0, 0, 0, 0};  // three masses; three counts of 21 bits each
    const auto lowest_key = static_cast<uint32_t>(pivots[0] >> 20);  // the pivots are rising
    over_tiles(lowest_key, [&](int, int vec, const float (&x)[kVec]) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const int id = row_.first_id(vec) + i;
        const uint64_t w = static_cast<uint64_t>(mass_of(x[i]));
#pragma unroll
        for (int p = 0; p < 3; ++p) {
          const bool is_reached = thresholds[p].is_reached(x[i], id);
          sums[3] += is_reached ? uint64_t{1} << (21 * p) : 0;
          sums[p] += is_reached ? w : 0;
        }
      }
    });
    cluster_.combine(sums, Add());
    if (threadIdx.x == 0) shared_.search.narrow(sums, target, by_mass);
    __syncthreads();
  }
  return range;
}

// The largest pivot that reaches the target is the new lower end, and the next one the upper end.
__device__ __forceinline__ void Search::narrow(
    const uint64_t (&sums)[4],
    int64_t target,
    bool by_mass
) {
#pragma unroll
  for (int p = 0; p < 3; ++p) {
    const int n = static_cast<int>(sums[3] >> (21 * p) & 0x1fffff);
    const int64_t w = static_cast<int64_t>(sums[p]);
    if (pivots[p] >= range.high) break;  // a probed logit was above the maximum
    if ((by_mass ? w : n) >= target) {
      range.low = pivots[p];
      count = n;
    } else {
      range = {range.low, pivots[p], n, w};
      break;
    }
  }
  split();
}

// A statistical probe: three codes, rising, around the one at which kProbed tokens, evenly spaced in the
// row, reach their share of the target. They are two standard deviations of a count apart, or three of
// a mass. It uses the arrays of the candidates.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::probe(
    int64_t target,
    bool by_mass,
    uint64_t lowest,
    uint64_t (&pivots)[3]
) {
  __syncthreads();
#pragma unroll 1
  for (int own = static_cast<int>(threadIdx.x); own < kProbed; own += kThreads) {
    const int id = static_cast<int>(static_cast<int64_t>(own) * row_.vocab_size / kProbed);
    const int vec = (id + row_.shift) / kVec;
    float x[kVec];
    process_any(vec, x);
    float probed = -kInfinity;
#pragma unroll
    for (int i = 0; i < kVec; ++i) probed = row_.first_id(vec) + i == id ? x[i] : probed;
    shared_.codes[own] = code_of(probed, id);
    shared_.masses[own] = mass_of(probed);
  }
  __syncthreads();
  sort(kProbed);
  const int count =
      count_leading_by_warp(kProbed, [&](int i) { return shared_.sorted[i] >= lowest; });
  const float reached = by_mass ? static_cast<float>(count > 0 ? shared_.running[count - 1] : 0)
                                : static_cast<float>(count);
  const float all = by_mass
                        ? static_cast<float>(total_mass_)
                        : static_cast<float>(count) * static_cast<float>(row_.vocab_size) / kProbed;
  float share = static_cast<float>(target) / (all > 1.0f ? all : 1.0f);
  share = share < 1.0f ? share : 1.0f;
  const float deviation = sqrtf(share * (1.0f - share) / static_cast<float>(count > 0 ? count : 1));
  const float spread = deviation * (by_mass ? 3.0f : 2.0f);
  for (int p = 0; p < 3; ++p) {
    const float part = share + spread * static_cast<float>(1 - p);
    const float wanted = (part < 0.0f ? 0.0f : part < 1.0f ? part : 1.0f) * reached;
    const int index = count_leading_by_warp(count, [&](int i) {
      const int64_t here = by_mass ? shared_.running[i] : i + 1;
      return static_cast<float>(here) < wanted;
    });
    pivots[p] = index < count ? shared_.sorted[index] : lowest;
  }
  __syncthreads();
}

// Three rising codes that split a range: at both thirds of the logits and at half of the keys, or, where
// there are few keys, at the quarters of the codes. The thirds need few passes for the bulk of a usual
// row, and the halves of the keys limit the passes for any row.
__device__ __forceinline__ void Search::split() {
  const uint64_t low = range.low;
  const uint64_t high = range.high;
  const uint64_t size = high - low;
  const uint32_t low_key = static_cast<uint32_t>(low >> 20);
  const uint32_t high_key = static_cast<uint32_t>((high - 1) >> 20);
  if (high_key - low_key < 4) {
    pivots[0] = low + size / 4;
    pivots[1] = low + size / 2;
    pivots[2] = low + size / 4 * 3;
    return;
  }
  const float bottom = from_order_key(low_key);
  const float top = from_order_key(high_key);
  uint32_t a = order_key(bottom * 0.6666667f + top * 0.33333334f);
  uint32_t b = order_key(bottom * 0.33333334f + top * 0.6666667f);
  uint32_t c = low_key + (high_key - low_key) / 2;
  const auto inside = [=](uint32_t key) {
    return key <= low_key ? low_key + 1 : key > high_key ? high_key : key;
  };
  const auto order = [](uint32_t& first, uint32_t& second) {
    const uint32_t smaller = first < second ? first : second;
    second = first < second ? second : first;
    first = smaller;
  };
  a = inside(a);
  b = inside(b);
  order(a, b);
  order(b, c);
  order(a, b);
  pivots[0] = first_code(a);
  pivots[1] = first_code(b);
  pivots[2] = first_code(c);
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_SELECT_CUH_
