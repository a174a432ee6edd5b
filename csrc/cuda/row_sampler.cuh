// The class that samples one row: its state in shared memory and registers, and its methods by file.
#ifndef LLM_SAMPLING_CUDA_ROW_SAMPLER_CUH_
#define LLM_SAMPLING_CUDA_ROW_SAMPLER_CUH_

#include <stddef.h>
#include <stdint.h>

#include <type_traits>

#include "../history.h"
#include "../llm_sampling.h"
#include "../rows.h"
#include "../semantics.h"
#include "cluster.cuh"
#include "launch.cuh"
#include "row.cuh"

namespace llm_sampling {

constexpr int kMaxCandidates = 384;  // in shared memory
constexpr int kAbreast = 16;         // candidates that one iteration of compare_all takes
constexpr int kProbed = 256;         // tokens of a probe
constexpr int kMaxima = 2;           // maxima that each thread keeps
constexpr int kBins = 2 * kThreads;
constexpr int kBinBits = 9;
static_assert(kBins == 1 << kBinBits, "narrow() divides a range by bits");
constexpr uint64_t kNoCode = 0;
constexpr int kCounted = 4;  // ranks that one pass finds
static_assert(
    kMaxCandidates % kAbreast == 0 && kProbed % kAbreast == 0,
    "compare_all reads whole multiples of kAbreast"
);
static_assert(kMaxima == 2, "find_maxima and find_tile_maxima name both");

// In place of the index of parameters: the row is to be recorded, and its text has no room.
constexpr int64_t kTextFull = -3;
static_assert(kTextFull < kPadding && kTextFull < kNoSuchSlot, "it is none of rows.h");

// The row's parameters that are not needed before the first barrier.
struct Parameters {
  float temperature, top_p, depth_cut;  // depth_cut: infinity where no filter by depth is on
  int32_t top_k, min_tokens_to_keep;
  uint64_t seed, position;
  uint64_t random;  // the random bits of draw 0
  int64_t slot;     // the row's slot of the history
  int64_t row;      // the row's index; index_ takes a register, which later passes do not have
};

// A row's list of step 5a, in global memory.
struct RowList {
  const int32_t* bits;
  const int32_t* before;
  const float* amounts;
};

// What the filters of a row ask for.
struct Filters {
  int min_kept;  // no filter leaves fewer tokens
  int max_kept;  // top-k leaves no more
  float top_p, depth_cut;
  bool has_top_k, has_top_p, has_depth_cut;

  __device__ Filters(const Parameters& row, int vocab_size) {
    min_kept = row.min_tokens_to_keep > 1 ? row.min_tokens_to_keep : 1;
    max_kept = row.top_k > 0 ? (row.top_k > min_kept ? row.top_k : min_kept) : vocab_size;
    top_p = row.top_p;
    depth_cut = row.depth_cut;
    has_top_k = max_kept < vocab_size;
    has_top_p = top_p < 1.0f;
    has_depth_cut = depth_cut < kInfinity;
  }
  __device__ bool are_off() const { return !has_top_k && !has_top_p && !has_depth_cut; }
  // Whether the mass of the whole row is needed.
  __device__ bool need_total() const { return !has_top_k && (has_top_p || !has_depth_cut); }
};

// A range of codes, and the count and mass of the tokens above it.
struct Range {
  uint64_t low, high;  // low included, high excluded
  int count_above;
  int64_t mass_above;
};

// What is known of the candidates besides their codes.
struct Candidates {
  uint64_t low;  // they are all tokens of the row from this code on, but for those above them
  int count;
  int count_above;     // tokens of the row above all candidates
  int64_t mass_above;  // and their mass
  bool is_last;        // whether all other tokens of the row are above them or at -inf
};

constexpr int kMaxOverrides = 2 * LLM_SAMPLING_MAX_EXTRA_OUTPUT;

// The tokens whose bit or count extra ids change, see overrides.cuh. Made only where a call has extra ids and
// the row has a penalty.
struct Overrides {
  int count;
  uint32_t keys[kMaxOverrides];   // rising; twice the id, and 1 more if the token is seen
  int32_t counts[kMaxOverrides];  // how often the output holds them

  // The number of entries with smaller ids.
  __device__ __forceinline__ int place_of(int id) const {
    const uint32_t key = static_cast<uint32_t>(id) * 2;
    return count_leading(count, [&](int i) { return keys[i] < key; });
  }
  // The entry of an id, or -1.
  __device__ __forceinline__ int find(int id) const {
    const int place = place_of(id);
    return place < count && static_cast<int>(keys[place] >> 1) == id ? place : -1;
  }
  __device__ __forceinline__ uint32_t over(uint32_t bits, int first, int width) const;
};

// The lists of a row: the same number of codes for each part, with kNoCode at the end.
struct Lists {
  PartHeader* headers;
  uint64_t* codes;
  int parts;
  int wanted;  // tokens that each part was asked for
  int listed;  // codes of each part, or places for them
};

// Where a search of the row is. All threads need it after each pass, and have no registers to keep it in meanwhile.
struct Search {
  Range range;
  int count;           // of the tokens that reach range.low, or more
  uint64_t pivots[3];  // rising

  __device__ __forceinline__ void narrow(const uint64_t (&sums)[4], int64_t target, bool by_mass);
  __device__ __forceinline__ void split();
};

// What results.cuh knows; written by thread 0, but for `counted`.
struct Order {
  int64_t kept_mass;           // of the kept set
  float raw_m, raw_log_sum;    // as the class has them
  int number;                  // codes of the order
  uint64_t last;               // the last of them
  uint64_t counted[kCounted];  // codes whose ranks a pass finds; written by the first threads
};

// The fixed part of a block's shared memory.
struct Shared {
  Cluster::Memory cluster;
  Parameters parameters;  // written by thread 0, once
  Penalties penalties;    // written by thread 0, once
  const int32_t* counts;  // output counts; null: no penalty needs them; written by thread 0, once
  int64_t bias_first;     // index of the row's first bias; written by thread 0, once
  int vecs;               // vecs of this block's part; written by thread 0, once
  // Whether another row names a slot of this one; written by thread 0, by slot only.
  bool is_shared;
  // Whether the id that leaves the window with the row's token is in it a second time; written by thread 0,
  // with windows only.
  bool leaving_id_stays;
  bool is_last;  // whether all other blocks of a split row are done; written by thread 0
  // The smallest of all threads' maxima that are not -inf; written by thread 0.
  float least_maximum;
  int held_before;  // what the bins before the one that find_bin() has found hold; split rows only
  int held_with;    // what they hold together with it
  uint32_t marked_count;  // marked tokens of this block's part, see Copy
  uint32_t appended;      // candidates that this block has found
  Candidates candidates;  // written by thread 0
  // That part of total_mass_ which belongs to earlier blocks; written by thread 0.
  int64_t mass_before;
  Overrides overrides;
  union {
    struct {
      int32_t ids[kMaxOverrides];  // -1 where there is none
      uint32_t stays[kMaxOverrides];
    } listing;                        // used by list_overrides
    uint32_t marked_ids[kMaxScores];  // in any order; used before there are candidates
    struct {
      uint64_t codes[kMaxCandidates];   // in any order; written by all blocks, between two barriers
      int64_t masses[kMaxCandidates];   // of `codes`
      uint64_t sorted[kMaxCandidates];  // codes in the order; before that, those this block found
      int64_t running[kMaxCandidates];  // running masses of `sorted`; for a draw, see draw.cuh
    };
  };
  union {
    // Histogram of the maxima of this block's threads, or of the codes of a split row.
    uint32_t bins[kBins];
    Search search;  // written by thread 0
  };
  Order order;
};
static_assert(sizeof(Shared) <= kFixedBytes, "launch.cuh reserves kFixedBytes for it");

// Samples one row. kMore: of a call that has_more(); only then a row may have a list. All threads of the row's cluster make one and call run(); all threads of a block that has
// a part of a split row make one and call run_part().
template <int kDtype, Layout kLayout, bool kMore>
class RowSampler {
 public:
  // `vecs` are those of a part; `part` is the block's part of a split row.
  __device__ RowSampler(const LlmSamplingArgs& args, int vecs, int index, int part = 0)
      : args_(args),
        index_(index),
        shared_(*reinterpret_cast<Shared*>(dynamic_shared())),
        cluster_(shared_.cluster),
        split_part_(part),
        part_vecs_(vecs) {
    unsigned char* after = dynamic_shared() + kFixedBytes;
    tile_masses_ = reinterpret_cast<int64_t*>(after);
    tile_keys_ = reinterpret_cast<uint32_t*>(tile_masses_ + count_tiles(vecs));
    copy_ = after + tiles_bytes(vecs);
  }

  // The argument is kMore. With it there is too much code for the compiler to inline it unless it must; where it need
  // not, it is left to it.
  __device__ void run(std::false_type) { run_as(); }
  __device__ __forceinline__ void run(std::true_type) { run_as(); }
  __device__ bool run_part(const Workspace& workspace, int parts, std::false_type) {
    return run_part_as(workspace, parts);
  }
  __device__ __forceinline__ bool run_part(const Workspace& workspace, int parts, std::true_type) {
    return run_part_as(workspace, parts);
  }

 private:
  __device__ __forceinline__ void run_as();
  __device__ __forceinline__ bool run_part_as(const Workspace& workspace, int parts);

  static constexpr bool kCopied = kLayout != Layout::kInPlace;
  static constexpr bool kIsSplit = kLayout == Layout::kSplit;
  using LogitWord = Unsigned<kLogitBytes<kDtype>>;
  static constexpr int kVecBytes = kVec * kLogitBytes<kDtype>;

  // The part of the row that this block has.
  __device__ int part() const { return kIsSplit ? split_part_ : cluster_.rank(); }

  // copy.cuh: where the row is, its copy in shared memory, steps 1 to 6 of a vec
  __device__ __forceinline__ int64_t find_parameters();
  __device__ int locate_logits();
  __device__ void read_parameters(int64_t index, int vecs);
  __device__ const int32_t* locate_bits(int64_t slot, const Penalties& penalties);
  template <int kUnrolled = kIsSplit ? 2 : 4>
  __device__ void copy_logits(int vecs);
  __device__ void copy_edge(unsigned char* to, const unsigned char* from, int first) const;
  __device__ void copy_bits(int vecs);
  __device__ bool score();
  __device__ __forceinline__ RowList row_list(int64_t row) const;
  __device__ __forceinline__ uint32_t
  marks_over(uint32_t bits, int first, int width, int64_t row) const;
  __device__ __forceinline__ float score_of(
      const Penalties& penalties,
      float x,
      int id,
      int32_t count
  ) const;
  __device__ Copy copy_of(int block) const;
  __device__ __forceinline__ bool has_scores(int block) const;
  __device__ __forceinline__ const unsigned char* logits_of(const Copy&, int local, int vec) const;
  __device__ __forceinline__ void process(
      const Copy& copy,
      bool is_scored,
      int local,
      int vec,
      float (&x)[kVec]
  ) const;
  __device__ __forceinline__ void process_any(int vec, float (&x)[kVec]) const;

  // overrides.cuh: ids that count for one call
  __device__ void list_overrides();
  __device__ void override_counts(const Copy& copy) const;
  __device__ __forceinline__ int32_t times_of(int id) const;
  __device__ __forceinline__ bool is_seen(int id) const;

  // passes.cuh: passes over the block's part
  __device__ int vecs() const { return shared_.vecs; }
  __device__ int rounds() const { return (vecs() + kThreads - 1) / kThreads; }
  template <typename Visit>
  __device__ __forceinline__ void over_vecs(const Visit& visit) const;
  template <typename Visit>
  __device__ __forceinline__ void over_tiles(uint32_t lowest, const Visit& visit) const;
  template <typename Visit>
  __device__ __forceinline__ void visit_round(int round, int count, const Visit& visit) const;
  __device__ __forceinline__ void prefetch_later(int local, int count) const;
  template <bool kRaw = false>
  __device__ bool find_maxima();
  __device__ void write_status(bool any_nan);
  template <bool kPlain>
  __device__ __forceinline__ bool find_tile_maxima();
  __device__ void find_first();
  __device__ __forceinline__ float depth_of(float x) const;
  __device__ __forceinline__ int64_t mass_of(float x) const;
  __device__ __forceinline__ int64_t kept_mass(const Threshold& threshold, float x, int id) const;
  __device__ void weigh();
  __device__ void sum_tiles();

  // candidates.cuh: the short list from which thresholds and tokens are chosen
  __device__ bool guess_range(const Filters& filters, int nucleus, Range& range);
  __device__ __forceinline__ void clear_bins();
  template <bool kHeld = kIsSplit>
  __device__ __forceinline__ int find_bin(int64_t wanted);
  template <typename OverCodes>
  __device__ __forceinline__ uint64_t
  narrow(uint64_t low, uint64_t high, int wanted, int most, const OverCodes& over_codes);
  __device__ __forceinline__ void collect(const Range& range);
  template <typename Visit>
  __device__ __forceinline__ void over_codes(uint64_t low, const Visit& visit) const;
  __device__ __forceinline__ void append_all(const Range& range);
  __device__ __forceinline__ void append(uint64_t code);
  __device__ __forceinline__ void share(const Range& range);
  template <typename Holds, typename Visit>
  __device__ __forceinline__ void compare_all(
      int count,
      const Holds& holds,
      const Visit& visit
  ) const;
  __device__ void sort(int count);
  __device__ int count_from(uint64_t code) const;
  __device__ int64_t mass_from(uint64_t code) const;
  __device__ bool has_threshold(int64_t target, bool by_mass) const;
  __device__ uint64_t threshold_at(int64_t target, bool by_mass, uint64_t lowest) const;

  // select.cuh: steps 11 to 13
  __device__ __forceinline__ Filters filters() const;
  __device__ bool is_greedy() const { return shared_.parameters.temperature == 0.0f; }
  __device__ void find_kept();
  __device__ void find_thresholds();
  __device__ uint64_t code_at_depth(float depth_cut) const;
  __device__ uint32_t key_at_depth(float depth_cut) const;
  __device__ Range search(int64_t target, bool by_mass, uint64_t lowest);
  __device__ void probe(int64_t target, bool by_mass, uint64_t lowest, uint64_t (&pivots)[3]);

  // split.cuh: a row without a cluster
  __device__ __forceinline__ int count_wanted() const;
  __device__ void make_list(const Lists& lists);
  __device__ uint64_t find_listed(const Lists& lists);
  __device__ __forceinline__ bool is_last(uint32_t* counter, int parts);
  __device__ bool finish(const Lists& lists);
  __device__ void gather(const Lists& lists, uint64_t bound);

  // draw.cuh: step 14 and the other results
  __device__ void draw();
  __device__ int64_t random_below(int draw, int64_t total) const;
  __device__ void draw_from_candidates(int64_t total);
  __device__ void draw_from_tiles();
  __device__ void write(int draw, int token, int64_t w, int64_t total);
  __device__ float raw_logit(int id) const;
  __device__ void find_raw_sum();
  __device__ void write_nothing(int64_t index);
  __device__ void write_filtered();
  __device__ __forceinline__ void find_sharing_row();
  __device__ __forceinline__ void find_leaving_id();
  __device__ __forceinline__ void advance();
  __device__ void record();

  // results.cuh: lists, ranks, and the kept set
  __device__ __forceinline__ void keep_mass();
  __device__ void write_more();
  __device__ __forceinline__ bool has_all_tokens();
  __device__ __forceinline__ void hold_first();
  __device__ __forceinline__ void list_raw();
  template <bool kRaw>
  __device__ __forceinline__ float logprob_of(float x) const;
  __device__ __forceinline__ void survey(bool has_last);
  template <bool kRaw>
  __device__ __forceinline__ void write_first();
  __device__ __forceinline__ void write_mask();
  __device__ __forceinline__ uint64_t code_of_item(int64_t item) const;
  __device__ __forceinline__ void count_reaching(uint64_t (&codes)[kCounted]);
  template <bool kRaw>
  __device__ __forceinline__ void write_ids();
  template <typename T>
  __device__ __forceinline__ void fill(T* values, int64_t row, int64_t size, T value) const;
  __device__ __forceinline__ void fill_lists(const LlmSamplingLogprobs& of, int64_t row) const;
  __device__ __forceinline__ void write_no_more(int64_t row) const;

  const LlmSamplingArgs& args_;
  const int index_;  // of the row
  Shared& shared_;
  Cluster cluster_;
  const int split_part_;  // see part()
  const int part_vecs_;   // vecs of a part; the last parts may have fewer
  int64_t* tile_masses_;  // running masses of this block's tiles, in shared memory
  uint32_t* tile_keys_;   // order keys of their largest logits, in shared memory
  unsigned char* copy_;   // this block's copy, in shared memory
  Row row_;
  int first_vec_;  // of this block's part

  float largest_[kMaxima] = {-kInfinity, -kInfinity};  // of this thread's tokens
  float m_;                                            // the row's largest logit after step 6
  float scale_ = 0.0f;                                 // of the depth
  bool is_scored_ = false;                             // has_scores() of this block

  uint64_t threshold_;          // the lowest code of the kept set
  bool in_candidates_ = false;  // whether the candidates contain the whole kept set
  // The mass of all tokens where a filter needs it; later that of the kept set, unless in_candidates_.
  int64_t total_mass_ = 0;

  float raw_m_ = 0.0f;        // the largest raw logit
  float raw_log_sum_ = 0.0f;  // the logarithm of the sum of exp(x - raw_m_)
  bool drew_ = false;         // whether this thread has drawn draw 0
  int token_ = -1;            // the token of draw 0, in that thread
};

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_ROW_SAMPLER_CUH_
