// The threads of a block, and the blocks of the cluster that owns a row: sums, maxima, running sums.
//
// Every function here is called by all threads of all blocks alike, and what it returns is the same for
// all of them, unless it says otherwise.
#ifndef LLM_SAMPLING_CUDA_CLUSTER_H_
#define LLM_SAMPLING_CUDA_CLUSTER_H_

#include <stdint.h>

#include "device.h"
#include "launch.h"

namespace llm_sampling {

constexpr int kWarps = kThreads / kWarpSize;

struct Add {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Larger {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};
// The larger upper half; the bits of both lower halves.
struct LargerWithFlags {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const {
    return (a > b ? a : b) | (a & 0xffffffffu) | (b & 0xffffffffu);
  }
};

// What the blocks before this one, this one and all of them have.
struct Sums {
  int64_t before, own, total;
};

// The inclusive running sum of one value of each lane.
__device__ __forceinline__ int64_t scan_warp(int64_t value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const int64_t other = __shfl_up_sync(kWholeWarp, value, static_cast<unsigned>(delta));
    if (lane >= delta) value += other;
  }
  return value;
}

class Cluster {
 public:
  struct Memory {
    uint64_t gathered[2][kBlocksAtMost][4];
    uint64_t partial[kWarps][4];
  };

  __device__ explicit Cluster(Memory& memory)
      : memory_(memory), rank_(cluster_rank()), blocks_(cluster_size()) {}

  __device__ int rank() const { return rank_; }
  __device__ int blocks() const { return blocks_; }

  // What all threads wrote before they arrive is seen by all of them after the wait. Of a single block
  // there is nothing to wait for.
  __device__ void arrive() const {
    if (blocks_ > 1) cluster_arrive();
  }
  __device__ void wait() const {
    if (blocks_ > 1) cluster_wait();
  }

  // What all threads wrote is seen by all of them then.
  __device__ void sync() const {
    if (blocks_ > 1) {
      arrive();
      wait();
    } else {
      __syncthreads();
    }
  }

  // Combines what each thread has; 0 changes nothing.
  template <int kCount, typename Combine>
  __device__ void combine(uint64_t (&values)[kCount], Combine two) {
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int other = kWarpSize / 2; other > 0; other /= 2) {
        values[i] = two(values[i], __shfl_xor_sync(kWholeWarp, values[i], other));
      }
      if (lane == 0) memory_.partial[warp][i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = memory_.partial[lane % kWarps][i];
#pragma unroll
      for (int other = kWarps / 2; other > 0; other /= 2) {
        values[i] = two(values[i], __shfl_xor_sync(kWholeWarp, values[i], other));
      }
    }
    const uint64_t (*all)[4] = share(values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = lane % kBlocksAtMost < blocks_ ? all[lane % kBlocksAtMost][i] : 0;
#pragma unroll
      for (int other = kBlocksAtMost / 2; other > 0; other /= 2) {
        values[i] = two(values[i], __shfl_xor_sync(kWholeWarp, values[i], other));
      }
    }
  }

  // The inclusive running sum of one value of each thread, over this block.
  __device__ int64_t scan(int64_t value) {
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    value = scan_warp(value);
    if (lane == kWarpSize - 1) memory_.partial[warp][0] = static_cast<uint64_t>(value);
    __syncthreads();
    const int64_t warps = lane < kWarps ? static_cast<int64_t>(memory_.partial[lane][0]) : 0;
    const int64_t before = __shfl_sync(kWholeWarp, scan_warp(warps) - warps, warp);
    __syncthreads();
    return value + before;
  }

  // Of one value of each block.
  __device__ Sums sum(int64_t own) {
    const uint64_t value[1] = {static_cast<uint64_t>(own)};
    const uint64_t (*all)[4] = share(value);
    const int block = threadIdx.x % kBlocksAtMost;
    const int64_t one = block < blocks_ ? static_cast<int64_t>(all[block][0]) : 0;
    Sums sums = {block < rank_ ? one : 0, own, one};
#pragma unroll
    for (int other = kBlocksAtMost / 2; other > 0; other /= 2) {
      sums.before += __shfl_xor_sync(kWholeWarp, sums.before, other);
      sums.total += __shfl_xor_sync(kWholeWarp, sums.total, other);
    }
    return sums;
  }

 private:
  // Brings values that all threads of a block have to all blocks: by block, until the next but one call.
  // Two sets of slots take turns: nobody writes one before all have passed the barrier after the one
  // in which it was read.
  template <int kCount>
  __device__ const uint64_t (*share(const uint64_t (&values)[kCount]))[4] {
    uint64_t (*slots)[4] = memory_.gathered[phase_];
    phase_ ^= 1;
    const int block = static_cast<int>(threadIdx.x);
    if (block < blocks_) {
      uint64_t* there = in_block(slots[rank_], block);
#pragma unroll
      for (int i = 0; i < kCount; ++i) there[i] = values[i];
    }
    sync();
    return slots;
  }

  Memory& memory_;
  const int rank_;
  const int blocks_;
  int phase_ = 0;
};

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_CLUSTER_H_
