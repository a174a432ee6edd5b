// The CUDA kernel in the emulation, behind C functions: samples a batch on the CPU, by any kind of launch.
#include "cuda_emulation.h"
//
#include "../../../csrc/cuda/sample.cu"
#include "../../../csrc/validate.h"

extern "C" {

// Returns what went wrong, or an empty string; valid until the next call.
const char* llm_sampling_cuda_emulated(
    const LlmSamplingArgs* args,
    int32_t blocks,
    int32_t copied,
    uint64_t seed
) {
  using namespace llm_sampling;
  static std::string failure;
  const int32_t code = check_struct(*args);
  if (code != LLM_SAMPLING_OK) return error_text(code);
  const int logit_bytes = args->dtype == LLM_SAMPLING_FLOAT32 ? 4 : 2;
  const Launch launch = split_rows(args->vocab_size, logit_bytes, blocks, copied != 0);
  cuda_emulation::Launch emulated;
  emulated.grid = dim3(static_cast<unsigned>(args->rows * launch.blocks));
  emulated.block = dim3(kThreads);
  emulated.cluster = static_cast<unsigned>(launch.blocks);
  emulated.seed = seed;
  emulated.shared_bytes = static_cast<size_t>(launch.shared_bytes);
  const Plan plan{*args, launch.vecs};
  failure = cuda_emulation::run(emulated, find_kernel(args->dtype, launch.copied), plan);
  return failure.c_str();
}

// Writes what choose_launch chooses: blocks, copied, vecs, shared bytes.
void llm_sampling_cuda_launch(
    int64_t rows,
    int64_t vocab_size,
    int32_t logit_bytes,
    const int32_t* device,
    int32_t* launch
) {
  const llm_sampling::Device on{device[0], device[1], device[2]};
  const auto chosen = llm_sampling::choose_launch(rows, vocab_size, logit_bytes, on);
  launch[0] = chosen.blocks;
  launch[1] = chosen.copied;
  launch[2] = chosen.vecs;
  launch[3] = chosen.shared_bytes;
}

}  // extern "C"
