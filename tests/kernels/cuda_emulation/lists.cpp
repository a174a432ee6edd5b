// The CUDA kernel that makes the lists of step 5a in the emulation, behind a C function.
#include "cuda_emulation.h"
//
#include "../../../csrc/cuda/rules.cu"
#include "../../../csrc/validate.h"

extern "C" {

// Memory that changes places with other memory: at every barrier of a row whose number, counted from 1, is a
// multiple of `every`.
struct Swapping {
  void* const* these;
  void* const* others;
  const int64_t* bytes;
  int64_t count;
  int64_t every;
};

// Returns what went wrong, or an empty string; valid until the next call. `swapping` may be NULL.
const char* llm_sampling_cuda_lists_emulated(
    const LlmSamplingArgs* args,
    uint64_t seed,
    const Swapping* swapping
) {
  using namespace llm_sampling;
  static std::string failure;
  int32_t code = check_struct(*args);
  if (code == LLM_SAMPLING_OK) code = check_lists(*args);
  if (code != LLM_SAMPLING_OK) return error_text(code);
  const ListPlan plan = list_plan_of(*args);
  cuda_emulation::Launch emulated;
  emulated.grid = dim3(static_cast<unsigned>(args->rows));
  emulated.block = dim3(kThreads);
  emulated.seed = seed;
  emulated.shared_bytes = static_cast<size_t>(list_bytes(plan));
  auto& machine = cuda_emulation::machine;
  machine.at_barrier = nullptr;
  if (swapping != nullptr) {
    machine.at_barrier = [&] {
      if (machine.barriers % swapping->every != 0) return;
      for (int64_t i = 0; i < swapping->count; ++i) {
        auto* memory = static_cast<unsigned char*>(swapping->these[i]);
        auto* other = static_cast<unsigned char*>(swapping->others[i]);
        std::swap_ranges(memory, memory + swapping->bytes[i], other);
      }
    };
  }
  failure = cuda_emulation::run(emulated, find_list_kernel(), plan);
  return failure.c_str();
}

}  // extern "C"
