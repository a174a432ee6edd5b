// The candidates: a short list of the tokens that may be kept, from which thresholds and drawn tokens are
// chosen. Every block of the cluster has the same candidates, so all blocks take the same decisions.
#ifndef LLM_SAMPLING_CUDA_CANDIDATES_CUH_
#define LLM_SAMPLING_CUDA_CANDIDATES_CUH_

#include <stdint.h>

#include "passes.cuh"
#include "row_sampler.cuh"

namespace llm_sampling {

constexpr int64_t kLargestMass = int64_t{1} << 42;  // of a token

// Estimates, from the threads' maxima, a range that begins at the top of the order and holds about as
// many tokens as the filters need; `nucleus` is how many top-p is assumed to need. Returns whether the
// candidates may hold that many; `range` is set only then. The histogram has bins of equal width between
// the row's largest logit and the smallest of the maxima.
template <int kDtype, Layout kLayout, bool kMore>
__device__ bool RowSampler<kDtype, kLayout, kMore>::guess_range(
    const Filters& filters,
    int nucleus,
    Range& range
) {
  int64_t wanted = filters.min_kept;
  if (filters.has_top_k) {
    wanted = filters.max_kept;
  } else if (filters.has_top_p) {
    // The estimate is good as long as it asks for no more than half of the maxima.
    const int half = kThreads * kMaxima / 2 * cluster_.blocks();
    nucleus = half < nucleus ? half : nucleus;
    wanted = wanted > nucleus ? wanted : nucleus;
  }
  if (wanted > kMaxCandidates) return false;
  const bool by_mass = filters.has_top_p && !filters.has_top_k;
  if (by_mass && top_p_target(total_mass_, filters.top_p) > wanted * kLargestMass) return false;
  clear_bins();
  constexpr float kLastBin = kBins - 1;
  const float span = m_ - shared_.least_maximum;
  const float scale = kLastBin / span;
#pragma unroll
  for (int half = 0; half < kMaxima; ++half) {
    if (largest_[half] == -kInfinity) continue;
    // The last bin takes what is no number, which a span of 0 or infinity leads to.
    const float bin = fminf((m_ - largest_[half]) * scale, kLastBin);
    atomicAdd(&shared_.bins[static_cast<int>(bin)], 1u);
  }
  cluster_.sync();
  const int last = find_bin(wanted);
  float lowest = kLowest;
  // A little below the bin, because the bins are rounded.
  if (last < kBins) {
    lowest = m_ - span * ((static_cast<float>(last) + 1.0625f) * (1.0f / kLastBin));
  }
  uint32_t key = order_key(fmaxf(lowest, kLowest));
  if (!filters.has_top_k && !filters.has_top_p) {
    const uint32_t deepest = key_at_depth(filters.depth_cut);
    key = key < deepest ? key : deepest;
  }
  range = {first_code(key), first_code(order_key(m_) + 1), 0, 0};
  return true;
}

template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::clear_bins() {
#pragma unroll
  for (int i = 0; i < kBins; i += kThreads) shared_.bins[i + static_cast<int>(threadIdx.x)] = 0;
  __syncthreads();
}

// Finds the first bin with which the bins of all blocks hold as many as wanted; kBins if they do not. kHeld: it
// also says how many they hold without it and with it.
template <int kDtype, Layout kLayout, bool kMore>
template <bool kHeld>
__device__ __forceinline__ int RowSampler<kDtype, kLayout, kMore>::find_bin(int64_t wanted) {
  const int own = static_cast<int>(threadIdx.x) * 2;
  int counts[2] = {0, 0};
#pragma unroll 4
  for (int block = 0; block < cluster_.blocks(); ++block) {
    const uint32_t* bins = in_block(shared_.bins, block);
    counts[0] += static_cast<int>(bins[own]);
    counts[1] += static_cast<int>(bins[own + 1]);
  }
  const int reached = static_cast<int>(cluster_.scan(counts[0] + counts[1]));
  // All bins before it hold fewer than wanted.
  const int bin =
      __syncthreads_count(reached - counts[1] < wanted) + __syncthreads_count(reached < wanted);
  if constexpr (kHeld) {
    if (own == bin / 2 * 2) {
      shared_.held_before = reached - counts[1] - (bin % 2 == 0 ? counts[0] : 0);
      shared_.held_with = reached - (bin % 2 == 0 ? counts[1] : 0);
    }
    __syncthreads();
  }
  return bin;
}

// Returns a code between `low` and `high` from which on there are, below `high`, at least as many codes as wanted
// and at most `most`, or else `low`.
// Each iteration divides a range of codes evenly into bins, and goes on with the bin in which there are enough,
// as long as there are too many with all of that bin.
template <int kDtype, Layout kLayout, bool kMore>
template <typename OverCodes>
__device__ __forceinline__ uint64_t RowSampler<kDtype, kLayout, kMore>::narrow(
    uint64_t low,
    uint64_t high,
    int wanted,
    int most,
    const OverCodes& over_codes
) {
  int above = 0;  // codes from `high` on
#pragma unroll 1
  while (true) {
    const int bits = 64 - __clzll(static_cast<long long>(high - low - 1));
    const int shift = bits > kBinBits ? bits - kBinBits : 0;
    clear_bins();
    over_codes(low, [&](uint64_t code) {
      const uint64_t below = high - 1 - code;
      if (below < high - low) atomicAdd(&shared_.bins[below >> shift], 1u);
    });
    cluster_.sync();
    const int bin = find_bin<true>(wanted - above);
    if (!kIsSplit) cluster_.sync();  // no block reads this one's bins any more
    if (bin == kBins) return low;    // there are fewer
    const uint64_t below = static_cast<uint64_t>(bin + 1) << shift;
    low = below < high - low ? high - below : low;
    if (shift == 0 || above + shared_.held_with <= most) return low;
    high -= static_cast<uint64_t>(bin) << shift;
    above += shared_.held_before;
  }
}

// Makes all tokens of a range the candidates, sorted, in every block. If the range has more than
// kMaxCandidates, there are no candidates afterwards.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::collect(const Range& range) {
  append_all(range);
  share(range);
}

// Calls visit(code) for this block's tokens whose logits are at least that of a code, until the block has
// appended too many: then how many there are does not matter any more.
template <int kDtype, Layout kLayout, bool kMore>
template <typename Visit>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::over_codes(
    uint64_t low,
    const Visit& visit
) const {
  const float lowest = logit_of(low);
  over_tiles(static_cast<uint32_t>(low >> 20), [&](int, int vec, const float (&x)[kVec]) {
    const int first = row_.first_id(vec);
    unsigned wanted = 0;
#pragma unroll
    for (int i = 0; i < kVec; ++i) wanted |= x[i] >= lowest ? 1u << i : 0;
    if (wanted == 0 || load_relaxed(&shared_.appended) > kMaxCandidates) return;
#pragma unroll 1
    for (; wanted != 0; wanted &= wanted - 1) {
      const int next = __ffs(static_cast<int>(wanted)) - 1;
      float value = 0.0f;
#pragma unroll
      for (int i = 0; i < kVec; ++i) value = i == next ? x[i] : value;
      visit(code_of(value, first + next));
    }
  });
}

// Lists the tokens of a range that this block has.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::append_all(const Range& range) {
  if (threadIdx.x == 0) shared_.appended = 0;
  __syncthreads();
  over_codes(range.low, [&](uint64_t code) {
    if (code >= range.low && code < range.high) append(code);
  });
}

// Adds a code to those that this block has found.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::append(uint64_t code) {
  const unsigned place = atomicAdd(&shared_.appended, 1u);
  if (place < kMaxCandidates) shared_.sorted[place] = code;
}

// Makes what all blocks have found, all tokens of a range, the candidates.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::share(const Range& range) {
  __syncthreads();
  const int own = static_cast<int>(shared_.appended);
  const Sums counts = kIsSplit ? Sums{0, own, own} : cluster_.sum(own);
  const int count = counts.total <= kMaxCandidates ? static_cast<int>(counts.total) : 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); count > 0 && i < own; i += kThreads) {
    const uint64_t code = shared_.sorted[i];
    const int64_t w = mass_of(logit_of(code));
    const int64_t place = counts.before + i;
#pragma unroll 1
    for (int block = 0; block < cluster_.blocks(); ++block) {
      in_block(shared_.codes, block)[place] = code;
      in_block(shared_.masses, block)[place] = w;
    }
  }
  // compare_all reads whole multiples of kAbreast.
  if (threadIdx.x < (kMaxCandidates - static_cast<unsigned>(count)) % kAbreast) {
    shared_.codes[count + threadIdx.x] = kNoCode;
    shared_.masses[count + threadIdx.x] = 0;
  }
  if (threadIdx.x == 0) {
    const bool is_last = range.low <= kLowestCode;
    shared_.candidates = {range.low, count, range.count_above, range.mass_above, is_last};
  }
  cluster_.sync();
  sort(count);
}

// Compares the first `count` codes with each other: calls visit(own, code, held, mass) for each, with the
// number of codes `other` for which holds(other, code) is true, and their mass. Four lanes share a code.
// `codes` must be padded to a multiple of kAbreast with codes for which it is false.
template <int kDtype, Layout kLayout, bool kMore>
template <typename Holds, typename Visit>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::compare_all(
    int count,
    const Holds& holds,
    const Visit& visit
) const {
  constexpr int kLanes = 4;
  const int part = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll 1
  for (int first = 0; first < count; first += kThreads / kLanes) {
    const int own = first + static_cast<int>(threadIdx.x) / kLanes;
    const uint64_t code = shared_.codes[own < count ? own : 0];
    int held = 0;
    int64_t mass = 0;
#pragma unroll 1
    for (int i = part; i < count; i += kAbreast) {
#pragma unroll
      for (int j = i; j < i + kAbreast; j += kLanes) {
        const bool is_held = holds(shared_.codes[j], code);
        held += is_held ? 1 : 0;
        mass += is_held ? shared_.masses[j] : 0;
      }
    }
#pragma unroll
    for (int other = 1; other < kLanes; other *= 2) {
      held += __shfl_xor_sync(kWholeWarp, held, other);
      mass += __shfl_xor_sync(kWholeWarp, mass, other);
    }
    if (part == 0 && own < count) visit(own, code, held, mass);
  }
}

// Writes `sorted` and `running`.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::sort(int count) {
  compare_all(
      count,
      [](uint64_t other, uint64_t code) { return other >= code; },
      [&](int, uint64_t code, int reached, int64_t mass) {
        shared_.sorted[reached - 1] = code;
        shared_.running[reached - 1] = mass;
      }
  );
  __syncthreads();
}

// The number of candidates that are at least a code.
template <int kDtype, Layout kLayout, bool kMore>
__device__ int RowSampler<kDtype, kLayout, kMore>::count_from(uint64_t code) const {
  return count_leading_by_warp(shared_.candidates.count, [&](int i) {
    return shared_.sorted[i] >= code;
  });
}

// The mass of all tokens of the row from a code on. The code must be a candidate's, or no token may lie
// between it and the last candidate.
template <int kDtype, Layout kLayout, bool kMore>
__device__ int64_t RowSampler<kDtype, kLayout, kMore>::mass_from(uint64_t code) const {
  const int count = count_from(code);
  return shared_.candidates.mass_above + (count > 0 ? shared_.running[count - 1] : 0);
}

// Whether threshold_at() can answer: the target, a count or a mass, is reached at a candidate, or the
// candidates end where the row does.
template <int kDtype, Layout kLayout, bool kMore>
__device__ bool RowSampler<kDtype, kLayout, kMore>::has_threshold(
    int64_t target,
    bool by_mass
) const {
  if (shared_.candidates.count == 0) return false;
  const int64_t above = by_mass ? shared_.candidates.mass_above : shared_.candidates.count_above;
  const int64_t own =
      by_mass ? shared_.running[shared_.candidates.count - 1] : shared_.candidates.count;
  return above < target && (above + own >= target || shared_.candidates.is_last);
}

// The code at which the target, a count or a mass, is reached; `lowest` if the row does not reach it, or if
// has_threshold() is false.
template <int kDtype, Layout kLayout, bool kMore>
__device__ uint64_t RowSampler<kDtype, kLayout, kMore>::threshold_at(
    int64_t target,
    bool by_mass,
    uint64_t lowest
) const {
  const int place =
      by_mass
          ? count_leading_by_warp(
                shared_.candidates.count,
                [&](int i) { return shared_.candidates.mass_above + shared_.running[i] < target; }
            )
          : static_cast<int>(target - shared_.candidates.count_above - 1);
  const bool is_listed =
      static_cast<unsigned>(place) < static_cast<unsigned>(shared_.candidates.count);
  return is_listed ? shared_.sorted[place] : lowest;
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_CANDIDATES_CUH_
