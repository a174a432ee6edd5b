// Correct and wrong kernels that test the emulation; main() runs them by name.
//
// nvcc compiles these kernels too, which shows that the emulated functions have CUDA's signatures.
#ifdef __CUDACC__
#include <cuda_pipeline_primitives.h>
#include <stdint.h>
__device__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
#else
#include "cuda_emulation.h"
#endif

constexpr int kTiles = 5;  // each has 4 numbers for each of 64 threads

// ----------------------------------------------------------------------------------------- correct

// The sum of the numbers below n, by a tree in shared memory.
__global__ void tree_sum(long long* out, const int*) {
  long long* sums = reinterpret_cast<long long*>(dynamic_shared_memory());
  sums[threadIdx.x] = threadIdx.x;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
}

// Every collective of a warp; each thread folds their results into one number.
__global__ void warp_collectives(long long* out, const int*) {
  const unsigned all = 0xffffffffu;
  const unsigned lane = threadIdx.x % 32;
  const int value = static_cast<int>(threadIdx.x * 7 % 13);
  unsigned long long sum = 0;
  int running = value;
  for (unsigned delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(all, running, delta);
    if (lane >= delta) running += other;
  }
  sum = sum * 31 + static_cast<unsigned>(running);
  sum = sum * 31 + __shfl_sync(all, value, 5);
  sum = sum * 31 + __shfl_sync(all, value, 1, 8);
  sum = sum * 31 + __shfl_down_sync(all, value, 3);
  sum = sum * 31 + __shfl_down_sync(all, value, 3, 16);
  sum = sum * 31 + __shfl_xor_sync(all, static_cast<long long>(value) << 33, 9);
  sum = sum * 31 + __ballot_sync(all, value % 3 == 0);
  sum = sum * 31 + __any_sync(all, value == 12) * 2 + __all_sync(all, value >= 0);
  sum = sum * 31 + __match_any_sync(all, value);
  sum = sum * 31 + __reduce_add_sync(all, static_cast<unsigned>(value));
  sum = sum * 31 + __reduce_max_sync(all, static_cast<unsigned>(value));
  sum = sum * 31 + __reduce_min_sync(all, static_cast<unsigned>(value) + 3);
  sum = sum * 31 + __reduce_or_sync(all, 1u << value);
  if (lane % 2 == 0) sum = sum * 31 + __reduce_add_sync(0x55555555u, lane);
  __syncwarp();
  out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<long long>(sum);
}

// Barriers that count, and atomics of all kinds in shared and global memory.
__global__ void counts(long long* out, const int*) {
  unsigned* shared = reinterpret_cast<unsigned*>(dynamic_shared_memory());
  if (threadIdx.x < 8) shared[threadIdx.x] = threadIdx.x == 2 ? 0xffffffffu : 0;
  __syncthreads();
  atomicAdd(&shared[0], threadIdx.x);
  atomicMax(&shared[1], threadIdx.x * 5 % 64);
  atomicMin(&shared[2], threadIdx.x + 9);
  atomicOr(&shared[3], 1u << threadIdx.x % 7);
  if (atomicCAS(&shared[4], 0u, 1u) == 0) atomicExch(&shared[5], 77u);
  const int third = __syncthreads_count(threadIdx.x % 3 == 0);
  const int any = __syncthreads_or(threadIdx.x == 1);
  const int all = __syncthreads_and(threadIdx.x != 1);
  if (threadIdx.x < 6) {
    const unsigned long long value = shared[threadIdx.x];
    atomicAdd(reinterpret_cast<unsigned long long*>(&out[threadIdx.x]), value);
  }
  if (threadIdx.x == 6) out[6] = third * 4 + any * 2 + all;
}

// Each block of a cluster reads the next one's shared memory.
__global__ void ring(long long* out, const int*) {
  int* own = reinterpret_cast<int*>(dynamic_shared_memory());
  const unsigned rank = __clusterRelativeBlockRank();
  own[threadIdx.x] = static_cast<int>(blockIdx.x * 1000 + threadIdx.x);
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  const unsigned next = (rank + 1) % __clusterSizeInBlocks();
  const int* others = static_cast<const int*>(__cluster_map_shared_rank(own, next));
  out[blockIdx.x * blockDim.x + threadIdx.x] = others[blockDim.x - 1 - threadIdx.x];
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// Asynchronous copies that run two groups ahead of their use.
__global__ void pipeline(long long* out, const int* in) {
  int* shared = reinterpret_cast<int*>(dynamic_shared_memory());
  const int width = 4 * static_cast<int>(blockDim.x);
  const int mine = 4 * static_cast<int>(threadIdx.x);
  for (int tile = 0; tile < 2; ++tile) {
    if (tile < kTiles)
      __pipeline_memcpy_async(shared + tile * width + mine, in + tile * width + mine, 16);
    __pipeline_commit();
  }
  long long sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    __pipeline_wait_prior(1);
    __syncthreads();
    // Numbers that another thread has copied.
    for (int i = 0; i < 4; ++i)
      sum += shared[tile % 2 * width + (mine + 4 * 5 + i) % width] * (tile + 1);
    __syncthreads();
    const int next = tile + 2;
    if (next < kTiles)
      __pipeline_memcpy_async(shared + tile % 2 * width + mine, in + next * width + mine, 16);
    __pipeline_commit();
  }
  __pipeline_wait_prior(0);
  out[threadIdx.x] = sum;
}

// ------------------------------------------------------------------------------------------- wrong

__global__ void missing_barrier(long long* out, const int*) {
  int* shared = reinterpret_cast<int*>(dynamic_shared_memory());
  shared[threadIdx.x] = 1;
  // __syncthreads() is missing here.
  if (threadIdx.x == 17) {
    long long sum = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) sum += shared[i];
    out[0] = sum;
  }
}

__global__ void missing_wait(long long* out, const int* in) {
  int* shared = reinterpret_cast<int*>(dynamic_shared_memory());
  __pipeline_memcpy_async(shared + 4 * threadIdx.x, in + 4 * threadIdx.x, 16);
  __pipeline_commit();
  __syncthreads();
  out[threadIdx.x] = shared[4 * threadIdx.x];
  __pipeline_wait_prior(0);
}

__global__ void forgotten_copy(long long* out, const int* in) {
  __pipeline_memcpy_async(dynamic_shared_memory() + 16 * threadIdx.x, in + 4 * threadIdx.x, 16);
  out[threadIdx.x] = 0;
}

__global__ void uninitialised(long long* out, const int*) {
  out[threadIdx.x] = reinterpret_cast<int*>(dynamic_shared_memory())[threadIdx.x];
}

__global__ void divergent_barrier(long long* out, const int*) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void missing_lane(long long* out, const int*) {
  unsigned all = 0;
  if (threadIdx.x != 3) all = __ballot_sync(0xffffffffu, 1);
  out[threadIdx.x] = all;
}

__global__ void disagreeing_lanes(long long* out, const int*) {
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __any_sync(0xffffffffu, 1);
  } else {
    out[threadIdx.x] = __all_sync(0xffffffffu, 1);
  }
}

__global__ void lane_outside_its_mask(long long* out, const int*) {
  out[threadIdx.x] = __ballot_sync(0xffffu, 1);
}

__global__ void early_exit(long long* out, const int*) {
  int* own = reinterpret_cast<int*>(dynamic_shared_memory());
  own[threadIdx.x] = 5;
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  // The last barrier is missing: the other block may have exited.
  const unsigned other = 1 - __clusterRelativeBlockRank();
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      static_cast<const int*>(__cluster_map_shared_rank(own, other))[threadIdx.x];
}

// Writes to the other block, which need not have started.
__global__ void early_look(long long* out, const int*) {
  int* own = reinterpret_cast<int*>(dynamic_shared_memory());
  const unsigned other = 1 - __clusterRelativeBlockRank();
  static_cast<int*>(__cluster_map_shared_rank(own, other))[threadIdx.x] = 5;
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  out[blockIdx.x * blockDim.x + threadIdx.x] = own[threadIdx.x];
}

__global__ void past_the_end(long long* out, const int*) {
  int* shared = reinterpret_cast<int*>(dynamic_shared_memory());
  shared[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}

__global__ void misaligned(long long* out, const int*) {
  const unsigned char* shared = dynamic_shared_memory();
  out[threadIdx.x] = reinterpret_cast<const uint4*>(shared + 4)->x != 0;
}

__global__ void trapped(long long* out, const int*) {
  if (threadIdx.x == 9) __trap();
  out[threadIdx.x] = 1;
}

#ifndef __CUDACC__
#include <stdio.h>

using Kernel = void (*)(long long*, const int*);

struct Case {
  const char* name;
  Kernel kernel;
  unsigned blocks = 1, cluster = 1, threads = 64;
  size_t shared_bytes = 64 * sizeof(int);
};

constexpr size_t kTwoTiles = 2 * 4 * 64 * sizeof(int);

const Case kCases[] = {
    {"tree_sum", tree_sum, 3, 1, 1024, 1024 * sizeof(long long)},
    {"warp_collectives", warp_collectives, 2},
    {"counts", counts},
    {"part_of_a_warp", counts, 1, 1, 41},
    {"ring", ring, 8, 4},
    {"half_a_cluster", ring, 3, 2},
    {"pipeline", pipeline, 1, 1, 64, kTwoTiles},
    {"missing_barrier", missing_barrier},
    {"missing_wait", missing_wait, 1, 1, 64, kTwoTiles},
    {"forgotten_copy", forgotten_copy, 1, 1, 64, kTwoTiles},
    {"uninitialised", uninitialised},
    {"divergent_barrier", divergent_barrier},
    {"missing_lane", missing_lane},
    {"disagreeing_lanes", disagreeing_lanes},
    {"lane_outside_its_mask", lane_outside_its_mask},
    {"early_exit", early_exit, 2, 2},
    {"early_look", early_look, 2, 2},
    {"past_the_end", past_the_end},
    {"misaligned", misaligned},
    {"trapped", trapped},
};

// Arguments: KERNEL... SEED. Runs the kernels one after another and prints the last one's output.
int main(int count, char** words) {
  if (count < 3) return 2;
  const uint64_t seed = strtoull(words[count - 1], nullptr, 10);
  std::vector<int> in(4 * 64 * kTiles);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i * i % 97);
  std::vector<long long> out;
  std::string failure;
  for (int word = 1; word < count - 1; ++word) {
    const Case* found = nullptr;
    for (const Case& each : kCases) {
      if (strcmp(each.name, words[word]) == 0) found = &each;
    }
    if (found == nullptr) return 2;
    out.assign(found->blocks * found->threads, 0);
    failure = cuda_emulation::run(
        {{found->blocks}, {found->threads}, found->cluster, found->shared_bytes, seed},
        found->kernel,
        out.data(),
        static_cast<const int*>(in.data())
    );
  }
  if (!failure.empty()) {
    printf("failed: %s\n", failure.c_str());
    return 1;
  }
  for (const long long value : out) printf("%lld ", value);
  printf("\n");
  return 0;
}
#endif
