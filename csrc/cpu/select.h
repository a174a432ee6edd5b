// Choosing from a list in linear time, whatever the ties; and estimating where to look.
#ifndef LLM_SAMPLING_CPU_SELECT_H_
#define LLM_SAMPLING_CPU_SELECT_H_

#include <algorithm>
#include <cstdint>

#include "passes.h"

namespace llm_sampling {
namespace {

// Tokens in id order.
struct List {
  float* x;
  uint32_t* id;
  int64_t* w;  // once list_masses has run
  int64_t size;
};

// Where a bisection over the order keys ended: so many values are at least `key`, and fewer than the
// goal are above it unless the number is close enough.
struct Bound {
  uint32_t key;
  int64_t number;

  float value() const { return from_order_key(key); }
};

// A lower bound of the goal-th largest value, >= 1: at most goal + close values are at least it, or
// it is that value. There must be as many values; none is NaN.
Bound bisect(const float* value, int64_t size, int64_t goal, int64_t close) {
  float least, most;
  find_ends(value, size, least, most);
  Bound found = {order_key(least), size};
  uint32_t too_few = order_key(most) + 1;
  while (found.number > goal + close && too_few - found.key > 1) {
    const uint32_t middle = found.key + (too_few - found.key) / 2;
    const int64_t number = count_from(value, size, from_order_key(middle));
    if (number >= goal) {
      found = {middle, number};
    } else {
      too_few = middle;
    }
  }
  return found;
}

// Where the running total of `goal` is reached in the order of the keys.
struct Reached {
  uint32_t key;
  int64_t missing;  // what the tokens above the key leave to those equal to it, >= 1
};

// Radix select: key[i] counts weight[i]. The total must reach `goal` >= 1. Overwrites both arrays.
Reached select(uint32_t* key, int64_t* weight, int64_t size, int64_t goal) {
  uint32_t differing = 0;
  for (int64_t i = 1; i < size; ++i) differing |= key[i] ^ key[0];
  int shift = differing == 0 ? 0 : std::max(0, 24 - __builtin_clz(differing));
  for (;;) {
    int64_t bucket[256] = {};
    for (int64_t i = 0; i < size; ++i) bucket[key[i] >> shift & 255] += weight[i];
    // The bits above shift + 8 are equal by now, so the bucket's number orders the keys.
    uint32_t digit = 255;
    while (bucket[digit] < goal) goal -= bucket[digit--];
    int64_t left = 0;
    for (int64_t i = 0; i < size; ++i) {
      const bool in_bucket = (key[i] >> shift & 255) == digit;
      key[left] = key[i];
      weight[left] = weight[i];
      left += in_bucket;
    }
    size = left;
    if (shift == 0 || size == 1) return {*std::min_element(key, key + size), goal};
    shift = std::max(0, shift - 8);
  }
}

// Everything above a key is kept, and the first `equals` of the tokens that have it.
struct LastKept {
  uint32_t key;
  int64_t equals;

  // For tokens in id order, each once.
  bool keeps(float x) {
    const uint32_t own = order_key(x);
    const bool equal = own == key;
    equals -= equal;
    return (own > key) | (equal & (equals >= 0));  // without a branch that nobody could predict
  }
};

// The sampled mass by depth, to estimate where a mass is reached.
class Histogram {
 public:
  void fill(const Sample& sample, int32_t* bins) {
    bins_per_octave_ = static_cast<float>(kBins - 1) / std::max(sample.deepest, 1e-30f);
    // four sums, so that neighbours in one bin do not wait for one another
    float sums[4][kBins] = {};
    for (int part = 0; part < 2; ++part) {
      const int64_t size = sample.size[part];
      find_bins(sample.depth[part], size, bins_per_octave_, kBins - 1, bins);
      const float* mass = sample.mass[part];
      for (int64_t i = 0; i < size; i += 4) {  // the sizes are multiples of kGroups
        for (int j = 0; j < 4; ++j) sums[j][bins[i + j]] += mass[i + j];
      }
    }
    for (int bin = 0; bin < kBins; ++bin) {
      mass_[bin] = (sums[0][bin] + sums[1][bin]) + (sums[2][bin] + sums[3][bin]);
    }
  }

  // About the largest value that so much mass is at or above; kLowest if there is not so much.
  float value_at(const Row& row, double goal) const {
    double sum = 0;
    for (int bin = 0; bin < kBins; ++bin) {
      const double mass = mass_[bin];
      if (sum + mass >= goal && mass > 0) {
        return at(row, bin + std::max(0.0, (goal - sum) / mass));
      }
      sum += mass;
    }
    return kLowest;
  }

  // About the smallest value that so much mass is below; the row's maximum if there is not so much.
  // Counted from below it does not see how wrong the sample is about the few tokens that have most.
  float value_over(const Row& row, double goal) const {
    double sum = 0;
    for (int bin = kBins - 1; bin >= 0; --bin) {
      const double mass = mass_[bin];
      if (sum + mass >= goal && mass > 0) return at(row, bin + 1 - (goal - sum) / mass);
      sum += mass;
    }
    return row.m;
  }

  // About the mass at or above a value.
  double mass_above(const Row& row, float value) const {
    const double bins = static_cast<double>(depth(value, row.m, row.scale)) * bins_per_octave_;
    double sum = 0;
    for (int bin = 0; bin < kBins && bin < bins; ++bin) {
      sum += mass_[bin] * std::min(1.0, bins - bin);
    }
    return sum;
  }

 private:
  static constexpr int kBins = 512;

  float at(const Row& row, double bins) const {
    const float d = static_cast<float>(bins / bins_per_octave_);
    return std::max(kLowest, row.m - d / row.scale);
  }

  float bins_per_octave_ = 1.0f;
  float mass_[kBins] = {};
};

}  // namespace
}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_SELECT_H_
