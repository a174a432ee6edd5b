// The CUDA kernel for the emulation, behind a C function: a batch on a CPU, as any launch would do it.
#include "cuda_emulation.h"
//
#include "../../csrc/cuda/sample.cu"

namespace llm_sampling {
namespace {

template <int kDtype>
std::string run_rows(const Plan& plan, const Launch& launch, uint64_t seed) {
  cuda_emulation::Launch emulated;
  emulated.grid = dim3(static_cast<unsigned>(plan.args.rows * launch.blocks));
  emulated.block = dim3(kThreads);
  emulated.cluster = static_cast<unsigned>(launch.blocks);
  emulated.seed = seed;
  emulated.shared_bytes = static_cast<size_t>(launch.shared_bytes);
  return launch.copied ? cuda_emulation::run(emulated, sample_kernel<kDtype, true>, plan)
                       : cuda_emulation::run(emulated, sample_kernel<kDtype, false>, plan);
}

}  // namespace
}  // namespace llm_sampling

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
  const Launch launch = cut_rows(args->vocab_size, logit_bytes, blocks, copied != 0);
  const Plan plan{*args, launch.groups};
  switch (args->dtype) {
    case LLM_SAMPLING_FLOAT32:
      failure = run_rows<LLM_SAMPLING_FLOAT32>(plan, launch, seed);
      break;
    case LLM_SAMPLING_FLOAT16:
      failure = run_rows<LLM_SAMPLING_FLOAT16>(plan, launch, seed);
      break;
    default:
      failure = run_rows<LLM_SAMPLING_BFLOAT16>(plan, launch, seed);
  }
  return failure.c_str();
}

// blocks, copied, groups, shared bytes
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
  launch[2] = chosen.groups;
  launch[3] = chosen.shared_bytes;
}

}  // extern "C"
