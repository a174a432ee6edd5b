// The kernel that makes the lists of step 5a: which tokens of a row the rules that look at its history lower, and by
// how much. csrc/cpu/sequence_rules.h makes the same lists one after the other.
//
// A block makes the list of one row, in one launch before that of the sampling kernel. The text of a row is the ids
// that its slot keeps in order, and behind them those of this call. A place is counted from the end of the text: it
// is the number of ids behind it. Thread t takes the places t, t + kThreads, … and likewise the words of the bits.
//
//   read      thread 0 reads the numbers on which all threads must agree.
//   stage     the row's bits become 0. The ids of the call that are in the vocabulary, the last ids of the text and
//             the records of token sequences are copied into shared memory. What does not fit there stays where it
//             is: shared memory that is enough for the usual text leaves room for more blocks.
//   find_room for DRY: how many ids follow the last complete breaker.
//   put       twice. The first time each id that is lowered sets its bit. A place compares the ids before it with
//             the last ids of the text, the first time as many as the rules ask for.
//   count     between the two: a running sum over the words gives each listed id its rank, its place in the list. Its
//             amount becomes 0.
//   put       the second time each id that is lowered raises the amount at its rank. Amounts are not negative, so
//             they are in the order of their bits, and an atomic maximum does not depend on the order of threads.
//
// Hazards. Each step reads what all threads have written in the one before, so a barrier stands between them. What
// decides how often threads meet at a barrier has been read once, by thread 0: nobody has checked the values that a
// call points to, and somebody may overwrite them meanwhile. A text or records in global memory may then differ from
// one read to the next, so only an id with a bit gets an amount.
#include <stdint.h>

#include "../history.h"
#include "../llm_sampling.h"
#include "../rows.h"
#include "../semantics.h"
#include "../sequence_rules.h"
#include "cluster.cuh"
#include "launch.cuh"

namespace llm_sampling {
namespace {

constexpr int kStagedNumbers = 1024;  // numbers of records that a block copies
constexpr int kWordsEach = 4;         // neighbouring words that a thread counts
constexpr int32_t kBan = 0x7f800000;  // the bits of infinity

// A block's shared memory; the staged ids of the text are behind it.
struct ListShared {
  Cluster::Memory cluster;
  // What thread 0 has read.
  SequenceRules rules;
  int64_t slot, kept, output_length;
  // What threads tell each other.
  int32_t first_end;  // the first thread of a round whose place has a breaker before it
  int32_t total;      // ids that are listed
  int32_t extra[LLM_SAMPLING_MAX_EXTRA_OUTPUT];
  int32_t numbers[kStagedNumbers];
};
static_assert(sizeof(ListShared) <= kListBytes, "launch.cuh reserves kListBytes for it");

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ __forceinline__ int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Makes the list of a row. All threads of a block make one and call run().
class ListMaker {
 public:
  __device__ ListMaker(const ListPlan& plan, int64_t row)
      : args_(plan.args),
        row_(row),
        most_staged_(plan.staged),
        slice_(vocab_slice(plan.args)),
        words_((plan.args.vocab_size + 31) / 32),
        bits_(plan.args.list_bits + row * words_),
        before_(plan.args.list_before + row * words_),
        amounts_(plan.args.list_amounts + row * plan.args.list_capacity),
        shared_(*reinterpret_cast<ListShared*>(dynamic_shared())),
        last_(reinterpret_cast<int32_t*>(dynamic_shared() + kListBytes)),
        cluster_(shared_.cluster) {}

  __device__ void run() {
    if (threadIdx.x == 0) read();
    __syncthreads();
    stage();
    __syncthreads();
    if (of_dry_ > 0) find_room();
    if (of_dry_ > 0) alone_ = single_breakers(rules_.sequences);
    put(false);
    __syncthreads();
    count();
    put(true);
  }

 private:
  // By thread 0.
  __device__ void read() {
    const int64_t index = parameter_index(args_, row_);
    shared_.rules = {};
    if (index >= 0) shared_.rules = read_rules(args_, index);
    // A row lists at most one id for each place and for each number of its records.
    Sequences& sequences = shared_.rules.sequences;
    const int64_t places = most_places(args_);
    const int64_t room = larger(args_.list_capacity - places, 0);
    if (args_.list_capacity < args_.vocab_size && sequences.end - sequences.begin > room) {
      sequences.end = sequences.begin + room;
    }
    const SlotHistory history = slot_history(args_, history_slot(args_, row_));
    shared_.slot = history_slot(args_, row_);
    shared_.kept = history.text != nullptr ? text_length(history) : 0;
    shared_.output_length = read_once(*history.length);
    shared_.first_end = kThreads;
  }

  __device__ void stage() {
    for (int64_t i = threadIdx.x; i < words_; i += kThreads) bits_[i] = 0;
    rules_ = shared_.rules;
    const int64_t numbers = rules_.sequences.end - rules_.sequences.begin;
    if (numbers <= kStagedNumbers) {
      for (int64_t i = threadIdx.x; i < numbers; i += kThreads) {
        shared_.numbers[i] = read_once(rules_.sequences.begin[i]);
      }
      rules_.sequences = {shared_.numbers, shared_.numbers + numbers};
    }
    history_ = slot_history(args_, shared_.slot);
    history_.vocab_size = slice_.vocab_size;  // a text has ids of the whole vocabulary
    kept_ = shared_.kept;
    const int64_t added = stage_extra();
    size_ = kept_ + added;
    is_short_ = shared_.output_length < rules_.min_tokens - added;

    const int32_t last_n = rules_.dry_penalty_last_n;
    allowed_ = larger(rules_.dry_allowed_length, 1);
    of_dry_ = last_n < 0 ? size_ : smaller(last_n, size_);
    if (rules_.dry_multiplier == 0.0f || of_dry_ <= allowed_) of_dry_ = 0;
    room_ = smaller(allowed_ + kMaxExcess, of_dry_);
    const int32_t window = rules_.no_repeat_ngram_window;
    others_ = rules_.no_repeat_ngram_size - int64_t{1};
    of_ngrams_ = window <= 0 ? size_ : smaller(window, size_);
    if (others_ < 0 || others_ >= of_ngrams_) of_ngrams_ = 0;
    if (of_ngrams_ == 0) others_ = 0;
    const int64_t staged = smaller(larger(of_dry_, of_ngrams_), most_staged_);
    for (int64_t i = threadIdx.x; i < staged; i += kThreads) last_[i] = id_at(i);
    __syncthreads();
    staged_ = staged;
  }

  // Copies the ids of this call that are in the vocabulary; returns how many they are.
  __device__ int64_t stage_extra() {
    if (args_.extra_output == nullptr) return 0;
    int32_t id = -1;
    if (threadIdx.x < args_.num_extra_output) {
      id = read_once(args_.extra_output[row_ * args_.num_extra_output + threadIdx.x]);
    }
    const bool is_id = slice_.is_id(id);
    const int32_t place = cluster_.scan(is_id ? 1 : 0) - 1;
    if (is_id) shared_.extra[place] = id;
    return __syncthreads_count(is_id);
  }

  // The id at a place, or -1 if it is outside of the vocabulary.
  __device__ int32_t id_at(int64_t place) const {
    if (place < staged_) return last_[place];
    const int64_t from_begin = size_ - 1 - place;
    return from_begin >= kept_ ? shared_.extra[from_begin - kept_] : text_id(history_, from_begin);
  }

  // How many ids before a place are the last ids of the text, up to a number of them.
  __device__ int64_t match(int64_t place, int64_t most) const {
    int64_t length = 0;
    while (length < most && id_at(place + 1 + length) == id_at(length)) ++length;
    return length;
  }

  // Whether the ids, which are no more than there are from a place on, are those from there on.
  __device__ bool is_end(const int32_t* ids, int64_t count, int64_t place) const {
    for (int64_t i = 0; i < count; ++i) {
      if (id_at(place + i) != read_once(ids[count - 1 - i])) return false;
    }
    return true;
  }

  __device__ static bool is_among(const int32_t* sorted, int64_t count, int32_t id) {
    const int size = static_cast<int>(count);
    const int place = count_leading(size, [&](int i) { return read_once(sorted[i]) < id; });
    return place < size && read_once(sorted[place]) == id;
  }

  // Whether an id is a breaker by itself.
  __device__ bool is_breaker(int32_t id) const {
    bool is_one = false;
    alone_.each([&](int32_t kind, const int32_t* ids, int64_t count) {
      is_one = is_one || (kind == LLM_SAMPLING_BREAKER_IDS && is_among(ids, count, id));
    });
    return is_one;
  }

  // Whether a breaker is complete with the id at a place.
  __device__ bool ends_breaker(int64_t place) const {
    bool is_one = false;
    rules_.sequences.each([&](int32_t kind, const int32_t* ids, int64_t count) {
      if (kind == LLM_SAMPLING_BREAKER_IDS) {
        is_one = is_one || is_among(ids, count, id_at(place));
      } else if (kind == LLM_SAMPLING_BREAKER && count > 0 && count <= of_dry_ - place) {
        is_one = is_one || is_end(ids, count, place);
      }
    });
    return is_one;
  }

  // Leaves the number of ids behind the last complete breaker in room_, if that is less. Longer matches make no
  // difference.
  __device__ void find_room() {
#pragma unroll 1
    for (int64_t first = 0; first < room_; first += kThreads) {
      const int64_t place = first + threadIdx.x;
      const bool is_one = place < room_ && ends_breaker(place);
      if (is_one) atomicMin(&shared_.first_end, static_cast<int32_t>(threadIdx.x));
      if (__syncthreads_or(is_one) != 0) {
        room_ = first + shared_.first_end;
        break;
      }
    }
    if (room_ < allowed_) of_dry_ = 0;
  }

  // Sets the bits of the ids that are lowered, or raises their amounts.
  __device__ void put(bool raises) {
    const int64_t of_dry = of_dry_ == 0 ? 0 : raises ? room_ : allowed_;
    const int64_t most = larger(of_dry, others_);
    const int64_t places = larger(of_dry_, of_ngrams_);
#pragma unroll 1
    for (int64_t place = threadIdx.x; place < places; place += kThreads) {
      const int32_t id = id_at(place);
      if (id < 0) continue;
      const int64_t length = match(place, smaller(most, places - 1 - place));
      if (place < of_ngrams_ && smaller(length, of_ngrams_ - 1 - place) >= others_) {
        put_id(id, kBan, raises);
        continue;
      }
      const int64_t level = smaller(smaller(length, of_dry_ - 1 - place), room_) - allowed_;
      if (place < of_dry_ && level >= 0 && !is_breaker(id)) put_id(id, amount(level), raises);
    }
    uint32_t words = 0;
    rules_.sequences.each([&](int32_t kind, const int32_t* ids, int64_t count) {
      if (kind == LLM_SAMPLING_BAD_WORD && words++ % kThreads == threadIdx.x) {
        if (count > 0 && count - 1 <= size_ && is_end(ids, count - 1, 0)) {
          put_id(read_once(ids[count - 1]), kBan, raises);
        }
      } else if (kind == LLM_SAMPLING_STOP_IDS && is_short_) {
        for (int64_t i = threadIdx.x; i < count; i += kThreads) {
          put_id(read_once(ids[i]), kBan, raises);
        }
      }
    });
  }

  // The bits of the amount for a match that is longer than allowed by so many ids.
  __device__ int32_t amount(int64_t level) const {
    float amount = rules_.dry_multiplier;
    for (; level > 0; --level) {
      const float next = amount * rules_.dry_base;
      amount = next < kMaxAmount ? next : kMaxAmount;
    }
    return bit_cast<int32_t>(amount);
  }

  __device__ void put_id(int32_t id, int32_t amount, bool raises) {
    const int32_t place = slice_.place_of(id);
    if (place < 0) return;
    const int32_t word = place / 32;
    const uint32_t bit = 1u << (place % 32);
    if (!raises) {
      atomicOr(bits_ + word, static_cast<int32_t>(bit));
      return;
    }
    const auto bits = static_cast<uint32_t>(read_once(bits_[word]));
    const int64_t rank = int64_t{read_once(before_[word])} + __popc(bits & (bit - 1));
    if ((bits & bit) == 0 || rank < 0 || rank >= args_.list_capacity) return;
    atomicMax(reinterpret_cast<int32_t*>(amounts_) + rank, amount);
  }

  // Ranks the listed ids, and writes what the bits say. Ends with a barrier.
  __device__ void count() {
    int32_t total = 0;
#pragma unroll 1
    for (int64_t first = 0; first < words_; first += kThreads * kWordsEach) {
      const int64_t own = first + static_cast<int64_t>(threadIdx.x) * kWordsEach;
      uint32_t bits[kWordsEach];
      int32_t ones = 0;
#pragma unroll
      for (int i = 0; i < kWordsEach; ++i) {
        bits[i] = own + i < words_ ? static_cast<uint32_t>(read_once(bits_[own + i])) : 0;
        ones += __popc(bits[i]);
      }
      const int32_t through = total + cluster_.scan(ones);
      int32_t rank = through - ones;
#pragma unroll
      for (int i = 0; i < kWordsEach; ++i) {
        if (own + i < words_) before_[own + i] = rank;
        rank += __popc(bits[i]);
      }
      if (threadIdx.x == kThreads - 1) shared_.total = through;
      __syncthreads();
      total = shared_.total;
    }
    const int64_t listed = smaller(total, args_.list_capacity);
    if (threadIdx.x == 0) args_.list_counts[row_] = static_cast<int32_t>(listed);
    for (int64_t i = threadIdx.x; i < listed; i += kThreads) amounts_[i] = 0.0f;
    __syncthreads();
  }

  const LlmSamplingArgs& args_;
  const int64_t row_;
  const int64_t most_staged_;
  const VocabSlice slice_;
  const int64_t words_;
  int32_t* const bits_;
  int32_t* const before_;
  float* const amounts_;
  ListShared& shared_;
  int32_t* const last_;  // the ids at the first places, staged_ of them
  Cluster cluster_;
  SequenceRules rules_ = {};
  Sequences alone_ = {};  // where the breakers of a single id are
  SlotHistory history_ = {};
  int64_t kept_ = 0, size_ = 0;  // ids that the slot keeps, and ids of the text
  int64_t staged_ = 0;
  int64_t of_dry_ = 0, of_ngrams_ = 0;  // places that the rules look at; 0 where they lower nothing
  int64_t allowed_ = 0,
          room_ = 0;       // from how many ids on a match counts for DRY, and up to how many
  int64_t others_ = 0;     // ids of an n-gram but its last one
  bool is_short_ = false;  // whether stop ids are banned
};

}  // namespace

__global__ void __launch_bounds__(kThreads, 3) list_kernel(const ListPlan plan) {
  ListMaker(plan, blockIdx.x).run();
}

ListKernel find_list_kernel() { return list_kernel; }

}  // namespace llm_sampling
