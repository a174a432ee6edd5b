// The CUDA kernel: all of docs/semantics.md in one launch, with its step numbers.
//
// A cluster of 1 to 8 blocks owns one row, a block an equal part of its groups (row.h), a thread every
// kThreads-th group of that. In round j a warp has 32 groups side by side: a chunk of 256 tokens.
// Where it fits, a block copies its part into shared memory as it is, and every later pass reads that
// copy: each logit is read from global memory once. Otherwise later passes read the row again.
//
// Passes over the part:
//   maxima    every row: each thread's largest logit.
//   (few)     greedy, and where the slots of the list suffice: the threads that hold the first tokens of
//             the order, and only those, go over their groups again and list them. A logarithmic
//             histogram of the threads' maxima tells which.
//   weigh     top-p, or no filter: the mass of each chunk.
//   search    a cut that the list does not hold: counts and masses of what reaches three codes, first
//             of a sample's; each pass leaves a part of them, until the list holds it.
//   weigh     the same row: the mass of what it kept, by chunk.
// A kept set is all codes from a cut on. A list is in id order, and every block of the cluster has all
// of it: so all decide alike, on the same integers, and only a draw's token has one owner.
//
// Hazards. What blocks share has two sets of slots, used in turn: nobody writes a set before all
// have passed the barrier after the one in which it was read. No block leaves before all have read
// what they wanted of its shared memory. The history is written after the cluster's last barrier.
#include <stddef.h>
#include <stdint.h>

#include "../check.h"
#include "../llm_sampling.h"
#include "../semantics.h"
#include "device.h"
#include "launch.h"
#include "row.h"

namespace llm_sampling {
namespace {

constexpr int kBins = 512;
constexpr int kNucleus = 256;  // the first tokens of the order among which a nucleus is expected
constexpr uint64_t kNoCode = 0;
constexpr int kWarps = kThreads / kWarpSize;
static_assert(kThreads >= kBins, "a thread for each bin");

struct Shared {
  uint64_t gathered[2][kBlocksAtMost][4];
  uint64_t partial[kWarps][4];
  uint64_t list[kThreads];    // codes, in id order
  uint64_t sorted[kThreads];  // the same, first of the order first
  int64_t reach[kThreads];    // running masses
  uint32_t bins[kBins];
};

static_assert(sizeof(Shared) <= kSharedFixed, "launch.h counts it");

struct Plan {
  LlmSamplingArgs args;
  int groups;  // of a block's part
};

struct Add {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Larger {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

// A logarithmic scale of how far a logit's key is below the largest one's: 16 steps per doubling.
__device__ __forceinline__ int bin_of(uint32_t below) {
  if (below < 16) return static_cast<int>(below);
  const int log = 31 - __clz(static_cast<int>(below));
  return (log - 3) * 16 + static_cast<int>(below >> (log - 4) & 15);
}

template <int kDtype, bool kCopied>
class RowSampler {
 public:
  __device__ RowSampler(const Plan& plan, int64_t index)
      : args_(plan.args), index_(index), shared_(*reinterpret_cast<Shared*>(dynamic_shared())) {
    rank_ = cluster_rank();
    blocks_ = cluster_size();
    make_row();
    first_group_ = rank_ * plan.groups;
    const int left = row_.groups() - first_group_;
    groups_ = left < 0 ? 0 : left < plan.groups ? left : plan.groups;
    rounds_ = (groups_ + kThreads - 1) / kThreads;
    part_groups_ = plan.groups;
    unsigned char* after = dynamic_shared() + kSharedFixed;
    chunks_ = reinterpret_cast<int64_t*>(after);
    copy_ = after + chunk_bytes(plan.groups);
  }

  __device__ void run() {
    find_maxima();
    const bool is_greedy = args_.temperature[index_] == 0.0f;
    if (m_ == -kInfinity) {
      cut_ = ~uint64_t{0};
    } else if (is_greedy) {
      find_first();
    } else {
      find_kept();
    }
    if (args_.filtered != nullptr) write_filtered(is_greedy);
    if (args_.tokens != nullptr) {
      if (rank_ == 0 && threadIdx.x == 0) args_.status[index_] = status_;
      if (args_.logprobs_mode == LLM_SAMPLING_LOGPROBS_RAW) find_raw_sum();
      draw(is_greedy);
    }
    sync_cluster();
    if (drew_) advance();
  }

 private:
  // ---- the row ----

  __device__ void make_row() {
    const int64_t bytes = kLogitBytes<kDtype>;
    const unsigned char* logits = static_cast<const unsigned char*>(args_.logits);
    logits += index_ * args_.logits_stride * bytes;
    const unsigned beyond = static_cast<unsigned>(reinterpret_cast<uintptr_t>(logits) & 15);
    row_.aligned = logits - beyond;
    row_.shift = static_cast<int>(beyond / bytes);
    row_.vocab_size = static_cast<int>(args_.vocab_size);
    row_.bias_count = 0;
    row_.bias_ids = nullptr;
    row_.bias_values = nullptr;
    if (args_.logit_bias_offsets != nullptr) {
      const int64_t first = args_.logit_bias_offsets[index_];
      row_.bias_count = static_cast<int>(args_.logit_bias_offsets[index_ + 1] - first);
      row_.bias_ids = args_.logit_bias_ids + first;
      row_.bias_values = args_.logit_bias_values + first;
    }
    row_.allowed = nullptr;
    if (args_.allowed_mask != nullptr) {
      row_.allowed = reinterpret_cast<const uint32_t*>(args_.allowed_mask) +
                     index_ * args_.allowed_mask_stride;
    }
    row_.repetition = args_.repetition_penalty[index_];
    row_.frequency = args_.frequency_penalty[index_];
    row_.presence = args_.presence_penalty[index_];
    row_.seen = nullptr;
    row_.counts = nullptr;
    const bool is_on = row_.repetition != 1.0f || row_.frequency != 0.0f || row_.presence != 0.0f;
    if (args_.seen != nullptr && is_on) {
      const int64_t slot = args_.slots[index_];
      row_.seen = reinterpret_cast<const uint32_t*>(args_.seen) + slot * args_.seen_stride;
      row_.counts = args_.counts + slot * args_.counts_stride;
    }
  }

  // Where a group of this block's part is.
  __device__ const unsigned char* place_of(int group) const {
    constexpr int kBytes = kGroup * kLogitBytes<kDtype>;
    return kCopied ? copy_ + (group - first_group_) * kBytes
                   : row_.aligned + static_cast<int64_t>(group) * kBytes;
  }

  __device__ bool process_own(int group, float (&x)[kGroup]) const {
    return process<kDtype, kCopied>(row_, place_of(group), group, x);
  }

  // visit(round, group, is_there) in every round, by all threads.
  template <typename Visit>
  __device__ void over_groups(const Visit& visit) const {
    for (int round = 0; round < rounds_; ++round) {
      const int local = round * kThreads + static_cast<int>(threadIdx.x);
      visit(round, first_group_ + local, local < groups_);
    }
  }

  // visit(x, id) of each token, by steps 1 to 6; -inf beyond the row.
  template <typename Visit>
  __device__ void over_tokens(const Visit& visit) const {
    over_groups([&](int, int group, bool is_there) {
      if (!is_there) return;
      float x[kGroup];
      process_own(group, x);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) visit(x[i], row_.first_id(group) + i);
    });
  }

  __device__ float depth_of(float x) const { return depth(x, m_, scale_); }
  __device__ int64_t mass_of(float x) const { return whole_mass(depth_of(x)); }

  // ---- threads of a block, blocks of a cluster ----

  template <int kCount, typename Combine>
  __device__ void over_block(uint64_t (&values)[kCount], Combine combine) {
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int other = kWarpSize / 2; other > 0; other /= 2) {
        values[i] = combine(values[i], __shfl_xor_sync(kWholeWarp, values[i], other));
      }
      if (lane == 0) shared_.partial[warp][i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = shared_.partial[lane % kWarps][i];
#pragma unroll
      for (int other = kWarps / 2; other > 0; other /= 2) {
        values[i] = combine(values[i], __shfl_xor_sync(kWholeWarp, values[i], other));
      }
    }
    __syncthreads();
  }

  // The inclusive running sum of one value of each thread.
  __device__ int64_t scan(int64_t value) {
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    value = scan_warp(value);
    if (lane == kWarpSize - 1) shared_.partial[warp][0] = static_cast<uint64_t>(value);
    __syncthreads();
    const int64_t warps = lane < kWarps ? static_cast<int64_t>(shared_.partial[lane][0]) : 0;
    const int64_t before = __shfl_sync(kWholeWarp, scan_warp(warps) - warps, warp);
    __syncthreads();
    return value + before;
  }

  __device__ int64_t scan_warp(int64_t value) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int delta = 1; delta < kWarpSize; delta *= 2) {
      const int64_t other = __shfl_up_sync(kWholeWarp, value, static_cast<unsigned>(delta));
      if (lane >= delta) value += other;
    }
    return value;
  }

  __device__ void sync_cluster() {
    if (blocks_ > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }

  // Brings values that all threads of a block have to all blocks: by block, until the next but one call.
  template <int kCount>
  __device__ const uint64_t (*share(const uint64_t (&values)[kCount]))[4] {
    uint64_t (*slots)[4] = shared_.gathered[phase_];
    phase_ ^= 1;
    const int block = static_cast<int>(threadIdx.x);
    if (block < blocks_) {
      uint64_t* there = in_block(slots[rank_], block);
#pragma unroll
      for (int i = 0; i < kCount; ++i) there[i] = values[i];
    }
    sync_cluster();
    return slots;
  }

  template <int kCount, typename Combine>
  __device__ void over_cluster(uint64_t (&values)[kCount], Combine combine) {
    over_block(values, combine);
    const uint64_t (*all)[4] = share(values);
    for (int block = 0; block < blocks_; ++block) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values[i] = block == 0 ? all[block][i] : combine(values[i], all[block][i]);
      }
    }
  }

  // What the blocks before this one, this one and all of them have.
  struct Sums {
    int64_t before, own, total;
  };

  // Running sums over the chunks of this block.
  __device__ Sums scan_chunks() {
    const int count = rounds_ * kWarps;
    const int each = (count + kThreads - 1) / kThreads;
    const int first = static_cast<int>(threadIdx.x) * each;
    __syncthreads();
    int64_t sum = 0;
    for (int i = first; i < first + each && i < count; ++i) sum += chunks_[i];
    int64_t running = scan(sum) - sum;
    for (int i = first; i < first + each && i < count; ++i) {
      running += chunks_[i];
      chunks_[i] = running;
    }
    __syncthreads();
    Sums sums = {0, count > 0 ? chunks_[count - 1] : 0, 0};
    const uint64_t own[1] = {static_cast<uint64_t>(sums.own)};
    const uint64_t (*all)[4] = share(own);
    for (int block = 0; block < blocks_; ++block) {
      if (block < rank_) sums.before += static_cast<int64_t>(all[block][0]);
      sums.total += static_cast<int64_t>(all[block][0]);
    }
    return sums;
  }

  // ---- maxima ----

  __device__ void find_maxima() {
    if (kCopied) {
      constexpr int kBytes = kGroup * kLogitBytes<kDtype>;
      over_groups([&](int, int group, bool is_there) {
        if (!is_there) return;
        unsigned char* to = copy_ + (group - first_group_) * kBytes;
        const unsigned char* from = row_.aligned + static_cast<int64_t>(group) * kBytes;
        if (row_.is_whole(group)) {
#pragma unroll
          for (int i = 0; i < kBytes; i += 16) copy_16(to + i, from + i);
          return;
        }
        const int first = row_.first_id(group);
        constexpr int kSize = kLogitBytes<kDtype>;
        for (int i = 0; i < kGroup; ++i) {
          if (first + i < 0 || first + i >= row_.vocab_size) continue;
          for (int byte = i * kSize; byte < (i + 1) * kSize; ++byte) to[byte] = from[byte];
        }
      });
      wait_for_copies();  // its own: nobody else reads them before a barrier
    }
    bool has_nan = false;
    largest_ = -kInfinity;
    over_groups([&](int, int group, bool is_there) {
      if (!is_there) return;
      float x[kGroup];
      has_nan |= process_own(group, x);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) largest_ = x[i] > largest_ ? x[i] : largest_;
    });
    uint64_t found[2] = {order_key(largest_), has_nan ? 1u : 0u};
    over_cluster(found, Larger());
    m_ = from_order_key(static_cast<uint32_t>(found[0]));
    status_ = found[1] != 0 ? LLM_SAMPLING_STATUS_NAN : 0;
    if (m_ == -kInfinity) status_ |= LLM_SAMPLING_STATUS_NO_CANDIDATE;
    if (m_ == kInfinity) status_ |= LLM_SAMPLING_STATUS_POS_INF;
  }

  // 8 greedy
  __device__ void find_first() {
    uint64_t first[1] = {kNoCode};
    if (largest_ == m_) {
      over_tokens([&](float x, int id) {
        if (x == m_) first[0] = Larger()(first[0], code_of(x, id));
      });
    }
    over_cluster(first, Larger());
    cut_ = first[0];
  }

  // ---- the list ----

  // Lists what is wanted, in id order, in every block; how many it is. More than kThreads are counted
  // and not listed. Threads that cannot hold any need not look.
  template <typename Wants>
  __device__ int64_t list(bool may_hold, const Wants& wants) {
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    const bool any = __any_sync(kWholeWarp, may_hold) != 0;
    const auto wanted_of = [&](int group, bool is_there, uint64_t (&codes)[kGroup]) {
      int count = 0;
      if (!may_hold || !is_there) return count;
      float x[kGroup];
      process_own(group, x);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const uint64_t code = code_of(x[i], row_.first_id(group) + i);
        const bool wanted = x[i] > -kInfinity && wants(x[i], code);
        codes[i] = wanted ? code : kNoCode;
        count += wanted;
      }
      return count;
    };
    over_groups([&](int round, int group, bool is_there) {
      uint64_t codes[kGroup];
      const int count = any ? wanted_of(group, is_there, codes) : 0;
      const unsigned sum = __reduce_add_sync(kWholeWarp, static_cast<unsigned>(count));
      if (lane == 0) chunks_[round * kWarps + warp] = sum;
    });
    const Sums counts = scan_chunks();
    if (counts.total > kThreads) return counts.total;
    over_groups([&](int round, int group, bool is_there) {
      uint64_t codes[kGroup];
      const int count = any ? wanted_of(group, is_there, codes) : 0;
      const int chunk = round * kWarps + warp;
      int64_t place =
          counts.before + (chunk > 0 ? chunks_[chunk - 1] : 0) + scan_warp(count) - count;
      if (count == 0) return;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (codes[i] == kNoCode) continue;
        for (int block = 0; block < blocks_; ++block)
          in_block(shared_.list, block)[place] = codes[i];
        ++place;
      }
    });
    sync_cluster();
    return counts.total;
  }

  // Sorts the list by rank, and gives the running mass of the sorted.
  __device__ void sort(int count) {
    const int own = static_cast<int>(threadIdx.x);
    const uint64_t code = own < count ? shared_.list[own] : kNoCode;
    int rank = 0;
    for (int i = 0; i < count; ++i) rank += shared_.list[i] > code;
    if (own < count) shared_.sorted[rank] = code;
    __syncthreads();
    const int64_t w = own < count ? mass_of(logit_of(shared_.sorted[own])) : 0;
    shared_.reach[own] = scan(w);
    __syncthreads();
  }

  // ---- steps 11 to 13 ----

  __device__ void find_kept() {
    scale_ = depth_scale(args_.temperature[index_]);
    const int64_t keep =
        args_.min_tokens_to_keep[index_] > 1 ? args_.min_tokens_to_keep[index_] : 1;
    const int64_t top_k = args_.top_k[index_];
    const float top_p = args_.top_p[index_];
    const float depth_cut = args_.min_p[index_] > 0.0f ? args_.min_p_cut[index_] : kInfinity;
    int64_t at_most = top_k > 0 ? (top_k > keep ? top_k : keep) : row_.vocab_size;
    const bool has_k = at_most < row_.vocab_size;
    const bool has_p = top_p < 1.0f;
    const bool has_min_p = depth_cut < kInfinity;

    cut_ = kLowestCode;
    if (!has_k && (has_p || !has_min_p)) weigh<false>();
    int64_t z = mass_.total;
    if (!has_k && !has_p && !has_min_p) return;

    const int64_t wanted = has_k ? at_most : has_p ? (keep > kNucleus ? keep : kNucleus) : keep;
    list_first(wanted, has_k || has_p ? -1.0f : depth_cut);

    uint64_t k_cut = kLowestCode;
    uint64_t p_cut = kLowestCode;
    if (has_k) {
      k_cut = find_cut(at_most, false, kLowestCode, 0);
      z = mass_from(k_cut);
    }
    if (has_p) p_cut = find_cut(top_p_target(z, top_p), true, k_cut, z);
    const uint64_t near_cut = has_min_p ? first_code(nearest_key(depth_cut)) : kLowestCode;
    // neither leaves fewer than min_tokens_to_keep
    uint64_t filter_cut = p_cut > near_cut ? p_cut : near_cut;
    if (filter_cut > k_cut && keep > 1) {
      const uint64_t keep_cut = find_cut(keep, false, k_cut, 0);
      filter_cut = filter_cut < keep_cut ? filter_cut : keep_cut;
    }
    cut_ = filter_cut > k_cut ? filter_cut : k_cut;

    in_list_ = listed_ > 0 && above_ == 0 && (is_last_ || cut_ >= shared_.sorted[listed_ - 1]);
    if (!in_list_) weigh<true>();
  }

  // Lists the first tokens of the order, about as many as wanted, and what is within a depth.
  __device__ void list_first(int64_t wanted, float within) {
    if (threadIdx.x < kBins) shared_.bins[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t top = order_key(m_);
    const int own = bin_of(top - order_key(largest_));
    if (largest_ > -kInfinity) atomicAdd(&shared_.bins[own], 1u);
    sync_cluster();
    int64_t sum = 0;
    if (threadIdx.x < kBins) {
      for (int block = 0; block < blocks_; ++block) {
        sum += in_block(shared_.bins, block)[threadIdx.x];
      }
    }
    const int64_t reached = scan(sum);
    const bool is_short = threadIdx.x < kBins && reached < wanted;
    const int limit = __syncthreads_count(is_short);
    const auto wants = [&](float x, uint64_t) {
      return bin_of(top - order_key(x)) <= limit || depth_of(x) <= within;
    };
    const bool may_hold = largest_ > -kInfinity && wants(largest_, 0);
    const int64_t count = list(may_hold, wants);
    above_ = 0;
    mass_above_ = 0;
    is_last_ = limit >= kBins;
    listed_ = count <= kThreads ? static_cast<int>(count) : 0;
    if (listed_ > 0) sort(listed_);
  }

  // 13 min-p: the lowest key whose depth is at most the cut. The depth grows as the key falls.
  __device__ uint32_t nearest_key(float depth_cut) const {
    uint32_t inside = order_key(m_);
    uint32_t outside = order_key(kLowest) - 1;
    while (inside - outside > 1) {
      const uint32_t middle = outside + (inside - outside) / 2;
      if (depth_of(from_order_key(middle)) <= depth_cut) {
        inside = middle;
      } else {
        outside = middle;
      }
    }
    return inside;
  }

  // The mass of all from a code on, which is in the list, or is what the list is empty below.
  __device__ int64_t mass_from(uint64_t code) const {
    const int count = count_while(listed_, [&](int i) { return shared_.sorted[i] >= code; });
    return mass_above_ + (count > 0 ? shared_.reach[count - 1] : 0);
  }

  // The code at which so many tokens, or so much mass, are reached; or the lowest.
  __device__ uint64_t find_cut(int64_t target, bool by_mass, uint64_t lowest, int64_t z) {
    if (!is_in_list(target, by_mass)) {
      search(target, by_mass, lowest, z);
      if (listed_ == 0) return lowest;
    }
    const int place =
        by_mass
            ? count_while(listed_, [&](int i) { return mass_above_ + shared_.reach[i] < target; })
            : static_cast<int>(target - above_ - 1);
    return place < listed_ ? shared_.sorted[place] : lowest;
  }

  // Whether the list has the token at which the target is reached, or the row does not reach it.
  __device__ bool is_in_list(int64_t target, bool by_mass) const {
    if (listed_ == 0) return false;
    const int64_t above = by_mass ? mass_above_ : above_;
    const int64_t reached = by_mass ? mass_above_ + shared_.reach[listed_ - 1] : above_ + listed_;
    return above < target && (reached >= target || is_last_);
  }

  // Lists the part of the order in which the target is reached.
  __device__ void search(int64_t target, bool by_mass, uint64_t lowest, int64_t z) {
    uint64_t low = lowest;
    uint64_t high = first_code(order_key(m_) + 1);
    int64_t n_low = row_.vocab_size;
    int64_t n_high = 0;
    int64_t w_high = 0;
    uint64_t pivots[3];
    sample(target, by_mass, lowest, z, pivots);
    while (n_low - n_high > kThreads && high - low > kThreads) {
      uint64_t sums[4] = {0, 0, 0, 0};
      over_tokens([&](float x, int id) {
        const uint64_t code = code_of(x, id);
        const uint64_t w = x > -kInfinity ? static_cast<uint64_t>(mass_of(x)) : 0;
#pragma unroll
        for (int p = 0; p < 3; ++p) {
          const bool reaches = code >= pivots[p];
          sums[3] += reaches ? uint64_t{1} << (21 * p) : 0;
          sums[p] += reaches ? w : 0;
        }
      });
      over_cluster(sums, Add());
      // the pivots are in order: the last one that reaches the target is the new lower end
      for (int p = 0; p < 3; ++p) {
        const int64_t n = static_cast<int64_t>(sums[3] >> (21 * p) & 0x1fffff);
        const int64_t w = static_cast<int64_t>(sums[p]);
        if ((by_mass ? w : n) >= target) {
          low = pivots[p];
          n_low = n;
        } else if (pivots[p] < high) {
          high = pivots[p];
          n_high = n;
          w_high = w;
          break;
        }
      }
      cut_in_parts(low, high, pivots);
    }
    const int64_t count =
        list(true, [=](float, uint64_t code) { return code >= low && code < high; });
    above_ = n_high;
    mass_above_ = w_high;
    is_last_ = low <= kLowestCode;
    listed_ = static_cast<int>(count);
    if (listed_ > 0) sort(listed_);
  }

  // Three codes about where a sample of the row reaches its share of the target, in rising order.
  __device__ void sample(
      int64_t target,
      bool by_mass,
      uint64_t lowest,
      int64_t z,
      uint64_t (&pivots)[3]
  ) {
    const int64_t id = static_cast<int64_t>(threadIdx.x) * row_.vocab_size / kThreads;
    const int group = static_cast<int>((id + row_.shift) / kGroup);
    const int owner = group / part_groups_;
    constexpr int kBytes = kGroup * kLogitBytes<kDtype>;
    const unsigned char* place =
        kCopied ? in_block(copy_, owner) + (group - owner * part_groups_) * kBytes
                : place_of(group);
    float x[kGroup];
    process<kDtype, kCopied>(row_, place, group, x);
    float own = -kInfinity;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (row_.first_id(group) + i == id) own = x[i];
    }
    const uint64_t code = code_of(own, static_cast<int>(id));
    __syncthreads();
    shared_.list[threadIdx.x] = code;
    const int count = __syncthreads_count(code >= lowest);
    sort(kThreads);
    const float reached = by_mass ? static_cast<float>(count > 0 ? shared_.reach[count - 1] : 0)
                                  : static_cast<float>(count);
    const float all =
        by_mass ? static_cast<float>(z)
                : static_cast<float>(count) * static_cast<float>(row_.vocab_size) / kThreads;
    float share = static_cast<float>(target) / (all > 1.0f ? all : 1.0f);
    share = share < 1.0f ? share : 1.0f;
    const float deviation =
        sqrtf(share * (1.0f - share) / static_cast<float>(count > 0 ? count : 1));
    const float spread = deviation * (by_mass ? 3.0f : 2.0f);
    for (int p = 0; p < 3; ++p) {
      const float part = share + spread * static_cast<float>(1 - p);
      const float wanted = (part < 0.0f ? 0.0f : part < 1.0f ? part : 1.0f) * reached;
      const int index = count_while(count, [&](int i) {
        const int64_t here = by_mass ? shared_.reach[i] : i + 1;
        return static_cast<float>(here) < wanted;
      });
      pivots[p] = index < count ? shared_.sorted[index] : lowest;
    }
    __syncthreads();
  }

  // Two codes by thirds of the logits and one by half of the keys, or by quarters of the codes: so that
  // a row's bulk is met in few passes and no row takes many.
  __device__ static void cut_in_parts(uint64_t low, uint64_t high, uint64_t (&pivots)[3]) {
    const uint64_t size = high - low;
    const uint32_t low_key = static_cast<uint32_t>(low >> 20);
    const uint32_t high_key = static_cast<uint32_t>((high - 1) >> 20);
    if (high_key - low_key < 4) {
      pivots[0] = low + size / 4;
      pivots[1] = low + size / 2;
      pivots[2] = low + size / 4 * 3;
      return;
    }
    const float bottom = from_order_key(low_key);
    const float top = from_order_key(high_key);
    uint32_t a = order_key(bottom * 0.6666667f + top * 0.33333334f);
    uint32_t b = order_key(bottom * 0.33333334f + top * 0.6666667f);
    uint32_t c = low_key + (high_key - low_key) / 2;
    const auto inside = [=](uint32_t key) {
      return key <= low_key ? low_key + 1 : key > high_key ? high_key : key;
    };
    const auto order = [](uint32_t& first, uint32_t& second) {
      const uint32_t smaller = first < second ? first : second;
      second = first < second ? second : first;
      first = smaller;
    };
    a = inside(a);
    b = inside(b);
    order(a, b);
    order(b, c);
    order(a, b);
    pivots[0] = first_code(a);
    pivots[1] = first_code(b);
    pivots[2] = first_code(c);
  }

  // The mass of each chunk, of all tokens or of what reaches the cut, as running sums.
  template <bool kCut>
  __device__ void weigh() {
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    __syncthreads();
    over_groups([&](int round, int group, bool is_there) {
      int64_t sum = 0;
      if (is_there) {
        float x[kGroup];
        process_own(group, x);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const bool is_kept = !kCut || code_of(x[i], row_.first_id(group) + i) >= cut_;
          sum += is_kept && x[i] > -kInfinity ? mass_of(x[i]) : 0;
        }
      }
#pragma unroll
      for (int other = kWarpSize / 2; other > 0; other /= 2) {
        sum += __shfl_xor_sync(kWholeWarp, sum, other);
      }
      if (lane == 0) chunks_[round * kWarps + warp] = sum;
    });
    mass_ = scan_chunks();
  }

  // ---- results ----

  // 14 draw
  __device__ void draw(bool is_greedy) {
    const int samples = args_.num_samples;
    if (m_ == -kInfinity || is_greedy) {
      if (rank_ != 0) return;
      for (int i = static_cast<int>(threadIdx.x); i < samples; i += kThreads) {
        write(i, m_ == -kInfinity ? -1 : id_of(cut_), 1, 1);
      }
    } else if (in_list_) {
      if (rank_ == 0) draw_from_list();
    } else {
      draw_from_chunks();
    }
  }

  __device__ int64_t random_below(int draw, int64_t total) const {
    const uint64_t seed = static_cast<uint64_t>(args_.seed[index_]);
    const uint64_t position = static_cast<uint64_t>(args_.position[index_]);
    return scaled_random(random_bits(seed, position, static_cast<uint32_t>(draw)), total);
  }

  __device__ void draw_from_list() {
    const int own = static_cast<int>(threadIdx.x);
    const uint64_t code = own < listed_ ? shared_.list[own] : kNoCode;
    const int64_t own_mass = code >= cut_ && own < listed_ ? mass_of(logit_of(code)) : 0;
    shared_.reach[own] = scan(own_mass);
    __syncthreads();
    const int64_t total = shared_.reach[kThreads - 1];
    for (int i = own; i < args_.num_samples; i += kThreads) {
      const int64_t r = random_below(i, total);
      const int place = count_while(listed_ - 1, [&](int j) { return shared_.reach[j] <= r; });
      const int64_t w = shared_.reach[place] - (place > 0 ? shared_.reach[place - 1] : 0);
      write(i, id_of(shared_.list[place]), w, total);
    }
  }

  // A warp for each draw, in the block that has its token.
  __device__ void draw_from_chunks() {
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    for (int i = warp; i < args_.num_samples; i += kWarps) {
      const int64_t r = random_below(i, mass_.total) - mass_.before;
      if (r < 0 || r >= mass_.own) continue;
      const int chunk = count_while(rounds_ * kWarps - 1, [&](int j) { return chunks_[j] <= r; });
      const int local = chunk / kWarps * kThreads + chunk % kWarps * kWarpSize + lane;
      const int group = first_group_ + local;
      int64_t w[kGroup] = {};
      int64_t sum = 0;
      if (local < groups_) {
        float x[kGroup];
        process_own(group, x);
#pragma unroll
        for (int t = 0; t < kGroup; ++t) {
          const bool is_kept = code_of(x[t], row_.first_id(group) + t) >= cut_;
          w[t] = is_kept && x[t] > -kInfinity ? mass_of(x[t]) : 0;
          sum += w[t];
        }
      }
      int64_t reach = (chunk > 0 ? chunks_[chunk - 1] : 0) + scan_warp(sum);
      const unsigned past = __ballot_sync(kWholeWarp, reach > r);
      if (lane != __ffs(static_cast<int>(past)) - 1) continue;
      reach -= sum;
      bool is_found = false;
#pragma unroll
      for (int t = 0; t < kGroup; ++t) {
        reach += w[t];
        if (!is_found && reach > r) {
          is_found = true;
          write(i, row_.first_id(group) + t, w[t], mass_.total);
        }
      }
    }
  }

  __device__ float raw_logit(int id) const {
    const unsigned char* first = row_.aligned + row_.shift * kLogitBytes<kDtype>;
    return widen<kDtype>(first + static_cast<int64_t>(id) * kLogitBytes<kDtype>);
  }

  // ``token`` is -1 where there was no candidate. The thread that has draw 0 advances the row later.
  __device__ void write(int draw, int token, int64_t w, int64_t total) {
    const int64_t place = index_ * args_.num_samples + draw;
    args_.tokens[place] = token;
    if (draw == 0) {
      drew_ = true;
      token_ = token;
    }
    if (args_.logprobs_mode == LLM_SAMPLING_LOGPROBS_NONE) return;
    float logprob = __uint_as_float(0x7fc00000u);
    if (token >= 0 && args_.logprobs_mode == LLM_SAMPLING_LOGPROBS_PROCESSED) {
      logprob = logf(static_cast<float>(w) / static_cast<float>(total));
    } else if (token >= 0) {
      const float x = raw_logit(token);
      logprob = (x == raw_m_ ? 0.0f : x - raw_m_) - raw_log_sum_;
    }
    args_.logprobs[place] = logprob;
  }

  // The largest raw logit, and the logarithm of the sum of exp(x - m).
  __device__ void find_raw_sum() {
    uint64_t largest[1] = {order_key(-kInfinity)};
    const auto over_raw = [&](const auto& visit) {
      over_groups([&](int, int group, bool is_there) {
        if (!is_there) return;
        float x[kGroup];
        load<kDtype, kCopied>(row_, place_of(group), group, x);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) visit(x[i] == x[i] ? x[i] : -kInfinity);
      });
    };
    over_raw([&](float x) { largest[0] = Larger()(largest[0], order_key(x)); });
    over_cluster(largest, Larger());
    raw_m_ = from_order_key(static_cast<uint32_t>(largest[0]));
    float sum = 0.0f;
    over_raw([&](float x) { sum += x == raw_m_ ? 1.0f : expf(x - raw_m_); });
    // in a fixed point that holds 2^20 ones
    uint64_t sums[1] = {static_cast<uint64_t>(sum * 0x1p40f)};
    over_cluster(sums, Add());
    raw_log_sum_ = logf(static_cast<float>(sums[0]) * 0x1p-40f);
  }

  __device__ void write_filtered(bool is_greedy) {
    const float t = args_.temperature[index_];
    float* out = args_.filtered + index_ * args_.filtered_stride;
    over_tokens([&](float x, int id) {
      if (id < 0 || id >= row_.vocab_size) return;
      const bool is_kept = x > -kInfinity && code_of(x, id) >= cut_;
      out[id] = is_kept ? (is_greedy ? x : x / t) : -kInfinity;
    });
  }

  __device__ void advance() {
    if (args_.advance == LLM_SAMPLING_ADVANCE_NEVER || token_ < 0) return;
    args_.position[index_] += 1;
    if (args_.seen == nullptr) return;
    const int64_t slot = args_.slots[index_];
    args_.seen[slot * args_.seen_stride + (token_ >> 5)] |=
        static_cast<int32_t>(1u << (token_ & 31));
    args_.counts[slot * args_.counts_stride + token_] += 1;
    args_.lengths[slot] += 1;
  }

  const LlmSamplingArgs& args_;
  const int64_t index_;
  Shared& shared_;
  int64_t* chunks_;
  unsigned char* copy_;
  Row row_;
  int rank_, blocks_;
  int part_groups_;                    // of a block
  int first_group_, groups_, rounds_;  // of this one
  int phase_ = 0;

  float largest_;  // of this thread's
  float m_;
  float scale_ = 0.0f;
  int32_t status_;

  // the list: a part of the order, and what is above it
  int listed_ = 0;
  int64_t above_ = 0;
  int64_t mass_above_ = 0;
  bool is_last_ = false;  // nothing is below it

  // the kept set, and its mass where the list has not all of it
  uint64_t cut_;
  bool in_list_ = false;
  Sums mass_ = {};

  float raw_m_ = 0.0f;
  float raw_log_sum_ = 0.0f;
  bool drew_ = false;
  int token_ = -1;
};

template <int kDtype, bool kCopied>
__global__ void __launch_bounds__(kThreads) sample_kernel(const Plan plan) {
  RowSampler<kDtype, kCopied> sampler(plan, blockIdx.x / cluster_size());
  sampler.run();
}

}  // namespace
}  // namespace llm_sampling

#ifdef __CUDACC__
// ---- The host's side. tests/cuda_emulation/ has its own. ----

namespace llm_sampling {
namespace {

constexpr int32_t kFirstCudaError = 1000;  // codes from here on are CUDA's

int32_t code_of_cuda(cudaError_t error) {
  return error == cudaSuccess ? LLM_SAMPLING_OK : kFirstCudaError + static_cast<int32_t>(error);
}

// That of the calling thread's current device.
cudaError_t find_device(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  int major = 0;
  int minor = 0;
  const auto attribute = [&](int& value, cudaDeviceAttr which) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, index);
  };
  attribute(major, cudaDevAttrComputeCapabilityMajor);
  attribute(minor, cudaDevAttrComputeCapabilityMinor);
  attribute(device.processors, cudaDevAttrMultiProcessorCount);
  attribute(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.capability = 10 * major + minor;
  return error;
}

template <int kDtype, bool kCopied>
cudaError_t start(const Plan& plan, const Launch& launch, cudaStream_t stream) {
  const auto kernel = sample_kernel<kDtype, kCopied>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel,
      cudaFuncAttributeMaxDynamicSharedMemorySize,
      launch.shared_bytes
  );
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(launch.blocks);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.args.rows * launch.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = launch.blocks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, plan);
}

template <int kDtype>
cudaError_t start(const Plan& plan, const Launch& launch, cudaStream_t stream) {
  return launch.copied ? start<kDtype, true>(plan, launch, stream)
                       : start<kDtype, false>(plan, launch, stream);
}

int32_t run(const LlmSamplingArgs& args, cudaStream_t stream) {
  // whether all rows are valid is not known to a single one
  if (args.advance == LLM_SAMPLING_ADVANCE_IF_ALL_VALID) return LLM_SAMPLING_BAD_OPTION;
  const int32_t code = check_struct(args);
  if (code != LLM_SAMPLING_OK || args.rows == 0) return code;
  Device device = {};
  const cudaError_t error = find_device(device);
  if (error != cudaSuccess) return code_of_cuda(error);
  const int logit_bytes = args.dtype == LLM_SAMPLING_FLOAT32 ? 4 : 2;
  const Launch launch = choose_launch(args.rows, args.vocab_size, logit_bytes, device);
  if (args.rows > INT32_MAX / launch.blocks) return LLM_SAMPLING_BAD_SIZE;
  const Plan plan = {args, launch.groups};
  switch (args.dtype) {
    case LLM_SAMPLING_FLOAT32:
      return code_of_cuda(start<LLM_SAMPLING_FLOAT32>(plan, launch, stream));
    case LLM_SAMPLING_FLOAT16:
      return code_of_cuda(start<LLM_SAMPLING_FLOAT16>(plan, launch, stream));
    default:
      return code_of_cuda(start<LLM_SAMPLING_BFLOAT16>(plan, launch, stream));
  }
}

}  // namespace
}  // namespace llm_sampling

extern "C" {

__attribute__((visibility("default"))) int32_t
llm_sampling_cuda(const LlmSamplingArgs* args, void* stream) {
  LlmSamplingArgs own = {};
  const int32_t code = llm_sampling::read_struct(args, own);
  if (code != LLM_SAMPLING_OK) return code;
  return llm_sampling::run(own, static_cast<cudaStream_t>(stream));
}

__attribute__((visibility("default"))) uint32_t llm_sampling_abi_version(void) {
  return LLM_SAMPLING_ABI_VERSION;
}

__attribute__((visibility("default"))) uint32_t llm_sampling_args_size(void) {
  return sizeof(LlmSamplingArgs);
}

__attribute__((visibility("default"))) const char* llm_sampling_error(int32_t code) {
  using namespace llm_sampling;
  if (code < kFirstCudaError) return error_text(code);
  return cudaGetErrorString(static_cast<cudaError_t>(code - kFirstCudaError));
}

}  // extern "C"
#endif  // __CUDACC__
