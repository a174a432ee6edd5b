// A row that is split over blocks without a cluster, for devices that have none and for few rows.
//
// No block waits for another one. Each block takes a part of the row, as though that were the row: it applies
// steps 1 to 6 and lists the first tokens of its part in the order, as many as the row's filters may keep. The
// list goes to the workspace in global memory. Then the block adds 1 to the row's counter, and the block that
// finds there that it is the last one finishes the row: the first tokens of the row are among those of the
// lists. It also sets the counter back to 0, for the next launch.
//
// Masses need the row's largest logit, which is known only when all parts are done. So rows that need the mass
// of all tokens (top-p without top-k, or no filter), and rows that may keep more tokens than a list holds, are
// sampled by the last block alone, as in a launch with one block for each row. So is a row whose lists have
// more tokens at the end of the kept set than fit the candidates, and one whose blocks have not all read the
// same parameters, because somebody has overwritten them meanwhile.
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
#include "row_sampler.cuh"
#include "select.cuh"

namespace llm_sampling {

constexpr int kListedAtDepth = 64;  // tokens that a part lists for a cut by depth alone
constexpr int kBinBits = 9;
static_assert(kBins == 1 << kBinBits, "a code's distance has a bin");

// The tokens that search() is for: those of the block's part of a split row, otherwise those of the row.
template <int kDtype, Layout kLayout>
__device__ __forceinline__ int RowSampler<kDtype, kLayout>::first_token() const {
  if (!kIsSplit) return 0;
  const int first = row_.first_id(first_vec_);
  return first > 0 ? first : 0;
}
template <int kDtype, Layout kLayout>
__device__ __forceinline__ int RowSampler<kDtype, kLayout>::tokens() const {
  if (!kIsSplit) return row_.vocab_size;
  const int end = row_.first_id(first_vec_ + vecs());
  return (end < row_.vocab_size ? end : row_.vocab_size) - first_token();
}

// Samples a row, or the block's part of it. Returns false if this block must sample the row alone.
template <int kDtype, Layout kLayout>
__device__ bool RowSampler<kDtype, kLayout>::run_part(int parts) {
  auto* counters = static_cast<unsigned char*>(args_.workspace);
  auto* all_lists = reinterpret_cast<PartList*>(counters + args_.rows * kCounterBytes);
  PartList* lists = all_lists + int64_t{index_} * parts;
  const int64_t param_index = find_parameters();
  int wanted = 0;
  if (param_index >= 0) {
    const int vecs = locate_logits();
    copy_logits(vecs);
    read_parameters(param_index, vecs);
    if (args_.extra_output != nullptr && row_.seen.words != nullptr) list_overrides();
    copy_bits(vecs);
    __syncthreads();
    wanted = count_wanted();
  }
  make_list(wanted, lists[split_part_]);
  if (!is_last(reinterpret_cast<uint32_t*>(counters + index_ * kCounterBytes), parts)) return true;
  if (param_index < 0) {
    write_nothing(param_index);
    return true;
  }
  return wanted > 0 && finish({lists, parts, wanted});
}

// How many tokens each part lists; 0 if the row cannot be finished from lists.
template <int kDtype, Layout kLayout>
__device__ __forceinline__ int RowSampler<kDtype, kLayout>::count_wanted() const {
  if (is_greedy()) return 1;
  const Filters filters = this->filters();
  int wanted = filters.max_kept;
  if (!filters.has_top_k) {
    if (filters.need_total()) return 0;
    wanted = filters.min_kept > kListedAtDepth ? filters.min_kept : kListedAtDepth;
  }
  return wanted <= kMaxListed ? wanted : 0;
}

// Writes the part's list; with no tokens wanted, an empty one.
template <int kDtype, Layout kLayout>
__device__ void RowSampler<kDtype, kLayout>::make_list(int wanted, PartList& list) {
  bool any_nan = false;
  if (wanted > 0) {
    any_nan = find_maxima();
    threshold_ = kNoCode;
    const bool has_any = m_ > -kInfinity;
    if (is_greedy()) {
      if (has_any) find_first();
      if (threadIdx.x == 0) list.codes[0] = threshold_;
    } else {
      if (has_any) find_listed(wanted);
      const int found = has_any ? count_from(threshold_) : 0;
      for (int i = static_cast<int>(threadIdx.x); i < wanted; i += kThreads) {
        list.codes[i] = i < found ? shared_.sorted[i] : kNoCode;
      }
    }
  }
  if (threadIdx.x != 0) return;
  list.maximum = static_cast<uint64_t>(order_key(m_)) << 32 | (any_nan ? 1 : 0);
  list.count = static_cast<uint64_t>(wanted);
}

// Finds the threshold of the part's first tokens, and makes them the candidates.
template <int kDtype, Layout kLayout>
__device__ void RowSampler<kDtype, kLayout>::find_listed(int wanted) {
  Filters filters = this->filters();
  filters.max_kept = wanted;
  filters.has_top_k = true;
  const uint64_t end = first_code(order_key(m_) + 1);
  Range range;
  guess_range(filters, 0, range);
  // A range that was guessed, one that was searched for, and where that does not begin at the top, one that
  // does: a loop, so that collect() is inlined once.
#pragma unroll 1
  for (int attempt = 0; attempt < 3; ++attempt) {
    if (attempt == 1) range = search(wanted, false, kLowestCode);
    if (attempt == 2) range = {threshold_, end, 0, 0};
    collect(range);
    threshold_ = threshold_at(wanted, false, kLowestCode);
    if (range.high == end && has_threshold(wanted, false)) return;
  }
}

// Ends the block's part of the work. Returns whether all other blocks of the row have done so before.
template <int kDtype, Layout kLayout>
__device__ __forceinline__ bool RowSampler<kDtype, kLayout>::is_last(uint32_t* counter, int parts) {
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
template <int kDtype, Layout kLayout>
__device__ bool RowSampler<kDtype, kLayout>::finish(const Lists& lists) {
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t found[4] =
      {0, 0, 0, 0};  // largest key, 1 if one is NaN, 1 if a list is of no use, bound
  if (thread < lists.parts) {
    const PartList& list = lists.first[thread];
    const uint64_t maximum = load_shared_by_all(&list.maximum);
    found[0] = maximum >> 32;
    found[1] = maximum & 1;
    found[2] = load_shared_by_all(&list.count) == static_cast<uint64_t>(lists.wanted) ? 0 : 1;
    found[3] = load_shared_by_all(&list.codes[lists.wanted - 1]);
  }
  cluster_.combine(found, Larger());
  if (found[2] != 0) return false;
  m_ = from_order_key(static_cast<uint32_t>(found[0]));
  write_status(found[1] != 0);
  find_sharing_row();
  find_leaving_id();
  threshold_ = kNoCode;  // nothing is kept
  if (m_ > -kInfinity) {
    if (is_greedy()) {
      threshold_ = found[3];
    } else {
      scale_ = depth_scale(shared_.parameters.temperature);
      gather(lists, found[3]);
      find_thresholds();
      if (!in_candidates_) return false;
    }
  }
  draw();
  advance();
  return true;
}

// Makes the first tokens of the lists the candidates: about as many as the filters need. From the code `bound`
// on, the lists hold all tokens of the row. Each iteration divides a range of codes evenly into bins, and goes
// on with the bin in which the filters have enough, as long as the candidates do not hold all of that bin.
template <int kDtype, Layout kLayout>
__device__ void RowSampler<kDtype, kLayout>::gather(const Lists& lists, uint64_t bound) {
  const Filters filters = this->filters();
  const auto over_codes = [&](const auto& visit) {
    const int all = lists.parts * lists.wanted;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < all; i += kThreads) {
      const uint64_t code =
          load_shared_by_all(&lists.first[i / lists.wanted].codes[i % lists.wanted]);
      visit(code);
    }
  };
  const uint64_t end = first_code(order_key(m_) + 1);
  const uint64_t least = bound > kLowestCode ? bound : kLowestCode;
  uint64_t low = least;
  uint64_t high = end;
  int wanted =
      filters.has_top_k ? filters.max_kept : filters.min_kept;  // of the tokens below `high`
  int above = 0;                                                // tokens above that
  while (true) {
    const int bits = 64 - __clzll(static_cast<long long>(high - low - 1));
    const int shift = bits > kBinBits ? bits - kBinBits : 0;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) shared_.bins[i] = 0;
    __syncthreads();
    over_codes([&](uint64_t code) {
      if (code >= low && code < high) atomicAdd(&shared_.bins[(high - 1 - code) >> shift], 1u);
    });
    __syncthreads();
    const int bin = find_bin(wanted);
    if (bin == kBins) break;  // the lists hold fewer tokens
    const uint64_t below = static_cast<uint64_t>(bin + 1) << shift;
    low = below < high - low ? high - below : low;
    if (shift == 0 || above + shared_.held_with <= kMaxCandidates) break;
    high -= static_cast<uint64_t>(bin) << shift;
    above += shared_.held_before;
    wanted -= shared_.held_before;
  }
  if (!filters.has_top_k) {
    const uint64_t deepest = first_code(key_at_depth(filters.depth_cut));
    low = low < deepest ? low : deepest > least ? deepest : least;
  }
  if (threadIdx.x == 0) shared_.appended = 0;
  __syncthreads();
  over_codes([&](uint64_t code) {
    if (code >= low) append(code);
  });
  share({low, end, 0, 0});
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_SPLIT_CUH_
