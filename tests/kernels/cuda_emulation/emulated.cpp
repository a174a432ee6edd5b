// The CUDA kernels in the emulation, behind C functions: samples a batch on the CPU, by any kind of launch, and
// changes histories.
#include "cuda_emulation.h"
//
#include "../../../csrc/cuda/history.cu"
#include "../../../csrc/cuda/rules.cu"
#include "../../../csrc/cuda/sample.cu"
#include "../../../csrc/validate.h"

extern "C" {

// Overwrites logits while a kernel runs: at the barrier of row r with the number at[r], counted from 1, its
// logits and those of `others` change places; where `often` is not 0, at every later barrier too.
struct Overwriting {
  void* logits;  // that the args of the same call point to
  void* others;  // (rows, vocab_size), contiguous
  const int32_t* at;
  int32_t often;
};

// Returns what went wrong, or an empty string; valid until the next call. `overwriting` may be NULL. The blocks
// of a split row run in turns, as those of a cluster do.
const char* llm_sampling_cuda_emulated(
    const LlmSamplingArgs* args,
    int32_t blocks,
    int32_t copied,
    int32_t is_split,
    uint64_t seed,
    const Overwriting* overwriting
) {
  using namespace llm_sampling;
  static std::string failure;
  int32_t code = check_struct(*args);
  if (code == LLM_SAMPLING_OK && args->dry_multiplier != nullptr) code = check_lists(*args);
  if (code != LLM_SAMPLING_OK) return error_text(code);
  const int logit_bytes = args->dtype == LLM_SAMPLING_FLOAT32 ? 4 : 2;
  Launch launch = divide_rows(args->vocab_size, logit_bytes, blocks, copied != 0);
  if (is_split != 0) {
    launch = can_split(*args) ? split_rows(args->vocab_size, logit_bytes, blocks)
                              : divide_rows(args->vocab_size, logit_bytes, 1, false);
  }
  cuda_emulation::Launch emulated;
  const auto of_row = static_cast<unsigned>(launch.blocks);
  const auto rows = static_cast<unsigned>(args->rows);
  emulated.grid = launch.is_split ? dim3(of_row, rows) : dim3(rows * of_row);
  emulated.block = dim3(kThreads);
  emulated.cluster = static_cast<unsigned>(launch.blocks);
  emulated.is_cluster = !launch.is_split;
  emulated.seed = seed;
  emulated.shared_bytes = static_cast<size_t>(launch.shared_bytes);
  const Plan plan = plan_of(*args, launch);
  auto& machine = cuda_emulation::machine;
  machine.at_barrier = nullptr;
  if (args->dry_multiplier != nullptr) {
    const ListPlan lists = list_plan_of(*args);
    cuda_emulation::Launch making;
    making.grid = dim3(rows);
    making.block = dim3(kThreads);
    making.seed = seed;
    making.shared_bytes = static_cast<size_t>(list_bytes(lists));
    failure = cuda_emulation::run(making, find_list_kernel(), lists);
    if (!failure.empty()) return failure.c_str();
  }
  if (overwriting != nullptr) {
    machine.at_barrier = [&] {
      const dim3& first = machine.blocks[0].index;
      const int64_t row = launch.is_split ? first.y : first.x / of_row;
      const auto at = static_cast<unsigned>(overwriting->at[row]);
      if (overwriting->often != 0 ? machine.barriers < at : machine.barriers != at) return;
      unsigned char* logits = static_cast<unsigned char*>(overwriting->logits);
      unsigned char* others = static_cast<unsigned char*>(overwriting->others);
      logits += row * args->logits_stride * logit_bytes;
      others += row * args->vocab_size * logit_bytes;
      std::swap_ranges(logits, logits + args->vocab_size * logit_bytes, others);
    };
  }
  const SampleKernel kernel = find_kernel(args->dtype, layout_of(launch), calls_of(*args));
  if (kernel == nullptr) return "the library has no kernel for this dtype";
  failure = cuda_emulation::run(emulated, kernel, plan);
  return failure.c_str();
}

// The same for a change of histories.
const char* llm_sampling_cuda_update_emulated(const LlmSamplingUpdate* update, uint64_t seed) {
  using namespace llm_sampling;
  static std::string failure;
  const int32_t code = check_update(*update);
  if (code != LLM_SAMPLING_OK) return error_text(code);
  cuda_emulation::Launch emulated;
  emulated.grid = dim3(static_cast<unsigned>(update->rows));
  emulated.block = dim3(kThreads);
  emulated.seed = seed;
  emulated.shared_bytes = kUpdateBytes;
  cuda_emulation::machine.at_barrier = nullptr;
  failure = cuda_emulation::run(emulated, find_update_kernel(), *update);
  return failure.c_str();
}

// Writes what choose_launch chooses: blocks, copied, is_split, vecs, shared bytes.
void llm_sampling_cuda_launch(
    int64_t rows,
    int64_t vocab_size,
    int32_t logit_bytes,
    int32_t has_workspace,
    const int32_t* device,
    int32_t* launch
) {
  const llm_sampling::Device on{device[0], device[1], device[2]};
  const auto chosen =
      llm_sampling::choose_launch(rows, vocab_size, logit_bytes, has_workspace != 0, on);
  launch[0] = chosen.blocks;
  launch[1] = chosen.copied;
  launch[2] = chosen.is_split;
  launch[3] = chosen.vecs;
  launch[4] = chosen.shared_bytes;
}

int64_t llm_sampling_cuda_workspace_bytes(int64_t rows, int32_t parts) {
  return llm_sampling::workspace_bytes(rows, parts);
}

}  // extern "C"
