// The CUDA kernel for the emulation, behind a C function: a batch on a CPU, as any launch would do it.
#include "cuda_emulation.h"
//
#include "../../csrc/cuda/sample.cu"

namespace llm_sampling {
namespace {

template <int kDtype, bool kCopied>
std::string run_rows(const Plan& plan, unsigned blocks, uint64_t seed) {
  constexpr int kThreads = 512;
  constexpr int kBytes = kGroup * kLogitBytes<kDtype>;
  cuda_emulation::Launch launch;
  launch.grid = dim3(static_cast<unsigned>(plan.args.rows) * blocks);
  launch.block = dim3(kThreads);
  launch.cluster = blocks;
  launch.seed = seed;
  launch.shared_bytes = sizeof(Shared<kThreads>);
  launch.shared_bytes +=
      static_cast<size_t>(RowSampler<kDtype, kCopied, kThreads>::chunk_bytes(plan.groups));
  if (kCopied) launch.shared_bytes += static_cast<size_t>(plan.groups) * kBytes;
  return cuda_emulation::run(launch, sample_kernel<kDtype, kCopied, kThreads>, plan);
}

template <int kDtype>
std::string run_dtype(const Plan& plan, unsigned blocks, bool copied, uint64_t seed) {
  return copied ? run_rows<kDtype, true>(plan, blocks, seed)
                : run_rows<kDtype, false>(plan, blocks, seed);
}

}  // namespace
}  // namespace llm_sampling

// Returns what went wrong, or an empty string; valid until the next call.
extern "C" const char* llm_sampling_cuda_emulated(
    const LlmSamplingArgs* args,
    uint32_t blocks,
    int32_t copied,
    uint64_t seed
) {
  using namespace llm_sampling;
  static std::string failure;
  Plan plan{*args, 0};
  const int64_t groups = (args->vocab_size + 2 * kGroup - 2) / kGroup;  // of a misaligned row
  plan.groups = static_cast<int>((groups + blocks - 1) / blocks + 31) / 32 * 32;
  switch (args->dtype) {
    case LLM_SAMPLING_FLOAT32:
      failure = run_dtype<LLM_SAMPLING_FLOAT32>(plan, blocks, copied != 0, seed);
      break;
    case LLM_SAMPLING_FLOAT16:
      failure = run_dtype<LLM_SAMPLING_FLOAT16>(plan, blocks, copied != 0, seed);
      break;
    default:
      failure = run_dtype<LLM_SAMPLING_BFLOAT16>(plan, blocks, copied != 0, seed);
  }
  return failure.c_str();
}
