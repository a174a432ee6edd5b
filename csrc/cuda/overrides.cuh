// Ids that count for one call: the bits and counts of a row's history that differ from those in memory.
//
// The history is not the kernel's to change before the token is drawn, so each block lists, once, the tokens
// whose bit or count the extra ids change: the extra ids themselves, and the ids of the text that leave the
// window because of them. Where bits and counts are read, the list comes first.
#ifndef LLM_SAMPLING_CUDA_OVERRIDES_CUH_
#define LLM_SAMPLING_CUDA_OVERRIDES_CUH_

#include <stdint.h>

#include "../history.h"
#include "row_sampler.cuh"

namespace llm_sampling {

static_assert(kMaxOverrides <= kThreads, "a thread has at most one entry to make");

// Makes the list. A thread makes the entry of an extra id or of a place of the text that leaves the window.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::list_overrides() {
  constexpr int kExtra = LLM_SAMPLING_MAX_EXTRA_OUTPUT;
  Overrides& list = shared_.overrides;
  const int thread = static_cast<int>(threadIdx.x);
  const SlotHistory history = slot_history(args_, history_slot(args_, index_));
  const int64_t length = history.text != nullptr ? text_length(history) : 0;
  const int64_t old_begin = window_of(history, length).begin;
  int32_t id = -1;
  if (thread < args_.num_extra_output) {
    id = args_.extra_output[int64_t{index_} * args_.num_extra_output + thread];
  }
  if (id < 0 || id >= row_.vocab_size) id = -1;
  // What threads read of the history may differ, if somebody changes it: no barrier depends on it.
  const int64_t end = length + __syncthreads_count(id >= 0);
  const int64_t begin = window_of(history, end).begin;
  const int64_t left_end = begin < length ? begin : length;
  const int64_t place = length + cluster_.scan(id >= 0 ? 1 : 0) - 1;
  if (place < begin) id = -1;
  const int64_t leaving = old_begin + thread - kExtra;
  if (thread >= kExtra)
    id = thread < kMaxOverrides && leaving < left_end ? text_id(history, leaving) : -1;
  if (thread < kMaxOverrides) {
    shared_.listing.ids[thread] = id;
    shared_.listing.stays[thread] = 0;
  }
  __syncthreads();
  int32_t change = 0;
  bool is_extra = false;  // whether it is an extra id inside of the window
  bool is_first = id >= 0;
#pragma unroll 1
  for (int i = 0; i < kMaxOverrides; ++i) {
    if (shared_.listing.ids[i] != id) continue;
    if (i < thread) is_first = false;
    if (i < kExtra) {
      is_extra = true;
      ++change;
    } else if (old_begin + i - kExtra >= history.prompt_length) {
      --change;
    }
  }
  const int count = __syncthreads_count(is_first);
  if (thread < kMaxOverrides) shared_.listing.ids[thread] = is_first ? id : -1;
  if (thread == 0) list.count = count;
  __syncthreads();
  if (is_first) {
    int before = 0;
#pragma unroll 1
    for (int i = 0; i < kMaxOverrides; ++i) {
      const int32_t other = shared_.listing.ids[i];
      before += other >= 0 && other < id ? 1 : 0;
    }
    list.keys[before] = static_cast<uint32_t>(id) * 2 + (is_extra ? 1 : 0);
    list.counts[before] = static_cast<int32_t>(
        static_cast<uint32_t>(history.counts[id]) + static_cast<uint32_t>(change)
    );
  }
  __syncthreads();
  // An id that has left at one place may be at another. Without places that leave there is nothing to find.
  const int64_t first = left_end > old_begin ? left_end : length;
#pragma unroll 1
  for (int64_t i = first + thread; i < length; i += kThreads) {
    const int entry = list.find(text_id(history, i));
    if (entry >= 0) shared_.listing.stays[entry] = 1;
  }
  __syncthreads();
  if (thread < count) list.keys[thread] |= shared_.listing.stays[thread];
  __syncthreads();
}

// The bits of `width` ids from `first` on, as the list has them; `first` may lie before the row.
__device__ __forceinline__ uint32_t Overrides::over(uint32_t bits, int first, int width) const {
#pragma unroll 1
  for (int i = place_of(first > 0 ? first : 0); i < count; ++i) {
    const int bit = static_cast<int>(keys[i] >> 1) - first;
    if (bit >= width) break;
    bits = (keys[i] & 1) != 0 ? bits | 1u << bit : bits & ~(1u << bit);
  }
  return bits;
}

// Replaces the counts of the marked tokens of this block's copy by those of the overrides.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::override_counts(const Copy& copy) const {
  const Overrides& list = shared_.overrides;
  const int first = row_.first_id(first_vec_);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < list.count; i += kThreads) {
    const int offset = static_cast<int>(list.keys[i] >> 1) - first;
    if ((list.keys[i] & 1) == 0 || offset < 0 || offset >= vecs() * kVec) continue;
    const uint32_t lower = copy.marked[offset / 32] & ((1u << offset % 32) - 1);
    memcpy(
        copy.scores + copy.places[offset / 32] + __popc(lower),
        &list.counts[i],
        sizeof(int32_t)
    );
  }
}

// How often the output holds a token.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ int32_t RowSampler<kDtype, kLayout, kMore>::times_of(int id) const {
  const int32_t* counts = shared_.counts;
  if (counts == nullptr) return 0;
  if (args_.extra_output != nullptr) {
    const int entry = shared_.overrides.find(id);
    if (entry >= 0) return shared_.overrides.counts[entry];
  }
  return counts[id];
}

// Whether a penalty is on, and prompt or output holds a token.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ bool RowSampler<kDtype, kLayout, kMore>::is_seen(int id) const {
  if (row_.seen.words == nullptr) return false;
  if (args_.extra_output != nullptr) {
    const int entry = shared_.overrides.find(id);
    if (entry >= 0) return (shared_.overrides.keys[entry] & 1) != 0;
  }
  return (row_.seen.words[id >> 5] >> (id & 31) & 1) != 0;
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_OVERRIDES_CUH_
