// Steps 1 to 5: the values of a row, 512 tokens at a time; and what a kept set is.
#ifndef LLM_SAMPLING_CPU_TILE_H_
#define LLM_SAMPLING_CPU_TILE_H_

#include <algorithm>
#include <cstdint>

#include "../llm_sampling.h"
#include "../semantics.h"

// A build that sets this to nothing and -march by hand tests one instruction set.
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

constexpr int kTile = 512;
constexpr int kGroups = 16;
constexpr int kSteps = kTile / kGroups;
constexpr int64_t kEveryId = INT64_MAX;

struct Row {
  const void* logits;
  int32_t dtype;
  int64_t vocab_size;
  const int32_t* bias_ids;  // ascending
  const float* bias_values;
  int64_t bias_count;
  const uint32_t* allowed;
  const uint32_t* seen;
  const int32_t* counts;  // NULL where no penalty needs them
  float repetition_penalty;
  float frequency_penalty;
  float presence_penalty;
  float m;      // step 9's maximum, known after the first pass
  float scale;  // step 9's s

  bool is_raw() const { return bias_count == 0 && allowed == nullptr && seen == nullptr; }
  int64_t tiles() const { return (vocab_size + kTile - 1) / kTile; }
};

template <typename T, float (*kWiden)(T)>
INLINE void widen(const void* logits, int64_t begin, int count, float* __restrict out) {
  const T* in = static_cast<const T*>(logits) + begin;
  // what follows takes longer than the hardware's prefetcher looks ahead
  for (int j = 0; j < kTile; j += 64 / sizeof(T)) __builtin_prefetch(in + kTile + j);
  for (int j = 0; j < count; ++j) out[j] = kWiden(in[j]);
}

INLINE float same(float x) { return x; }

INLINE void add_bias(const Row& row, int64_t begin, int count, float* y) {
  const int32_t* end = row.bias_ids + row.bias_count;
  const int32_t* id = std::lower_bound(row.bias_ids, end, static_cast<int32_t>(begin));
  for (; id != end && *id < begin + count; ++id) {
    y[*id - begin] += row.bias_values[id - row.bias_ids];
  }
}

INLINE void mask_out(const uint32_t* allowed, int count, float* __restrict y) {
  for (int w = 0; w * 32 < count; ++w) {
    const uint32_t bits = allowed[w];
    if (bits == 0xffffffffu) continue;
    float* z = y + w * 32;  // a tile has room for the whole of its last word
    for (int j = 0; j < 32; ++j) z[j] = (bits >> j & 1) != 0 ? z[j] : -kInfinity;
  }
}

// The places of the set bits among the first `count`, in order; their number. Writes up to 4 past it.
INLINE int set_bits(const uint32_t* words, int count, int32_t* __restrict places) {
  int size = 0;
  for (int begin = 0; begin < count; begin += 64) {
    uint64_t bits = words[begin / 32];
    if (begin + 32 < count) bits |= static_cast<uint64_t>(words[begin / 32 + 1]) << 32;
    if (begin + 64 > count) bits &= (uint64_t{1} << (count - begin)) - 1;
    // four at a time, so that most words take no branch that depends on their bits
    int32_t* out = places + size;
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

// 3 to 5: the seen tokens are gathered first, since what a loop over bits reads misses the caches.
INLINE void penalise(const Row& row, int64_t begin, int count, float* __restrict y) {
  constexpr int kBlock = 8;  // what is past the last place is worked out too and not written
  int32_t places[kTile + kBlock];
  alignas(64) float x[kTile];
  alignas(64) int32_t times[kTile];
  const int size = set_bits(row.seen + begin / 32, count, places);
  const int padded = (size + kBlock - 1) / kBlock * kBlock;
  for (int i = size; i < padded; ++i) places[i] = 0;
  for (int i = 0; i < padded; ++i) x[i] = y[places[i]];
  for (int i = 0; i < padded; i += kBlock) {
    for (int j = i; j < i + kBlock; ++j) x[j] = repetition(x[j], row.repetition_penalty);
  }
  if (row.counts != nullptr) {
    const int32_t* counts = row.counts + begin;
    for (int i = 0; i < padded; ++i) times[i] = counts[places[i]];
    for (int i = 0; i < padded; i += kBlock) {
      for (int j = i; j < i + kBlock; ++j) {
        const float less = frequency(x[j], row.frequency_penalty, times[j]) - row.presence_penalty;
        x[j] = times[j] > 0 ? less : x[j];
      }
    }
  }
  for (int i = 0; i < size; ++i) y[places[i]] = x[i];
}

// 3 to 5 for tokens of a list.
INLINE void penalise_list(const Row& row, float* x, const uint32_t* id, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if ((row.seen[id[i] >> 5] >> (id[i] & 31) & 1) == 0) continue;
    x[i] = repetition(x[i], row.repetition_penalty);
    const int32_t times = row.counts == nullptr ? 0 : row.counts[id[i]];
    if (times > 0) x[i] = frequency(x[i], row.frequency_penalty, times) - row.presence_penalty;
  }
}

// The 512 values of a tile, -inf past the row's end: in `buffer`, or where they lie.
INLINE const float* load_tile(const Row& row, int64_t tile, float* __restrict buffer) {
  const int64_t begin = tile * kTile;
  const int count = static_cast<int>(std::min<int64_t>(kTile, row.vocab_size - begin));
  switch (row.dtype) {  // 1
    case LLM_SAMPLING_FLOAT32:
      if (count == kTile && row.is_raw()) return static_cast<const float*>(row.logits) + begin;
      widen<float, same>(row.logits, begin, count, buffer);
      break;
    case LLM_SAMPLING_FLOAT16:
      widen<uint16_t, widen_float16>(row.logits, begin, count, buffer);
      break;
    default:
      widen<uint16_t, widen_bfloat16>(row.logits, begin, count, buffer);
  }
  for (int j = count; j < kTile; ++j) buffer[j] = -kInfinity;
  if (row.bias_count > 0) add_bias(row, begin, count, buffer);                    // 2
  if (row.allowed != nullptr) mask_out(row.allowed + begin / 32, count, buffer);  // 2
  if (row.seen != nullptr) penalise(row, begin, count, buffer);                   // 3 to 5
  return buffer;
}

// ---- Kept sets -----------------------------------------------------------------------------------

// The tokens above `value`, and those equal to it with an id of at most `last_id`.
struct Cut {
  float value;
  int64_t last_id;
};

// Whether token begin + j, of value x, is kept; begin is its tile's first token.
INLINE bool is_kept(const Cut& cut, int64_t begin, float x, int32_t j) {
  const int64_t last = cut.last_id - begin;
  const int32_t last_equal = static_cast<int32_t>(last > kTile ? kTile : last < -1 ? -1 : last);
  return (x > cut.value) | ((x == cut.value) & (j <= last_equal));
}

}  // namespace
}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_TILE_H_
