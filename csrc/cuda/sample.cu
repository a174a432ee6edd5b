// The CUDA kernel: all of docs/semantics.md in one launch, with its step numbers.
//
// A cluster of 1 to 8 blocks owns one row, a block an equal part of its groups (row.h), a thread every
// kThreads-th group of that. In round j a warp has 32 groups side by side: a chunk of 256 tokens.
// Where it fits, a block copies its part into shared memory as it is, with the bits of the mask and of
// the history that belong to it, and every pass reads those copies: each logit is read from global memory
// once. Otherwise later passes read the row again. The copies leave room for a block of another row on
// the same multiprocessor where launch.h finds a way: its logits come while this one is searched.
//
// Passes over the part:
//   score     a history, where there is a copy: the tokens that were seen, evenly among the threads. Their
//             logits after step 5 are kept, and -inf takes their place in the copy.
//   maxima    every row: the largest logit of each chunk, and each thread's two largest, of the first and
//             the last halves of its groups.
//   list      the first tokens of the order, in the chunks that have one: a logarithmic histogram of the
//             threads' maxima tells from where on there are enough. Greedy looks for one token only.
//   weigh     top-p, or no filter: the mass of each chunk.
//   search    a cut that the list does not hold: counts and masses of what reaches three codes, first
//             of a sample's; each pass leaves a part of them, until a list holds it.
//   weigh     the same row: the mass of what it kept, by chunk.
// A kept set is all codes from a cut on. A list is in the order, and every block of the cluster has all
// of it: so all decide alike, on the same integers, and only a draw's token has one owner.
//
// A pass over the part, and what the steps that need one share, is written once in a loop over steps:
// its code is long, and it would be there as often as it is called.
//
// Hazards. Each array in Shared says who writes it. A barrier of the cluster follows whenever a block has
// looked into another one's memory: so it may leave. Nobody reads the history when it is written.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../llm_sampling.h"
#include "../semantics.h"
#include "../validate.h"
#include "cluster.h"
#include "device.h"
#include "launch.h"
#include "row.h"

namespace llm_sampling {
namespace {

constexpr int kListed = 384;  // the longest list
// So many of the first tokens of the order are listed for top-p; more of them where those have not its mass.
constexpr int kFewTokens = 64;
constexpr int kMoreTokens = 192;
constexpr int kAbreast = 16;   // of a list that is compared with itself
constexpr int kSampled = 256;  // tokens of a row
constexpr int64_t kLargestMass = int64_t{1} << 42;
constexpr int kBins = 2 * kThreads;
constexpr int kMaxima = 2;      // of a thread
constexpr int kPrefetched = 4;  // rounds ahead, of a row that is not copied
constexpr uint64_t kNoCode = 0;
static_assert(kListed % kAbreast == 0 && kSampled % kAbreast == 0, "a list is filled up");
static_assert(kBins >= 29 * 16, "a bin for each distance that bin_of knows");

struct Parameters {
  float temperature, top_p, depth_cut;  // depth_cut: infinite where min-p is off
  int32_t top_k, keep;
  uint64_t seed, position;
  uint64_t random;  // of draw 0
  int64_t slot;     // of the history
};

// What is known of the list beside its tokens.
struct Listed {
  int count;
  int count_above;
  int64_t mass_above;
  bool is_last;  // nothing is below it
};

struct Shared {
  Cluster::Memory cluster;
  Parameters parameters;  // by thread 0, once
  int groups;             // of this block's part, by thread 0, once
  uint32_t seen_count;    // of the tokens of this block's part that were seen
  uint32_t appended;      // to the list, by this block
  Listed listed;          // by thread 0
  union {
    uint32_t seen_ids[kScored];  // in any order; before there is a list
    struct {
      uint64_t list[kListed];    // codes in any order; written by all blocks, between two barriers
      int64_t masses[kListed];   // of each
      uint64_t sorted[kListed];  // codes in the order; before that, what this block appends
      int64_t reach[kListed];    // running masses of the sorted
    };
  };
  uint32_t bins[kBins];  // of this block's maxima, once
};

static_assert(sizeof(Shared) <= kSharedFixed, "launch.h counts it");

struct Plan {
  LlmSamplingArgs args;
  int groups;  // of a block's part
};

// A part of the order, and what is above it.
struct Range {
  uint64_t low, high;
  int count_above;
  int64_t mass_above;
};

// What a row's filters ask for.
struct Filters {
  int keep, at_most;
  float top_p, depth_cut;
  bool has_k, has_p, has_min_p;

  __device__ Filters(const Parameters& row, int vocab_size) {
    keep = row.keep > 1 ? row.keep : 1;
    at_most = row.top_k > 0 ? (row.top_k > keep ? row.top_k : keep) : vocab_size;
    top_p = row.top_p;
    depth_cut = row.depth_cut;
    has_k = at_most < vocab_size;
    has_p = top_p < 1.0f;
    has_min_p = depth_cut < kInfinity;
  }
  __device__ bool are_off() const { return !has_k && !has_p && !has_min_p; }
  // Whether the mass of the whole row is asked for.
  __device__ bool weigh_all() const { return !has_k && (has_p || !has_min_p); }
};

// A logarithmic scale of how far a logit's key is below the largest one's: 16 steps per doubling.
__device__ __forceinline__ int bin_of(uint32_t below) {
  if (below < 16) return static_cast<int>(below);
  const int log = 31 - __clz(static_cast<int>(below));
  return (log - 3) * 16 + static_cast<int>(below >> (log - 4) & 15);
}

// The smallest distance of a bin.
__device__ __forceinline__ uint64_t first_of_bin(int bin) {
  return bin < 16 ? static_cast<uint64_t>(bin)
                  : static_cast<uint64_t>(16 + bin % 16) << (bin / 16 - 1);
}

template <int kDtype, bool kCopied>
class RowSampler {
 public:
  __device__ RowSampler(const Plan& plan, int index)
      : args_(plan.args),
        index_(index),
        shared_(*reinterpret_cast<Shared*>(dynamic_shared())),
        cluster_(shared_.cluster),
        part_groups_(plan.groups) {
    unsigned char* after = dynamic_shared() + kSharedFixed;
    chunks_ = reinterpret_cast<int64_t*>(after);
    chunk_keys_ = reinterpret_cast<uint32_t*>(chunks_ + count_chunks(plan.groups));
    copy_ = after + chunk_bytes(plan.groups);
  }

  __device__ void run() {
    cluster_.arrive();
    const int groups = find_logits();
    if (kCopied) copy_logits(groups);
    find_parameters(groups);
    if (kCopied) copy_bits(groups);
    __syncthreads();
    cluster_.wait();  // all blocks have started, which whoever looks into one must know
    find_maxima();
    const bool is_greedy = shared_.parameters.temperature == 0.0f;
    if (m_ == -kInfinity) {
      cut_ = ~uint64_t{0};
    } else if (is_greedy) {
      find_first();
    } else {
      find_kept();
    }
    if (args_.filtered != nullptr) write_filtered(is_greedy);
    if (args_.tokens != nullptr) {
      if (args_.logprobs_mode == LLM_SAMPLING_LOGPROBS_RAW) find_raw_sum();
      draw(is_greedy);
    }
    // by others of one that draws, or that writes what it filtered
    const bool is_history_read = args_.filtered != nullptr || args_.num_samples > 1;
    if (is_history_read) cluster_.sync();
    if (drew_) advance();
  }

 private:
  // ---- the row ----

  // Returns how many groups this block has.
  __device__ int find_logits() {
    const unsigned char* logits = static_cast<const unsigned char*>(args_.logits);
    logits += int64_t{index_} * args_.logits_stride * kLogitBytes<kDtype>;
    const unsigned beyond = static_cast<unsigned>(reinterpret_cast<uintptr_t>(logits) & 15);
    row_.aligned = logits - beyond;
    row_.shift = static_cast<int>(beyond) / kLogitBytes<kDtype>;
    row_.vocab_size = static_cast<int>(args_.vocab_size);
    first_group_ = cluster_.rank() * part_groups_;
    const int left = row_.groups() - first_group_;
    return left < 0 ? 0 : left < part_groups_ ? left : part_groups_;
  }

  // Everything but the logits. One thread reads what is not needed before the first barrier.
  __device__ void find_parameters(int groups) {
    row_.bias_count = 0;
    row_.bias_first = 0;
    if (args_.logit_bias_offsets != nullptr) {
      row_.bias_first = args_.logit_bias_offsets[index_];
      row_.bias_count = static_cast<int>(args_.logit_bias_offsets[index_ + 1] - row_.bias_first);
    }
    const int64_t slot = args_.seen != nullptr ? args_.slots[index_] : 0;
    row_.repetition = args_.repetition_penalty[index_];
    row_.frequency = args_.frequency_penalty[index_];
    row_.presence = args_.presence_penalty[index_];
    find_bits(slot);
    row_.is_plain =
        row_.bias_count == 0 && row_.allowed.words == nullptr && row_.seen.words == nullptr;
    if (threadIdx.x != 0) return;
    shared_.groups = groups;
    shared_.seen_count = 0;
    shared_.listed.count = 0;
    Parameters& own = shared_.parameters;
    own.temperature = args_.temperature[index_];
    own.top_p = args_.top_p[index_];
    own.depth_cut = depth_cut(args_, index_);
    own.top_k = args_.top_k[index_];
    own.keep = args_.min_tokens_to_keep[index_];
    own.seed = args_.seed != nullptr ? static_cast<uint64_t>(args_.seed[index_]) : 0;
    own.position = args_.position != nullptr ? static_cast<uint64_t>(args_.position[index_]) : 0;
    own.slot = slot;
    own.random = random_bits(own.seed, own.position, 0);
  }

  // Where the row's mask and history are in global memory.
  __device__ void find_bits(int64_t slot) {
    row_.allowed = {nullptr};
    if (args_.allowed_mask != nullptr) {
      const int32_t* words = args_.allowed_mask + int64_t{index_} * args_.allowed_mask_stride;
      row_.allowed.words = reinterpret_cast<const uint32_t*>(words);
    }
    row_.seen = {nullptr};
    row_.counts = nullptr;
    const bool has_output_penalty = row_.frequency != 0.0f || row_.presence != 0.0f;
    if (args_.seen == nullptr || (row_.repetition == 1.0f && !has_output_penalty)) return;
    row_.seen.words = reinterpret_cast<const uint32_t*>(args_.seen + slot * args_.seen_stride);
    if (has_output_penalty) row_.counts = args_.counts + slot * args_.counts_stride;
  }

  // ---- copies: all of them are on their way together, but for what tells where another is ----

  __device__ Copy copy_of(int block) const {
    unsigned char* base = block == cluster_.rank() ? copy_ : in_block(copy_, block);
    return Copy(base, part_groups_, kLogitBytes<kDtype>);
  }

  __device__ void copy_logits(int groups) {
    if (groups == 0) return;
    constexpr int kBytes = kGroup * kLogitBytes<kDtype>;
    const unsigned char* from = row_.aligned + static_cast<int64_t>(first_group_) * kBytes;
    const int thread = static_cast<int>(threadIdx.x);
    const int whole = row_.is_whole(first_group_) ? 0 : 1;
    const int end = row_.is_whole(first_group_ + groups - 1) ? groups : groups - 1;
#pragma unroll 4
    for (int local = whole + thread; local < end; local += kThreads) {
#pragma unroll
      for (int i = 0; i < kBytes; i += 16) {
        copy<16>(copy_ + local * kBytes + i, from + local * kBytes + i);
      }
    }
    if (thread == 0 && whole > 0) copy_edge(copy_, from, row_.first_id(first_group_));
    if (thread == kWarpSize && end < groups && groups > whole) {
      const int first = row_.first_id(first_group_ + groups - 1);
      copy_edge(copy_ + (groups - 1) * kBytes, from + (groups - 1) * kBytes, first);
    }
  }

  // A group that reaches beyond the row; -inf where it does.
  __device__ void copy_edge(unsigned char* to, const unsigned char* from, int first) const {
    using Word = Unsigned<kLogitBytes<kDtype>>;
    Word words[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const bool is_inside = first + i >= 0 && first + i < row_.vocab_size;
      words[i] = is_inside ? reinterpret_cast<const Word*>(from)[i] : kLowestBits<kDtype>;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) memcpy(to + i * sizeof(Word), &words[i], sizeof(Word));
  }

  // The bits, and the counts of the tokens that were seen, each at a place of its own.
  __device__ void copy_bits(int groups) {
    const Copy copies = copy_of(cluster_.rank());
    const int first = row_.first_id(first_group_);
    const int words = (groups + 3) / 4;
    const int thread = static_cast<int>(threadIdx.x);
    if (row_.allowed.words != nullptr) {
#pragma unroll 4
      for (int i = thread; i < words; i += kThreads) {
        copies.allowed[i] = row_.allowed.word_of(first + i * 32, row_.vocab_size);
      }
    }
    if (row_.seen.words != nullptr) {
      int count = 0;
#pragma unroll 4
      for (int i = thread; i < words; i += kThreads) {
        copies.seen[i] = row_.seen.word_of(first + i * 32, row_.vocab_size);
        count += __popc(copies.seen[i]);
      }
      __syncthreads();  // seen_count is 0
      const int before = static_cast<int>(scan_warp(count));
      int place = 0;
      if (thread % kWarpSize == kWarpSize - 1) {
        place = static_cast<int>(atomicAdd(&shared_.seen_count, static_cast<uint32_t>(before)));
      }
      place = __shfl_sync(kWholeWarp, place, kWarpSize - 1) + before - count;
#pragma unroll 1
      for (int i = thread; i < words; i += kThreads) {
        copies.places[i] = static_cast<uint16_t>(place);
#pragma unroll 1
        for (uint32_t seen = copies.seen[i]; seen != 0; seen &= seen - 1, ++place) {
          if (place >= kScored) continue;
          const int id = first + i * 32 + __ffs(static_cast<int>(seen)) - 1;
          shared_.seen_ids[place] = static_cast<uint32_t>(id);
          if (row_.counts != nullptr) copy<4>(copies.scores + place, row_.counts + id);
        }
      }
    }
    wait_for_copies();
  }

  // ---- groups ----

  __device__ int groups() const { return shared_.groups; }
  __device__ int rounds() const { return (groups() + kThreads - 1) / kThreads; }

  // The logits of a group.
  __device__ __forceinline__ const unsigned char* place_of(
      const Copy& copies,
      int local,
      int group
  ) const {
    constexpr int kBytes = kGroup * kLogitBytes<kDtype>;
    return kCopied ? copies.logits + local * kBytes
                   : row_.aligned + static_cast<int64_t>(group) * kBytes;
  }

  // Whether a block has the scores of all tokens of its part that were seen.
  __device__ __forceinline__ bool has_scores(int block) const {
    if (!kCopied || row_.seen.words == nullptr) return false;
    const bool is_own = block == cluster_.rank();
    return *(is_own ? &shared_.seen_count : in_block(&shared_.seen_count, block)) <= kScored;
  }

  // Steps 1 to 5 of a group, that another block may have.
  __device__ __forceinline__ void process(
      const Copy& copies,
      bool is_scored,
      int local,
      int group,
      float (&x)[kGroup]
  ) const {
    load<kDtype, kCopied>(row_, place_of(copies, local, group), group, x);
    if (row_.is_plain) return;
    const int first = row_.first_id(group);
    add_bias(args_, row_, first, x);
    const int word = local / 4;
    const int bit = local % 4 * kGroup;
    if (row_.allowed.words != nullptr) {
      leave(kCopied ? copies.allowed[word] >> bit : row_.allowed.of(first, row_.vocab_size), x);
    }
    if (row_.seen.words == nullptr) return;
    const uint32_t here = kCopied ? copies.seen[word] : 0;
    unsigned seen = kCopied ? here >> bit & 0xff : row_.seen.of(first, row_.vocab_size);
    const float* scores = nullptr;
    if (kCopied && is_scored)
      scores = copies.scores + copies.places[word] + __popc(here & ((1u << bit) - 1));
    // few are: a loop is shorter than eight times its body
#pragma unroll 1
    for (; seen != 0; seen &= seen - 1) {
      const int next = __ffs(static_cast<int>(seen)) - 1;
      float value = 0.0f;
      if (kCopied && is_scored) {
        value = *scores++;
      } else {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) value = i == next ? x[i] : value;
        value = penalize(row_, value, row_.counts != nullptr ? row_.counts[first + next] : 0);
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x[i] = i == next ? value : x[i];
    }
  }

  // visit(round, group, x) of each of this thread's groups, by steps 1 to 6, in every round: x is -inf where
  // the part has no group left, and the group is another block's.
  template <typename Visit>
  __device__ __forceinline__ void over_groups(const Visit& visit) const {
    const int count = groups();
#pragma unroll 1
    for (int round = 0; round * kThreads < count; ++round) visit_round(round, count, visit);
  }

  // The same for the chunks that have a key from ``lowest`` on.
  template <typename Visit>
  __device__ __forceinline__ void over_chunks(uint32_t lowest, const Visit& visit) const {
    const int count = groups();
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int first = 0; first * kThreads < count; first += kWarpSize) {
      const int round = first + lane;
      const bool has_one = round * kThreads < count && chunk_keys_[round * kWarps + warp] >= lowest;
#pragma unroll 1
      for (unsigned rest = __ballot_sync(kWholeWarp, has_one); rest != 0; rest &= rest - 1) {
        visit_round(first + __ffs(static_cast<int>(rest)) - 1, count, visit);
      }
    }
  }

  template <typename Visit>
  __device__ __forceinline__ void visit_round(int round, int count, const Visit& visit) const {
    const int local = round * kThreads + static_cast<int>(threadIdx.x);
    const int group = first_group_ + local;
    float x[kGroup];
    if (local < count) {
      fetch_ahead(local, count);
      process(copy_of(cluster_.rank()), is_scored_, local, group, x);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x[i] = canonical(x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x[i] = -kInfinity;
    }
    visit(round, group, x);
  }

  // Asks for logits of a later round, of a row that is not copied.
  __device__ __forceinline__ void fetch_ahead(int local, int count) const {
    constexpr int kBytes = kGroup * kLogitBytes<kDtype>;
    local += kPrefetched * kThreads;
    if (kCopied || local >= count) return;
    prefetch(row_.aligned + static_cast<int64_t>(first_group_ + local) * kBytes);
  }

  // Steps 1 to 6 of any group of the row.
  __device__ __forceinline__ void process_any(int group, float (&x)[kGroup]) const {
    const int owner = group / part_groups_;
    process(copy_of(owner), has_scores(owner), group - owner * part_groups_, group, x);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = canonical(x[i]);
  }

  // 9 depth, 10 mass
  __device__ __forceinline__ float depth_of(float x) const { return depth(x, m_, scale_); }
  __device__ __forceinline__ int64_t mass_of(float x) const { return whole_mass(depth_of(x)); }

  // ---- maxima ----

  __device__ void find_maxima() {
    is_scored_ = has_scores(cluster_.rank());
    bool any_nan = is_scored_ && score();
    const bool has_seen = row_.seen.words != nullptr && !is_scored_;
    if (row_.bias_count == 0 && row_.allowed.words == nullptr && !has_seen) {
      any_nan |= find_chunk_maxima<true>();
    } else {
      any_nan |= find_chunk_maxima<false>();
    }
    const uint32_t key = order_key(fmaxf(largest_[0], largest_[1]));
    uint64_t found[1] = {static_cast<uint64_t>(key) << 32 | (any_nan ? 1 : 0)};
    cluster_.combine(found, LargerWithFlags());
    m_ = from_order_key(static_cast<uint32_t>(found[0] >> 32));
    if (args_.status != nullptr && cluster_.rank() == 0 && threadIdx.x == 0) {
      int32_t status = (found[0] & 1) != 0 ? LLM_SAMPLING_STATUS_NAN : 0;
      if (m_ == -kInfinity) status |= LLM_SAMPLING_STATUS_NO_CANDIDATE;
      if (m_ == kInfinity) status |= LLM_SAMPLING_STATUS_POS_INF;
      args_.status[index_] = status;
    }
  }

  // Of all but the tokens that have scores: those are -inf in the copy. True if one is NaN.
  template <bool kPlain>
  __device__ __forceinline__ bool find_chunk_maxima() {
    const int warp = threadIdx.x / kWarpSize;
    const int count = groups();
    bool any_nan = false;
#pragma unroll(kPlain ? 2 : 1)
    for (int round = 0; round * kThreads < count; ++round) {
      const int local = round * kThreads + static_cast<int>(threadIdx.x);
      const int group = first_group_ + local;
      float found[kMaxima];
#pragma unroll
      for (int half = 0; half < kMaxima; ++half) found[half] = -kInfinity;
      if (local < count) {
        float x[kGroup];
        fetch_ahead(local, count);
        const Copy copies = copy_of(cluster_.rank());
        if (kPlain) {
          load<kDtype, kCopied>(row_, place_of(copies, local, group), group, x);
        } else {
          process(copies, is_scored_, local, group, x);
        }
        // step 6 is left to the largest: fmaxf passes over NaN
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          sum += x[i];
          found[i * kMaxima / kGroup] = fmaxf(found[i * kMaxima / kGroup], x[i]);
        }
        if (sum != sum) {  // a NaN, or both infinities
#pragma unroll
          for (int i = 0; i < kGroup; ++i) any_nan |= x[i] != x[i];
        }
      }
#pragma unroll
      for (int half = 0; half < kMaxima; ++half)
        largest_[half] = fmaxf(largest_[half], found[half]);
      const uint32_t key = __reduce_max_sync(kWholeWarp, order_key(fmaxf(found[0], found[1])));
      if (threadIdx.x % kWarpSize == 0) {
        uint32_t& chunk = chunk_keys_[round * kWarps + warp];
        chunk = is_scored_ && chunk > key ? chunk : key;
      }
    }
    return any_nan;
  }

  // Steps 1 to 5 of the tokens that were seen, evenly among the threads; -inf takes their place in the copy.
  // True if one is NaN.
  __device__ bool score() {
    const Copy copies = copy_of(cluster_.rank());
    const int first = row_.first_id(first_group_);
    const int count = static_cast<int>(shared_.seen_count);
    const int chunks = rounds() * kWarps;
    bool any_nan = false;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < chunks; i += kThreads) chunk_keys_[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const int id = static_cast<int>(shared_.seen_ids[i]);
      const int offset = id - first;
      const int local = offset / kGroup;
      unsigned char* place = copies.logits + offset * kLogitBytes<kDtype>;
      float x[1] = {widen<kDtype>(place)};
      const auto lowest = kLowestBits<kDtype>;
      memcpy(place, &lowest, sizeof(lowest));
      add_bias(args_, row_, id, x);
      if (row_.allowed.words != nullptr) leave(copies.allowed[local / 4] >> offset % 32, x);
      int32_t times = 0;
      if (row_.counts != nullptr) memcpy(&times, copies.scores + i, sizeof(times));
      x[0] = penalize(row_, x[0], times);
      copies.scores[i] = x[0];
      any_nan |= x[0] != x[0];
      const float value = canonical(x[0]);
      // a token is in one of the maxima of one thread
      largest_[0] = fmaxf(largest_[0], value);
      const int chunk = local / kThreads * kWarps + local % kThreads / kWarpSize;
      atomicMax(&chunk_keys_[chunk], order_key(value));
    }
    __syncthreads();
    return any_nan;
  }

  // 8 greedy
  __device__ void find_first() {
    uint64_t first[1] = {kNoCode};
    over_chunks(order_key(m_), [&](int, int group, const float (&x)[kGroup]) {
      // later groups come later in the order
      if (first[0] != kNoCode) return;
#pragma unroll
      for (int i = kGroup - 1; i >= 0; --i) {
        if (x[i] == m_) first[0] = code_of(x[i], row_.first_id(group) + i);
      }
    });
    cluster_.combine(first, Larger());
    cut_ = first[0];
  }

  // ---- the list ----

  // Lists a part of the order, sorted, in every block; an empty list where it is longer than kListed.
  __device__ void list(const Range& range) {
    if (threadIdx.x == 0) shared_.appended = 0;
    __syncthreads();
    const float low = logit_of(range.low);
    over_chunks(
        static_cast<uint32_t>(range.low >> 20),
        [&](int, int group, const float (&x)[kGroup]) {
          const int first = row_.first_id(group);
          unsigned wanted = 0;
#pragma unroll
          for (int i = 0; i < kGroup; ++i) wanted |= x[i] >= low ? 1u << i : 0;
          // nobody adds to what is too long already, of however many
          if (wanted == 0 || *const_cast<volatile uint32_t*>(&shared_.appended) > kListed) return;
#pragma unroll 1
          for (; wanted != 0; wanted &= wanted - 1) {
            const int next = __ffs(static_cast<int>(wanted)) - 1;
            float value = 0.0f;
#pragma unroll
            for (int i = 0; i < kGroup; ++i) value = i == next ? x[i] : value;
            const uint64_t code = code_of(value, first + next);
            if (code < range.low || code >= range.high) continue;
            const unsigned place = atomicAdd(&shared_.appended, 1u);
            if (place < kListed) shared_.sorted[place] = code;
          }
        }
    );
    __syncthreads();
    const int own = static_cast<int>(shared_.appended);
    const Sums counts = cluster_.sum(own);
    const int count = counts.total <= kListed ? static_cast<int>(counts.total) : 0;
    for (int i = static_cast<int>(threadIdx.x); count > 0 && i < own; i += kThreads) {
      const uint64_t code = shared_.sorted[i];
      const int64_t w = mass_of(logit_of(code));
      const int64_t place = counts.before + i;
#pragma unroll 1
      for (int block = 0; block < cluster_.blocks(); ++block) {
        in_block(shared_.list, block)[place] = code;
        in_block(shared_.masses, block)[place] = w;
      }
    }
    if (threadIdx.x < (kListed - static_cast<unsigned>(count)) % kAbreast) {
      shared_.list[count + threadIdx.x] = kNoCode;
      shared_.masses[count + threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) {
      const bool is_last = range.low <= kLowestCode;
      shared_.listed = {count, range.count_above, range.mass_above, is_last};
    }
    cluster_.sync();
    sort(count);
  }

  // visit(own, code, count, mass) of each of so many codes of the list: how many hold(other, code), and their
  // mass. Four lanes share one. The list is filled up to a multiple of kAbreast by what never holds.
  template <typename Holds, typename Visit>
  __device__ __forceinline__ void compare_all(
      int count,
      const Holds& holds,
      const Visit& visit
  ) const {
    constexpr int kLanes = 4;
    const int part = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll 1
    for (int first = 0; first < count; first += kThreads / kLanes) {
      const int own = first + static_cast<int>(threadIdx.x) / kLanes;
      const uint64_t code = shared_.list[own < count ? own : 0];
      int held = 0;
      int64_t mass = 0;
#pragma unroll 1
      for (int i = part; i < count; i += kAbreast) {
#pragma unroll
        for (int j = i; j < i + kAbreast; j += kLanes) {
          const bool is_held = holds(shared_.list[j], code);
          held += is_held ? 1 : 0;
          mass += is_held ? shared_.masses[j] : 0;
        }
      }
#pragma unroll
      for (int other = 1; other < kLanes; other *= 2) {
        held += __shfl_xor_sync(kWholeWarp, held, other);
        mass += __shfl_xor_sync(kWholeWarp, mass, other);
      }
      if (part == 0 && own < count) visit(own, code, held, mass);
    }
  }

  // Sorts the list, and gives the running mass of the sorted.
  __device__ void sort(int count) {
    compare_all(
        count,
        [](uint64_t other, uint64_t code) { return other >= code; },
        [&](int, uint64_t code, int reached, int64_t mass) {
          shared_.sorted[reached - 1] = code;
          shared_.reach[reached - 1] = mass;
        }
    );
    __syncthreads();
  }

  // How many of the list reach a code.
  __device__ int count_from(uint64_t code) const {
    return count_while_together(shared_.listed.count, [&](int i) {
      return shared_.sorted[i] >= code;
    });
  }

  // The mass of all from a code on, which is in the list, or is what the list is empty below.
  __device__ int64_t mass_from(uint64_t code) const {
    const int count = count_from(code);
    return shared_.listed.mass_above + (count > 0 ? shared_.reach[count - 1] : 0);
  }

  // Whether the list has the token at which the target is reached, or the row does not reach it.
  __device__ bool is_in_list(int64_t target, bool by_mass) const {
    if (shared_.listed.count == 0) return false;
    const int64_t above = by_mass ? shared_.listed.mass_above : shared_.listed.count_above;
    const int64_t own = by_mass ? shared_.reach[shared_.listed.count - 1] : shared_.listed.count;
    return above < target && (above + own >= target || shared_.listed.is_last);
  }

  // The code at which so many tokens, or so much mass, are reached; or the lowest.
  __device__ uint64_t cut_at(int64_t target, bool by_mass, uint64_t lowest) const {
    const int place =
        by_mass ? count_while_together(
                      shared_.listed.count,
                      [&](int i) { return shared_.listed.mass_above + shared_.reach[i] < target; }
                  )
                : static_cast<int>(target - shared_.listed.count_above - 1);
    return place < shared_.listed.count ? shared_.sorted[place] : lowest;
  }

  // ---- steps 11 to 13 ----

  __device__ void find_kept() {
    scale_ = depth_scale(shared_.parameters.temperature);
    cut_ = kLowestCode;
    // the mass of all tokens, where it is asked for; then of the kept ones, where no list has them
#pragma unroll 1
    for (bool all = true;; all = false) {
      if (!all) find_cuts();
      const Filters filters = find_filters();
      if (all ? filters.weigh_all() : !in_list_) weigh();
      if (!all || filters.are_off()) return;
    }
  }

  // Anew at each use, since registers are dear.
  __device__ __forceinline__ Filters find_filters() const {
    return Filters(shared_.parameters, row_.vocab_size);
  }

  // Each filter's cut. None leaves fewer than min_tokens_to_keep.
  __device__ void find_cuts() {
    enum { kFirst, kTopK, kMore, kTopP, kKeep, kSteps };
    uint64_t k_cut = kLowestCode;
    uint64_t filter_cut = kLowestCode;
#pragma unroll 1
    for (int step = kFirst; step < kSteps; ++step) {
      const Filters filters = find_filters();
      const bool by_mass = step == kMore || step == kTopP;
      int64_t target = filters.at_most;
      if (step == kTopK && !filters.has_k) continue;
      if (by_mass) {  // 12 top-p
        if (!filters.has_p) continue;
        if (filters.has_k) {
          if (step == kMore) continue;
          mass_.total = mass_from(k_cut);
        }
        target = top_p_target(mass_.total, filters.top_p);
      }
      if (step == kKeep) {
        if (filters.has_min_p) {  // 13 min-p
          const uint64_t near_cut = nearest_code(filters.depth_cut);
          filter_cut = filter_cut > near_cut ? filter_cut : near_cut;
        }
        if (filters.keep == 1 || filter_cut <= k_cut) continue;
        target = filters.keep;
      }
      Range range;
      bool is_listed = step != kFirst && is_in_list(target, by_mass);
      if (!is_listed) {
        if (step == kFirst || step == kMore) {
          is_listed = !first_tokens(filters, step == kFirst ? kFewTokens : kMoreTokens, range);
        } else {
          range = search(target, by_mass, k_cut);
        }
      }
      if (!is_listed) list(range);
      if (step == kFirst || step == kMore) continue;
      const uint64_t cut = cut_at(target, by_mass, k_cut);
      if (step == kTopK) k_cut = cut;  // 11 top-k
      if (step == kTopP) filter_cut = cut;
      if (step == kKeep) filter_cut = filter_cut < cut ? filter_cut : cut;
    }
    cut_ = filter_cut > k_cut ? filter_cut : k_cut;
    const Listed& listed = shared_.listed;
    in_list_ = listed.count > 0 && listed.count_above == 0 &&
               (listed.is_last || cut_ >= shared_.sorted[listed.count - 1]);
  }

  // The first tokens of the order, about as many as the filters ask for, and what is within min-p's depth.
  // False if no list would have them.
  __device__ bool first_tokens(const Filters& filters, int nucleus, Range& range) {
    int64_t wanted = filters.keep;
    if (filters.has_k) {
      wanted = filters.at_most;
    } else if (filters.has_p) {
      // half of the maxima tell it well enough
      const int half = kThreads * kMaxima / 2 * cluster_.blocks();
      nucleus = half < nucleus ? half : nucleus;
      wanted = wanted > nucleus ? wanted : nucleus;
      if (top_p_target(mass_.total, filters.top_p) > wanted * kLargestMass) return false;
    }
    if (wanted > kListed) return false;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) shared_.bins[i] = 0;
    __syncthreads();
    const uint32_t top = order_key(m_);
#pragma unroll
    for (int half = 0; half < kMaxima; ++half) {
      if (largest_[half] == -kInfinity) continue;
      atomicAdd(&shared_.bins[bin_of(top - order_key(largest_[half]))], 1u);
    }
    cluster_.sync();
    const int own = static_cast<int>(threadIdx.x) * 2;
    int counts[2] = {0, 0};
#pragma unroll 4
    for (int block = 0; block < cluster_.blocks(); ++block) {
      const uint32_t* bins = in_block(shared_.bins, block);
      counts[0] += static_cast<int>(bins[own]);
      counts[1] += static_cast<int>(bins[own + 1]);
    }
    const int64_t reached = cluster_.scan(counts[0] + counts[1]);
    const int limit =
        __syncthreads_count(reached - counts[1] < wanted) + __syncthreads_count(reached < wanted);
    const uint32_t lowest = static_cast<uint32_t>(kLowestCode >> 20);
    uint32_t key = lowest;
    if (limit < kBins && first_of_bin(limit + 1) <= top - lowest) {
      key = top - static_cast<uint32_t>(first_of_bin(limit + 1) - 1);
    }
    if (!filters.has_k && !filters.has_p) {
      const uint32_t nearest = nearest_key(filters.depth_cut);
      key = key < nearest ? key : nearest;
    }
    range = {first_code(key), first_code(top + 1), 0, 0};
    return true;
  }

  // 13 min-p: the last code whose depth is at most the cut, or one between it and the next token.
  __device__ uint64_t nearest_code(float depth_cut) const {
    const Listed& listed = shared_.listed;
    if (listed.count > 0 && listed.count_above == 0) {
      const int inside = count_while_together(listed.count, [&](int i) {
        return depth_of(logit_of(shared_.sorted[i])) <= depth_cut;
      });
      if (inside < listed.count) return shared_.sorted[inside - 1];
    }
    return first_code(nearest_key(depth_cut));
  }

  // The lowest key whose depth is at most the cut. The depth grows as the key falls. Each lane tries
  // another one.
  __device__ uint32_t nearest_key(float depth_cut) const {
    uint32_t inside = order_key(m_);
    uint32_t size =
        inside - static_cast<uint32_t>(kLowestCode >> 20) + 1;  // below it, all are outside
    while (size > 1) {
      const uint32_t step = size / (kWarpSize + 1) + 1;
      const uint32_t down = (threadIdx.x % kWarpSize + 1) * step;
      const bool is_inside = down < size && depth_of(from_order_key(inside - down)) <= depth_cut;
      const uint32_t passed = static_cast<uint32_t>(__popc(__ballot_sync(kWholeWarp, is_inside)));
      inside -= passed * step;
      size -= passed * step;
      size = size < step ? size : step;
    }
    return inside;
  }

  // The part of the order in which the target is reached, short enough for a list.
  __device__ Range search(int64_t target, bool by_mass, uint64_t lowest) {
    Range range = {lowest, first_code(order_key(m_) + 1), 0, 0};
    int count = row_.vocab_size;  // from the lower end on
    uint64_t pivots[3];
    sample(target, by_mass, lowest, pivots);
    while (count - range.count_above > kListed && range.high - range.low > kListed) {
      const Bound bounds[3] = {Bound(pivots[0]), Bound(pivots[1]), Bound(pivots[2])};
      uint64_t sums[4] = {0, 0, 0, 0};
      const auto lowest_key = static_cast<uint32_t>(pivots[0] >> 20);  // of rising ones
      over_chunks(lowest_key, [&](int, int group, const float (&x)[kGroup]) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const int id = row_.first_id(group) + i;
          const uint64_t w = static_cast<uint64_t>(mass_of(x[i]));
#pragma unroll
          for (int p = 0; p < 3; ++p) {
            const bool is_reached = bounds[p].is_reached(x[i], id);
            sums[3] += is_reached ? uint64_t{1} << (21 * p) : 0;
            sums[p] += is_reached ? w : 0;
          }
        }
      });
      cluster_.combine(sums, Add());
      // the pivots are in order: the last one that reaches the target is the new lower end
      for (int p = 0; p < 3; ++p) {
        const int n = static_cast<int>(sums[3] >> (21 * p) & 0x1fffff);
        const int64_t w = static_cast<int64_t>(sums[p]);
        if ((by_mass ? w : n) >= target) {
          range.low = pivots[p];
          count = n;
        } else if (pivots[p] < range.high) {
          range = {range.low, pivots[p], n, w};
          break;
        }
      }
      cut_in_parts(range.low, range.high, pivots);
    }
    return range;
  }

  // Three codes about where a sample of the row reaches its share of the target, in rising order.
  __device__ void sample(int64_t target, bool by_mass, uint64_t lowest, uint64_t (&pivots)[3]) {
    __syncthreads();
#pragma unroll 1
    for (int own = static_cast<int>(threadIdx.x); own < kSampled; own += kThreads) {
      const int id = static_cast<int>(static_cast<int64_t>(own) * row_.vocab_size / kSampled);
      const int group = (id + row_.shift) / kGroup;
      float x[kGroup];
      process_any(group, x);
      float sampled = -kInfinity;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) sampled = row_.first_id(group) + i == id ? x[i] : sampled;
      shared_.list[own] = code_of(sampled, id);
      shared_.masses[own] = mass_of(sampled);
    }
    __syncthreads();
    sort(kSampled);
    const int count =
        count_while_together(kSampled, [&](int i) { return shared_.sorted[i] >= lowest; });
    const float reached = by_mass ? static_cast<float>(count > 0 ? shared_.reach[count - 1] : 0)
                                  : static_cast<float>(count);
    const float all =
        by_mass ? static_cast<float>(mass_.total)
                : static_cast<float>(count) * static_cast<float>(row_.vocab_size) / kSampled;
    float share = static_cast<float>(target) / (all > 1.0f ? all : 1.0f);
    share = share < 1.0f ? share : 1.0f;
    const float deviation =
        sqrtf(share * (1.0f - share) / static_cast<float>(count > 0 ? count : 1));
    const float spread = deviation * (by_mass ? 3.0f : 2.0f);
    for (int p = 0; p < 3; ++p) {
      const float part = share + spread * static_cast<float>(1 - p);
      const float wanted = (part < 0.0f ? 0.0f : part < 1.0f ? part : 1.0f) * reached;
      const int index = count_while_together(count, [&](int i) {
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

  // The mass of each chunk, of what reaches the cut, as running sums.
  __device__ void weigh() {
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    const Bound cut(cut_);
    const bool all = cut_ == kLowestCode;
    __syncthreads();
    over_groups([&](int round, int group, const float (&x)[kGroup]) {
      int64_t sum = 0;
      if (all) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) sum += mass_of(x[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) sum += kept_mass(cut, x[i], row_.first_id(group) + i);
      }
#pragma unroll
      for (int other = kWarpSize / 2; other > 0; other /= 2) {
        sum += __shfl_xor_sync(kWholeWarp, sum, other);
      }
      if (lane == 0) chunks_[round * kWarps + warp] = sum;
    });
    sum_chunks();
  }

  __device__ __forceinline__ int64_t kept_mass(const Bound& cut, float x, int id) const {
    return cut.is_reached(x, id) ? mass_of(x) : 0;
  }

  // Running sums over the chunks of this block, and those over the blocks.
  __device__ void sum_chunks() {
    const int count = rounds() * kWarps;
    const int each = (count + kThreads - 1) / kThreads;
    const int first = static_cast<int>(threadIdx.x) * each;
    __syncthreads();
    int64_t sum = 0;
#pragma unroll 1
    for (int i = first; i < first + each && i < count; ++i) sum += chunks_[i];
    int64_t running = cluster_.scan(sum) - sum;
#pragma unroll 1
    for (int i = first; i < first + each && i < count; ++i) {
      running += chunks_[i];
      chunks_[i] = running;
    }
    __syncthreads();
    mass_ = cluster_.sum(count > 0 ? chunks_[count - 1] : 0);
  }

  // ---- results ----

  // 14 draw
  __device__ void draw(bool is_greedy) {
    const int samples = args_.num_samples;
    if (m_ == -kInfinity || is_greedy) {
      if (cluster_.rank() != 0) return;
      for (int i = static_cast<int>(threadIdx.x); i < samples; i += kThreads) {
        write(i, m_ == -kInfinity ? -1 : id_of(cut_), 1, 1);
      }
    } else if (in_list_) {
      if (cluster_.rank() == 0) draw_from_list();
    } else {
      draw_from_chunks();
    }
  }

  __device__ int64_t random_below(int draw, int64_t total) const {
    const Parameters& row = shared_.parameters;
    if (draw == 0) return scaled_random(row.random, total);
    return scaled_random(random_bits(row.seed, row.position, static_cast<uint32_t>(draw)), total);
  }

  // The kept ones of the list: each asks how much mass those with smaller ids have. A warp for each draw.
  __device__ void draw_from_list() {
    const int count = shared_.listed.count;
    const int64_t total = mass_from(cut_);
    const uint64_t cut = cut_;
    __syncthreads();
    compare_all(
        count,
        [=](uint64_t other, uint64_t code) {
          const auto bits = [](uint64_t of) { return static_cast<uint32_t>(of) & kLastId; };
          return other >= cut && bits(other) > bits(code);  // they are larger for smaller ids
        },
        [&](int own, uint64_t, int, int64_t mass) { shared_.reach[own] = mass; }
    );
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x / kWarpSize; i < args_.num_samples; i += kWarps) {
      const int64_t r = random_below(i, total);
#pragma unroll 1
      for (int own = threadIdx.x % kWarpSize; own < count; own += kWarpSize) {
        const uint64_t code = shared_.list[own];
        const int64_t w = shared_.masses[own];
        const int64_t below = shared_.reach[own];
        if (code >= cut && below <= r && r < below + w) write(i, id_of(code), w, total);
      }
    }
  }

  // A warp for each draw, in the block that has its token.
  __device__ void draw_from_chunks() {
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    const Bound cut(cut_);
#pragma unroll 1
    for (int i = warp; i < args_.num_samples; i += kWarps) {
      const int64_t r = random_below(i, mass_.total) - mass_.before;
      if (r < 0 || r >= mass_.own) continue;
      const int chunk = count_while(rounds() * kWarps - 1, [&](int j) { return chunks_[j] <= r; });
      const int local = chunk / kWarps * kThreads + chunk % kWarps * kWarpSize + lane;
      const int group = first_group_ + local;
      int64_t w[kGroup] = {};
      int64_t sum = 0;
      if (local < groups()) {
        float x[kGroup];
        process_any(group, x);
#pragma unroll
        for (int t = 0; t < kGroup; ++t) {
          w[t] = kept_mass(cut, x[t], row_.first_id(group) + t);
          sum += w[t];
        }
      }
      int64_t reach = (chunk > 0 ? chunks_[chunk - 1] : 0) + scan_warp(sum);
      const unsigned past = __ballot_sync(kWholeWarp, reach > r);
      if (lane != __ffs(static_cast<int>(past)) - 1) continue;
      reach -= sum;
      bool is_found = false;
      int token = 0;
      int64_t own = 0;
#pragma unroll
      for (int t = 0; t < kGroup; ++t) {
        reach += w[t];
        if (is_found || reach <= r) continue;
        is_found = true;
        token = row_.first_id(group) + t;
        own = w[t];
      }
      write(i, token, own, mass_.total);
    }
  }

  __device__ float raw_logit(int id) const {
    const unsigned char* first = row_.aligned + row_.shift * kLogitBytes<kDtype>;
    return widen<kDtype>(first + static_cast<int64_t>(id) * kLogitBytes<kDtype>);
  }

  // ``token`` is -1 where there was no candidate. The thread that has draw 0 advances the row later.
  __device__ void write(int draw, int token, int64_t w, int64_t total) {
    const int64_t place = int64_t{index_} * args_.num_samples + draw;
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
    constexpr int kBytes = kGroup * kLogitBytes<kDtype>;
    uint64_t sum[1] = {0};
#pragma unroll 1
    for (bool sums = false;; sums = true) {
      float own = sums ? 0.0f : -kInfinity;
#pragma unroll 1
      for (int round = 0; round < rounds(); ++round) {
        const int local = round * kThreads + static_cast<int>(threadIdx.x);
        if (local >= groups()) continue;
        float x[kGroup];
        const int group = first_group_ + local;
        // the copy has not the logits of tokens with scores
        load<kDtype, false>(row_, row_.aligned + static_cast<int64_t>(group) * kBytes, group, x);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const float valid = x[i] == x[i] ? x[i] : -kInfinity;
          if (sums) {
            own += valid == raw_m_ ? 1.0f : expf(valid - raw_m_);
          } else {
            own = fmaxf(own, valid);
          }
        }
      }
      // in a fixed point that holds 2^20 ones
      sum[0] = sums ? static_cast<uint64_t>(own * 0x1p40f) : order_key(own);
      if (sums) break;
      cluster_.combine(sum, Larger());
      raw_m_ = from_order_key(static_cast<uint32_t>(sum[0]));
    }
    cluster_.combine(sum, Add());
    raw_log_sum_ = logf(static_cast<float>(sum[0]) * 0x1p-40f);
  }

  __device__ void write_filtered(bool is_greedy) {
    const float t = shared_.parameters.temperature;
    const Bound cut(cut_);
    float* out = args_.filtered + int64_t{index_} * args_.filtered_stride;
    over_groups([&](int, int group, const float (&x)[kGroup]) {
      if (group >= first_group_ + groups()) return;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int id = row_.first_id(group) + i;
        if (id < 0 || id >= row_.vocab_size) continue;
        out[id] = cut.is_reached(x[i], id) ? (is_greedy ? x[i] : x[i] / t) : -kInfinity;
      }
    });
  }

  __device__ void advance() {
    if (args_.advance == LLM_SAMPLING_ADVANCE_NEVER || token_ < 0) return;
    const Parameters& row = shared_.parameters;
    args_.position[index_] = static_cast<int64_t>(row.position + 1);
    if (args_.seen == nullptr) return;
    // none of them is waited for
    int32_t* seen = args_.seen + row.slot * args_.seen_stride + (token_ >> 5);
    atomicOr(seen, static_cast<int32_t>(1u << (token_ & 31)));
    atomicAdd(args_.counts + row.slot * args_.counts_stride + token_, 1);
    atomicAdd(reinterpret_cast<unsigned long long*>(args_.lengths + row.slot), 1ull);
  }

  const LlmSamplingArgs& args_;
  const int index_;
  Shared& shared_;
  Cluster cluster_;
  const int part_groups_;  // of a block
  int64_t* chunks_;        // masses
  uint32_t* chunk_keys_;   // the largest
  unsigned char* copy_;
  Row row_;
  int first_group_;  // of this block

  float largest_[kMaxima] = {-kInfinity, -kInfinity};  // of this thread's
  float m_;
  float scale_ = 0.0f;
  bool is_scored_ = false;  // whether this block has_scores

  // the kept set; the mass that top-p takes a part of, then that of the kept set unless the list has it
  uint64_t cut_;
  bool in_list_ = false;
  Sums mass_ = {};

  float raw_m_ = 0.0f;
  float raw_log_sum_ = 0.0f;
  bool drew_ = false;
  int token_ = -1;
};

template <int kDtype, bool kCopied>
__global__ void __launch_bounds__(kThreads, 2) sample_kernel(const Plan plan) {
  RowSampler<kDtype, kCopied> sampler(plan, static_cast<int>(blockIdx.x) / cluster_size());
  sampler.run();
}

}  // namespace
}  // namespace llm_sampling

#ifdef __CUDACC__
// ---- The host's side. tests/kernels/cuda_emulation/ has its own. ----

namespace llm_sampling {
namespace {

constexpr int32_t kFirstCudaError = 1000;  // codes from here on are CUDA's
constexpr int kFirstMajor = 8;             // the compute capability that setup.py begins with

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

cudaError_t find_usable() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return error;
  for (int device = 0; device < devices; ++device) {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (major >= kFirstMajor) return cudaSuccess;
  }
  return cudaErrorNoKernelImageForDevice;
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

__attribute__((visibility("default"))) int32_t llm_sampling_cuda_usable(void) {
  return llm_sampling::code_of_cuda(llm_sampling::find_usable());
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
