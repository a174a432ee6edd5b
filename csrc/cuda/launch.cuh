// How a launch divides its rows among blocks. Plain C++ without CUDA, so that every branch is tested
// without a GPU.
#ifndef LLM_SAMPLING_CUDA_LAUNCH_CUH_
#define LLM_SAMPLING_CUDA_LAUNCH_CUH_

#include <stdint.h>

#include <initializer_list>

#include "../llm_sampling.h"
#include "../semantics.h"

namespace llm_sampling {

constexpr int kThreads = 256;         // threads of a block
constexpr int kVec = 8;               // tokens of a vec; its logits begin at a multiple of 16 bytes
constexpr int kMaxBlocks = 8;         // blocks of a cluster: every device with clusters supports 8
constexpr int kMaxScores = 2048;      // most seen tokens per block whose scores are kept (row.cuh)
constexpr int kFixedBytes = 16384;    // shared memory that a block needs whatever its part's size
constexpr int kUpdateBytes = 1024;    // shared memory of a block that changes a history
constexpr int kReservedBytes = 1024;  // shared memory that the device reserves for each block

struct Device {
  int capability;    // 80 for sm_80
  int processors;    // streaming multiprocessors
  int shared_bytes;  // the most shared memory that a block may have
};

struct Launch {
  int blocks;        // blocks of a row's cluster
  bool copied;       // whether each block copies its part of the row into shared memory
  int vecs;          // vecs of a block's part, a multiple of 32
  int shared_bytes;  // shared memory of a block
};

// The kernel's argument.
struct Plan {
  LlmSamplingArgs args;
  int vecs;  // vecs of a block's part
};

using SampleKernel = void (*)(const Plan);

// The kernel for a dtype, in sample.cu.
SampleKernel find_kernel(int32_t dtype, bool copied);

using UpdateKernel = void (*)(const LlmSamplingUpdate);

// The kernel that changes histories, in history.cu: a block of kThreads threads for each row.
UpdateKernel find_update_kernel();

// The shared memory behind the fixed part, in whole lines of 128 bytes: a mass and a key for each tile
// of 32 vecs, for whole rounds of a block; then, where there is a copy, the arrays of row.cuh's Copy.
LLM_SAMPLING_FN constexpr int whole_lines(int bytes) { return (bytes + 127) / 128 * 128; }
LLM_SAMPLING_FN constexpr int count_tiles(int vecs) {
  return (vecs + kThreads - 1) / kThreads * (kThreads / 32);
}
LLM_SAMPLING_FN constexpr int tiles_bytes(int vecs) {
  return whole_lines(count_tiles(vecs) * (8 + 4));
}
LLM_SAMPLING_FN constexpr int logits_bytes(int vecs, int logit_bytes) {
  return vecs * kVec * logit_bytes;
}
LLM_SAMPLING_FN constexpr int bits_bytes(int vecs) { return whole_lines(vecs); }
LLM_SAMPLING_FN constexpr int places_bytes(int vecs) { return whole_lines(vecs / 4 * 2); }
LLM_SAMPLING_FN constexpr int copy_bytes(int vecs, int logit_bytes) {
  return logits_bytes(vecs, logit_bytes) + kMaxScores * 4 + 2 * bits_bytes(vecs) +
         places_bytes(vecs);
}

inline Launch split_rows(int64_t vocab_size, int logit_bytes, int blocks, bool copied) {
  // A row may begin anywhere between two multiples of 16 bytes.
  const int64_t all = (vocab_size + 2 * kVec - 2) / kVec;
  const int vecs = static_cast<int>((all + blocks - 1) / blocks + 31) / 32 * 32;
  int shared = kFixedBytes + tiles_bytes(vecs);
  if (copied) shared += copy_bytes(vecs, logit_bytes);
  return {blocks, copied, vecs, shared};
}

// Takes the fewest blocks whose copies leave room for a second row on the same multiprocessor, so that
// the logits of one row are copied while the other row is searched; otherwise the fewest blocks whose
// copies fit. Then doubles the blocks while multiprocessors would be idle and each block still has two
// vecs for every thread. Without clusters, or where 8 copies do not fit, later passes read the row from
// global memory again, through the L2 cache.
inline Launch choose_launch(
    int64_t rows,
    int64_t vocab_size,
    int logit_bytes,
    const Device& device
) {
  const int most = device.capability >= 90 ? kMaxBlocks : 1;
  const int half = (device.shared_bytes + kReservedBytes) / 2 - kReservedBytes;
  Launch launch = split_rows(vocab_size, logit_bytes, 1, false);
  for (const int room : {half, device.shared_bytes}) {
    for (int blocks = 1; blocks <= most && !launch.copied; blocks *= 2) {
      const Launch next = split_rows(vocab_size, logit_bytes, blocks, true);
      if (next.shared_bytes <= room) launch = next;
    }
  }
  while (launch.blocks < most && rows * launch.blocks * 2 <= device.processors &&
         launch.vecs >= 4 * kThreads) {
    launch = split_rows(vocab_size, logit_bytes, launch.blocks * 2, launch.copied);
  }
  return launch;
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_LAUNCH_CUH_
