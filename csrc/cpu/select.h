// Selection among candidates, in linear time whatever the ties; and estimates of where a threshold lies.
#ifndef LLM_SAMPLING_CPU_SELECT_H_
#define LLM_SAMPLING_CPU_SELECT_H_

#include <algorithm>
#include <cstdint>

#include "passes.h"

namespace llm_sampling {
namespace {

// The short list of tokens that may be kept, in id order.
struct Candidates {
  float* x;      // logits
  uint32_t* id;  // token ids
  int64_t* w;    // masses; NULL until they are computed
  int64_t size;
};

// ---- By rank ---------------------------------------------------------------------------------------

// `count` of the values are at least value().
struct RankBound {
  uint32_t key;  // order key of the value
  int64_t count;

  float value() const { return from_order_key(key); }
};

// A lower bound of the k-th largest value, by bisection over the order keys with exact counts. It is either
// the k-th largest value itself, or at most k + slack values are at least it. 1 <= k <= size, and no value
// is NaN.
RankBound bound_kth_largest(const float* value, int64_t size, int64_t k, int64_t slack) {
  float least, most;
  find_min_max(value, size, least, most);
  RankBound found = {order_key(least), size};
  uint32_t too_high = order_key(most) + 1;  // a key that fewer than k values reach
  while (found.count > k + slack && too_high - found.key > 1) {
    const uint32_t middle = found.key + (too_high - found.key) / 2;
    const int64_t count = count_at_least(value, size, from_order_key(middle));
    if (count >= k) {
      found = {middle, count};
    } else {
      too_high = middle;
    }
  }
  return found;
}

// ---- By mass ---------------------------------------------------------------------------------------

// The key at which a running mass reaches its goal, and what the tokens with larger keys leave of the goal.
struct MassReached {
  uint32_t key;
  int64_t missing;  // >= 1, and at most the mass of all tokens with this key
};

// Radix select: takes the keys in descending order, key[i] with mass[i], until the running mass reaches
// `goal`. 1 <= goal <= the total mass. Overwrites both arrays.
MassReached select_by_mass(uint32_t* key, int64_t* mass, int64_t size, int64_t goal) {
  uint32_t differing = 0;
  for (int64_t i = 1; i < size; ++i) differing |= key[i] ^ key[0];
  int shift = differing == 0 ? 0 : std::max(0, 24 - __builtin_clz(differing));
  for (;;) {
    int64_t bucket[256] = {};
    for (int64_t i = 0; i < size; ++i) bucket[key[i] >> shift & 255] += mass[i];
    // All keys that are left agree in the bits above shift + 8, so the bucket's number orders them.
    uint32_t digit = 255;
    while (bucket[digit] < goal) goal -= bucket[digit--];
    int64_t left = 0;
    for (int64_t i = 0; i < size; ++i) {
      const bool in_bucket = (key[i] >> shift & 255) == digit;
      key[left] = key[i];
      mass[left] = mass[i];
      left += in_bucket;
    }
    size = left;
    if (shift == 0 || size == 1) return {*std::min_element(key, key + size), goal};
    shift = std::max(0, shift - 8);
  }
}

// ---- Kept candidates -------------------------------------------------------------------------------

// A threshold among candidates: those with a larger key are kept, and of those with the same key the first
// `ties`.
struct CandidateThreshold {
  uint32_t key;
  int64_t ties;

  // Whether a candidate is kept. Call it once for each candidate, in id order: it counts the ties down.
  bool keeps(float x) {
    const uint32_t own = order_key(x);
    const bool equal = own == key;
    ties -= equal;
    return (own > key) | (equal & (ties >= 0));  // no branch, since none could be predicted
  }
};

// ---- Estimates -------------------------------------------------------------------------------------

// The mass of a probe by depth. It estimates which logits a mass lies above or below.
class Histogram {
 public:
  void fill(const Probe& probe, int32_t* bins) {
    bins_per_octave_ = static_cast<float>(kBins - 1) / std::max(probe.max_depth, 1e-30f);
    // Four sums for each bin, so that additions to the same bin in a row do not wait for one another.
    float sums[4][kBins] = {};
    for (int part = 0; part < 2; ++part) {
      const int64_t size = probe.size[part];
      find_bins(probe.depth[part], size, bins_per_octave_, kBins - 1, bins);
      const float* mass = probe.mass[part];
      for (int64_t i = 0; i < size; i += 4) {  // the sizes are multiples of kStripes
        for (int j = 0; j < 4; ++j) sums[j][bins[i + j]] += mass[i + j];
      }
    }
    for (int bin = 0; bin < kBins; ++bin) {
      mass_[bin] = (sums[0][bin] + sums[1][bin]) + (sums[2][bin] + sums[3][bin]);
    }
  }

  // Estimates the logit at which the mass at or above it reaches `goal`; kLowest if the total is smaller.
  float logit_by_mass_above(const Row& row, double goal) const {
    double sum = 0;
    for (int bin = 0; bin < kBins; ++bin) {
      const double mass = mass_[bin];
      if (sum + mass >= goal && mass > 0) {
        return logit_at(row, bin + std::max(0.0, (goal - sum) / mass));
      }
      sum += mass;
    }
    return kLowest;
  }

  // Estimates the logit at which the mass below it reaches `goal`; the row's maximum if the total is smaller.
  // The probe is accurate for the many tokens with little mass and inaccurate for the few with most of it,
  // which a sum from below does not contain.
  float logit_by_mass_below(const Row& row, double goal) const {
    double sum = 0;
    for (int bin = kBins - 1; bin >= 0; --bin) {
      const double mass = mass_[bin];
      if (sum + mass >= goal && mass > 0) return logit_at(row, bin + 1 - (goal - sum) / mass);
      sum += mass;
    }
    return row.m;
  }

  // Estimates the mass at or above a logit.
  double mass_above(const Row& row, float logit) const {
    const double bins = static_cast<double>(depth(logit, row.m, row.scale)) * bins_per_octave_;
    double sum = 0;
    for (int bin = 0; bin < kBins && bin < bins; ++bin) {
      sum += mass_[bin] * std::min(1.0, bins - bin);
    }
    return sum;
  }

 private:
  static constexpr int kBins = 512;

  // The logit at a depth that is given in bins.
  float logit_at(const Row& row, double bins) const {
    const float d = static_cast<float>(bins / bins_per_octave_);
    return std::max(kLowest, row.m - d / row.scale);
  }

  float bins_per_octave_ = 1.0f;
  float mass_[kBins] = {};
};

}  // namespace
}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_SELECT_H_
