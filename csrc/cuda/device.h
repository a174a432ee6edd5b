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

// All threads of all blocks; what they wrote, also into each other's shared memory, is seen then.
__device__ __forceinline__ void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// Where another block has what this one has at a place of its shared memory.
template <typename T>
__device__ __forceinline__ T* in_block(T* own, int rank) {
  return static_cast<T*>(__cluster_map_shared_rank(own, static_cast<unsigned>(rank)));
}
#else
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
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

// 16 bytes to shared memory; there after the same thread's wait_for_copies.
__device__ __forceinline__ void copy_16(void* to, const void* from) {
  __pipeline_memcpy_async(to, from, 16);
}
__device__ __forceinline__ void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CUDA_DEVICE_H_
