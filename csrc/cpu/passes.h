// Every loop over tiles or candidates that is vectorised. A range of tiles is [begin, end).
#ifndef LLM_SAMPLING_CPU_PASSES_H_
#define LLM_SAMPLING_CPU_PASSES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd_x86.h"
#include "tile.h"

namespace llm_sampling {
namespace {

// The largest of a tile's stripe maxima, halved three times, so that each step is one vector operation.
INLINE float largest(const float* stripes) {
  float best[kStripes / 2];
  for (int j = 0; j < 8; ++j) best[j] = std::max(stripes[j], stripes[j + 8]);
  for (int j = 0; j < 4; ++j) best[j] = std::max(best[j], best[j + 4]);
  return std::max(std::max(best[0], best[1]), std::max(best[2], best[3]));
}

INLINE bool holds_nan(const float* sums) {
  bool nan = false;
  for (int j = 0; j < kStripes * 2; ++j) nan |= sums[j] != sums[j];
  return nan;
}

// Writes the maximum of every stripe and every tile of a row without a mask. Returns true if a logit may be
// NaN, which is when a sum of logits is NaN: +inf plus -inf is NaN too.
LLM_SAMPLING_CLONES bool scan_maxima(
    const Row& row,
    int64_t begin,
    int64_t end,
    float* stripe_max,
    float* tile_max
) {
  alignas(64) float buffer[kTile];
  alignas(64) float sums[kStripes * 2] = {};
  for (int64_t tile = begin; tile < end; ++tile) {
    float* stripes = stripe_max + tile * kStripes;
    tile_maxima(load_tile_unmasked(row, tile, buffer), stripes, sums);
    tile_max[tile] = largest(stripes);
  }
  return holds_nan(sums);
}

// The same of the allowed tokens alone, of a row that has a mask.
LLM_SAMPLING_CLONES bool scan_masked_maxima(
    const Row& row,
    int64_t begin,
    int64_t end,
    float* stripe_max,
    float* tile_max
) {
  alignas(64) float buffer[kTile];
  alignas(64) float sums[kStripes * 2] = {};
  uint32_t mask_buffer[kMaskWords];
  for (int64_t tile = begin; tile < end; ++tile) {
    float* stripes = stripe_max + tile * kStripes;
    const TileMask mask = tile_mask(row, tile, mask_buffer);
    if (mask.bans_all) {
      std::fill_n(stripes, kStripes, -kInfinity);
      tile_max[tile] = -kInfinity;
      continue;
    }
    const float* y = load_tile_unmasked(row, tile, buffer);
    if (mask.words == nullptr) {
      tile_maxima(y, stripes, sums);
    } else {
      masked_tile_maxima(y, mask.words, stripes, sums);
    }
    tile_max[tile] = largest(stripes);
  }
  return holds_nan(sums);
}

// Whether a logit is NaN.
LLM_SAMPLING_CLONES bool has_nan(const Row& row, int64_t begin, int64_t end) {
  alignas(64) float buffer[kTile];
  int nan = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    const float* y = load_tile(row, tile, buffer);
    for (int j = 0; j < kTile; ++j) nan |= y[j] != y[j];
  }
  return nan != 0;
}

// Whether no token of a tile has mass.
INLINE bool is_massless(const Row& row, float tile_max) {
  return !(depth(tile_max, row.m, row.scale) < kMassless);
}

// The scaled masses of a tile, 0 for banned tokens. `y` are its logits without the mask.
INLINE void scaled_masses(const Row& row, int64_t tile, const float* y, float* __restrict scaled) {
  alignas(64) float fraction[kTile];
  alignas(64) int32_t exponent[kTile];
  if (row.m < kInfinity && row.scale < kInfinity) {
    for (int j = 0; j < kTile; ++j) {
      split_depth(finite_depth(y[j], row.m, row.scale), fraction[j], exponent[j]);
    }
  } else {
    for (int j = 0; j < kTile; ++j) {
      split_depth(depth(y[j], row.m, row.scale), fraction[j], exponent[j]);
    }
  }
  for (int j = 0; j < kTile; ++j) scaled[j] = scaled_mass(fraction[j], exponent[j]);
  uint32_t mask_buffer[kMaskWords];
  const TileMask mask = tile_mask(row, tile, mask_buffer);
  if (mask.words != nullptr) replace_banned(mask.words, 0.0f, scaled);
}

INLINE int64_t sum_masses(const float* scaled) {
  static_assert(kTile <= kMaxSummedHalves, "the sums of a tile's halves fit an int32");
  int32_t high = 0;
  int32_t low = 0;
  for (int j = 0; j < kTile; ++j) {
    int32_t h, l;
    mass_halves(scaled[j], h, l);
    high += h;
    low += l;
  }
  return join_halves(high, low);
}

// The mass of each tile.
LLM_SAMPLING_CLONES void scan_mass(
    const Row& row,
    int64_t begin,
    int64_t end,
    const float* tile_max,
    int64_t* tile_mass
) {
  alignas(64) float buffer[kTile];
  alignas(64) float scaled[kTile];
  for (int64_t tile = begin; tile < end; ++tile) {
    tile_mass[tile] = 0;
    if (is_massless(row, tile_max[tile])) continue;
    scaled_masses(row, tile, load_tile_unmasked(row, tile, buffer), scaled);
    tile_mass[tile] = sum_masses(scaled);
  }
}

// The mass of each tile's kept tokens.
LLM_SAMPLING_CLONES void scan_kept_mass(
    const Row& row,
    int64_t begin,
    int64_t end,
    Threshold threshold,
    const float* tile_max,
    int64_t* tile_kept
) {
  alignas(64) float buffer[kTile];
  alignas(64) float scaled[kTile];
  for (int64_t tile = begin; tile < end; ++tile) {
    tile_kept[tile] = 0;
    if (!(tile_max[tile] >= threshold.value) || is_massless(row, tile_max[tile])) continue;
    const float* y = load_tile_unmasked(row, tile, buffer);
    scaled_masses(row, tile, y, scaled);
    for (int32_t j = 0; j < kTile; ++j) {
      scaled[j] = is_kept(threshold, tile * kTile, y[j], j) ? scaled[j] : 0.0f;
    }
    tile_kept[tile] = sum_masses(scaled);
  }
}

// The mass of each tile, and in tile_kept the mass of its tokens whose logit is at least `value`.
LLM_SAMPLING_CLONES void scan_split_mass(
    const Row& row,
    int64_t begin,
    int64_t end,
    float value,
    const float* tile_max,
    int64_t* tile_mass,
    int64_t* tile_kept
) {
  alignas(64) float buffer[kTile];
  alignas(64) float scaled[kTile];
  for (int64_t tile = begin; tile < end; ++tile) {
    tile_mass[tile] = tile_kept[tile] = 0;
    if (is_massless(row, tile_max[tile])) continue;
    const float* y = load_tile_unmasked(row, tile, buffer);
    scaled_masses(row, tile, y, scaled);
    static_assert(kTile <= kMaxSummedHalves, "the sums of a tile's halves fit an int32");
    int32_t high[2] = {};
    int32_t low[2] = {};
    for (int j = 0; j < kTile; ++j) {
      int32_t h, l;
      mass_halves(scaled[j], h, l);
      high[0] += h;
      low[0] += l;
      high[1] += y[j] >= value ? h : 0;
      low[1] += y[j] >= value ? l : 0;
    }
    tile_mass[tile] = join_halves(high[0], low[0]);
    tile_kept[tile] = join_halves(high[1], low[1]);
  }
}

// The mass of each kept token of a tile, 0 for the others, as float32.
LLM_SAMPLING_CLONES void tile_kept_masses(
    const Row& row,
    int64_t tile,
    Threshold threshold,
    float* w
) {
  alignas(64) float buffer[kTile];
  const float* y = load_tile_unmasked(row, tile, buffer);
  scaled_masses(row, tile, y, w);
  for (int32_t j = 0; j < kTile; ++j) {
    const float whole = __builtin_truncf(w[j] * 0x1p21f);
    w[j] = is_kept(threshold, tile * kTile, y[j], j) ? whole : 0.0f;
  }
}

// The masses of candidates, whose logits are x.
LLM_SAMPLING_CLONES void candidate_masses(
    const Row& row,
    const float* x,
    int64_t size,
    int64_t* w
) {
  for (int64_t i = 0; i < size; ++i) {
    w[i] = static_cast<int64_t>(mass(depth(x[i], row.m, row.scale)));
  }
}

// The smallest and the largest value; size >= 1, and no value is NaN.
LLM_SAMPLING_CLONES void find_min_max(const float* value, int64_t size, float& least, float& most) {
  // By lanes, because the compiler must not reorder a single running maximum.
  constexpr int kLanes = 32;
  float low[kLanes];
  float high[kLanes];
  for (int j = 0; j < kLanes; ++j) low[j] = high[j] = value[0];
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) low[j] = value[i + j] < low[j] ? value[i + j] : low[j];
    for (int j = 0; j < kLanes; ++j) high[j] = value[i + j] > high[j] ? value[i + j] : high[j];
  }
  for (; i < size; ++i) {
    low[0] = value[i] < low[0] ? value[i] : low[0];
    high[0] = value[i] > high[0] ? value[i] : high[0];
  }
  least = *std::min_element(low, low + kLanes);
  most = *std::max_element(high, high + kLanes);
}

// The largest value that is not NaN, or -inf.
LLM_SAMPLING_CLONES float find_max(const float* value, int64_t size) {
  constexpr int kLanes = 32;
  float high[kLanes];
  for (int j = 0; j < kLanes; ++j) high[j] = -kInfinity;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) high[j] = value[i + j] > high[j] ? value[i + j] : high[j];
  }
  for (; i < size; ++i) high[0] = value[i] > high[0] ? value[i] : high[0];
  for (int j = 0; j < 16; ++j) high[j] = std::max(high[j], high[j + 16]);
  for (int j = 0; j < 8; ++j) high[j] = std::max(high[j], high[j + 8]);
  for (int j = 0; j < 4; ++j) high[j] = std::max(high[j], high[j + 4]);
  return std::max(std::max(high[0], high[1]), std::max(high[2], high[3]));
}

// A weighted sample of a row's tokens, to estimate where a threshold lies. Part 0: the maximum of each
// stripe, with weight 1. Part 1: one more token of each stripe of every other tile, weighted to represent all
// tokens that are not the maximum of their stripe.
struct Probe {
  int64_t size[2];
  float* depth[2];
  float* mass[2];   // times the weight
  double total;     // the estimated mass of the row
  double maxima;    // the mass of part 0, which is a part of the total
  float max_depth;  // the largest depth in the probe that has mass
};

LLM_SAMPLING_CLONES void take_probe(const Row& row, const float* stripe_max, Probe& out) {
  alignas(64) float buffer[kTile];
  uint32_t mask_buffer[kMaskWords];
  const int64_t tiles = row.tiles();
  float* other = out.depth[1];
  for (int64_t tile = 0; tile < tiles; tile += 2) {
    // Another 16 neighbours in each tile, one of each stripe.
    const int64_t first = tile * 7 % kStripeTokens * kStripes;
    const float* y = load_tile_unmasked(row, tile, buffer) + first;
    const float* top = stripe_max + tile * kStripes;
    for (int j = 0; j < kStripes; ++j) other[j] = y[j] < top[j] ? y[j] : -kInfinity;
    const TileMask mask = tile_mask(row, tile, mask_buffer);
    if (mask.words != nullptr) {
      const uint32_t bits = mask.words[first / 32] >> first % 32;
      for (int j = 0; j < kStripes; ++j) other[j] = (bits & kBit[j]) != 0 ? other[j] : -kInfinity;
    }
    other += kStripes;
  }
  out.size[0] = tiles * kStripes;
  out.size[1] = other - out.depth[1];
  std::copy(stripe_max, stripe_max + out.size[0], out.depth[0]);
  const float others = static_cast<float>((kStripeTokens - 1) * tiles * kStripes);
  const float weight[2] = {0x1p21f, 0x1p21f * (others / static_cast<float>(out.size[1]))};
  alignas(64) float fraction[kTile];
  alignas(64) int32_t exponent[kTile];
  alignas(64) float weighing[kTile];
  // Sums by lanes in float32, which are exact enough for an estimate.
  float lane[2][kStripes] = {};
  out.max_depth = 0;
  for (int part = 0; part < 2; ++part) {
    float* __restrict d = out.depth[part];
    float* __restrict w = out.mass[part];
    for (int64_t i = 0; i < out.size[part]; ++i) d[i] = depth(d[i], row.m, row.scale);
    for (int64_t at = 0; at < out.size[part]; at += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, out.size[part] - at));
      for (int j = 0; j < count; ++j) split_depth(d[at + j], fraction[j], exponent[j]);
      for (int j = 0; j < count; ++j)
        w[at + j] = scaled_mass(fraction[j], exponent[j]) * weight[part];
      for (int j = 0; j < count; ++j) weighing[j] = d[at + j] < kMassless ? d[at + j] : 0.0f;
      float least, most;
      find_min_max(weighing, count, least, most);
      out.max_depth = std::max(out.max_depth, most);
    }
    for (int64_t i = 0; i < out.size[part]; i += kStripes) {
      for (int j = 0; j < kStripes; ++j) lane[part][j] += w[i + j];
    }
  }
  out.maxima = out.total = 0;
  for (int j = 0; j < kStripes; ++j) out.maxima += lane[0][j];
  for (int j = 0; j < kStripes; ++j) out.total += lane[0][j] + lane[1][j];
}

// The bin of each depth in a histogram: depth * scale, at most `last`. A depth is negative, and its bin 0, if
// the token's logit has risen above the maximum of the row since that was taken.
LLM_SAMPLING_CLONES void find_bins(
    const float* d,
    int64_t size,
    float scale,
    int last,
    int32_t* bin
) {
  const float limit = static_cast<float>(last);
  for (int64_t i = 0; i < size; ++i) {
    const float b = d[i] * scale;
    const float at_most = b < limit ? b : limit;
    bin[i] = static_cast<int32_t>(at_most > 0.0f ? at_most : 0.0f);
  }
}

// How many of the values are at least the bound.
LLM_SAMPLING_CLONES int64_t count_at_least(const float* value, int64_t size, float bound) {
  int32_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += value[i] >= bound;
  return count;
}

// How many stripes have a maximum of at least the bound.
LLM_SAMPLING_CLONES int64_t
count_stripes(const float* stripe_max, const float* tile_max, int64_t tiles, float bound) {
  int64_t count = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (!(tile_max[tile] >= bound)) continue;
    int32_t inside = 0;
    for (int j = 0; j < kStripes; ++j) inside += stripe_max[tile * kStripes + j] >= bound;
    count += inside;
  }
  return count;
}

// Appends a tile's tokens with low <= logit <= high to x and id, in id order; returns the new size.
LLM_SAMPLING_CLONES int64_t append_band(
    const Row& row,
    int64_t tile,
    float low,
    float high,
    float* x,
    uint32_t* id,
    int64_t size
) {
  alignas(64) float buffer[kTile];
  uint64_t inside[kTile / 64];
  const float* y = load_tile_unmasked(row, tile, buffer);
  band_bits(y, low, high, inside);
  uint32_t mask_buffer[kMaskWords];
  const TileMask mask = tile_mask(row, tile, mask_buffer);
  if (mask.words != nullptr) {
    for (int i = 0; i < kTile / 64; ++i) {
      inside[i] &= mask.words[2 * i] | static_cast<uint64_t>(mask.words[2 * i + 1]) << 32;
    }
  }
  // Collect the words that have bits without a branch, which the CPU could not predict.
  int words[kTile / 64 + 1];
  int number = 0;
  for (int word = 0; word < kTile / 64; ++word) {
    words[number] = word;
    number += inside[word] != 0;
  }
  for (int i = 0; i < number; ++i) {
    uint64_t bits = inside[words[i]];
    do {
      const int j = words[i] * 64 + __builtin_ctzll(bits);
      x[size] = y[j];
      id[size++] = static_cast<uint32_t>(tile * kTile + j);
      bits &= bits - 1;
    } while (bits != 0);
  }
  return size;
}

// A threshold in one tile: the tokens with a logit of at least `low` are kept, but for those that equal it and
// come after place `last`.
struct TileThreshold {
  float low;
  int last;

  TileThreshold(const Threshold& threshold, int64_t tile) : low(threshold.value), last(kTile) {
    const int64_t at = threshold.last_id - tile * kTile;
    if (at >= kTile - 1) return;
    if (at >= 0) {
      last = static_cast<int>(at);
    } else {  // no equal one is kept, and nothing is larger than +inf
      low = low < kInfinity ? std::nextafter(low, kInfinity) : kNan;
    }
  }

  bool cuts_ties() const { return last < kTile; }

  // The bits of the tokens of the tile that are kept. Another thread may overwrite y between its two uses; a
  // difference of two counts could then be negative.
  void kept_bits(const float* y, uint64_t* kept) const {
    band_bits(y, low, kInfinity, kept);
    if (!cuts_ties()) return;
    uint64_t ties[kTile / 64];
    band_bits(y, low, low, ties);
    for (int word = 0; word < kTile / 64; ++word) {
      const int before_cut = last + 1 - word * 64;  // tokens of the word that are not cut
      if (before_cut >= 64) continue;
      kept[word] &= ~(before_cut > 0 ? ties[word] & ~uint64_t{0} << before_cut : ties[word]);
    }
  }
};

// How many tokens are kept.
LLM_SAMPLING_CLONES int64_t scan_kept_count(
    const Row& row,
    int64_t begin,
    int64_t end,
    Threshold threshold,
    const float* tile_max
) {
  alignas(64) float buffer[kTile];
  int64_t count = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    if (!(tile_max[tile] >= threshold.value)) continue;
    const float* y = load_tile(row, tile, buffer);
    const TileThreshold kept(threshold, tile);
    if (kept.cuts_ties()) {
      uint64_t bits[kTile / 64];
      kept.kept_bits(y, bits);
      for (const uint64_t word : bits) count += __builtin_popcountll(word);
    } else {
      int32_t inside = 0;
      for (int j = 0; j < kTile; ++j) inside += y[j] >= kept.low;
      count += inside;
    }
  }
  return count;
}

// Writes a bitmask of the tokens that are kept.
LLM_SAMPLING_CLONES void scan_kept_bits(
    const Row& row,
    int64_t begin,
    int64_t end,
    Threshold threshold,
    const float* tile_max,
    uint32_t* mask
) {
  constexpr int kWords = kTile / 32;
  alignas(64) float buffer[kTile];
  const int64_t words = (row.vocab_size + 31) / 32;
  for (int64_t tile = begin; tile < end; ++tile) {
    uint64_t bits[kTile / 64] = {};
    if (tile_max[tile] >= threshold.value) {
      const float* y = load_tile(row, tile, buffer);
      const TileThreshold kept(threshold, tile);
      kept.kept_bits(y, bits);
    }
    const int64_t first = tile * kWords;
    for (int64_t word = first; word < std::min(words, first + kWords); ++word) {
      mask[word] = static_cast<uint32_t>(bits[(word - first) / 2] >> (word - first) % 2 * 32);
    }
  }
}

// The last token of the order whose logit is at least `low`: its logit and its id, which is -1 if there is
// none.
LLM_SAMPLING_CLONES Threshold
find_last(const Row& row, float low, const float* tile_max, int64_t tiles) {
  alignas(64) float buffer[kTile];
  Threshold last = {kInfinity, -1};
  int64_t found = -1;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (!(tile_max[tile] >= low)) continue;
    const float* y = load_tile(row, tile, buffer);
    alignas(64) float x[kTile];
    for (int j = 0; j < kTile; ++j) x[j] = y[j] >= low ? y[j] : kInfinity;
    float least, most;
    find_min_max(x, kTile, least, most);
    if (least > last.value) continue;
    last.value = least;
    found = tile;
  }
  if (found < 0) return last;
  const float* y = load_tile(row, found, buffer);
  for (int j = 0; j < kTile; ++j) {
    if (y[j] == last.value) last.last_id = found * kTile + j;
  }
  return last;
}

// Writes x / temperature for kept tokens, -inf for the others; (x - m) / temperature if the quotient of the
// best token, whose logit is m, is not finite. What is kept is finite.
LLM_SAMPLING_CLONES void write_filtered(
    const Row& row,
    int64_t begin_tile,
    int64_t end_tile,
    Threshold threshold,
    float temperature,
    float* out
) {
  alignas(64) float buffer[kTile];
  alignas(64) float z[kTile];
  const float best = row.m / temperature;
  const bool is_shifted = !(best >= kLowest && best < kInfinity);
  for (int64_t tile = begin_tile; tile < end_tile; ++tile) {
    const float* y = load_tile(row, tile, buffer);
    const int64_t begin = tile * kTile;
    if (is_shifted) {
      for (int32_t j = 0; j < kTile; ++j) {
        const float divided = (y[j] - row.m) / temperature;
        const float shifted = y[j] == row.m ? 0.0f : divided;
        const float finite = shifted > kLowest ? shifted : kLowest;
        z[j] = is_kept(threshold, begin, y[j], j) ? finite : -kInfinity;
      }
    } else {
      for (int32_t j = 0; j < kTile; ++j) {
        const float x = y[j] + 0.0f;  // 6 canonical
        const float divided = x / temperature;
        const float finite = divided > kLowest ? divided : kLowest;
        z[j] = is_kept(threshold, begin, x, j) ? finite : -kInfinity;
      }
    }
    const int64_t count = std::min<int64_t>(kTile, row.vocab_size - begin);
    std::copy(z, z + count, out + begin);
  }
}

}  // namespace
}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_PASSES_H_
