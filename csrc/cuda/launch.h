// How a launch cuts its rows: a function of numbers alone, so that each branch is tested without a GPU.
#ifndef LLM_SAMPLING_CUDA_LAUNCH_H_
#define LLM_SAMPLING_CUDA_LAUNCH_H_

#include <stdint.h>

#include <initializer_list>

#include "../semantics.h"

namespace llm_sampling {

constexpr int kThreads = 256;        // of a block
constexpr int kGroup = 8;            // whose logits begin at a multiple of 16 bytes
constexpr int kBlocksAtMost = 8;     // of a cluster, on every device that has clusters
constexpr int kScored = 2048;        // of a block's seen tokens have their scores in shared memory
constexpr int kSharedFixed = 16384;  // bytes for what every block has, whatever its part
constexpr int kReserved = 1024;      // bytes that the device takes for each block

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

// Shared memory behind the fixed part, in whole lines of 128 bytes: what is kept of each chunk of 32 groups,
// in whole rounds of a block; then, where there is a copy, what device.h's Copy has.
LLM_SAMPLING_FN constexpr int whole_lines(int bytes) { return (bytes + 127) / 128 * 128; }
LLM_SAMPLING_FN constexpr int count_chunks(int groups) {
  return (groups + kThreads - 1) / kThreads * (kThreads / 32);
}
LLM_SAMPLING_FN constexpr int chunk_bytes(int groups) {
  return whole_lines(count_chunks(groups) * (8 + 4));
}
LLM_SAMPLING_FN constexpr int logits_bytes(int groups, int logit_bytes) {
  return groups * kGroup * logit_bytes;
}
LLM_SAMPLING_FN constexpr int bits_bytes(int groups) { return whole_lines(groups); }
LLM_SAMPLING_FN constexpr int places_bytes(int groups) { return whole_lines(groups / 4 * 2); }
LLM_SAMPLING_FN constexpr int copy_bytes(int groups, int logit_bytes) {
  return logits_bytes(groups, logit_bytes) + kScored * 4 + 2 * bits_bytes(groups) +
         places_bytes(groups);
}

inline Launch cut_rows(int64_t vocab_size, int logit_bytes, int blocks, bool copied) {
  // a row that begins anywhere between two multiples of 16 bytes
  const int64_t all = (vocab_size + 2 * kGroup - 2) / kGroup;
  const int groups = static_cast<int>((all + blocks - 1) / blocks + 31) / 32 * 32;
  int shared = kSharedFixed + chunk_bytes(groups);
  if (copied) shared += copy_bytes(groups, logit_bytes);
  return {blocks, copied, groups, shared};
}

// The fewest blocks whose copies leave room for a second row on the same multiprocessor: its logits come
// while this one is searched. Else the fewest whose copies fit. Then more of them while processors would
// idle and each block still has two groups for every thread. Without clusters, or where 8 copies do not
// fit, later passes read the row again, through the L2 cache.
inline Launch choose_launch(
    int64_t rows,
    int64_t vocab_size,
    int logit_bytes,
    const Device& device
) {
  const int most = device.capability >= 90 ? kBlocksAtMost : 1;
  const int half = (device.shared_bytes + kReserved) / 2 - kReserved;
  Launch launch = cut_rows(vocab_size, logit_bytes, 1, false);
  for (const int room : {half, device.shared_bytes}) {
    for (int blocks = 1; blocks <= most && !launch.copied; blocks *= 2) {
      const Launch next = cut_rows(vocab_size, logit_bytes, blocks, true);
      if (next.shared_bytes <= room) launch = next;
    }
  }
  while (launch.blocks < most && rows * launch.blocks * 2 <= device.processors &&
         launch.groups >= 4 * kThreads) {
    launch = cut_rows(vocab_size, logit_bytes, launch.blocks * 2, launch.copied);
  }
  return launch;
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_LAUNCH_H_
