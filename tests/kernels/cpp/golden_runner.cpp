// Runs the CPU kernel for calls that it reads from stdin, without Python, so that tests/sampling/test_golden.py
// can ask a kernel that was compiled for another machine and runs in an emulator.
//
// A call is an LlmSamplingArgs in which every pointer is the size of its array in bytes instead, or 0 for NULL.
// The arrays that the kernel reads follow in the order of kArrays. The answer on stdout is the returned code, an
// int32_t, and the arrays that the kernel writes, those of kResults last. The exit status is 0 if stdin ended
// after a call.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

#include "../../../csrc/llm_sampling.h"
#include "result_arrays.h"

namespace {

struct Array {
  size_t field;  // the offset of its pointer
  bool is_result;
};

#define ARGUMENT(name) {offsetof(LlmSamplingArgs, name), false}
#define OUTPUT(name) {offsetof(LlmSamplingArgs, name), true}

constexpr Array kArrays[] = {
    ARGUMENT(logits),
    ARGUMENT(temperature),
    ARGUMENT(top_k),
    ARGUMENT(top_p),
    ARGUMENT(min_p_cut),
    ARGUMENT(repetition_penalty),
    ARGUMENT(frequency_penalty),
    ARGUMENT(presence_penalty),
    ARGUMENT(min_tokens_to_keep),
    ARGUMENT(seed),
    ARGUMENT(position),
    ARGUMENT(logit_bias_offsets),
    ARGUMENT(logit_bias_ids),
    ARGUMENT(logit_bias_values),
    ARGUMENT(allowed_mask),
    ARGUMENT(seen),
    ARGUMENT(counts),
    ARGUMENT(lengths),
    ARGUMENT(slots),
    ARGUMENT(token_ids),
    OUTPUT(tokens),
    OUTPUT(status),
    OUTPUT(filtered),
};

// kArrays, and then the other results.
std::vector<Array> all_arrays() {
  std::vector<Array> arrays(std::begin(kArrays), std::end(kArrays));
  for (const Result& result : kResults) arrays.push_back({result.offset, true});
  return arrays;
}

bool answer(LlmSamplingArgs& args, const std::vector<Array>& arrays) {
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<uint64_t> sizes;
  for (const Array& array : arrays) {
    char* field = reinterpret_cast<char*>(&args) + array.field;
    uint64_t size;
    std::memcpy(&size, field, sizeof size);
    sizes.push_back(size);
    memory.emplace_back(size > 0 ? new char[size] : nullptr);
    char* const bytes = memory.back().get();
    std::memcpy(field, &bytes, sizeof bytes);
    if (size == 0) continue;
    if (array.is_result) {
      std::memset(bytes, 0xa5, size);  // no answer of a kernel that writes nothing
    } else if (std::fread(bytes, 1, size, stdin) != size) {
      return false;
    }
  }
  const int32_t code = llm_sampling_cpu(&args);
  bool written = std::fwrite(&code, sizeof code, 1, stdout) == 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (arrays[i].is_result)
      written &= std::fwrite(memory[i].get(), 1, sizes[i], stdout) == sizes[i];
  }
  return written;
}

}  // namespace

int main() {
  static_assert(sizeof(void*) == sizeof(uint64_t), "a pointer has the place of a size");
  const std::vector<Array> arrays = all_arrays();
  LlmSamplingArgs args;
  size_t read;
  while ((read = std::fread(&args, 1, sizeof args, stdin)) == sizeof args) {
    if (!answer(args, arrays)) return 1;
  }
  return read != 0 || std::fflush(stdout) != 0;
}
