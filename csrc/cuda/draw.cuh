// Step 14 and the other results of a row: tokens, logprobs, filtered logits, and the advanced history.
#ifndef LLM_SAMPLING_CUDA_DRAW_CUH_
#define LLM_SAMPLING_CUDA_DRAW_CUH_

#include <math.h>
#include <stdint.h>

#include "../history.h"
#include "candidates.cuh"
#include "passes.cuh"
#include "row_sampler.cuh"

namespace llm_sampling {

// 14 draw. The kept set of a row that somebody overwrites between two passes may be found to be empty.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::draw() {
  const int samples = args_.num_samples;
  const bool is_greedy = this->is_greedy();
  const int64_t total = is_greedy                    ? 1
                        : kIsSplit || in_candidates_ ? mass_from(threshold_)
                                                     : total_mass_;
  const bool is_empty = m_ == -kInfinity || threshold_ == kNoCode || total == 0;
  if (is_empty || is_greedy) {
    if (cluster_.rank() != 0) return;
    for (int i = static_cast<int>(threadIdx.x); i < samples; i += kThreads) {
      write(i, is_empty ? -1 : id_of(threshold_), 1, 1);
    }
  } else if (kIsSplit || in_candidates_) {
    if (cluster_.rank() == 0) draw_from_candidates(total);
  } else {
    draw_from_tiles();
  }
}

// A uniform integer in [0, total); the total must not be 0.
template <int kDtype, Layout kLayout, bool kMore>
__device__ int64_t RowSampler<kDtype, kLayout, kMore>::random_below(int draw, int64_t total) const {
  const Parameters& row = shared_.parameters;
  if (draw == 0) return scaled_random(row.random, total);
  return scaled_random(random_bits(row.seed, row.position, static_cast<uint32_t>(draw)), total);
}

// First works out, for each candidate, the mass of the kept candidates with smaller ids, in `running`.
// Then each warp takes a draw, and the lane writes it whose candidate holds the random number.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::draw_from_candidates(int64_t total) {
  const int count = shared_.candidates.count;
  const uint64_t threshold = threshold_;
  __syncthreads();
  compare_all(
      count,
      [=](uint64_t other, uint64_t code) {
        // The lower bits of a code are larger for smaller ids.
        const auto bits = [](uint64_t of) { return static_cast<uint32_t>(of) & kLastId; };
        return other >= threshold && bits(other) > bits(code);
      },
      [&](int own, uint64_t, int, int64_t mass) { shared_.running[own] = mass; }
  );
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x / kWarpSize; i < args_.num_samples; i += kWarps) {
    const int64_t r = random_below(i, total);
#pragma unroll 1
    for (int own = threadIdx.x % kWarpSize; own < count; own += kWarpSize) {
      const uint64_t code = shared_.codes[own];
      const int64_t w = shared_.masses[own];
      const int64_t below = shared_.running[own];
      if (code >= threshold && below <= r && r < below + w) write(i, id_of(code), w, total);
    }
  }
}

// Each warp takes a draw, in the block whose part holds the token: finds its tile by the running masses,
// then the token within it. The tile is read again for that: where it has lost mass meanwhile, the draw
// fails.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::draw_from_tiles() {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const Threshold threshold(threshold_);
  __syncthreads();  // thread 0 has written mass_before
  const int last = rounds() * kWarps - 1;
  const int64_t own_mass = last < 0 ? 0 : tile_masses_[last];
#pragma unroll 1
  for (int i = warp; i < args_.num_samples; i += kWarps) {
    const int64_t r = random_below(i, total_mass_) - shared_.mass_before;
    if (r < 0 || r >= own_mass) continue;
    const int tile = count_leading(last, [&](int j) { return tile_masses_[j] <= r; });
    const int local = tile / kWarps * kThreads + tile % kWarps * kWarpSize + lane;
    const int vec = first_vec_ + local;
    int64_t w[kVec] = {};
    int64_t sum = 0;
    if (local < vecs()) {
      float x[kVec];
      process_any(vec, x);
#pragma unroll
      for (int t = 0; t < kVec; ++t) {
        w[t] = kept_mass(threshold, x[t], row_.first_id(vec) + t);
        sum += w[t];
      }
    }
    int64_t running = (tile > 0 ? tile_masses_[tile - 1] : 0) + scan_warp(sum);
    const unsigned past = __ballot_sync(kWholeWarp, running > r);
    const int writer = past != 0 ? __ffs(static_cast<int>(past)) - 1 : 0;
    if (lane != writer) continue;
    running -= sum;
    bool is_found = false;
    int token = -1;
    int64_t own = 0;
#pragma unroll
    for (int t = 0; t < kVec; ++t) {
      running += w[t];
      if (is_found || running <= r) continue;
      is_found = true;
      token = row_.first_id(vec) + t;
      own = w[t];
    }
    write(i, token, own, total_mass_);
  }
}

// Writes a token of mass `w` out of `total`, and its logprob. The token is -1, and the status says so, where
// the row has none to draw. The thread that writes draw 0 remembers it for advance().
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::write(
    int draw,
    int token,
    int64_t w,
    int64_t total
) {
  const int64_t row = shared_.parameters.row;
  const int64_t place = row * args_.num_samples + draw;
  args_.tokens[place] = token;
  if (token < 0) atomicOr(args_.status + row, int32_t{LLM_SAMPLING_STATUS_NO_CANDIDATE});
  if (draw == 0) {
    drew_ = true;
    token_ = token;
  }
  if (args_.processed.logprobs != nullptr) {
    const float share = static_cast<float>(w) / static_cast<float>(total);
    args_.processed.logprobs[place] = token >= 0 ? logf(share) : kNan;
  }
  if (args_.raw.logprobs != nullptr) {
    const float x = token >= 0 ? raw_logit(token) : kNan;
    args_.raw.logprobs[place] = (x == raw_m_ ? 0.0f : x - raw_m_) - raw_log_sum_;
  }
}

// A token's logit after step 1.
template <int kDtype, Layout kLayout, bool kMore>
__device__ float RowSampler<kDtype, kLayout, kMore>::raw_logit(int id) const {
  const unsigned char* first = row_.aligned + row_.shift * kLogitBytes<kDtype>;
  return widen<kDtype>(first + static_cast<int64_t>(id) * kLogitBytes<kDtype>);
}

// Finds the largest raw logit, then the logarithm of the sum of exp(x - raw_m_). It reads global memory,
// because the copy has -inf in place of the marked tokens' logits.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::find_raw_sum() {
  uint64_t sum[1] = {0};
  // Two passes: a loop, so that their code is there once.
#pragma unroll 1
  for (bool sums = false;; sums = true) {
    float own = sums ? 0.0f : -kInfinity;
#pragma unroll 1
    for (int round = 0; round < rounds(); ++round) {
      const int local = round * kThreads + static_cast<int>(threadIdx.x);
      if (local >= vecs()) continue;
      float x[kVec];
      const int vec = first_vec_ + local;
      load<kDtype, false>(row_, row_.aligned + static_cast<int64_t>(vec) * kVecBytes, vec, x);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float valid = x[i] == x[i] ? x[i] : -kInfinity;
        if (sums) {
          own += valid == raw_m_ ? 1.0f : expf(valid - raw_m_);
        } else {
          own = fmaxf(own, valid);
        }
      }
    }
    // A sum is added up in fixed point with 40 fractional bits, which holds a sum of 2^20.
    sum[0] = sums ? static_cast<uint64_t>(own * 0x1p40f) : order_key(own);
    if (sums) break;
    cluster_.combine(sum, Larger());
    raw_m_ = from_order_key(static_cast<uint32_t>(sum[0]));
  }
  cluster_.combine(sum, Add());
  raw_log_sum_ = logf(static_cast<float>(sum[0]) * 0x1p-40f);
}

// Writes the results of a row that draws nothing; `index` is what find_parameters() has returned.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::write_nothing(int64_t index) {
  const int first = cluster_.rank() * kThreads + static_cast<int>(threadIdx.x);
  const int threads = cluster_.blocks() * kThreads;
  if (args_.filtered != nullptr) {
    float* out = args_.filtered + int64_t{index_} * args_.filtered_stride;
    for (int64_t id = first; id < args_.vocab_size; id += threads) out[id] = -kInfinity;
  }
  if (args_.tokens == nullptr) return;
  const int64_t place = int64_t{index_} * args_.num_samples;
  for (int64_t draw = first; draw < args_.num_samples; draw += threads) {
    args_.tokens[place + draw] = -1;
    if (args_.processed.logprobs != nullptr) args_.processed.logprobs[place + draw] = kNan;
    if (args_.raw.logprobs != nullptr) args_.raw.logprobs[place + draw] = kNan;
  }
  if (first != 0) return;
  args_.status[index_] =
      index == kTextFull ? int32_t{LLM_SAMPLING_STATUS_TEXT_FULL} : status_of_nothing(index);
}

template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::write_filtered() {
  const float t = is_greedy() ? 1.0f : shared_.parameters.temperature;
  // Where the quotient of m would not be finite, m is subtracted first; fminf makes 0 of inf - inf.
  const bool is_shifted = !(fabsf(m_ / t) < kInfinity);
  const float base = is_shifted ? m_ : 0.0f;
  const float most = is_shifted ? 0.0f : kInfinity;
  const Threshold threshold(threshold_);
  float* out = args_.filtered + shared_.parameters.row * args_.filtered_stride;
  over_vecs([&](int, int vec, const float (&x)[kVec]) {
    if (vec >= first_vec_ + vecs()) return;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const int id = row_.first_id(vec) + i;
      if (id < 0 || id >= row_.vocab_size) continue;
      const float divided = fmaxf(fminf(x[i] - base, most) / t, kLowest);  // what is kept is finite
      out[id] = threshold.is_reached(x[i], id) ? divided : -kInfinity;
    }
  });
}

// Where parameters belong to slots: whether another row names a slot of this one.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::find_sharing_row() {
  if (args_.param_slots == nullptr) return;
  bool is_found = false;
  for (int64_t row = threadIdx.x; row < args_.rows; row += kThreads) {
    if (row == index_) continue;
    is_found |= args_.param_slots[row] == args_.param_slots[index_];
    if (args_.seen != nullptr) is_found |= args_.slots[row] == args_.slots[index_];
  }
  const bool is_shared = __syncthreads_count(is_found) > 0;
  if (threadIdx.x == 0) shared_.is_shared = is_shared;
}

// Whether recording one more id moves the window, so that its first id leaves it.
__device__ __forceinline__ bool has_leaving_id(const SlotHistory& history, Places window) {
  return window.begin < window.end && window_of(history, window.end + 1).begin > window.begin;
}

// Where recording the token moves a window: whether the id that leaves it occurs in it a second time. All threads
// look for it, because the window may be long; record() is run by one.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::find_leaving_id() {
  if (args_.windows == nullptr || args_.advance == LLM_SAMPLING_ADVANCE_NEVER) return;
  bool is_found = false;
  const SlotHistory history = slot_history(args_, history_slot(args_, index_));
  const Places window = window_of(history, text_length(history));
  if (has_leaving_id(history, window)) {
    const int32_t leaving = text_id(history, window.begin);
    for (int64_t place = window.begin + 1 + threadIdx.x; place < window.end; place += kThreads) {
      is_found |= text_id(history, place) == leaving;
    }
  }
  const bool stays = __syncthreads_count(is_found) > 0;
  if (threadIdx.x == 0) shared_.leaving_id_stays = stays;
}

// Records the token of draw 0, in the thread that has drawn it.
template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::advance() {
  // Other threads may still read the history, for further draws or for the filtered logits.
  const bool is_history_read = args_.filtered != nullptr || args_.num_samples > 1;
  if (is_history_read) cluster_.sync();
  if (drew_) record();
}

// Adds the token of draw 0 to the row's history and 1 to its position. Atomics whose results are not used: the
// thread waits for none of them.
template <int kDtype, Layout kLayout, bool kMore>
__device__ void RowSampler<kDtype, kLayout, kMore>::record() {
  const Parameters& row = shared_.parameters;
  if (token_ < 0 || !is_recorded(args_, row.row)) return;
  if (args_.param_slots != nullptr && shared_.is_shared) return;
  const int64_t index = parameter_index(args_, row.row);
  if (index >= 0 && args_.position_of != LLM_SAMPLING_POSITION_OF_TEXT) {
    *position_place(args_, row.row, index) = static_cast<int64_t>(row.position + 1);
  }
  if (args_.seen == nullptr) return;
  const SlotHistory history = slot_history(args_, row.slot);
  bool is_counted = true;
  if (history.text != nullptr) {
    const int64_t length = text_length(history);
    if (length == history.max_text_length) return;  // it has been changed since the row began
    history.text[length] = token_;
    *history.text_length = length + 1;
    is_counted = history.window != 0;
    const Places window = window_of(history, length);
    const int32_t leaving = has_leaving_id(history, window) ? text_id(history, window.begin) : -1;
    if (leaving >= 0) {
      if (!shared_.leaving_id_stays) {
        atomicAnd(history.seen + (leaving >> 5), static_cast<int32_t>(~(1u << (leaving & 31))));
      }
      if (window.begin >= history.prompt_length) atomicAdd(history.counts + leaving, -1);
    }
  }
  if (is_counted) {
    // After the bit of the id that leaves is cleared, because both may be the same id.
    atomicOr(history.seen + (token_ >> 5), static_cast<int32_t>(1u << (token_ & 31)));
    atomicAdd(history.counts + token_, 1);
  }
  atomicAdd(reinterpret_cast<unsigned long long*>(history.length), 1ull);
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_DRAW_CUH_
