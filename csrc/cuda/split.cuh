// A row that is split over blocks without a cluster, for devices that have none and for few rows.
//
// No block waits for another one. Each block takes a part of the row, as though that were the row: it applies
// steps 1 to 6 and lists the first tokens of its part in the order, at least as many as the row's filters may
// keep, in any order. The list goes to the workspace in global memory. Then the block adds 1 to the row's
// counter, and the block that finds there that it is the last one finishes the row: the first tokens of the row
// are among those of the lists. It also sets the counter back to 0, for the next launch.
//
// Masses need the row's largest logit, which is known only when all parts are done. So rows that need the mass
// of all tokens (top-p without top-k, or no filter), and rows that may keep more tokens than a list holds, are
// sampled by the last block alone, as in a launch with one block for each row. So is a row whose lists have
// more tokens at the end of the kept set than fit the candidates, and one whose blocks have not all read the
// same parameters, because somebody has overwritten them meanwhile.
//
// Plain calls (see is_plain()) have a kernel of their own, which is compiled from the same source.
//
// Hazards. What a block writes into the workspace becomes visible with count_up(): a barrier comes before it,
// and another one before the last block's threads read. They read through the L2 cache, because the caches of
// the multiprocessors do not know of each other. All blocks read the history before they count up, and only
// the last one writes it.
#ifndef LLM_SAMPLING_CUDA_SPLIT_CUH_
#define LLM_SAMPLING_CUDA_SPLIT_CUH_

#include <stdint.h>

#include "candidates.cuh"
#include "copy.cuh"
#include "draw.cuh"
#include "passes.cuh"
#include "results.cuh"
#include "row_sampler.cuh"
#include "select.cuh"

namespace llm_sampling {

static_assert(kMaxListed <= kThreads, "a thread writes a code of a list");
constexpr int kMostWanted = 192;  // tokens that a part may be asked for
constexpr int kMoreAtDepth = 64;  // the same, where a cut by depth is the only filter

// How many of its first tokens each part must list; 0 if the row cannot be finished from lists.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ int RowSampler<kDtype, kLayout, kMore>::count_wanted() const {
  if (is_greedy()) return 1;
  const Filters filters = this->filters();
  int wanted = filters.max_kept;
  if (!filters.has_top_k) {
    if (filters.need_total()) return 0;
    wanted = filters.min_kept > kMoreAtDepth ? filters.min_kept : kMoreAtDepth;
  }
  return wanted <= kMostWanted ? wanted : 0;
}

// Two codes of a list in shared memory, which are read at once.
struct alignas(16) Pair {
  uint64_t codes[2];
};

// The places of a list, a multiple of 32: a guess finds some more tokens than are wanted.
__device__ __forceinline__ int count_listed(int wanted) {
  const int listed = (wanted + wanted / 4 + kWarpSize - 1) / kWarpSize * kWarpSize;
  return listed < kMaxListed ? listed : kMaxListed;
}

// Samples a row, or the block's part of it. Returns false if this block must sample the row alone.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ bool RowSampler<kDtype, kLayout, kMore>::run_part_as(
    const Workspace& workspace,
    int parts
) {
  const int64_t first = int64_t{index_} * parts;
  Lists lists = {workspace.headers + first, workspace.codes + first * kMaxListed, parts, 0, 0};
  const int64_t param_index = find_parameters();
  if (param_index >= 0) {
    const int vecs = locate_logits();
    copy_logits(vecs);
    read_parameters(param_index, vecs);
    if (args_.extra_output != nullptr && row_.seen.words != nullptr) list_overrides();
    copy_bits(vecs);
    __syncthreads();
    lists.wanted = count_wanted();
    lists.listed = count_listed(lists.wanted);
  }
  make_list(lists);
  auto* counter = reinterpret_cast<uint32_t*>(workspace.counters + index_);
  if (!is_last(counter, parts)) return true;
  if (param_index < 0) {
    write_nothing(param_index);
    if constexpr (kMore) write_no_more(index_);
    return true;
  }
  return lists.wanted > 0 && finish(lists);
}

// Writes the part's list. Of a greedy row it has no codes, because the header has the only one.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::make_list(const Lists& lists) {
  bool any_nan = false;
  uint64_t low = kNoCode;
  m_ = -kInfinity;
  if (lists.wanted > 0) {
    any_nan = find_maxima();
    const bool has_any = m_ > -kInfinity;
    if (is_greedy()) {
      if (has_any) find_first();
      if (has_any) low = threshold_;
    } else {
      if (has_any) low = find_listed(lists);
      const int found = has_any ? static_cast<int>(shared_.appended) : 0;
      const int i = static_cast<int>(threadIdx.x);
      if (i < lists.listed) {
        lists.codes[split_part_ * lists.listed + i] = i < found ? shared_.sorted[i] : kNoCode;
      }
    }
  }
  if (threadIdx.x != 0) return;
  lists.headers[split_part_] = {
      static_cast<uint64_t>(order_key(m_)) << 32 | (any_nan ? 1 : 0),
      static_cast<uint64_t>(lists.wanted),
      low
  };
}

// Leaves the first tokens of the part in `sorted`, `appended` of them, and returns the code from which on they
// are all; kNoCode if that is the whole part.
template <int kDtype, Layout kLayout, bool kMore>
__device__ uint64_t RowSampler<kDtype, kLayout, kMore>::find_listed(const Lists& lists) {
  Filters filters = this->filters();
  filters.max_kept = lists.wanted;
  filters.has_top_k = true;
  Range range;
  guess_range(filters, 0, range);
  // First a range that was guessed; where that has too many tokens or too few, one that was searched for, from the
  // whole part on. A loop, so that append_all() is inlined once.
#pragma unroll 1
  for (bool is_guess = true;; is_guess = false) {
    append_all(range);
    __syncthreads();
    const int found = static_cast<int>(shared_.appended);
    const bool is_all = range.low <= kLowestCode;
    const bool is_right = found <= lists.listed && (is_all || found >= lists.wanted);
    if (is_right || !is_guess) return is_all ? kNoCode : range.low;
    __syncthreads();
    if (threadIdx.x == 0) shared_.appended = 0;
    const auto over_part = [&](uint64_t low, const auto& visit) { over_codes(low, visit); };
    range.low =
        narrow(kLowestCode, first_code(order_key(m_) + 1), lists.wanted, lists.listed, over_part);
  }
}

// Ends the block's part of the work. Returns whether all other blocks of the row have done so before.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ bool RowSampler<kDtype, kLayout, kMore>::is_last(
    uint32_t* counter,
    int parts
) {
  __syncthreads();
  if (threadIdx.x == 0) {
    shared_.is_last = count_up(counter) == static_cast<uint32_t>(parts) - 1;
    if (shared_.is_last) *counter = 0;
  }
  __syncthreads();
  return shared_.is_last;
}

// Finishes the row. Returns false, and has written nothing but the status, if the lists do not hold what the
// row keeps.
template <int kDtype, Layout kLayout, bool kMore>
__device__ bool RowSampler<kDtype, kLayout, kMore>::finish(const Lists& lists) {
  static_assert(kMaxParts <= kWarpSize, "each lane reads a header");
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int codes = is_greedy() ? 0 : lists.parts * lists.listed;
#pragma unroll 1
  for (int i = 2 * static_cast<int>(threadIdx.x); i < codes; i += 2 * kThreads) {
    start_copy<16>(copy_ + 8 * i, lists.codes + i);
  }
  uint64_t maximum = 0;
  uint64_t low = kNoCode;
  bool is_useless = false;
  if (lane < lists.parts) {
    const PartHeader& header = lists.headers[lane];
    maximum = load_shared_by_all(&header.maximum);
    low = load_shared_by_all(&header.low);
    is_useless = load_shared_by_all(&header.wanted) != static_cast<uint64_t>(lists.wanted);
  }
  wait_for_copies();
  if (__any_sync(kWholeWarp, is_useless)) return false;
  m_ = from_order_key(__reduce_max_sync(kWholeWarp, static_cast<uint32_t>(maximum >> 32)));
  // The largest `low` of all parts: from there on, the lists hold all tokens of the row.
  const uint32_t upper = __reduce_max_sync(kWholeWarp, static_cast<uint32_t>(low >> 32));
  const uint32_t lower = static_cast<uint32_t>(low >> 32) == upper ? static_cast<uint32_t>(low) : 0;
  const uint64_t bound = static_cast<uint64_t>(upper) << 32 | __reduce_max_sync(kWholeWarp, lower);
  write_status(__any_sync(kWholeWarp, (maximum & 1) != 0));
  find_sharing_row();
  find_leaving_id();
  threshold_ = kNoCode;  // nothing is kept
  if (m_ > -kInfinity) {
    if (is_greedy()) {
      threshold_ = bound;
    } else {
      scale_ = depth_scale(shared_.parameters.temperature);
      gather(lists, bound);
      find_thresholds();
      if (!in_candidates_) return false;
    }
  }
  if constexpr (kMore) keep_mass();
  draw();
  if constexpr (kMore) write_more();
  advance();
  return true;
}

// Makes the first tokens of the lists the candidates: about as many as the filters need. From the code `bound`
// on, the lists hold all tokens of the row. finish() has copied them in place of the part's logits.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::gather(const Lists& lists, uint64_t bound) {
  static_assert(kWarpSize % 4 == 0, "a list is a multiple of what a thread reads at a time");
  const auto* pairs = reinterpret_cast<const Pair*>(copy_);
  const int count = lists.parts * lists.listed / 2;
  const auto over_lists = [&](uint64_t, const auto& visit) {
#pragma unroll 1
    for (int i = 2 * static_cast<int>(threadIdx.x); i < count; i += 2 * kThreads) {
      const Pair four[2] = {pairs[i], pairs[i + 1]};
#pragma unroll
      for (int j = 0; j < 4; ++j) visit(four[j / 2].codes[j % 2]);
    }
  };
  const Filters filters = this->filters();
  const uint64_t least = bound > kLowestCode ? bound : kLowestCode;
  const int wanted = filters.has_top_k ? filters.max_kept : filters.min_kept;
  uint64_t low = narrow(least, first_code(order_key(m_) + 1), wanted, kMaxCandidates, over_lists);
  if (!filters.has_top_k) {
    const uint64_t deepest = first_code(key_at_depth(filters.depth_cut));
    low = low < deepest ? low : deepest > least ? deepest : least;
  }
  if (threadIdx.x == 0) shared_.appended = 0;
  __syncthreads();
  over_lists(low, [&](uint64_t code) {
    if (code >= low) append(code);
  });
  share({low, first_code(order_key(m_) + 1), 0, 0});
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_SPLIT_CUH_
