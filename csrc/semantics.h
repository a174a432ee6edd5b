// The arithmetic of docs/semantics.md, for host and device. No other C++ file repeats it.
//
// Every float32 operation is rounded on its own, so compile without contraction into fused multiply-adds
// (-ffp-contract=off, -fmad=false) and without flushing subnormals.
#ifndef LLM_SAMPLING_SEMANTICS_H_
#define LLM_SAMPLING_SEMANTICS_H_

#include <stdint.h>
#include <string.h>

#include "llm_sampling.h"

#ifdef __CUDACC__
#define LLM_SAMPLING_FN __host__ __device__ __forceinline__
#else
#define LLM_SAMPLING_FN inline __attribute__((always_inline))
#endif

namespace llm_sampling {

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");
// The lowest finite float. What is below it, -inf, is never drawn.
constexpr float kLowest = -0x1.fffffep+127f;

template <typename To, typename From>
LLM_SAMPLING_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of the same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Loads a value exactly once. Memory of the caller may change during a call, and a compiler may load a plain
// value again after it has been checked.
template <typename T>
LLM_SAMPLING_FN T read_once(const T& value) {
  return *static_cast<const volatile T*>(&value);
}

// 1 widen, which is exact.
LLM_SAMPLING_FN float widen_bfloat16(uint16_t bits) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

LLM_SAMPLING_FN float widen_float16(uint16_t bits) {
  // The multiplication changes the exponent's bias, and is right for subnormals too.
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const float finite = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t value = magnitude >= 0x0f800000u ? special : bit_cast<uint32_t>(finite);
  return bit_cast<float>(value | static_cast<uint32_t>(bits & 0x8000) << 16);
}

// 2 bias: -infinity bans a token whatever its logit is, NaN and +infinity included.
LLM_SAMPLING_FN float biased(float x, float bias) {
  const float sum = x + bias;
  return bias == -kInfinity ? bias : sum;
}

// 5a the list: an infinite amount bans the token, whatever its logit is.
LLM_SAMPLING_FN float lowered(float x, float amount) {
  return amount == kInfinity ? -kInfinity : x - amount;
}

// 3 repetition penalty
LLM_SAMPLING_FN float repetition(float x, float penalty) {
  const float divided = x / penalty;
  const float multiplied = x * penalty;
  return x > 0.0f ? divided : multiplied;
}

// 4 frequency penalty
LLM_SAMPLING_FN float frequency(float x, float penalty, int32_t count) {
  const float amount = penalty * static_cast<float>(count);
  return x - amount;
}

// 7 order: the larger key comes first, and of equal keys the smaller token id. -0.0 has the key of +0.0
// (step 6). x must not be NaN.
LLM_SAMPLING_FN uint32_t order_key(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

LLM_SAMPLING_FN float from_order_key(uint32_t key) {
  return bit_cast<float>(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// 9 depth: octaves below the row's maximum m. It is never negative, and not -0.0 unless m is; NaN if x is.
LLM_SAMPLING_FN float depth_scale(float temperature) { return kLog2E / temperature; }

LLM_SAMPLING_FN float depth(float x, float m, float scale) {
  const float d = (m - x) * scale;
  return x == m ? 0.0f : d;
}

// The same depth, if m and the scale are finite.
LLM_SAMPLING_FN float finite_depth(float x, float m, float scale) { return (m - x) * scale; }

// 10 mass: an integer in 0 .. 2^42. The depth must be neither negative nor -0.0; the mass of NaN is 0.
//
// The polynomial's p has 24 significant bits and is at least 0.5, so p * 2^24 is the integer M of
// docs/semantics.md, and p * 2^(42 - e) truncated to an integer is (M << 18) >> e. A scaled mass is
// p * 2^(21 - e), which is the mass times 2^-21 before truncation. It takes two functions, split_depth and
// scaled_mass: a loop over each keeps a CPU busier than one loop over both, whose chain of dependent
// operations is too long.
LLM_SAMPLING_FN void split_depth(float d, float& fraction, int32_t& exponent_bits) {
  // Floats that are not negative are ordered like their bits, and the bits of NaN are above all of them.
  const uint32_t bits = bit_cast<uint32_t>(d);
  d = bit_cast<float>(bits < 0x427c0000u ? bits : 0x427c0000u);  // at most 63
  const int32_t e = static_cast<int32_t>(d);
  fraction = d - static_cast<float>(e);
  exponent_bits = (21 - e) * (1 << 23);
}

LLM_SAMPLING_FN float polynomial(float fraction) {
  float p = -0x1.eca6f0p-11f;
  p = p * fraction;
  p = p + 0x1.2d4322p-7f;
  p = p * fraction;
  p = p + -0x1.c4eb2cp-5f;
  p = p * fraction;
  p = p + 0x1.ebe206p-3f;
  p = p * fraction;
  p = p + -0x1.62e3b2p-1f;
  p = p * fraction;
  p = p + 0x1.000000p+0f;
  return p;
}

LLM_SAMPLING_FN float scaled_mass(float fraction, int32_t exponent_bits) {
  return bit_cast<float>(bit_cast<int32_t>(polynomial(fraction)) + exponent_bits);
}

// The mass as a float32, which represents it exactly.
LLM_SAMPLING_FN float mass(float d) {
  float fraction;
  int32_t exponent_bits;
  split_depth(d, fraction, exponent_bits);
  return __builtin_truncf(scaled_mass(fraction, exponent_bits) * 0x1p21f);
}

// So many halves of masses, each at most 2^21, have a sum that fits an int32.
constexpr int kMaxSummedHalves = 512;
static_assert(int64_t{kMaxSummedHalves} << 21 <= INT32_MAX, "a sum of halves fits an int32");

// Splits a scaled mass: its mass is high * 2^21 + low.
LLM_SAMPLING_FN void mass_halves(float scaled, int32_t& high, int32_t& low) {
  high = static_cast<int32_t>(scaled);
  low = static_cast<int32_t>((scaled - static_cast<float>(high)) * 0x1p21f);
}

LLM_SAMPLING_FN int64_t join_halves(int32_t high, int32_t low) {
  return static_cast<int64_t>(high) * (1 << 21) + low;
}

// The same mass as an integer, without conversions between float and integer, which are slow on a GPU.
LLM_SAMPLING_FN int64_t whole_mass(float d) {
  d = d < 63.0f ? d : 63.0f;  // 63 for NaN too
  // 2^23 + d is rounded to the nearest integer, which may be the one above d.
  const float shifted = d + 0x1p23f;
  const float nearest = shifted - 0x1p23f;
  const bool above = nearest > d;
  const float fraction = d - (above ? nearest - 1.0f : nearest);
  const int32_t e = bit_cast<int32_t>(shifted) - 0x4b000000 - (above ? 1 : 0);
  // Floats from 0.5 to 1 are 2^-24 apart, and their bits are 1 apart.
  const int32_t m = bit_cast<int32_t>(polynomial(fraction)) - 0x3e800000;
  return (static_cast<int64_t>(m) << 18) >> e;
}

constexpr float kMassless = 43.0f;  // a token at this depth, or deeper, has no mass

// 12 top-p: the mass that the nucleus must reach, where z is the mass that step 11 kept.
LLM_SAMPLING_FN int64_t top_p_target(int64_t z, float top_p) {
  const double scaled = static_cast<double>(top_p) * 0x1p31;  // exact
  int64_t share = static_cast<int64_t>(scaled) - (1 << 11);
  share = share > 0 ? share : 0;
  const int64_t high = z >> 31;
  const int64_t low = z & 0x7fffffff;
  const int64_t target = high * share + ((low * share + 0x7fffffff) >> 31);
  return target > 1 ? target : 1;
}

// 13 min-p: the largest depth that a row's filters by depth keep; infinity if none is on. `index` is that of
// the row's parameters. A further filter by depth is one more term of a minimum here.
LLM_SAMPLING_FN float depth_cut(const LlmSamplingArgs& args, int64_t index) {
  return args.min_p_cut[index];
}

// 14 draw: Philox4x32-10 (Salmon et al., SC 2011). Key: seed; counter: position, draw, stream.
LLM_SAMPLING_FN uint64_t
random_bits(uint64_t seed, uint64_t position, uint32_t draw, uint32_t stream = 0) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(position);
  uint32_t c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = draw;
  uint32_t c3 = stream;
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t second = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<uint64_t>(c0) | static_cast<uint64_t>(c1) << 32;
}

// (random * s) >> 64, which is uniform in 0 .. s - 1.
LLM_SAMPLING_FN int64_t scaled_random(uint64_t random, int64_t s) {
#ifdef __CUDA_ARCH__
  return static_cast<int64_t>(__umul64hi(random, static_cast<uint64_t>(s)));
#else
  return static_cast<int64_t>(
      (static_cast<unsigned __int128>(random) * static_cast<uint64_t>(s)) >> 64
  );
#endif
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_SEMANTICS_H_
