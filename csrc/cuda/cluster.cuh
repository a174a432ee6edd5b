// How threads work together: the lanes of a warp, the threads of a block, and the blocks of the cluster
// that owns a row.
#ifndef LLM_SAMPLING_CUDA_CLUSTER_CUH_
#define LLM_SAMPLING_CUDA_CLUSTER_CUH_

#include <stdint.h>

#include "launch.cuh"

namespace llm_sampling {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarps = kThreads / kWarpSize;

// The start of a block's shared memory.
#ifdef __CUDACC__
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
#else
__device__ __forceinline__ unsigned char* dynamic_shared() { return dynamic_shared_memory(); }
#endif

// ---- a thread and a warp ----

// threadIdx.x, but what depends on it is worked out anew at each use: the compiler keeps no register for it from one
// pass to a later one.
__device__ __forceinline__ int own_thread() {
#ifdef __CUDA_ARCH__
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

// Binary search: the number of leading i in [0, count) for which holds(i) is true.
template <typename Holds>
__device__ __forceinline__ int count_leading(int count, const Holds& holds) {
  int low = 0;
  while (low < count) {
    const int middle =
        static_cast<int>((static_cast<unsigned>(low) + static_cast<unsigned>(count)) / 2);
    if (holds(middle)) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// The same search by all lanes of a warp together: two steps for a count of up to 1,024.
template <typename Holds>
__device__ __forceinline__ int count_leading_by_warp(int count, const Holds& holds) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int low = 0;
  int stride = count;
  while (stride > 0) {
    stride = (stride + kWarpSize - 1) / kWarpSize;
    const int last = low + (lane + 1) * stride - 1;
    const bool is_before = last < count && holds(last);
    low += stride * __popc(__ballot_sync(kWholeWarp, is_before));
    if (stride == 1) break;
  }
  return low;
}

// The inclusive running sum of one value of each lane.
template <typename Integer>
__device__ __forceinline__ Integer scan_warp(Integer value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const Integer other = __shfl_up_sync(kWholeWarp, value, static_cast<unsigned>(delta));
    if (lane >= delta) value += other;
  }
  return value;
}

// ---- a row's blocks without a cluster ----

// Adds 1 to a counter in global memory and returns what it was. What this thread wrote before, and what other
// threads wrote before a barrier that this thread has passed, is visible to a thread that finds the new value
// here, and after a barrier of its block to all threads of that block.
__device__ __forceinline__ unsigned count_up(unsigned* counter) {
#ifdef __CUDACC__
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
#else
  return atomicAdd(counter, 1u);
#endif
}

// Reads what a block of another multiprocessor may have written: from the L2 cache, which all of them share.
__device__ __forceinline__ uint64_t load_shared_by_all(const uint64_t* place) {
#ifdef __CUDACC__
  return __ldcg(reinterpret_cast<const unsigned long long*>(place));
#else
  return *place;
#endif
}

// A read of a number in shared memory that other threads are changing by atomics.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* place) {
#ifdef __CUDACC__
  uint32_t value;
  asm volatile("ld.relaxed.cta.shared.u32 %0, [%1];"
               : "=r"(value)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(place)))
               : "memory");
  return value;
#else
  return *const_cast<const volatile uint32_t*>(place);
#endif
}

// ---- the cluster ----

// A launch without clusters behaves as one of clusters of one block.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
  return static_cast<int>(__clusterRelativeBlockRank());
}
__device__ __forceinline__ int cluster_size() { return static_cast<int>(__clusterSizeInBlocks()); }

// A barrier of all threads of all blocks, in two halves: what a thread writes before it arrives, also
// into another block's shared memory, is visible to all threads after they have waited.
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }

// The address in another block's shared memory that corresponds to an address in this block's.
template <typename T>
__device__ __forceinline__ T* in_block(T* own, int rank) {
  return static_cast<T*>(__cluster_map_shared_rank(own, static_cast<unsigned>(rank)));
}
#else
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <typename T>
__device__ __forceinline__ T* in_block(T* own, int) {
  return own;
}
#endif

// Operations for Cluster::combine.
struct Add {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Larger {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};
// The exclusive prefix sum, this block's own value, and the total over the blocks.
struct Sums {
  int64_t before, own, total;
};

// Barriers and reductions over the cluster. All threads of all blocks must make the same calls in the
// same order; every thread gets the same result, unless the function says otherwise.
class Cluster {
 public:
  struct Memory {
    uint64_t gathered[2][kMaxBlocks][4];
    uint64_t partial[kWarps][4];
  };

  __device__ explicit Cluster(Memory& memory)
      : memory_(memory), rank_(cluster_rank()), blocks_(cluster_size()) {}

  __device__ int rank() const { return rank_; }
  __device__ int blocks() const { return blocks_; }

  // The two halves of sync() between the blocks. They do nothing in a cluster of one block.
  __device__ void arrive() const {
    if (blocks_ > 1) cluster_arrive();
  }
  __device__ void wait() const {
    if (blocks_ > 1) cluster_wait();
  }

  // A barrier of all threads of the cluster: what they wrote before it is visible to all after it.
  __device__ void sync() const {
    if (blocks_ > 1) {
      arrive();
      wait();
    } else {
      __syncthreads();
    }
  }

  // The value of thread 0 of block 0, for all threads of the cluster.
  __device__ int64_t common(int64_t value) {
    sync();  // all blocks have started
    if (rank_ == 0 && threadIdx.x == 0) {
      for (int block = 0; block < blocks_; ++block) {
        *in_block(&memory_.partial[0][0], block) = static_cast<uint64_t>(value);
      }
    }
    sync();
    value = static_cast<int64_t>(memory_.partial[0][0]);
    sync();
    return value;
  }

  // Reduces the values of all threads, element by element; 0 must be neutral.
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
    const uint64_t (*all)[4] = all_gather(values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = lane % kMaxBlocks < blocks_ ? all[lane % kMaxBlocks][i] : 0;
#pragma unroll
      for (int other = kMaxBlocks / 2; other > 0; other /= 2) {
        values[i] = two(values[i], __shfl_xor_sync(kWholeWarp, values[i], other));
      }
    }
  }

  // The largest of one key and the smallest of another of all threads, and whether a flag of any is set.
  __device__ void find_limits(uint32_t& largest, uint32_t& smallest, bool& flag) {
    const int thread = own_thread();
    const int lane = thread % kWarpSize;
    const int warp = thread / kWarpSize;
    const auto join = [&] {
      largest = __reduce_max_sync(kWholeWarp, largest);
      smallest = __reduce_min_sync(kWholeWarp, smallest);
      flag = __any_sync(kWholeWarp, flag);
    };
    const auto set = [&](const uint64_t (&of)[4]) {
      largest = static_cast<uint32_t>(of[0] >> 32);
      smallest = static_cast<uint32_t>(of[0]);
      flag = of[1] != 0;
    };
    join();
    if (lane == 0) {
      memory_.partial[warp][0] = static_cast<uint64_t>(largest) << 32 | smallest;
      memory_.partial[warp][1] = flag ? 1 : 0;
    }
    __syncthreads();
    set(memory_.partial[lane % kWarps]);
    join();
    if (blocks_ == 1) {
      __syncthreads();  // the memory may be written again
      return;
    }
    const uint64_t own[2] = {static_cast<uint64_t>(largest) << 32 | smallest, flag ? 1u : 0u};
    const uint64_t (*all)[4] = all_gather(own);
    set(all[lane % kMaxBlocks < blocks_ ? lane % kMaxBlocks : 0]);
    join();
  }

  // Replaces values that are the same in all threads of a block by those of block 0.
  template <int kCount>
  __device__ void broadcast(uint64_t (&values)[kCount]) {
    const uint64_t (*all)[4] = all_gather(values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = all[0][i];
  }

  // The inclusive running sum of one value of each thread of this block; each thread gets its own.
  template <typename Integer>
  __device__ Integer scan(Integer value) {
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    value = scan_warp(value);
    if (lane == kWarpSize - 1) memory_.partial[warp][0] = static_cast<uint64_t>(value);
    __syncthreads();
    const Integer warps = lane < kWarps ? static_cast<Integer>(memory_.partial[lane][0]) : 0;
    const Integer before = __shfl_sync(kWholeWarp, scan_warp(warps) - warps, warp);
    __syncthreads();
    return value + before;
  }

  // Sums one value of each block; each block gets the sums from its own place.
  __device__ Sums sum(int64_t own) {
    const uint64_t value[1] = {static_cast<uint64_t>(own)};
    const uint64_t (*all)[4] = all_gather(value);
    const int block = threadIdx.x % kMaxBlocks;
    const int64_t one = block < blocks_ ? static_cast<int64_t>(all[block][0]) : 0;
    Sums sums = {block < rank_ ? one : 0, own, one};
#pragma unroll
    for (int other = kMaxBlocks / 2; other > 0; other /= 2) {
      sums.before += __shfl_xor_sync(kWholeWarp, sums.before, other);
      sums.total += __shfl_xor_sync(kWholeWarp, sums.total, other);
    }
    return sums;
  }

 private:
  // All-gather of values that are the same in all threads of a block; the result is indexed by block
  // rank and valid until the caller's next call. It is double-buffered: a block that is already in the
  // next call writes the other buffer, and none can write this one again before all threads have
  // reached the barrier of the next call.
  template <int kCount>
  __device__ const uint64_t (*all_gather(const uint64_t (&values)[kCount]))[4] {
    uint64_t (*gathered)[4] = memory_.gathered[phase_];
    phase_ ^= 1;
    const int block = static_cast<int>(threadIdx.x);
    if (block < blocks_) {
      uint64_t* there = in_block(gathered[rank_], block);
#pragma unroll
      for (int i = 0; i < kCount; ++i) there[i] = values[i];
    }
    sync();
    return gathered;
  }

  Memory& memory_;
  const int rank_;
  const int blocks_;
  int phase_ = 0;
};

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_CLUSTER_CUH_
