// The kernel that changes histories by ids that were not drawn: LlmSamplingUpdate, in one launch.
//
// A block owns the history of one row's slot. Its threads share the ids, the places of the text, and the words
// and counts that are cleared. The model is csrc/cpu/history.h; the order within a step does not matter here,
// because bits are set and cleared by atomics and counts are sums.
//
// Hazards. Between a step that clears bits and one that sets them there is a barrier, because an id may leave
// the window at one place and be at another. What decides how often threads meet at a barrier is read once, by
// thread 0: the values that a call points to are not checked, and somebody may overwrite them meanwhile.
#include <stdint.h>

#include "../history.h"
#include "../llm_sampling.h"
#include "../rows.h"
#include "cluster.cuh"
#include "launch.cuh"

namespace llm_sampling {
namespace {

// A block's shared memory.
struct UpdateShared {
  Cluster::Memory cluster;
  // What thread 0 has read.
  int64_t slot, number, of_prompt;
  int64_t text_length, prompt_length, window;
};
static_assert(sizeof(UpdateShared) <= kUpdateBytes, "launch.cuh reserves kUpdateBytes for it");

__device__ __forceinline__ void set_bit(int32_t* words, int32_t id) {
  atomicOr(words + (id >> 5), static_cast<int32_t>(1u << (id & 31)));
}

__device__ __forceinline__ void clear_bit(int32_t* words, int32_t id) {
  atomicAnd(words + (id >> 5), static_cast<int32_t>(~(1u << (id & 31))));
}

// Calls visit(place) for the places that are in `places` and not in `others`, divided among the threads.
template <typename Visit>
__device__ __forceinline__ void over_difference(Places places, Places others, const Visit& visit) {
  const auto largest = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const int64_t before = largest(places.begin, others.begin);
  const int64_t end = before < places.end ? before : places.end;
  for (int64_t i = places.begin + threadIdx.x; i < end; i += kThreads) visit(i);
  const int64_t begin = largest(places.begin, others.end);
  for (int64_t i = begin + threadIdx.x; i < places.end; i += kThreads) visit(i);
}

// Changes the history of one row's slot. All threads of a block make one and call run().
class RowUpdate {
 public:
  __device__ RowUpdate(const LlmSamplingUpdate& update, int64_t row)
      : update_(update),
        row_(row),
        shared_(*reinterpret_cast<UpdateShared*>(dynamic_shared())),
        cluster_(shared_.cluster) {}

  __device__ void run() {
    if (threadIdx.x == 0) read();
    __syncthreads();
    slot_ = shared_.slot;
    if (slot_ < 0 || slot_ >= update_.num_slots) return;
    history_ = slot_history(update_, slot_);
    history_.window = shared_.window;
    history_.prompt_length = shared_.prompt_length;
    if (update_.kind == LLM_SAMPLING_UPDATE_ROLLBACK) return roll_back();
    if (update_.kind == LLM_SAMPLING_UPDATE_FILL) clear();
    add_ids();
  }

 private:
  // By thread 0.
  __device__ void read() {
    const bool fills = update_.kind == LLM_SAMPLING_UPDATE_FILL;
    shared_.slot = read_once(update_.slots[row_]);
    if (shared_.slot < 0 || shared_.slot >= update_.num_slots) return;
    shared_.number = read_once(update_.numbers[row_]);
    shared_.of_prompt =
        fills && update_.prompt_lengths != nullptr ? read_once(update_.prompt_lengths[row_]) : 0;
    const SlotHistory history = slot_history(update_, shared_.slot);
    shared_.text_length = history.text == nullptr || fills ? 0 : text_length(history);
    shared_.prompt_length = fills ? 0 : history.prompt_length;
    shared_.window = history.window;
  }

  __device__ void clear() {
    const int64_t words = (update_.vocab_size + 31) / 32;
    for (int64_t i = threadIdx.x; i < words; i += kThreads) history_.seen[i] = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < update_.vocab_size; i += kThreads) history_.counts[i] = 0;
    __syncthreads();
  }

  // Adds the row's ids. Those of the vocabulary get places one after another, as far as there is room.
  __device__ void add_ids() {
    const int64_t number = limited(shared_.number, 0, update_.max_ids);
    const int64_t before = shared_.text_length;
    const bool has_text = history_.text != nullptr;
    int64_t valid = 0;  // ids before the threads' present ones
    uint64_t output[1] = {0};
#pragma unroll 1
    for (int64_t first = 0; first < number; first += kThreads) {
      const int64_t i = first + threadIdx.x;
      const int64_t id = i < number ? id_at(i) : -1;
      bool is_id = id >= 0 && id < update_.vocab_size;
      const bool is_output = i >= shared_.of_prompt;
      if (has_text) {
        const int64_t place = before + valid + cluster_.scan(is_id ? 1 : 0) - 1;
        valid += __syncthreads_count(is_id);
        is_id = is_id && place < history_.max_text_length;
        if (is_id) history_.text[place] = static_cast<int32_t>(id);
      } else if (is_id) {
        set_bit(history_.seen, static_cast<int32_t>(id));
        if (is_output) atomicAdd(history_.counts + id, 1);
      }
      output[0] += is_id && is_output ? 1 : 0;
    }
    cluster_.combine(output, Add());  // a barrier too: what was written to the text is there
    const int64_t grown = static_cast<int64_t>(output[0]);
    if (has_text) {
      const int64_t after = limited(before + valid, 0, history_.max_text_length);
      if (update_.kind == LLM_SAMPLING_UPDATE_FILL) {
        history_.prompt_length = after - grown;
        if (threadIdx.x == 0) update_.text_prompt_lengths[slot_] = history_.prompt_length;
      }
      move_window(before, after);
    }
    grow_output(grown);
  }

  __device__ void roll_back() {
    const int64_t before = shared_.text_length;
    const int64_t output = before - limited(history_.prompt_length, 0, before);
    const int64_t number = limited(shared_.number, 0, output);
    move_window(before, before - number);
    grow_output(-number);
  }

  // Gives the text its new length, and makes the ids of the new window count instead of those of the old one.
  __device__ void move_window(int64_t before, int64_t after) {
    if (threadIdx.x == 0) *history_.text_length = after;
    const Places from = window_of(history_, before);
    const Places to = window_of(history_, after);
    bool has_left = false;
    over_difference(from, to, [&](int64_t place) {
      const int32_t id = text_id(history_, place);
      if (id < 0) return;
      clear_bit(history_.seen, id);
      if (place >= history_.prompt_length) atomicAdd(history_.counts + id, -1);
      has_left = true;
    });
    const bool any_left = __syncthreads_count(has_left) > 0;
    // What stays may have an id that has left.
    const Places sure = any_left ? Places{0, 0} : from;
    over_difference(to, sure, [&](int64_t place) {
      const int32_t id = text_id(history_, place);
      if (id < 0) return;
      set_bit(history_.seen, id);
      if (!from.has(place) && place >= history_.prompt_length) atomicAdd(history_.counts + id, 1);
    });
  }

  // By the number of ids that the output grows by, after a fill from nothing.
  __device__ void grow_output(int64_t number) {
    if (threadIdx.x != 0) return;
    const bool fills = update_.kind == LLM_SAMPLING_UPDATE_FILL;
    const auto add = [&](int64_t& value) {
      const uint64_t old = fills ? 0 : static_cast<uint64_t>(value);
      value = static_cast<int64_t>(old + static_cast<uint64_t>(number));
    };
    add(*history_.length);
    const bool by_slot = update_.position_of == LLM_SAMPLING_POSITION_OF_SLOT;
    if (update_.position != nullptr) add(update_.position[by_slot ? slot_ : row_]);
  }

  __device__ int64_t id_at(int64_t i) const {
    const int64_t place = row_ * update_.ids_stride + i;
    return update_.id_bytes == 4 ? static_cast<const int32_t*>(update_.ids)[place]
                                 : static_cast<const int64_t*>(update_.ids)[place];
  }

  const LlmSamplingUpdate& update_;
  const int64_t row_;
  UpdateShared& shared_;
  Cluster cluster_;
  int64_t slot_ = 0;
  SlotHistory history_ = {};
};

}  // namespace

// At least two blocks on a multiprocessor: without a number, nvcc spills registers to have more of them.
__global__ void __launch_bounds__(kThreads, 2) update_kernel(const LlmSamplingUpdate update) {
  RowUpdate(update, blockIdx.x).run();
}

UpdateKernel find_update_kernel() { return update_kernel; }

}  // namespace llm_sampling
