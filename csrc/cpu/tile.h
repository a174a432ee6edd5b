// Steps 1 to 5: the processed logits of a row, one tile of 512 tokens at a time; and the threshold that
// describes a kept set.
#ifndef LLM_SAMPLING_CPU_TILE_H_
#define LLM_SAMPLING_CPU_TILE_H_

#include <algorithm>
#include <cstdint>

#include "../llm_sampling.h"
#include "../semantics.h"
#include "history.h"

// LLM_SAMPLING_CLONES marks a function that is compiled once per instruction set; the CPU chooses when the
// library is loaded. A build that defines it otherwise, and sets -march, is for one instruction set alone.
// clang-format off
#ifndef LLM_SAMPLING_CLONES
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define LLM_SAMPLING_VERSIONS
#define LLM_SAMPLING_CLONES \
  __attribute__((noinline, flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "arch=x86-64-v2", "default")))
#else
#define LLM_SAMPLING_CLONES __attribute__((noinline))
#endif
#endif
// clang-format on
#define INLINE inline __attribute__((always_inline))

namespace llm_sampling {
namespace {

constexpr int kTile = 512;    // tokens
constexpr int kStripes = 16;  // stripe i of a tile is its tokens j with j mod 16 == i
constexpr int kStripeTokens = kTile / kStripes;
constexpr int kMaskWords = kTile / 32;

// One row's logits, and all that steps 1 to 5 and 9 need.
struct Row {
  const void* logits;
  int32_t dtype;
  int64_t vocab_size;
  const int32_t* bias_ids;  // ascending, unless another thread changes them
  const float* bias_values;
  int64_t bias_count;
  const uint32_t* allowed;   // NULL without a mask
  const uint32_t* seen;      // NULL without penalties
  const int32_t* counts;     // NULL if no penalty needs them
  const Replaced* replaced;  // NULL if the row has no ids that count for one call
  bool is_of_output;         // whether the repetition penalty is for the output alone
  float repetition_penalty;
  float frequency_penalty;
  float presence_penalty;
  const int32_t* listed_ids;    // of step 5a, rising
  const float* listed_amounts;  // what is subtracted from their logits
  int64_t listed_count;
  bool is_changed;  // whether a bias, a penalty or the list may change logits; settle() says so
  float m;          // the row's maximum (step 9), known after the first pass
  float scale;      // s of step 9

  // Whether steps 2 to 5 change nothing.
  bool is_raw() const { return allowed == nullptr && !is_changed; }
  void settle() { is_changed = bias_count > 0 || seen != nullptr || listed_count > 0; }
  int64_t tiles() const { return (vocab_size + kTile - 1) / kTile; }
};

template <typename T, float (*kWiden)(T)>
INLINE void widen(const void* logits, int64_t begin, int count, float* __restrict out) {
  const T* in = static_cast<const T*>(logits) + begin;
  // Prefetch the next tile: the work on this one takes longer than the hardware's prefetcher looks ahead.
  for (int j = 0; j < kTile; j += 64 / sizeof(T)) __builtin_prefetch(in + kTile + j);
  for (int j = 0; j < count; ++j) out[j] = kWiden(in[j]);
}

INLINE float same(float x) { return x; }

INLINE void add_bias(const Row& row, int64_t begin, int count, float* y) {
  const int32_t* end = row.bias_ids + row.bias_count;
  const int32_t* id = std::lower_bound(row.bias_ids, end, static_cast<int32_t>(begin));
  for (; id != end; ++id) {
    const int64_t j = read_once(*id) - begin;
    if (j >= count) break;
    if (j < 0) continue;  // the ids have changed since they were found to ascend
    y[j] = biased(y[j], row.bias_values[id - row.bias_ids]);
  }
}

// The mask of a tile.
struct TileMask {
  const uint32_t* words;  // kMaskWords of them; NULL if every token is allowed
  bool bans_all;
};

// The mask of a tile; past the row's end nothing is allowed. `buffer` is for a tile that the row ends in.
INLINE TileMask tile_mask(const Row& row, int64_t tile, uint32_t* buffer) {
  if (row.allowed == nullptr) return {nullptr, false};
  const uint32_t* words = row.allowed + tile * kMaskWords;
  const int64_t left = row.vocab_size - tile * kTile;
  if (left < kTile) {
    std::fill(std::copy_n(words, (left + 31) / 32, buffer), buffer + kMaskWords, 0);
    words = buffer;
  }
  const uint32_t first = words[0];
  if (first != 0 && first != 0xffffffffu) return {words, false};
  uint32_t differing = 0;
  for (int i = 0; i < kMaskWords; ++i) differing |= words[i] ^ first;
  if (differing != 0) return {words, false};
  return {first == 0 ? words : nullptr, first == 0};
}

// 1 << j. As a table, since SSE2 and NEON test many bits at once, but SSE2 cannot shift by many numbers.
constexpr uint32_t kBit[32] = {
    1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
    1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
    1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
    1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31,
};

// Replaces the values of a tile's banned tokens.
INLINE void replace_banned(const uint32_t* allowed, float replacement, float* __restrict y) {
  for (int word = 0; word < kMaskWords; ++word) {
    const uint32_t bits = allowed[word];
    for (int j = 0; j < 32; ++j) {
      const float x = y[word * 32 + j];
      y[word * 32 + j] = (bits & kBit[j]) != 0 ? x : replacement;
    }
  }
}

// Writes the ascending indices of the set bits among the first `count` bits, and returns how many there
// are. It writes up to 4 elements past the last index.
INLINE int set_bits(const uint32_t* words, int count, int32_t* __restrict indices) {
  int size = 0;
  for (int begin = 0; begin < count; begin += 64) {
    uint64_t bits = read_once(words[begin / 32]);
    if (begin + 32 < count) bits |= static_cast<uint64_t>(read_once(words[begin / 32 + 1])) << 32;
    if (begin + 64 > count) bits &= (uint64_t{1} << (count - begin)) - 1;
    // Four at a time, so that most words take no branch that depends on their bits.
    int32_t* out = indices + size;
    size += __builtin_popcountll(bits);
    do {
      *out++ = begin + __builtin_ctzll(bits | uint64_t{1} << 63), bits &= bits - 1;
      *out++ = begin + __builtin_ctzll(bits | uint64_t{1} << 63), bits &= bits - 1;
      *out++ = begin + __builtin_ctzll(bits | uint64_t{1} << 63), bits &= bits - 1;
      *out++ = begin + __builtin_ctzll(bits | uint64_t{1} << 63), bits &= bits - 1;
    } while (bits != 0);
  }
  return size;
}

// 3 to 5 penalties, for a tile. The indices of the seen tokens are collected first, so that the loads of
// their counts, which miss the caches, do not wait for one another.
INLINE void penalise(const Row& row, int64_t begin, int count, float* __restrict y) {
  constexpr int kWidth =
      8;  // seen tokens at a time; index 0 pads them, and its results are not stored
  int32_t indices[kTile + kWidth];
  alignas(64) float x[kTile];
  alignas(64) int32_t times[kTile];
  const int size = set_bits(row.seen + begin / 32, count, indices);
  const int padded = (size + kWidth - 1) / kWidth * kWidth;
  for (int i = size; i < padded; ++i) indices[i] = 0;
  for (int i = 0; i < padded; ++i) x[i] = y[indices[i]];
  if (row.counts != nullptr) {
    const int32_t* counts = row.counts + begin;
    for (int i = 0; i < padded; ++i) times[i] = counts[indices[i]];
    if (row.replaced != nullptr) row.replaced->replace(begin, indices, size, times);
  }
  if (row.is_of_output) {
    for (int i = 0; i < size; ++i) {
      if (times[i] > 0) x[i] = repetition(x[i], row.repetition_penalty);
    }
  } else {
    for (int i = 0; i < padded; i += kWidth) {
      for (int j = i; j < i + kWidth; ++j) x[j] = repetition(x[j], row.repetition_penalty);
    }
  }
  if (row.counts != nullptr) {
    for (int i = 0; i < padded; i += kWidth) {
      for (int j = i; j < i + kWidth; ++j) {
        const float less = frequency(x[j], row.frequency_penalty, times[j]) - row.presence_penalty;
        x[j] = times[j] > 0 ? less : x[j];
      }
    }
  }
  for (int i = 0; i < size; ++i) y[indices[i]] = x[i];
}

// 3 to 5 penalties, for candidates whose logits are x and whose token ids are id.
INLINE void penalise_candidates(const Row& row, float* x, const uint32_t* id, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if ((row.seen[id[i] >> 5] >> (id[i] & 31) & 1) == 0) continue;
    int32_t times = row.counts == nullptr ? 0 : row.counts[id[i]];
    if (row.replaced != nullptr) row.replaced->replace(id[i], times);
    if (!row.is_of_output || times > 0) x[i] = repetition(x[i], row.repetition_penalty);
    if (times > 0) x[i] = frequency(x[i], row.frequency_penalty, times) - row.presence_penalty;
  }
}

// The listed tokens of a row from an id on.
struct Listed {
  const int32_t* id;
  const int32_t* end;
};

INLINE Listed listed_from(const Row& row, int64_t begin) {
  const int32_t* end = row.listed_ids + row.listed_count;
  return {std::lower_bound(row.listed_ids, end, static_cast<int32_t>(begin)), end};
}

// Whether a tile has a listed token.
INLINE bool has_listed(const Row& row, int64_t begin) {
  if (row.listed_count == 0) return false;
  const auto [first, end] = listed_from(row, begin);
  return first != end && *first < begin + kTile;
}

// Whether steps 2 to 5a without the mask change nothing in a tile.
INLINE bool is_as_given(const Row& row, int64_t begin) {
  if (!row.is_changed) return true;
  return row.bias_count == 0 && row.seen == nullptr && !has_listed(row, begin);
}

// 5a the list, for a tile.
INLINE void lower_listed(const Row& row, int64_t begin, int count, float* y) {
  const auto [first, end] = listed_from(row, begin);
  for (const int32_t* id = first; id != end && *id < begin + count; ++id) {
    y[*id - begin] = lowered(y[*id - begin], row.listed_amounts[id - row.listed_ids]);
  }
}

// 5a the list, for candidates, whose ids rise.
INLINE void lower_candidates(const Row& row, float* x, const uint32_t* id, int64_t size) {
  const int32_t* listed = row.listed_ids;
  const int32_t* end = listed + row.listed_count;
  for (int64_t i = 0; i < size && listed != end; ++i) {
    listed = std::lower_bound(listed, end, static_cast<int32_t>(id[i]));
    if (listed == end || static_cast<uint32_t>(*listed) != id[i]) continue;
    x[i] = lowered(x[i], row.listed_amounts[listed - row.listed_ids]);
  }
}

// The 512 logits of a tile after steps 1 to 5 without the mask, -inf past the row's end. They are written to
// `buffer`, or returned in place if they are float32 and nothing changes them: then another thread may change
// them between two loads. A mask may be applied afterwards, since no bias and no penalty changes -inf.
INLINE const float* load_tile_unmasked(const Row& row, int64_t tile, float* __restrict buffer) {
  const int64_t begin = tile * kTile;
  const int count = static_cast<int>(std::min<int64_t>(kTile, row.vocab_size - begin));
  switch (row.dtype) {  // 1 widen
    case LLM_SAMPLING_FLOAT32:
      if (count == kTile && is_as_given(row, begin)) {
        return static_cast<const float*>(row.logits) + begin;
      }
      widen<float, same>(row.logits, begin, count, buffer);
      break;
    case LLM_SAMPLING_FLOAT16:
      widen<uint16_t, widen_float16>(row.logits, begin, count, buffer);
      break;
    default:
      widen<uint16_t, widen_bfloat16>(row.logits, begin, count, buffer);
  }
  for (int j = count; j < kTile; ++j) buffer[j] = -kInfinity;
  if (!row.is_changed) return buffer;
  if (row.bias_count > 0) add_bias(row, begin, count, buffer);        // 2 bias
  if (row.seen != nullptr) penalise(row, begin, count, buffer);       // 3 to 5 penalties
  if (row.listed_count > 0) lower_listed(row, begin, count, buffer);  // 5a
  return buffer;
}

// The same logits with the mask: after all of steps 1 to 5.
INLINE const float* load_tile(const Row& row, int64_t tile, float* __restrict buffer) {
  uint32_t mask_buffer[kMaskWords];
  const TileMask mask = tile_mask(row, tile, mask_buffer);
  const float* y = load_tile_unmasked(row, tile, buffer);
  if (mask.words == nullptr) return y;
  if (y != buffer) std::copy_n(y, kTile, buffer);
  replace_banned(mask.words, -kInfinity, buffer);  // 2 mask
  return buffer;
}

// ---- Kept sets -----------------------------------------------------------------------------------

// The end of a kept set, which is a prefix of the order: logits above `value` are kept, and of those equal
// to it the ones of ids up to `last_id`.
struct Threshold {
  float value;
  int64_t last_id;

  bool keeps(float x, int64_t id) const { return (x > value) | ((x == value) & (id <= last_id)); }
};

constexpr int64_t kEveryId = INT64_MAX;  // a last_id that keeps all logits equal to the value

// Whether token begin + j, whose logit is x, is kept; begin is the first token of its tile.
INLINE bool is_kept(const Threshold& threshold, int64_t begin, float x, int32_t j) {
  const int64_t last = threshold.last_id - begin;
  const int32_t last_equal = static_cast<int32_t>(last > kTile ? kTile : last < -1 ? -1 : last);
  return (x > threshold.value) | ((x == threshold.value) & (j <= last_equal));
}

}  // namespace
}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_TILE_H_
