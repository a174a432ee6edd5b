// How a launch divides its rows among blocks. Plain C++ without CUDA, so that every branch is tested
// without a GPU.
#ifndef LLM_SAMPLING_CUDA_LAUNCH_CUH_
#define LLM_SAMPLING_CUDA_LAUNCH_CUH_

#include <stdint.h>

#include <initializer_list>

#include "../llm_sampling.h"
#include "../semantics.h"
#include "../sequence_rules.h"

namespace llm_sampling {

constexpr int kThreads = 256;       // threads of a block
constexpr int kVec = 8;             // tokens of a vec; its logits begin at a multiple of 16 bytes
constexpr int kMaxBlocks = 8;       // blocks of a cluster: every device with clusters supports 8
constexpr int kMaxParts = 32;       // blocks of a row that is split without a cluster (split.cuh)
constexpr int kMaxListed = 256;     // codes that such a block hands on
constexpr int kMaxScores = 2048;    // most marked tokens per block whose scores are kept (row.cuh)
constexpr int kFixedBytes = 16384;  // shared memory that a block needs whatever its part's size
constexpr int kUpdateBytes = 1024;  // shared memory of a block that changes a history
constexpr int kListBytes = 5376;    // shared memory of a block that makes a list, without ids
constexpr int kMostStaged = 8192;   // ids that such a block keeps in shared memory behind it
constexpr int kReservedBytes = 1024;  // shared memory that the device reserves for each block

struct Device {
  int processors;    // streaming multiprocessors
  int shared_bytes;  // the most shared memory that a block may have
  int most_blocks;   // the most blocks that a cluster may have; 1 without clusters
};

struct Launch {
  int blocks;        // blocks of a row
  bool copied;       // whether each block copies its part of the row into shared memory
  bool is_split;     // whether the blocks of a row are no cluster (split.cuh)
  int vecs;          // vecs of a block's part, a multiple of 32
  int shared_bytes;  // shared memory of a block
};

// Where a block's part of the row is read, and who owns the other parts.
enum class Layout {
  kInPlace,  // in global memory; the blocks of the row's cluster
  kCopied,   // a copy in shared memory; the blocks of the row's cluster
  kSplit     // a copy in shared memory; blocks that know nothing of each other, see split.cuh
};
constexpr int kLayouts = 3;

// What a block of a split row hands on, besides its codes.
struct PartHeader {
  uint64_t maximum;  // order key of the part's largest logit in the upper half; 1 if one is NaN
  uint64_t wanted;   // tokens of the part that were asked for; 0: one block must sample the row
  uint64_t low;      // the list has all tokens of the part from this code on; greedy: the first one
};

// The memory of split rows, all of it in global memory.
struct Workspace {
  uint64_t* counters;   // of each row: how many of its blocks are done
  uint64_t* codes;      // of each row: the lists of its parts
  PartHeader* headers;  // of each part of each row
};

// The kernel's argument.
struct Plan {
  LlmSamplingArgs args;
  int vecs;             // vecs of a block's part
  int parts;            // for split rows: the parts of a row
  int whole_vecs;       // for split rows: vecs of a part that is the whole row
  Workspace workspace;  // for split rows
};

using SampleKernel = void (*)(const Plan);

// The calls that a kernel is for. Those that need little have the least code to read; what few calls ask for is
// no part of the others' kernels.
enum class Calls {
  kUsual,
  kPlain,  // see is_plain(): a kernel of their own for split rows
  kMore    // see has_more()
};
constexpr int kCalls = 3;

// The kernel for a dtype, in sample.cu.
SampleKernel find_kernel(int32_t dtype, Layout layout, Calls calls);

using UpdateKernel = void (*)(const LlmSamplingUpdate);

// The kernel that changes histories, in history.cu: a block of kThreads threads for each row.
UpdateKernel find_update_kernel();

// The argument of the kernel that makes lists.
struct ListPlan {
  LlmSamplingArgs args;
  int staged;  // so many ids of a text have room in shared memory
};

inline ListPlan list_plan_of(const LlmSamplingArgs& args) {
  const int64_t places = most_places(args);
  return {args, places < kMostStaged ? static_cast<int>(places) : kMostStaged};
}
inline int list_bytes(const ListPlan& plan) { return kListBytes + plan.staged * 4; }

using ListKernel = void (*)(const ListPlan);

// The kernel that makes lists, in rules.cu: a block of kThreads threads for each row.
ListKernel find_list_kernel();

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

// The workspace that a call with split rows needs. Its codes begin at a multiple of 16 bytes.
inline int64_t workspace_bytes(int64_t rows, int64_t parts) {
  const auto codes = static_cast<int64_t>(kMaxListed * sizeof(uint64_t));
  const auto header = static_cast<int64_t>(sizeof(PartHeader));
  return rows * (static_cast<int64_t>(sizeof(uint64_t)) + parts * (codes + header)) + 8;
}
inline Workspace divide_workspace(void* workspace, int64_t rows, int64_t parts) {
  auto* counters = static_cast<uint64_t*>(workspace);
  uint64_t* codes = counters + rows;
  if (reinterpret_cast<uintptr_t>(codes) % 16 != 0) ++codes;
  return {counters, codes, reinterpret_cast<PartHeader*>(codes + rows * parts * kMaxListed)};
}

inline Launch divide_rows(int64_t vocab_size, int logit_bytes, int blocks, bool copied) {
  // A row may begin anywhere between two multiples of 16 bytes.
  const int64_t all = (vocab_size + 2 * kVec - 2) / kVec;
  const int vecs = static_cast<int>((all + blocks - 1) / blocks + 31) / 32 * 32;
  int shared = kFixedBytes + tiles_bytes(vecs);
  if (copied) shared += copy_bytes(vecs, logit_bytes);
  return {blocks, copied, false, vecs, shared};
}

// A launch whose blocks are no clusters. Any block may have to hold the lists of its row in place of its copy, or
// to sample the row alone, without a copy.
inline Launch split_rows(int64_t vocab_size, int logit_bytes, int parts) {
  Launch launch = divide_rows(vocab_size, logit_bytes, parts, true);
  launch.is_split = true;
  const int alone = divide_rows(vocab_size, logit_bytes, 1, false).shared_bytes;
  const int lists = kFixedBytes + tiles_bytes(launch.vecs) + parts * kMaxListed * 8;
  for (const int needed : {lists, alone}) {
    if (launch.shared_bytes < needed) launch.shared_bytes = needed;
  }
  return launch;
}

// Takes the fewest blocks whose copies leave room for a second row on the same multiprocessor, so that
// the logits of one row are copied while the other row is searched; otherwise the fewest blocks whose
// copies fit. Then doubles the blocks while multiprocessors would be idle and each block still has two
// vecs for every thread. Where the copies do not fit, later passes read the row from global memory again,
// through the L2 cache.
//
// Without clusters, a row of which one block has no copy is split, if there is a workspace: into as many parts
// as there are multiprocessors for, of which each has at least one vec for every thread.
inline Launch choose_launch(
    int64_t rows,
    int64_t vocab_size,
    int logit_bytes,
    bool has_workspace,
    const Device& device
) {
  const int most = device.most_blocks;
  const int half = (device.shared_bytes + kReservedBytes) / 2 - kReservedBytes;
  Launch launch = divide_rows(vocab_size, logit_bytes, 1, false);
  for (const int room : {half, device.shared_bytes}) {
    for (int blocks = 1; blocks <= most && !launch.copied; blocks *= 2) {
      const Launch next = divide_rows(vocab_size, logit_bytes, blocks, true);
      if (next.shared_bytes <= room) launch = next;
    }
  }
  while (launch.blocks < most && rows * launch.blocks * 2 <= device.processors &&
         launch.vecs >= 4 * kThreads) {
    launch = divide_rows(vocab_size, logit_bytes, launch.blocks * 2, launch.copied);
  }
  if (most > 1 || launch.copied || !has_workspace || rows == 0) return launch;
  int64_t parts = device.processors / rows;
  if (parts > launch.vecs / kThreads) parts = launch.vecs / kThreads;
  if (parts > kMaxParts) parts = kMaxParts;
  if (parts < 2) return launch;
  const Launch split = split_rows(vocab_size, logit_bytes, static_cast<int>(parts));
  return split.shared_bytes <= device.shared_bytes ? split : launch;
}

// Whether a call asks for more of a kind of logprobs than those of the drawn tokens.
LLM_SAMPLING_FN bool wants_lists(const LlmSamplingLogprobs& of) {
  return of.ranks != nullptr || of.top_ids != nullptr || of.id_logprobs != nullptr ||
         of.id_ranks != nullptr;
}
LLM_SAMPLING_FN bool wants_raw(const LlmSamplingArgs& args) { return wants_lists(args.raw); }
LLM_SAMPLING_FN bool wants_processed(const LlmSamplingArgs& args) {
  const LlmSamplingKept& kept = args.kept;
  return wants_lists(args.processed) || kept.counts != nullptr || kept.total != nullptr ||
         kept.masses != nullptr || kept.id_masses != nullptr || kept.mask != nullptr ||
         kept.ids != nullptr || kept.first_id != nullptr || kept.first_logit != nullptr ||
         kept.last_id != nullptr || kept.last_logit != nullptr;
}

// Whether a call asks for results beside tokens, status, their logprobs and filtered logits, see results.cuh, or has
// rules that look at the history.
inline bool has_more(const LlmSamplingArgs& args) {
  return wants_processed(args) || wants_raw(args) || args.dry_multiplier != nullptr;
}

// Whether the rows of a call may be split. Filtered logits and all that is raw need all tokens of a row once more.
inline bool can_split(const LlmSamplingArgs& args) {
  return args.workspace != nullptr && args.filtered == nullptr && args.raw.logprobs == nullptr &&
         !wants_raw(args);
}

// Whether a call has nothing but logits and the parameters of each row, and draws one token without its logprob.
// Where rows are few, a kernel takes longer to read the code for the rest than to sample.
inline bool is_plain(const LlmSamplingArgs& args) {
  return args.param_slots == nullptr && args.logit_bias_offsets == nullptr &&
         args.allowed_mask == nullptr && args.seen == nullptr && args.text == nullptr &&
         args.num_samples == 1 && args.processed.logprobs == nullptr && !has_more(args);
}

inline Calls calls_of(const LlmSamplingArgs& args) {
  if (has_more(args)) return Calls::kMore;
  return is_plain(args) ? Calls::kPlain : Calls::kUsual;
}

// The arguments of a plain call, with constants in place of what such a call does not have, so that the compiler
// leaves out the code for it.
LLM_SAMPLING_FN LlmSamplingArgs plain(LlmSamplingArgs args) {
  args.param_slots = nullptr;
  args.logit_bias_offsets = nullptr;
  args.allowed_mask = nullptr;
  args.seen = nullptr;
  args.text = nullptr;
  args.windows = nullptr;
  args.extra_output = nullptr;
  args.num_samples = 1;
  args.processed.logprobs = args.raw.logprobs = nullptr;
  return args;
}

inline Layout layout_of(const Launch& launch) {
  if (launch.is_split) return Layout::kSplit;
  return launch.copied ? Layout::kCopied : Layout::kInPlace;
}

inline Plan plan_of(const LlmSamplingArgs& args, const Launch& launch) {
  const int logit_bytes = args.dtype == LLM_SAMPLING_FLOAT32 ? 4 : 2;
  const int whole = divide_rows(args.vocab_size, logit_bytes, 1, false).vecs;
  const Workspace none = {nullptr, nullptr, nullptr};
  return {
      args,
      launch.vecs,
      launch.blocks,
      whole,
      launch.is_split ? divide_workspace(args.workspace, args.rows, launch.blocks) : none
  };
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_LAUNCH_CUH_
