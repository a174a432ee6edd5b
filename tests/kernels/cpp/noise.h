// Reproducible random numbers for the test programs.
#ifndef LLM_SAMPLING_TESTS_NOISE_H_
#define LLM_SAMPLING_TESTS_NOISE_H_

#include <cstdint>

// SplitMix64 (Steele, Lea, Flood, 2014).
class Noise {
 public:
  explicit Noise(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  template <typename T>
  T below(T limit) {
    return static_cast<T>(next() % static_cast<uint64_t>(limit));
  }
  // About normally distributed, with standard deviation 1.
  float normal() {
    const uint64_t z = next();
    const int sum =
        static_cast<int>((z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48));
    return static_cast<float>(sum - 0x1fffe) * 0x1.bb68p-16f;
  }

 private:
  uint64_t state_;
};

#endif  // LLM_SAMPLING_TESTS_NOISE_H_
