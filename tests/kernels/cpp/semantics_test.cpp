// Compares csrc/semantics.h with integer arithmetic and with known answers. The exit status is the number of
// failures.
#include "../../../csrc/semantics.h"

#include <cstdio>
#include <initializer_list>

using namespace llm_sampling;

static int failures = 0;

static void check(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

// The definition in docs/semantics.md, section "Mass".
static int64_t mass_by_definition(float d) {
  d = d < 63.0f ? d : 63.0f;
  const int32_t e = static_cast<int32_t>(d);
  const float f = d - static_cast<float>(e);
  float p = -0x1.eca6f0p-11f;
  for (float c :
       {0x1.2d4322p-7f, -0x1.c4eb2cp-5f, 0x1.ebe206p-3f, -0x1.62e3b2p-1f, 0x1.000000p+0f}) {
    p = p * f;
    p = p + c;
  }
  const int32_t m = static_cast<int32_t>(p * 0x1p24f);
  return (static_cast<int64_t>(m) << 18) >> e;
}

int main() {
  // Every float from 0 to 64, and infinity and NaN.
  uint32_t differ = 0;
  for (uint32_t bits = 0; bits <= 0x42800000u; ++bits) {
    const float d = bit_cast<float>(bits);
    const int64_t expected = mass_by_definition(d);
    differ += mass(d) != static_cast<float>(expected) || whole_mass(d) != expected;
  }
  check(differ == 0, "mass and whole_mass equal the definition at every depth");
  check(
      mass(kInfinity) == 0 && mass(__builtin_nanf("")) == 0 && mass(-__builtin_nanf("")) == 0,
      "mass of infinity and of NaN is 0"
  );
  check(
      whole_mass(kInfinity) == 0 && whole_mass(__builtin_nanf("")) == 0,
      "whole_mass of infinity and of NaN is 0"
  );
  check(mass(kMassless) == 0 && mass(42.0f) == 1, "mass is 0 at kMassless and not yet at 42");

  // Every float16, and two bfloat16.
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
    const uint32_t sign = bits >> 15, exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float wide = widen_float16(static_cast<uint16_t>(bits));
    float expected = exponent == 0 ? fraction * 0x1p-24f : (1024 + fraction) * 0x1p-25f;
    for (uint32_t i = 0; exponent != 0 && i < exponent; ++i) expected *= 2;
    if (exponent == 31) expected = fraction == 0 ? kInfinity : __builtin_nanf("");
    if (sign != 0) expected = -expected;
    check(
        expected != expected ? wide != wide
                             : bit_cast<uint32_t>(wide) == bit_cast<uint32_t>(expected),
        "widen_float16"
    );
  }
  check(widen_bfloat16(0x3f80) == 1.0f && widen_bfloat16(0xc000) == -2.0f, "widen_bfloat16");

  // Keys have the order of the floats.
  const float ordered[] =
      {-kInfinity, kLowest, -1.0f, -0x1p-149f, 0.0f, 0x1p-149f, 1.0f, kInfinity};
  for (int i = 0; i < 8; ++i) {
    check(
        from_order_key(order_key(ordered[i])) == ordered[i],
        "from_order_key is the inverse of order_key"
    );
    for (int j = 0; j < i; ++j)
      check(order_key(ordered[j]) < order_key(ordered[i]), "a larger float has a larger order_key");
  }
  check(order_key(-0.0f) == order_key(0.0f), "-0.0 has the key of +0.0");

  // Words 0 and 1 of Philox's known answers.
  check(random_bits(0, 0, 0) == 0xe169c58d6627e8d5u, "random_bits of zeros");
  check(
      random_bits(0x299f31d0a4093822u, 0x85a308d3243f6a88u, 0x13198a2eu, 0x03707344u) ==
          0x94fdccebd16cfe09u,
      "random_bits of digits of pi"
  );

  check(
      scaled_random(~uint64_t{0}, 1) == 0 &&
          scaled_random(~uint64_t{0}, INT64_MAX) == INT64_MAX - 1,
      "scaled_random stays below s"
  );
  check(scaled_random(uint64_t{1} << 63, 10) == 5, "scaled_random scales");

  // ceil(z * P / 2^31) in 128-bit integers.
  for (float p : {1e-30f, 1e-6f, 0.1f, 0.5f, 0.9f, 0.999999f}) {
    int64_t share = static_cast<int64_t>(static_cast<double>(p) * 0x1p31) - 2048;
    share = share < 0 ? 0 : share;
    for (int64_t z : {int64_t{1}, int64_t{1} << 42, INT64_MAX / 3, INT64_MAX}) {
      const __int128 exact = (static_cast<__int128>(z) * share + 0x7fffffff) >> 31;
      check(top_p_target(z, p) == (exact < 1 ? 1 : static_cast<int64_t>(exact)), "top_p_target");
    }
  }
  std::printf("%d failures\n", failures);
  return failures;
}
