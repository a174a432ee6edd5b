// Every loop over tiles: what is vectorised, and nothing else. Ranges are of tiles, [begin, end).
#ifndef LLM_SAMPLING_CPU_PASSES_H_
#define LLM_SAMPLING_CPU_PASSES_H_

#include <algorithm>
#include <cstdint>

#include "simd_x86.h"
#include "tile.h"

namespace llm_sampling {
namespace {

// Maxima of groups and tiles. True if a NaN may have been seen: some sum of a group's values is NaN,
// which +inf and -inf together make too.
LLM_SAMPLING_CLONES bool scan_maxima(
    const Row& row,
    int64_t begin,
    int64_t end,
    float* group_max,
    float* tile_max
) {
  alignas(64) float buffer[kTile];
  alignas(64) float sums[kGroups * 2] = {};
  for (int64_t tile = begin; tile < end; ++tile) {
    float* group = group_max + tile * kGroups;
    tile_maxima(load_tile(row, tile, buffer), group, sums);
    // in halves, each step for all at once
    float best[kGroups / 2];
    for (int j = 0; j < 8; ++j) best[j] = std::max(group[j], group[j + 8]);
    for (int j = 0; j < 4; ++j) best[j] = std::max(best[j], best[j + 4]);
    tile_max[tile] = std::max(std::max(best[0], best[1]), std::max(best[2], best[3]));
  }
  bool nan = false;
  for (int j = 0; j < kGroups * 2; ++j) nan |= sums[j] != sums[j];
  return nan;
}

LLM_SAMPLING_CLONES bool has_nan(const Row& row, int64_t begin, int64_t end) {
  alignas(64) float buffer[kTile];
  int nan = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    const float* y = load_tile(row, tile, buffer);
    for (int j = 0; j < kTile; ++j) nan |= y[j] != y[j];
  }
  return nan != 0;
}

INLINE bool is_massless(const Row& row, float tile_max) {
  return !(depth(tile_max, row.m, row.scale) < kMassless);
}

// The uncut masses of a tile.
INLINE void uncut_masses(const Row& row, const float* y, float* __restrict uncut) {
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
  for (int j = 0; j < kTile; ++j) uncut[j] = uncut_mass(fraction[j], exponent[j]);
}

INLINE int64_t sum_masses(const float* uncut) {
  int32_t high = 0;
  int32_t low = 0;
  for (int j = 0; j < kTile; ++j) {
    int32_t h, l;
    mass_halves(uncut[j], h, l);
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
  alignas(64) float uncut[kTile];
  for (int64_t tile = begin; tile < end; ++tile) {
    tile_mass[tile] = 0;
    if (is_massless(row, tile_max[tile])) continue;
    uncut_masses(row, load_tile(row, tile, buffer), uncut);
    tile_mass[tile] = sum_masses(uncut);
  }
}

// The mass of each tile's kept tokens.
LLM_SAMPLING_CLONES void scan_kept_mass(
    const Row& row,
    int64_t begin,
    int64_t end,
    Cut cut,
    const float* tile_max,
    int64_t* tile_kept
) {
  alignas(64) float buffer[kTile];
  alignas(64) float uncut[kTile];
  for (int64_t tile = begin; tile < end; ++tile) {
    tile_kept[tile] = 0;
    if (!(tile_max[tile] >= cut.value) || is_massless(row, tile_max[tile])) continue;
    const float* y = load_tile(row, tile, buffer);
    uncut_masses(row, y, uncut);
    for (int32_t j = 0; j < kTile; ++j) {
      uncut[j] = is_kept(cut, tile * kTile, y[j], j) ? uncut[j] : 0.0f;
    }
    tile_kept[tile] = sum_masses(uncut);
  }
}

// The mass of each tile, and that of its tokens of at least `value`.
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
  alignas(64) float uncut[kTile];
  for (int64_t tile = begin; tile < end; ++tile) {
    tile_mass[tile] = tile_kept[tile] = 0;
    if (is_massless(row, tile_max[tile])) continue;
    const float* y = load_tile(row, tile, buffer);
    uncut_masses(row, y, uncut);
    int32_t high[2] = {};
    int32_t low[2] = {};
    for (int j = 0; j < kTile; ++j) {
      int32_t h, l;
      mass_halves(uncut[j], h, l);
      high[0] += h;
      low[0] += l;
      high[1] += y[j] >= value ? h : 0;
      low[1] += y[j] >= value ? l : 0;
    }
    tile_mass[tile] = join_halves(high[0], low[0]);
    tile_kept[tile] = join_halves(high[1], low[1]);
  }
}

LLM_SAMPLING_CLONES int64_t
scan_count(const Row& row, int64_t begin, int64_t end, Cut cut, const float* tile_max) {
  alignas(64) float buffer[kTile];
  int64_t count = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    if (!(tile_max[tile] >= cut.value)) continue;
    const float* y = load_tile(row, tile, buffer);
    int32_t inside = 0;
    for (int32_t j = 0; j < kTile; ++j) inside += is_kept(cut, tile * kTile, y[j], j);
    count += inside;
  }
  return count;
}

// The masses of one tile's kept tokens, in w.
LLM_SAMPLING_CLONES void tile_kept_masses(const Row& row, int64_t tile, Cut cut, float* w) {
  alignas(64) float buffer[kTile];
  const float* y = load_tile(row, tile, buffer);
  uncut_masses(row, y, w);
  for (int32_t j = 0; j < kTile; ++j) {
    const float whole = __builtin_truncf(w[j] * 0x1p21f);
    w[j] = is_kept(cut, tile * kTile, y[j], j) ? whole : 0.0f;
  }
}

LLM_SAMPLING_CLONES void list_masses(const Row& row, const float* x, int64_t size, int64_t* w) {
  for (int64_t i = 0; i < size; ++i) {
    w[i] = static_cast<int64_t>(mass(depth(x[i], row.m, row.scale)));
  }
}

// The least and the largest of the values, of which there are some and none is NaN.
LLM_SAMPLING_CLONES void find_ends(const float* value, int64_t size, float& least, float& most) {
  // in lanes: the compiler may not change the order of one running maximum
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

// A weighted sample of a row: the maximum of each group, which stands for itself, and of every other
// tile another value of each group, which stand for all that are no maxima.
struct Sample {
  int64_t size[2];
  float* depth[2];
  float* mass[2];  // of all the tokens that the value stands for
  double total;    // an estimate of the row's mass
  double maxima;   // of it the mass of the maxima
  float deepest;   // of the others that have mass
};

LLM_SAMPLING_CLONES void take_sample(const Row& row, const float* group_max, Sample& out) {
  alignas(64) float buffer[kTile];
  const int64_t tiles = row.tiles();
  float* other = out.depth[1];
  for (int64_t tile = 0; tile < tiles; tile += 2) {
    const float* y = load_tile(row, tile, buffer) + tile * 7 % kSteps * kGroups;
    const float* top = group_max + tile * kGroups;
    for (int j = 0; j < kGroups; ++j) other[j] = y[j] < top[j] ? y[j] : -kInfinity;
    other += kGroups;
  }
  out.size[0] = tiles * kGroups;
  out.size[1] = other - out.depth[1];
  std::copy(group_max, group_max + out.size[0], out.depth[0]);
  const float others = static_cast<float>((kSteps - 1) * tiles * kGroups);
  const float weight[2] = {0x1p21f, 0x1p21f * (others / static_cast<float>(out.size[1]))};
  alignas(64) float fraction[kTile];
  alignas(64) int32_t exponent[kTile];
  alignas(64) float weighing[kTile];
  // in lanes, whose sums are exact enough for an estimate
  float lane[2][kGroups] = {};
  out.deepest = 0;
  for (int part = 0; part < 2; ++part) {
    float* __restrict d = out.depth[part];
    float* __restrict w = out.mass[part];
    for (int64_t i = 0; i < out.size[part]; ++i) d[i] = depth(d[i], row.m, row.scale);
    for (int64_t at = 0; at < out.size[part]; at += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, out.size[part] - at));
      for (int j = 0; j < count; ++j) split_depth(d[at + j], fraction[j], exponent[j]);
      for (int j = 0; j < count; ++j)
        w[at + j] = uncut_mass(fraction[j], exponent[j]) * weight[part];
      for (int j = 0; j < count; ++j) weighing[j] = d[at + j] < kMassless ? d[at + j] : 0.0f;
      float least, most;
      find_ends(weighing, count, least, most);
      out.deepest = std::max(out.deepest, most);
    }
    for (int64_t i = 0; i < out.size[part]; i += kGroups) {
      for (int j = 0; j < kGroups; ++j) lane[part][j] += w[i + j];
    }
  }
  out.maxima = out.total = 0;
  for (int j = 0; j < kGroups; ++j) out.maxima += lane[0][j];
  for (int j = 0; j < kGroups; ++j) out.total += lane[0][j] + lane[1][j];
}

// The bin of each depth: depth * scale, or the last.
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
    bin[i] = static_cast<int32_t>(b < limit ? b : limit);
  }
}

// How many of the values are at least the bound.
LLM_SAMPLING_CLONES int64_t count_from(const float* value, int64_t size, float bound) {
  int32_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += value[i] >= bound;
  return count;
}

// How many groups have a maximum of at least the bound.
LLM_SAMPLING_CLONES int64_t
count_groups(const float* group_max, const float* tile_max, int64_t tiles, float bound) {
  int64_t count = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (!(tile_max[tile] >= bound)) continue;
    int32_t inside = 0;
    for (int j = 0; j < kGroups; ++j) inside += group_max[tile * kGroups + j] >= bound;
    count += inside;
  }
  return count;
}

// A tile's tokens with low <= x <= high, appended to x and id in id order; the new size.
LLM_SAMPLING_CLONES int64_t tile_band(
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
  const float* y = load_tile(row, tile, buffer);
  band_bits(y, low, high, inside);
  // words without bits are passed over without a branch that nobody could predict
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

// Writes x / T in the kept set, -inf elsewhere.
LLM_SAMPLING_CLONES void write_filtered(
    const Row& row,
    int64_t begin_tile,
    int64_t end_tile,
    Cut cut,
    float temperature,
    float* out
) {
  alignas(64) float buffer[kTile];
  alignas(64) float z[kTile];
  for (int64_t tile = begin_tile; tile < end_tile; ++tile) {
    const float* y = load_tile(row, tile, buffer);
    const int64_t begin = tile * kTile;
    for (int32_t j = 0; j < kTile; ++j) {
      const float x = y[j] + 0.0f;  // 6
      const float divided = x / temperature;
      z[j] = is_kept(cut, begin, x, j) ? divided : -kInfinity;
    }
    const int64_t count = std::min<int64_t>(kTile, row.vocab_size - begin);
    std::copy(z, z + count, out + begin);
  }
}

}  // namespace
}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_PASSES_H_
