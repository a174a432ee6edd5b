// How a launch cuts its rows: a function of numbers alone, so that each branch is tested without a GPU.
#ifndef LLM_SAMPLING_CUDA_LAUNCH_H_
#define LLM_SAMPLING_CUDA_LAUNCH_H_

#include <stdint.h>

#include "../semantics.h"

namespace llm_sampling {

constexpr int kThreads = 512;        // of a block
constexpr int kGroup = 8;            // whose logits begin at a multiple of 16 bytes
constexpr int kBlocksAtMost = 8;     // of a cluster, on every device that has clusters
constexpr int kSharedFixed = 16384;  // bytes for what every block has beside chunks and copy

struct Device {
  int capability;    // 80 for sm_80
  int processors;    // multiprocessors
  int shared_bytes;  // that a block may have
};

struct Launch {
  int blocks;        // of a row's cluster
  bool copied;       // whether each copies its part into shared memory
  int groups;        // of a part, a multiple of 32
  int shared_bytes;  // of a block
};

inline int groups_of_part(int64_t vocab_size, int blocks) {
  // a row that begins anywhere between two multiples of 16 bytes
  const int64_t groups = (vocab_size + 2 * kGroup - 2) / kGroup;
  return static_cast<int>((groups + blocks - 1) / blocks + 31) / 32 * 32;
}

// 8 bytes for each chunk of 32 groups, in whole rounds of a block, and in whole lines.
LLM_SAMPLING_FN constexpr int chunk_bytes(int groups) {
  return ((groups + kThreads - 1) / kThreads * (kThreads / 32) * 8 + 127) / 128 * 128;
}

inline Launch cut_rows(int64_t vocab_size, int logit_bytes, int blocks, bool copied) {
  const int groups = groups_of_part(vocab_size, blocks);
  const int copy = copied ? groups * kGroup * logit_bytes : 0;
  return {blocks, copied, groups, kSharedFixed + chunk_bytes(groups) + copy};
}

// The fewest blocks whose copies fit, then more of them while processors would idle and each block
// still has a group for every thread. Without clusters, or where 8 copies do not fit, later passes read
// the row again, through the L2 cache.
inline Launch choose_launch(
    int64_t rows,
    int64_t vocab_size,
    int logit_bytes,
    const Device& device
) {
  const int most = device.capability >= 90 ? kBlocksAtMost : 1;
  Launch launch = cut_rows(vocab_size, logit_bytes, 1, false);
  for (int blocks = 1; blocks <= most; blocks *= 2) {
    const Launch next = cut_rows(vocab_size, logit_bytes, blocks, true);
    if (next.shared_bytes > device.shared_bytes) continue;
    launch = next;
    break;
  }
  while (launch.blocks < most && rows * launch.blocks * 2 <= device.processors &&
         launch.groups >= 2 * kThreads) {
    launch = cut_rows(vocab_size, logit_bytes, launch.blocks * 2, launch.copied);
  }
  return launch;
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_LAUNCH_H_
