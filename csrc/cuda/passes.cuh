// Passes over a block's part of the row: how they visit its vecs, and the passes for maxima, greedy rows
// and masses. Those of collect() and search() are in candidates.cuh and select.cuh.
#ifndef LLM_SAMPLING_CUDA_PASSES_CUH_
#define LLM_SAMPLING_CUDA_PASSES_CUH_

#include <stdint.h>

#include "copy.cuh"
#include "row_sampler.cuh"

namespace llm_sampling {

constexpr int kRoundsAhead = 4;  // how far a pass prefetches a row that is not copied

// Asks the L2 cache for the bytes at a place of global memory.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* place) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(place));
#endif
}

// ---- visiting vecs ----

// Calls visit(round, vec, x) in every round, with x after step 6. Where the part has no vec left for this
// thread, x is -inf and the vec belongs to another block.
template <int kDtype, Layout kLayout, bool kMore>
template <typename Visit>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::over_vecs(
    const Visit& visit
) const {
  const int count = vecs();
#pragma unroll 1
  for (int round = 0; round * kThreads < count; ++round) visit_round(round, count, visit);
}

// The same for the tiles whose largest key is at least `lowest`.
template <int kDtype, Layout kLayout, bool kMore>
template <typename Visit>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::over_tiles(
    uint32_t lowest,
    const Visit& visit
) const {
  const int count = vecs();
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int first = 0; first * kThreads < count; first += kWarpSize) {
    const int round = first + lane;
    const bool has_one = round * kThreads < count && tile_keys_[round * kWarps + warp] >= lowest;
#pragma unroll 1
    for (unsigned rest = __ballot_sync(kWholeWarp, has_one); rest != 0; rest &= rest - 1) {
      visit_round(first + __ffs(static_cast<int>(rest)) - 1, count, visit);
    }
  }
}

template <int kDtype, Layout kLayout, bool kMore>
template <typename Visit>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::visit_round(
    int round,
    int count,
    const Visit& visit
) const {
  const int local = round * kThreads + static_cast<int>(threadIdx.x);
  const int vec = first_vec_ + local;
  float x[kVec];
  if (local < count) {
    prefetch_later(local, count);
    process(copy_of(part()), is_scored_, local, vec, x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = canonical(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = -kInfinity;
  }
  visit(round, vec, x);
}

// Prefetches this thread's logits of a later round, where the row is not copied.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::prefetch_later(
    int local,
    int count
) const {
  local += kRoundsAhead * kThreads;
  if (kCopied || local >= count) return;
  prefetch(row_.aligned + static_cast<int64_t>(first_vec_ + local) * kVecBytes);
}

// ---- maxima ----

// Finds the largest logit of the row, of each tile, and of each thread (kMaxima of them), and the smallest of
// the threads' maxima. Returns whether a logit is NaN.
// kRaw: of rows that neither a bias, nor a mask, nor a penalty, nor a list changes any more.
template <int kDtype, Layout kLayout, bool kMore>
template <bool kRaw>
__device__ bool RowSampler<kDtype, kLayout, kMore>::find_maxima() {
  is_scored_ = !kRaw && has_scores(part());
  bool any_nan = is_scored_ && score();
  const bool has_unscored = row_.has_marks() && !is_scored_;
  if (kRaw || (!row_.has_bias_or_mask() && !has_unscored)) {
    any_nan |= find_tile_maxima<true>();
  } else {
    any_nan |= find_tile_maxima<false>();
  }
  float least = kInfinity;
#pragma unroll
  for (int half = 0; half < kMaxima; ++half) {
    least = fminf(least, largest_[half] > -kInfinity ? largest_[half] : kInfinity);
  }
  uint32_t largest_key = order_key(fmaxf(largest_[0], largest_[1]));
  uint32_t least_key = order_key(least);
  cluster_.find_limits(largest_key, least_key, any_nan);
  m_ = from_order_key(largest_key);
  if (threadIdx.x == 0) shared_.least_maximum = from_order_key(least_key);
  return any_nan;
}

template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::write_status(bool any_nan) {
  if (args_.status == nullptr || cluster_.rank() != 0 || threadIdx.x != 0) return;
  int32_t status = any_nan ? LLM_SAMPLING_STATUS_NAN : 0;
  if (m_ == -kInfinity) status |= LLM_SAMPLING_STATUS_NO_CANDIDATE;
  if (m_ == kInfinity) status |= LLM_SAMPLING_STATUS_POS_INF;
  args_.status[shared_.parameters.row] = status;
}

// The maxima of all tokens. kPlain: steps 2 to 5a change none of those without a score; score() has counted the
// others, which are -inf in the copy. Returns whether one is NaN.
template <int kDtype, Layout kLayout, bool kMore>
template <bool kPlain>
__device__ __forceinline__ bool RowSampler<kDtype, kLayout, kMore>::find_tile_maxima() {
  const int warp = threadIdx.x / kWarpSize;
  const int count = vecs();
  bool any_nan = false;
#pragma unroll(kPlain ? 2 : 1)
  for (int round = 0; round * kThreads < count; ++round) {
    const int local = round * kThreads + static_cast<int>(threadIdx.x);
    const int vec = first_vec_ + local;
    float found[kMaxima];
#pragma unroll
    for (int half = 0; half < kMaxima; ++half) found[half] = -kInfinity;
    if (local < count) {
      float x[kVec];
      prefetch_later(local, count);
      const Copy copy = copy_of(part());
      if (kPlain) {
        load<kDtype, kCopied>(row_, logits_of(copy, local, vec), vec, x);
      } else {
        process(copy, is_scored_, local, vec, x);
      }
      // Step 6 is not needed here: fmaxf ignores NaN, and order_key makes -0.0 into +0.0.
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        sum += x[i];
        found[i * kMaxima / kVec] = fmaxf(found[i * kMaxima / kVec], x[i]);
      }
      if (sum != sum) {  // there is a NaN, or there are both infinities
#pragma unroll
        for (int i = 0; i < kVec; ++i) any_nan |= x[i] != x[i];
      }
    }
#pragma unroll
    for (int half = 0; half < kMaxima; ++half) largest_[half] = fmaxf(largest_[half], found[half]);
    const uint32_t key = __reduce_max_sync(kWholeWarp, order_key(fmaxf(found[0], found[1])));
    if (threadIdx.x % kWarpSize == 0) {
      uint32_t& tile = tile_keys_[round * kWarps + warp];
      tile = is_scored_ && tile > key ? tile : key;
    }
  }
  return any_nan;
}

// 8 greedy: the kept set is the first token of the order. The threshold is kNoCode if no token is at the
// maximum any more.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::find_first() {
  uint64_t first[1] = {kNoCode};
  over_tiles(order_key(m_), [&](int, int vec, const float (&x)[kVec]) {
    // A thread visits its vecs by rising ids, so the first token at the maximum is the one.
    if (first[0] != kNoCode) return;
#pragma unroll
    for (int i = kVec - 1; i >= 0; --i) {
      if (x[i] == m_) first[0] = code_of(x[i], row_.first_id(vec) + i);
    }
  });
  cluster_.combine(first, Larger());
  threshold_ = first[0];
}

// ---- masses ----

// 9 depth, 10 mass. The depth is 0 where x is m: fmaxf makes 0 of NaN, which inf - inf and 0 * inf are. It
// is also 0 where x is above m, as in a row that somebody overwrites meanwhile, so that any logit has a mass
// of 0 .. 2^42.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ float RowSampler<kDtype, kLayout, kMore>::depth_of(float x) const {
  return fmaxf(finite_depth(x, m_, scale_), 0.0f);
}
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ int64_t RowSampler<kDtype, kLayout, kMore>::mass_of(float x) const {
  return whole_mass(depth_of(x));
}

template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ int64_t
RowSampler<kDtype, kLayout, kMore>::kept_mass(const Threshold& threshold, float x, int id) const {
  return threshold.is_reached(x, id) ? mass_of(x) : 0;
}

// The mass of what reaches the threshold: running sums over this block's tiles, and sums over the blocks.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::weigh() {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const Threshold threshold(threshold_);
  const bool all = threshold_ == kLowestCode;
  __syncthreads();
  over_vecs([&](int round, int vec, const float (&x)[kVec]) {
    int64_t sum = 0;
    if (all) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum += mass_of(x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum += kept_mass(threshold, x[i], row_.first_id(vec) + i);
    }
#pragma unroll
    for (int other = kWarpSize / 2; other > 0; other /= 2) {
      sum += __shfl_xor_sync(kWholeWarp, sum, other);
    }
    if (lane == 0) tile_masses_[round * kWarps + warp] = sum;
  });
  sum_tiles();
}

// Makes the tiles' masses into running sums, and sums them over the blocks.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::sum_tiles() {
  const int count = rounds() * kWarps;
  const int each = (count + kThreads - 1) / kThreads;
  const int first = static_cast<int>(threadIdx.x) * each;
  __syncthreads();
  int64_t sum = 0;
#pragma unroll 1
  for (int i = first; i < first + each && i < count; ++i) sum += tile_masses_[i];
  int64_t running = cluster_.scan(sum) - sum;
#pragma unroll 1
  for (int i = first; i < first + each && i < count; ++i) {
    running += tile_masses_[i];
    tile_masses_[i] = running;
  }
  __syncthreads();
  const Sums sums = cluster_.sum(count > 0 ? tile_masses_[count - 1] : 0);
  total_mass_ = sums.total;
  if (threadIdx.x == 0) shared_.mass_before = sums.before;
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_PASSES_CUH_
