// The CUDA kernel that samples: all of docs/semantics.md in one launch, with its step numbers. What changes
// histories by ids that were not drawn is in history.cu, and what makes the lists of step 5a in rules.cu.
//
// A cluster of 1 to 8 blocks owns one row. Each block owns an equal part of the row's vecs (8 neighbouring
// tokens, see row.cuh), and each thread owns every kThreads-th vec of that part. In one round, a warp
// processes 32 neighbouring vecs, a tile of 256 tokens.
//
// Where the part fits, a block copies it into shared memory, with the bits of mask and history that belong
// to it, and every pass reads this copy: each logit is read from global memory once. Otherwise each pass
// reads the row from global memory again. launch.cuh chooses the number of blocks, where it can, such that
// two rows share a multiprocessor: one is copied while the other is searched.
//
// Passes over a part, by the function that makes them:
//   score            rows with a penalty or a list, where there is a copy: the logits after step 5a of seen and
//                    listed tokens. They are divided evenly among the threads and kept apart; -inf replaces
//                    them in the copy.
//   find_maxima      every row: the largest logit of each tile, and two for each thread, one over the lower
//                    halves of its vecs and one over the upper halves.
//   find_first       greedy rows: the first token of the order.
//   collect          the candidates: all tokens of a range of the order, from the tiles that have any. The
//                    first range is estimated from a histogram of the threads' maxima.
//   weigh            no filter, or top-p without top-k: the mass of each tile.
//   search           rows with a threshold that the candidates do not hold: counts and masses of the tokens
//                    that reach three codes, at first those that a probe of the row suggests. Each pass
//                    narrows the range, until it is short enough for the candidates.
//   weigh            where the candidates do not hold the kept set: the mass of its tokens in each tile.
//   write_filtered   where the caller asks for filtered logits.
//   find_raw_sum     where the caller asks for raw logprobs: two passes over global memory.
// In the kernels for calls that ask for more, see results.cuh:
//   survey           the kept set's size and last token, where the candidates do not hold it.
//   write_mask       the kept set's bits, where the candidates do not hold it.
//   narrow, collect  long lists, and those whose first range has too many tokens: histograms, then candidates.
//   count_reaching   the ranks of tokens that are not among the candidates, four in a pass.
//   list_raw         raw lists of rows with a bias, a mask, a penalty or a list: the part is copied again, and its maxima are
//                    found again.
// A pass is inlined where it is called. Steps that share a pass are iterations of one loop, because each
// call would add the whole of its code to the kernel.
//
// Before the passes, where a call asks for it: find_sharing_row, for rows whose parameters belong to slots;
// find_leaving_id, for what recording the token takes out of a window; list_overrides (overrides.cuh), for ids
// that count for this call alone. A row whose text has no room for its token draws nothing.
//
// Hazards. The comments of Shared (row_sampler.cuh) say which threads write what. A block may not exit
// while another one reads its shared memory, so every such read is followed by a barrier of the cluster.
// The history is written only after all threads of the cluster have read it, by one thread, in advance().
//
// The values that a call points to are not checked, and somebody may overwrite logits or history while the
// kernel runs. Slots, offsets and parameters are limited where they are read. A later pass may find other
// logits than an earlier one, so every loop ends whatever a pass finds, all blocks decide by numbers that
// they have in common, and a draw that does not meet the mass that an earlier pass has found gives the token
// -1 and the status NO_CANDIDATE.
#include <stdint.h>

#include "../history.h"
#include "../llm_sampling.h"
#include "../semantics.h"
#include "candidates.cuh"
#include "cluster.cuh"
#include "copy.cuh"
#include "draw.cuh"
#include "launch.cuh"
#include "passes.cuh"
#include "results.cuh"
#include "row_sampler.cuh"
#include "select.cuh"
#include "split.cuh"

namespace llm_sampling {

template <int kDtype, Layout kLayout, bool kMore>
__device__ __forceinline__ void RowSampler<kDtype, kLayout, kMore>::run_as() {
  const int64_t param_index = find_parameters();
  if (param_index < 0) {
    if constexpr (kMore) write_no_more(index_);
    return write_nothing(param_index);
  }
  find_sharing_row();
  cluster_.arrive();
  const int vecs = locate_logits();
  if (kCopied) copy_logits(vecs);
  find_leaving_id();
  read_parameters(param_index, vecs);
  if (args_.extra_output != nullptr && row_.seen.words != nullptr) list_overrides();
  if (kCopied) copy_bits(vecs);
  __syncthreads();
  cluster_.wait();  // from here on, all blocks have started and may be looked into

  // 1 widen, 2 bias and mask, 3 repetition, 4 frequency, 5 presence, 5a list, 6 canonical: in every pass
  write_status(find_maxima());
  if (m_ == -kInfinity) {
    threshold_ = ~uint64_t{0};  // nothing is kept
  } else if (is_greedy()) {
    find_first();  // 7 order, 8 greedy
  } else {
    find_kept();  // 9 depth, 10 mass, 11 top-k, 12 top-p, 13 min-p
  }

  if (args_.filtered != nullptr) write_filtered();
  if (args_.tokens != nullptr) {
    if (args_.raw.logprobs != nullptr || (kMore && wants_raw(args_))) find_raw_sum();
    if constexpr (kMore) keep_mass();
    draw();  // 14 draw
    if constexpr (kMore) write_more();
  }

  advance();
}

template <int kDtype, bool kCopied, bool kMore>
__global__ void __launch_bounds__(kThreads, 2) sample_kernel(const Plan plan) {
  const int row = static_cast<int>(blockIdx.x) / cluster_size();
  constexpr Layout kLayout = kCopied ? Layout::kCopied : Layout::kInPlace;
  RowSampler<kDtype, kLayout, kMore>(plan.args, plan.vecs, row).run(std::bool_constant<kMore>());
}

// The same for split rows, where there are no clusters. With kIsPlain it is for the calls of is_plain() alone.
template <int kDtype, bool kIsPlain, bool kMore>
__global__ void __launch_bounds__(kThreads, 2) split_kernel(const Plan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 900
  const int row = static_cast<int>(blockIdx.y);
  const int part = static_cast<int>(blockIdx.x);
  LlmSamplingArgs args = kIsPlain ? plain(plan.args) : plan.args;
  args.filtered = nullptr;  // it is, see can_split(); here the compiler knows it too
  RowSampler<kDtype, Layout::kSplit, kMore> sampler(args, plan.vecs, row, part);
  if (sampler.run_part(plan.workspace, plan.parts, std::bool_constant<kMore>())) return;
  __syncthreads();
  RowSampler<kDtype, Layout::kInPlace, kMore> alone(args, plan.whole_vecs, row);
  alone.run(std::bool_constant<kMore>());
#else
  __trap();
#endif
}

template <int kDtype>
SampleKernel find_kernel_of(Layout layout, Calls calls) {
  const bool more = calls == Calls::kMore;
  switch (layout) {
    case Layout::kInPlace:
      return more ? sample_kernel<kDtype, false, true> : sample_kernel<kDtype, false, false>;
    case Layout::kCopied:
      return more ? sample_kernel<kDtype, true, true> : sample_kernel<kDtype, true, false>;
    default:
      if (more) return split_kernel<kDtype, false, true>;
      return calls == Calls::kPlain ? split_kernel<kDtype, true, false>
                                    : split_kernel<kDtype, false, false>;
  }
}

SampleKernel find_kernel(int32_t dtype, Layout layout, Calls calls) {
  switch (dtype) {
    case LLM_SAMPLING_FLOAT32:
      return find_kernel_of<LLM_SAMPLING_FLOAT32>(layout, calls);
    case LLM_SAMPLING_FLOAT16:
      return find_kernel_of<LLM_SAMPLING_FLOAT16>(layout, calls);
    default:
      return find_kernel_of<LLM_SAMPLING_BFLOAT16>(layout, calls);
  }
}

}  // namespace llm_sampling
