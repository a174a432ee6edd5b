// What device code needs of CUDA beyond the language, in few words: shared memory, clusters, copies.
#ifndef LLM_SAMPLING_CUDA_DEVICE_H_
#define LLM_SAMPLING_CUDA_DEVICE_H_

#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_pipeline_primitives.h>
#endif

namespace llm_sampling {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

#ifdef __CUDACC__
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
#else
__device__ __forceinline__ unsigned char* dynamic_shared() { return dynamic_shared_memory(); }
#endif

// The blocks of a cluster; a launch without clusters has those of one.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
  return static_cast<int>(__clusterRelativeBlockRank());
}
__device__ __forceinline__ int cluster_size() { return static_cast<int>(__clusterSizeInBlocks()); }

// A barrier of all threads of all blocks, in two halves: what they wrote before the first, also into each
// other's shared memory, is seen after the second.
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }

// Where another block has what this one has at a place of its shared memory.
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

// How many of the numbers from 0 on come before the first for which it does not hold, at most count.
template <typename Holds>
__device__ __forceinline__ int count_while(int count, const Holds& holds) {
  int low = 0;
  while (low < count) {
    const int middle = (low + count) / 2;
    if (holds(middle)) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// The same by a warp whose lanes all ask it: two steps for up to 1,024 numbers.
template <typename Holds>
__device__ __forceinline__ int count_while_together(int count, const Holds& holds) {
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

// Copies to shared memory, there after the same thread's wait_for_copies.
template <int kBytes>
__device__ __forceinline__ void copy(void* to, const void* from) {
  __pipeline_memcpy_async(to, from, kBytes);
}
__device__ __forceinline__ void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// Asks for the bytes around a place of global memory.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* place) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(place));
#endif
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_DEVICE_H_
