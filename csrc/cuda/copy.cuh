// Where a row is, its copy in shared memory, and steps 1 to 6 of its vecs.
//
// All copies to shared memory are started before any is waited for, except where one tells the address of
// another. The logits of a copy are as they came; bits and counts are those of the block's part.
#ifndef LLM_SAMPLING_CUDA_COPY_CUH_
#define LLM_SAMPLING_CUDA_COPY_CUH_

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_pipeline_primitives.h>
#endif

#include "../rows.h"
#include "overrides.cuh"
#include "row_sampler.cuh"

namespace llm_sampling {

// Starts a copy to shared memory; it has arrived once the same thread returns from wait_for_copies().
template <int kBytes>
__device__ __forceinline__ void start_copy(void* to, const void* from) {
  __pipeline_memcpy_async(to, from, kBytes);
}
__device__ __forceinline__ void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// ---- where the row is ----

// Returns the number of vecs of this block's part.
template <int kDtype, Layout kLayout, bool kMore>
__device__ int RowSampler<kDtype, kLayout, kMore>::locate_logits() {
  const unsigned char* logits = static_cast<const unsigned char*>(args_.logits);
  logits += int64_t{index_} * args_.logits_stride * kLogitBytes<kDtype>;
  const unsigned beyond = static_cast<unsigned>(reinterpret_cast<uintptr_t>(logits) & 15);
  row_.aligned = logits - beyond;
  row_.shift = static_cast<int>(beyond) / kLogitBytes<kDtype>;
  row_.vocab_size = static_cast<int>(args_.vocab_size);
  first_vec_ = part() * part_vecs_;
  const int left = row_.vecs() - first_vec_;
  return left < 0 ? 0 : left < part_vecs_ ? left : part_vecs_;
}

// The index of the row's parameters, or what is negative: the row has none, or its text has no room. All
// blocks agree on it, so that all of them leave or none does.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ int64_t RowSampler<kDtype, kLayout, kMore>::find_parameters() {
  if (args_.param_slots == nullptr && args_.text == nullptr) return index_;
  const int64_t index = parameter_index(args_, index_);
  const bool is_full = index >= 0 && is_text_full(args_, index_);
  return cluster_.common(is_full ? kTextFull : index);
}

// Nobody has checked the values that a call points to. This makes out of any value one with which the kernel
// ends, and leaves a valid one as it is.
__device__ __forceinline__ float valid_temperature(float temperature) {
  return temperature >= 0.0f && temperature < kInfinity ? temperature : 1.0f;
}

// Reads everything but the logits; `index` is that of the parameters. Thread 0 alone reads what is not needed
// before the first barrier.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::read_parameters(int64_t index, int vecs) {
  const Entries biases = bias_entries(args_, index);
  row_.bias_count = static_cast<int>(biases.count);
  const int64_t slot = args_.seen != nullptr ? history_slot(args_, index_) : 0;
  Penalties penalties = {
      args_.repetition_penalty[index],
      args_.frequency_penalty[index],
      args_.presence_penalty[index]
  };
  if (args_.repetition_penalty_scope != nullptr && args_.repetition_penalty_scope[index] != 0) {
    penalties.repetition = -penalties.repetition;
  }
  const int32_t* counts = locate_bits(slot, penalties);
  row_.has_list = kMore && args_.dry_multiplier != nullptr && args_.list_counts[index_] > 0;
  row_.is_plain = !row_.has_bias_or_mask() && !row_.has_marks();
  if (threadIdx.x != 0) return;
  shared_.vecs = vecs;
  shared_.marked_count = 0;
  shared_.candidates.count = 0;
  Parameters& own = shared_.parameters;
  own.temperature = valid_temperature(args_.temperature[index]);
  own.top_p = fmaxf(args_.top_p[index], 0.0f);  // 0 for NaN
  own.depth_cut = depth_cut(args_, index);
  own.top_k = args_.top_k[index];
  own.min_tokens_to_keep = args_.min_tokens_to_keep[index];
  own.seed = args_.seed != nullptr ? static_cast<uint64_t>(args_.seed[index]) : 0;
  own.position = args_.tokens != nullptr ? position(args_, index_, index) : 0;
  own.slot = slot;
  own.row = index_;
  own.random = random_bits(own.seed, own.position, 0);
  shared_.penalties = penalties;
  shared_.counts = counts;
  shared_.bias_first = biases.begin;
}

// Finds the row's token bitmask, and its history where a penalty is on. Returns the output counts, or null
// where no penalty needs them.
template <int kDtype, Layout kLayout, bool kMore>
__device__ const int32_t* RowSampler<kDtype, kLayout, kMore>::locate_bits(
    int64_t slot,
    const Penalties& penalties
) {
  row_.allowed = {nullptr};
  if (args_.allowed_mask != nullptr) {
    const int32_t* words = args_.allowed_mask + int64_t{index_} * args_.allowed_mask_stride;
    row_.allowed.words = reinterpret_cast<const uint32_t*>(words);
  }
  row_.seen = {nullptr};
  const bool has_repetition = fabsf(penalties.repetition) != 1.0f;
  const bool has_output_penalty = penalties.frequency != 0.0f || penalties.presence != 0.0f ||
                                  (has_repetition && penalties.repetition < 0.0f);
  if (args_.seen == nullptr || (!has_repetition && !has_output_penalty)) return nullptr;
  row_.seen.words = reinterpret_cast<const uint32_t*>(args_.seen + slot * args_.seen_stride);
  return has_output_penalty ? args_.counts + slot * args_.counts_stride : nullptr;
}

// ---- the copy ----

template <int kDtype, Layout kLayout, bool kMore>
template <int kUnrolled>
__device__ void RowSampler<kDtype, kLayout, kMore>::copy_logits(int vecs) {
  if (vecs == 0) return;
  const unsigned char* from = row_.aligned + static_cast<int64_t>(first_vec_) * kVecBytes;
  const int thread = static_cast<int>(threadIdx.x);
  const int whole = row_.is_whole(first_vec_) ? 0 : 1;
  const int end = row_.is_whole(first_vec_ + vecs - 1) ? vecs : vecs - 1;
#pragma unroll(kUnrolled)
  for (int local = whole + thread; local < end; local += kThreads) {
#pragma unroll
    for (int i = 0; i < kVecBytes; i += 16) {
      start_copy<16>(copy_ + local * kVecBytes + i, from + local * kVecBytes + i);
    }
  }
  if (thread == 0 && whole > 0) copy_edge(copy_, from, row_.first_id(first_vec_));
  if (thread == kWarpSize && end < vecs && vecs > whole) {
    const int first = row_.first_id(first_vec_ + vecs - 1);
    copy_edge(copy_ + (vecs - 1) * kVecBytes, from + (vecs - 1) * kVecBytes, first);
  }
}

// Copies a vec that reaches beyond the row, with -inf for the ids outside of it.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::copy_edge(
    unsigned char* to,
    const unsigned char* from,
    int first
) const {
  LogitWord words[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const bool is_inside = first + i >= 0 && first + i < row_.vocab_size;
    words[i] = is_inside ? reinterpret_cast<const LogitWord*>(from)[i] : kLowestBits<kDtype>;
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) memcpy(to + i * sizeof(LogitWord), &words[i], sizeof(LogitWord));
}

// Copies the bits of mask, history and list. Each marked token gets a place of its own for its output count,
// which is copied too, and later for its score. Returns once all copies have arrived.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::copy_bits(int vecs) {
  const Copy copy = copy_of(part());
  const int first = row_.first_id(first_vec_);
  const int words = (vecs + 3) / 4;
  const int thread = static_cast<int>(threadIdx.x);
  if (row_.allowed.words != nullptr) {
#pragma unroll 4
    for (int i = thread; i < words; i += kThreads) {
      copy.allowed[i] = row_.allowed.word_at(first + i * 32, row_.vocab_size);
    }
  }
  if (row_.has_marks()) {
    int count = 0;
    if (row_.seen.words != nullptr) {
#pragma unroll 4
      for (int i = thread; i < words; i += kThreads) {
        copy.marked[i] = row_.seen.word_at(first + i * 32, row_.vocab_size);
        count += __popc(copy.marked[i]);
      }
    }
    if (row_.has_list || args_.extra_output != nullptr) {
      count = 0;
#pragma unroll 1
      for (int i = thread; i < words; i += kThreads) {
        copy.marked[i] =
            marks_over(row_.seen.words != nullptr ? copy.marked[i] : 0, first + i * 32, 32, index_);
        count += __popc(copy.marked[i]);
      }
    }
    __syncthreads();  // thread 0 has set marked_count to 0 and found the counts
    const int32_t* counts = shared_.counts;
    const int before = static_cast<int>(scan_warp(count));
    int place = 0;
    if (thread % kWarpSize == kWarpSize - 1) {
      place = static_cast<int>(atomicAdd(&shared_.marked_count, static_cast<uint32_t>(before)));
    }
    place = __shfl_sync(kWholeWarp, place, kWarpSize - 1) + before - count;
#pragma unroll 1
    for (int i = thread; i < words; i += kThreads) {
      copy.places[i] = static_cast<uint16_t>(place);
#pragma unroll 1
      for (uint32_t marked = copy.marked[i]; marked != 0; marked &= marked - 1, ++place) {
        if (place >= kMaxScores) continue;
        const int id = first + i * 32 + __ffs(static_cast<int>(marked)) - 1;
        shared_.marked_ids[place] = static_cast<uint32_t>(id);
        if (counts != nullptr) start_copy<4>(copy.scores + place, counts + id);
      }
    }
  }
  wait_for_copies();
}

// Steps 1 to 5a of the marked tokens, divided evenly among the threads: stores their scores, replaces their
// logits in the copy by -inf, and starts the maxima of tiles and threads. Returns whether one is NaN.
template <int kDtype, Layout kLayout, bool kMore>
__device__ bool RowSampler<kDtype, kLayout, kMore>::score() {
  const Copy copy = copy_of(part());
  const int first = row_.first_id(first_vec_);
  const int count = static_cast<int>(shared_.marked_count);
  const int tiles = rounds() * kWarps;
  const Penalties penalties = shared_.penalties;
  bool any_nan = false;
  const bool has_counts = shared_.counts != nullptr;
  if (args_.extra_output != nullptr && has_counts) override_counts(copy);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < tiles; i += kThreads) tile_keys_[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const int id = static_cast<int>(shared_.marked_ids[i]);
    const int offset = id - first;
    const int local = offset / kVec;
    unsigned char* place = copy.logits + offset * kLogitBytes<kDtype>;
    float x[1] = {widen<kDtype>(place)};
    const auto lowest = kLowestBits<kDtype>;
    memcpy(place, &lowest, sizeof(lowest));
    add_bias(args_, row_, shared_.bias_first, id, x);
    if (row_.allowed.words != nullptr) apply_mask(copy.allowed[local / 4] >> offset % 32, x);
    int32_t times = 0;
    if (has_counts) memcpy(&times, copy.scores + i, sizeof(times));
    x[0] = score_of(penalties, x[0], id, times);
    copy.scores[i] = x[0];
    any_nan |= x[0] != x[0];
    const float value = canonical(x[0]);
    // Each token is in exactly one maximum of one thread; which one does not matter. With a bias or a mask,
    // find_tile_maxima() looks at the scores too.
    if (!row_.has_bias_or_mask()) largest_[0] = fmaxf(largest_[0], value);
    const int tile = local / kThreads * kWarps + local % kThreads / kWarpSize;
    atomicMax(&tile_keys_[tile], order_key(value));
  }
  __syncthreads();
  return any_nan;
}

// ---- steps 3 to 5a of a token ----

// Where the list of a row is.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ RowList RowSampler<kDtype, kLayout, kMore>::row_list(int64_t row) const {
  const int64_t words = row * ((row_.vocab_size + 31) / 32);
  const float* amounts = args_.list_amounts + row * args_.list_capacity;
  return {args_.list_bits + words, args_.list_before + words, amounts};
}

// The marks of `width` ids from `first` on, which may lie before the row, where the history in memory has these
// bits and a penalty is on.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ uint32_t RowSampler<kDtype, kLayout, kMore>::marks_over(
    uint32_t bits,
    int first,
    int width,
    int64_t row
) const {
  if (args_.extra_output != nullptr && row_.seen.words != nullptr) {
    bits = shared_.overrides.over(bits, first, width);
  }
  if (row_.has_list) {
    const Bits own = {reinterpret_cast<const uint32_t*>(row_list(row).bits)};
    bits |= own.word_at(first, row_.vocab_size) & (width < 32 ? (1u << width) - 1 : ~0u);
  }
  return bits;
}

// Steps 3 to 5a of a marked token, which the output holds `count` times.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ float RowSampler<kDtype, kLayout, kMore>::score_of(
    const Penalties& penalties,
    float x,
    int id,
    int32_t count
) const {
  if (!row_.has_list || is_seen(id)) x = penalize(penalties, x, count);
  if (!row_.has_list) return x;
  // 5a the list. The place of an amount is the number of listed tokens with smaller ids.
  const RowList list = row_list(shared_.parameters.row);
  const uint32_t bits = static_cast<uint32_t>(list.bits[id >> 5]);
  const uint32_t bit = 1u << (id & 31);
  const int place = list.before[id >> 5] + __popc(bits & (bit - 1));
  if ((bits & bit) == 0 || place < 0 || place >= args_.list_capacity) return x;
  return lowered(x, list.amounts[place]);
}

// ---- steps 1 to 6 of a vec ----

template <int kDtype, Layout kLayout, bool kMore>
__device__ Copy RowSampler<kDtype, kLayout, kMore>::copy_of(int block) const {
  unsigned char* base = kIsSplit || block == part() ? copy_ : in_block(copy_, block);
  return Copy(base, part_vecs_, kLogitBytes<kDtype>);
}

// Whether a block has stored the scores of all marked tokens of its part.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ bool RowSampler<kDtype, kLayout, kMore>::has_scores(int block) const {
  if (!kCopied || !row_.has_marks()) return false;
  const bool is_own = kIsSplit || block == part();
  return *(is_own ? &shared_.marked_count : in_block(&shared_.marked_count, block)) <= kMaxScores;
}

// Where a vec's logits are read from; `local` is the vec's index within the part that holds it.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ const unsigned char* RowSampler<kDtype, kLayout, kMore>::logits_of(
    const Copy& copy,
    int local,
    int vec
) const {
  return kCopied ? copy.logits + local * kVecBytes
                 : row_.aligned + static_cast<int64_t>(vec) * kVecBytes;
}

// Steps 1 to 5a of a vec. `copy` and `is_scored` are those of the block whose part holds the vec, and
// `local` is its index there.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::process(
    const Copy& copy,
    bool is_scored,
    int local,
    int vec,
    float (&x)[kVec]
) const {
  load<kDtype, kCopied>(row_, logits_of(copy, local, vec), vec, x);
  if (row_.is_plain) return;
  const int first = row_.first_id(vec);
  add_bias(args_, row_, shared_.bias_first, first, x);
  const int word = local / 4;
  const int bit = local % 4 * kVec;
  if (row_.allowed.words != nullptr) {
    const unsigned allowed =
        kCopied ? copy.allowed[word] >> bit : row_.allowed.of_vec(first, row_.vocab_size);
    apply_mask(allowed, x);
  }
  if (!row_.has_marks()) return;
  const uint32_t here = kCopied ? copy.marked[word] : 0;
  unsigned marked = here >> bit & 0xff;
  if (!kCopied) {
    if (row_.seen.words != nullptr) marked = row_.seen.of_vec(first, row_.vocab_size);
    marked = marks_over(marked, first, kVec, shared_.parameters.row);
  }
  const float* scores = nullptr;
  if (kCopied && is_scored)
    scores = copy.scores + copy.places[word] + __popc(here & ((1u << bit) - 1));
  // A vec has few marked tokens, so a loop over them is shorter than the unrolled body for all eight.
#pragma unroll 1
  for (; marked != 0; marked &= marked - 1) {
    const int next = __ffs(static_cast<int>(marked)) - 1;
    float value = 0.0f;
    if (kCopied && is_scored) {
      value = *scores++;
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) value = i == next ? x[i] : value;
      value = score_of(shared_.penalties, value, first + next, times_of(first + next));
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = i == next ? value : x[i];
  }
}

// Steps 1 to 6 of any vec of the row, whichever block's part holds it.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::process_any(
    int vec,
    float (&x)[kVec]
) const {
  const int owner = vec / part_vecs_;
  process(copy_of(owner), has_scores(owner), vec - owner * part_vecs_, vec, x);
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[i] = canonical(x[i]);
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_COPY_CUH_
