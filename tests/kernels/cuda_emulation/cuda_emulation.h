// Runs CUDA device code on a CPU. Each thread of a cluster is a fiber; all fibers share one OS thread.
//
// g++ compiles the device code unchanged, with this header included before it. A fiber runs until it
// waits at a barrier or at a collective of its warp; it may also yield at an atomic operation and after
// arriving at the cluster's barrier. A seed shuffles the order in which fibers run, so that a missing
// barrier gives a wrong result for some seeds.
//
// Device code has global memory for itself, unless Machine::at_barrier changes some of it: the emulation calls
// it whenever a barrier is complete, before any of its threads goes on.
//
// A launch fails, with a message, on a deadlock (the message names the threads that wait), on a barrier
// that cannot complete because a thread has exited, on a collective about which the lanes of a warp
// disagree, on a copy that its thread never waits for, on access to the shared memory of a block that
// need not have started, and on kMostBarriers, which tells of a loop without an end. AddressSanitizer sees accesses out of bounds, because the shared memory of each
// block is an allocation of its own, and UndefinedBehaviorSanitizer sees misaligned vectors.
//
// Not detected are races without a waiting point between the accesses, what only a memory model weaker
// than sequential consistency allows, and anything about time. Shared memory is dynamic only: __shared__
// is deliberately not defined.
#ifndef LLM_SAMPLING_CUDA_EMULATION_H_
#define LLM_SAMPLING_CUDA_EMULATION_H_

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#define CUDA_EMULATION_UCONTEXT  // other processors use the C library's context switch, a slower one
#endif
#ifdef CUDA_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace cuda_emulation {

constexpr unsigned kWarp = 32;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack =
    1024 * 1024;  // a sanitizer's report is made on the stack of the thread that caused it
#else
constexpr size_t kStack = 64 * 1024;
#endif
constexpr size_t kPage = 4096;
constexpr unsigned kMostBarriers = 100000;  // of a cluster
constexpr unsigned char kUninitialised = 0xCD;
constexpr unsigned char kFreed = 0xDD;

// The saved state of a fiber that does not run, and the switch from one fiber to another.
#ifdef CUDA_EMULATION_UCONTEXT
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#else
using Context = void*;  // the fiber's stack pointer; its registers are on top of the stack
extern "C" void cuda_emulation_switch(void** from, void* to);
asm(R"(
.text
.weak cuda_emulation_switch
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_switch, .-cuda_emulation_switch
)");
inline void switch_context(Context& from, Context& to) { cuda_emulation_switch(&from, to); }
#endif

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
};

enum class Collective {
  kNone,
  kSync,
  kShuffle,
  kBallot,
  kAny,
  kAll,
  kMatch,
  kAdd,
  kMax,
  kMin,
  kOr
};

// Where the lanes of one mask meet, once for each collective.
struct Meeting {
  uint32_t mask = 0;
  uint32_t arrived = 0;
  Collective collective = Collective::kNone;
  uint64_t generation = 0;
  uint64_t values[2][kWarp];  // of this generation, and of the previous one, which lanes still read
};

struct Warp {
  uint32_t lanes = 0;            // mask of the lanes that exist
  std::deque<Meeting> meetings;  // one per mask; lanes of a warp may wait at different ones
};

struct Block {
  dim3 index;
  unsigned rank = 0;  // in its cluster
  unsigned running = 0;
  unsigned char* shared = nullptr;
  std::vector<Warp> warps;
  Barrier barrier;
  unsigned predicates = 0;  // true predicates at the current barrier
  unsigned last_predicates = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t size;
  size_t zeros;
};

enum class State { kReady, kWaiting, kDone };

struct Thread {
  dim3 index;
  unsigned number = 0;  // in its block
  Block* block = nullptr;
  State state = State::kReady;
  const char* waits_at = "";
  const uint64_t* generation = nullptr;  // a waiting thread waits until this differs from `seen`
  uint64_t seen = 0;
  uint64_t cluster_seen = 0;  // generation of the cluster's barrier when the thread arrived
  bool has_arrived = false;
  std::vector<std::vector<Copy>> copies;  // committed groups in flight, then the open group
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;
  Context context = {};
};

struct Launch {
  dim3 grid;
  dim3 block;
  unsigned cluster = 1;  // blocks of a cluster, along x
  size_t shared_bytes = 0;
  uint64_t seed = 0;  // 0: threads run in their order, and atomics do not yield
  bool is_cluster =
      true;  // false: the blocks of a cluster run in turns, but know nothing of each other
};

struct Machine {
  Launch launch;
  std::function<void()> kernel;
  std::vector<Block> blocks;  // of the running cluster
  std::vector<Thread> threads;
  std::vector<unsigned char*> stacks;  // kept from launch to launch
  Thread* current = nullptr;
  Barrier cluster_barrier;
  unsigned running = 0;
  unsigned barriers = 0;             // that the running cluster and its blocks have completed
  std::function<void()> at_barrier;  // may be empty
  std::string failure;
  uint64_t random_state = 0;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
  void* main_fake_stack = nullptr;
  Context context = {};
};

inline Machine machine;

inline uint32_t random_below(uint32_t n) {  // SplitMix64
  uint64_t z = machine.random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>(((z ^ (z >> 31)) >> 32) * n >> 32);
}

// ------------------------------------------------------------------------------------------ fibers

inline void to_scheduler(bool for_good = false) {
  Thread& thread = *machine.current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(
      for_good ? nullptr : &thread.fake_stack,
      machine.main_stack,
      machine.main_stack_size
  );
#else
  (void)for_good;
#endif
  switch_context(thread.context, machine.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(thread.fake_stack, nullptr, nullptr);
#endif
}

inline void resume(Thread& thread) {
  machine.current = &thread;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&machine.main_fake_stack, thread.stack, kStack);
#endif
  switch_context(machine.context, thread.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(machine.main_fake_stack, nullptr, nullptr);
#endif
}

inline std::string name(const Thread& thread) {
  const dim3& block = thread.block->index;
  return "thread " + std::to_string(thread.number) + " of block (" + std::to_string(block.x) +
         ", " + std::to_string(block.y) + ", " + std::to_string(block.z) + ")";
}

// Ends the launch. The calling thread is never resumed, so its memory is not freed.
[[noreturn]] inline void fail(const char* what, const char* why = "") {
  machine.failure = name(*machine.current);
  machine.failure.append(": ").append(what).append(why);
  to_scheduler();
  abort();
}

inline void wait_for(const uint64_t& generation, uint64_t seen, const char* where) {
  Thread& thread = *machine.current;
  if (generation != seen) return;
  thread.state = State::kWaiting;
  thread.waits_at = where;
  thread.generation = &generation;
  thread.seen = seen;
  to_scheduler();
}

// Yields at random, so that other threads run between two operations of this one.
inline void give_way() {
  if (machine.launch.seed != 0 && random_below(4) == 0) to_scheduler();
}

inline void run_thread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.main_stack, &machine.main_stack_size);
#endif
  machine.kernel();
  Thread& thread = *machine.current;
  for (const auto& group : thread.copies) {
    if (!group.empty()) fail("exits with copies that it has not waited for");
  }
  if (thread.has_arrived) fail("exits between arriving at the cluster's barrier and waiting there");
  thread.state = State::kDone;
  machine.running -= 1;
  Block& block = *thread.block;
  block.running -= 1;
  if (block.running == 0 && machine.launch.shared_bytes > 0) {
    // The shared memory of a block that has exited must not be read any more.
    memset(block.shared, kFreed, machine.launch.shared_bytes);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(block.shared, machine.launch.shared_bytes);
#endif
  }
  to_scheduler(true);
  abort();
}

inline unsigned char* take_stack(size_t number) {
  while (machine.stacks.size() <= number) {
    // The page below the stack is not accessible, so a stack overflow ends the program.
    void* made = mmap(
        nullptr,
        kPage + kStack,
        PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
        -1,
        0
    );
    if (made == MAP_FAILED || mprotect(made, kPage, PROT_NONE) != 0) abort();
    machine.stacks.push_back(static_cast<unsigned char*>(made) + kPage);
  }
  unsigned char* stack = machine.stacks[number];
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, kStack);  // a failed launch leaves poisoned frames behind
#endif
  return stack;
}

inline void start(Thread& thread, size_t number) {
  thread.stack = take_stack(number);
#ifdef CUDA_EMULATION_UCONTEXT
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = kStack;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, run_thread, 0);
#else
  void** top = reinterpret_cast<void**>(thread.stack + kStack) - 1;
  *top = nullptr;  // run_thread's return address: it never returns, but it aligns the stack
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers that a switch restores
  thread.context = top;
#endif
}

// ------------------------------------------------------------------------------------------ launch

inline std::string who_waits() {
  std::string text;
  unsigned count = 0;
  for (const Thread& thread : machine.threads) {
    if (thread.state == State::kWaiting && ++count <= 6) {
      text += (count == 1 ? "" : "; ") + name(thread) + " at " + thread.waits_at;
    }
  }
  return count <= 6 ? text : text + "; and " + std::to_string(count - 6) + " more";
}

inline void run_cluster(unsigned first_x, unsigned y, unsigned z) {
  const Launch& launch = machine.launch;
  const dim3 size = launch.block;
  const unsigned per_block = size.x * size.y * size.z;
  machine.blocks.assign(launch.cluster, Block());
  machine.threads.assign(static_cast<size_t>(launch.cluster) * per_block, Thread());
  machine.cluster_barrier = Barrier();
  machine.barriers = 0;
  machine.running = launch.cluster * per_block;
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    Block& block = machine.blocks[rank];
    block.index = dim3(first_x + rank, y, z);
    block.rank = rank;
    block.running = per_block;
    block.warps.assign((per_block + kWarp - 1) / kWarp, Warp());
    if (launch.shared_bytes > 0) {
      void* memory = nullptr;
      if (posix_memalign(&memory, 128, launch.shared_bytes) != 0) abort();
      block.shared = static_cast<unsigned char*>(memory);
      memset(block.shared, kUninitialised, launch.shared_bytes);
    }
    for (unsigned number = 0; number < per_block; ++number) {
      const size_t place = static_cast<size_t>(rank) * per_block + number;
      Thread& thread = machine.threads[place];
      thread.index = dim3(number % size.x, number / size.x % size.y, number / (size.x * size.y));
      thread.number = number;
      thread.block = &block;
      thread.copies.resize(1);
      block.warps[number / kWarp].lanes |= 1u << number % kWarp;
      start(thread, place);
    }
  }

  std::vector<Thread*> order;
  for (Thread& thread : machine.threads) order.push_back(&thread);
  while (machine.running > 0 && machine.failure.empty()) {
    if (launch.seed != 0) {
      for (size_t i = order.size(); i > 1; --i) {
        std::swap(order[i - 1], order[random_below(static_cast<uint32_t>(i))]);
      }
    }
    bool moved = false;
    for (Thread* thread : order) {
      if (thread->state == State::kWaiting && *thread->generation != thread->seen) {
        thread->state = State::kReady;
      }
      if (thread->state != State::kReady) continue;
      resume(*thread);
      moved = true;
      if (!machine.failure.empty()) break;
    }
    if (!moved) machine.failure = "deadlock: " + who_waits();
  }
  for (Block& block : machine.blocks) {
#ifdef __SANITIZE_ADDRESS__
    if (block.shared != nullptr) {
      __asan_unpoison_memory_region(block.shared, launch.shared_bytes);
    }
#endif
    free(block.shared);
  }
}

// Runs a launch to its end. Returns what went wrong, or an empty string.
template <typename Kernel, typename... Args>
std::string run(const Launch& launch, Kernel kernel, Args... args) {
  machine.launch = launch;
  machine.kernel = [=] { kernel(args...); };
  machine.failure.clear();
  machine.random_state = launch.seed;
  if (launch.cluster == 0 || launch.grid.x % launch.cluster != 0) {
    return "the grid is not a whole number of clusters";
  }
  for (unsigned z = 0; z < launch.grid.z; ++z) {
    for (unsigned y = 0; y < launch.grid.y; ++y) {
      for (unsigned x = 0; x < launch.grid.x; x += launch.cluster) {
        run_cluster(x, y, z);
        if (!machine.failure.empty()) return machine.failure;
      }
    }
  }
  return "";
}

// -------------------------------------------------------------------------------------- collectives

inline void arrive(Barrier& barrier, unsigned expected) {
  barrier.arrived += 1;
  if (barrier.arrived == expected) {
    barrier.arrived = 0;
    barrier.generation += 1;
    if (++machine.barriers == kMostBarriers)
      fail("a barrier", " of a loop that does not seem to end");
    if (machine.at_barrier) machine.at_barrier();
  }
}

inline unsigned per_block() {
  const dim3& size = machine.launch.block;
  return size.x * size.y * size.z;
}

// Waits for all threads of the block; returns how many of them have a true predicate.
inline unsigned block_barrier(bool predicate, const char* what) {
  Block& block = *machine.current->block;
  if (block.running != per_block()) fail(what, " after threads of the block have exited");
  const uint64_t seen = block.barrier.generation;
  block.predicates += predicate;
  if (block.barrier.arrived + 1 == per_block()) {
    block.last_predicates = block.predicates;
    block.predicates = 0;
  }
  arrive(block.barrier, per_block());
  wait_for(block.barrier.generation, seen, what);
  return block.last_predicates;
}

inline unsigned lane() { return machine.current->number % kWarp; }

inline Warp& warp() { return machine.current->block->warps[machine.current->number / kWarp]; }

// Waits for all lanes of the mask; returns the values of all of them, indexed by lane.
inline const uint64_t* meet(
    uint32_t mask,
    uint64_t value,
    Collective collective,
    const char* what
) {
  mask &= warp().lanes;
  if ((mask >> lane() & 1) == 0) fail(what, " by a lane that is not in its mask");
  Meeting* meeting = nullptr;
  for (Meeting& other : warp().meetings) {
    if (other.mask == mask) meeting = &other;
  }
  if (meeting == nullptr) {
    meeting = &warp().meetings.emplace_back();
    meeting->mask = mask;
  }
  if (meeting->arrived != 0 && meeting->collective != collective) {
    fail(what, " while other lanes of its mask are at another collective");
  }
  meeting->collective = collective;
  const uint64_t seen = meeting->generation;
  uint64_t* values = meeting->values[seen % 2];
  values[lane()] = value;
  meeting->arrived |= 1u << lane();
  if (meeting->arrived == mask) {
    meeting->arrived = 0;
    meeting->generation += 1;
  } else {
    wait_for(meeting->generation, seen, what);
  }
  return values;
}

template <typename T>
uint64_t boxed(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a collective takes 4 or 8 bytes");
  uint64_t box = 0;
  memcpy(&box, &value, sizeof(T));
  return box;
}

template <typename T>
T unboxed(uint64_t box) {
  T value;
  memcpy(&value, &box, sizeof(T));
  return value;
}

template <typename T>
T shuffle(uint32_t mask, T value, unsigned from, const char* what) {
  const uint32_t lanes = mask & warp().lanes;
  const uint64_t* values = meet(mask, boxed(value), Collective::kShuffle, what);
  if ((lanes >> from & 1) == 0) fail(what, " from a lane that is not in its mask");
  return unboxed<T>(values[from]);
}

template <typename T, typename Combine>
T reduce(uint32_t mask, T value, Collective collective, const char* what, Combine combine) {
  const uint32_t lanes = mask & warp().lanes;
  const uint64_t* values = meet(mask, boxed(value), collective, what);
  bool is_first = true;
  T result = value;
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((lanes >> i & 1) == 0) continue;
    const T other = unboxed<T>(values[i]);
    result = is_first ? other : combine(result, other);
    is_first = false;
  }
  return result;
}

template <typename T, typename Change>
T atomically(T* place, Change change) {
  give_way();
  const T before = *place;
  *place = change(before);
  return before;
}

inline void finish(std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    memcpy(copy.to, copy.from, copy.size - copy.zeros);
    memset(static_cast<unsigned char*>(copy.to) + copy.size - copy.zeros, 0, copy.zeros);
  }
  group.clear();
}

}  // namespace cuda_emulation

// ---------------------------------------------------------------------------- what device code calls

#define threadIdx (cuda_emulation::machine.current->index)
#define blockIdx (cuda_emulation::machine.current->block->index)
#define blockDim (cuda_emulation::machine.launch.block)
#define gridDim (cuda_emulation::machine.launch.grid)
constexpr int warpSize = 32;

inline unsigned char* dynamic_shared_memory() {
  return cuda_emulation::machine.current->block->shared;
}

[[noreturn]] inline void __trap() { cuda_emulation::fail("__trap"); }

inline void __syncthreads() { cuda_emulation::block_barrier(false, "__syncthreads"); }
inline int __syncthreads_or(int predicate) {
  return cuda_emulation::block_barrier(predicate != 0, "__syncthreads_or") != 0;
}
inline int __syncthreads_and(int predicate) {
  return cuda_emulation::block_barrier(predicate == 0, "__syncthreads_and") == 0;
}
inline int __syncthreads_count(int predicate) {
  return static_cast<int>(cuda_emulation::block_barrier(predicate != 0, "__syncthreads_count"));
}
inline void __threadfence_block() {}
inline void __threadfence() {}

inline unsigned __clusterRelativeBlockRank() {
  using namespace cuda_emulation;
  return machine.launch.is_cluster ? machine.current->block->rank : 0;
}
inline unsigned __clusterSizeInBlocks() {
  using namespace cuda_emulation;
  return machine.launch.is_cluster ? machine.launch.cluster : 1;
}
inline void __cluster_barrier_arrive() {
  using namespace cuda_emulation;
  Thread& thread = *machine.current;
  if (!machine.launch.is_cluster) fail("__cluster_barrier_arrive in a launch without clusters");
  if (thread.has_arrived) fail("__cluster_barrier_arrive twice without a wait");
  if (machine.running != machine.threads.size()) {
    fail("__cluster_barrier_arrive after threads of the cluster have exited");
  }
  thread.has_arrived = true;
  thread.cluster_seen = machine.cluster_barrier.generation;
  arrive(machine.cluster_barrier, static_cast<unsigned>(machine.threads.size()));
  give_way();  // other threads may run ahead of what this one does between arrival and wait
}
inline void __cluster_barrier_wait() {
  using namespace cuda_emulation;
  Thread& thread = *machine.current;
  if (!thread.has_arrived) fail("__cluster_barrier_wait without an arrival");
  thread.has_arrived = false;
  wait_for(machine.cluster_barrier.generation, thread.cluster_seen, "__cluster_barrier_wait");
}
inline void* __cluster_map_shared_rank(const void* pointer, unsigned rank) {
  using namespace cuda_emulation;
  const unsigned char* shared = machine.current->block->shared;
  const unsigned char* own = static_cast<const unsigned char*>(pointer);
  if (own < shared || own > shared + machine.launch.shared_bytes) {
    fail("__cluster_map_shared_rank of what is not in the block's shared memory");
  }
  if (rank >= __clusterSizeInBlocks())
    fail("__cluster_map_shared_rank of a block that is not there");
  if (!machine.launch.is_cluster) return const_cast<unsigned char*>(own);
  if (rank != machine.current->block->rank && machine.cluster_barrier.generation == 0) {
    fail("__cluster_map_shared_rank of a block that need not have started: no barrier came before");
  }
  return machine.blocks[rank].shared + (own - shared);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_emulation::meet(mask, 0, cuda_emulation::Collective::kSync, "__syncwarp");
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const unsigned own = cuda_emulation::lane();
  const unsigned from = (own & ~(width - 1u)) + (static_cast<unsigned>(lane) & (width - 1u));
  return cuda_emulation::shuffle(mask, value, from, "__shfl_sync");
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned own = cuda_emulation::lane();
  const unsigned from = (own & (width - 1u)) < delta ? own : own - delta;
  return cuda_emulation::shuffle(mask, value, from, "__shfl_up_sync");
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned own = cuda_emulation::lane();
  const unsigned from =
      (own & (width - 1u)) + delta >= static_cast<unsigned>(width) ? own : own + delta;
  return cuda_emulation::shuffle(mask, value, from, "__shfl_down_sync");
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned own = cuda_emulation::lane();
  const unsigned other = own ^ static_cast<unsigned>(bits);
  const unsigned from = (other & ~(width - 1u)) > (own & ~(width - 1u)) ? own : other;
  return cuda_emulation::shuffle(mask, value, from, "__shfl_xor_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  using namespace cuda_emulation;
  const uint32_t bit = predicate != 0 ? 1u << lane() : 0u;
  return reduce(mask, bit, Collective::kBallot, "__ballot_sync", [](uint32_t a, uint32_t b) {
    return a | b;
  });
}
inline int __any_sync(unsigned mask, int predicate) {
  using namespace cuda_emulation;
  return reduce(mask, int(predicate != 0), Collective::kAny, "__any_sync", [](int a, int b) {
    return a | b;
  });
}
inline int __all_sync(unsigned mask, int predicate) {
  using namespace cuda_emulation;
  return reduce(mask, int(predicate != 0), Collective::kAll, "__all_sync", [](int a, int b) {
    return a & b;
  });
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  using namespace cuda_emulation;
  const uint32_t lanes = mask & warp().lanes;
  const uint64_t* values = meet(mask, boxed(value), Collective::kMatch, "__match_any_sync");
  uint32_t equal = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((lanes >> i & 1) != 0 && values[i] == boxed(value)) equal |= 1u << i;
  }
  return equal;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  using namespace cuda_emulation;
  return reduce(mask, value, Collective::kAdd, "__reduce_add_sync", [](unsigned a, unsigned b) {
    return a + b;
  });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  using namespace cuda_emulation;
  return reduce(mask, value, Collective::kMax, "__reduce_max_sync", [](unsigned a, unsigned b) {
    return a > b ? a : b;
  });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  using namespace cuda_emulation;
  return reduce(mask, value, Collective::kMin, "__reduce_min_sync", [](unsigned a, unsigned b) {
    return a < b ? a : b;
  });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  using namespace cuda_emulation;
  return reduce(mask, value, Collective::kOr, "__reduce_or_sync", [](unsigned a, unsigned b) {
    return a | b;
  });
}

template <typename T>
T atomicAdd(T* place, T value) {
  using Unsigned = std::make_unsigned_t<T>;  // what overflows wraps around, as on a device
  return cuda_emulation::atomically(place, [=](T before) {
    return static_cast<T>(static_cast<Unsigned>(before) + static_cast<Unsigned>(value));
  });
}
template <typename T>
T atomicMax(T* place, T value) {
  return cuda_emulation::atomically(place, [=](T before) {
    return before > value ? before : value;
  });
}
template <typename T>
T atomicMin(T* place, T value) {
  return cuda_emulation::atomically(place, [=](T before) {
    return before < value ? before : value;
  });
}
template <typename T>
T atomicOr(T* place, T value) {
  return cuda_emulation::atomically(place, [=](T before) { return before | value; });
}
template <typename T>
T atomicAnd(T* place, T value) {
  return cuda_emulation::atomically(place, [=](T before) { return before & value; });
}
template <typename T>
T atomicExch(T* place, T value) {
  return cuda_emulation::atomically(place, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* place, T expected, T value) {
  return cuda_emulation::atomically(place, [=](T before) {
    return before == expected ? value : before;
  });
}

// A group of copies to shared memory arrives when it is waited for, or at random when it is committed.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0) {
  using namespace cuda_emulation;
  if (size != 4 && size != 8 && size != 16)
    fail("__pipeline_memcpy_async of a size that is not 4, 8 or 16");
  if (reinterpret_cast<uintptr_t>(to) % size != 0 ||
      reinterpret_cast<uintptr_t>(from) % size != 0) {
    fail("__pipeline_memcpy_async of misaligned memory");
  }
  machine.current->copies.back().push_back({to, from, size, zeros});
}
inline void __pipeline_commit() {
  using namespace cuda_emulation;
  auto& copies = machine.current->copies;
  if (machine.launch.seed != 0 && random_below(2) == 0) finish(copies.back());
  copies.emplace_back();
}
inline void __pipeline_wait_prior(size_t groups) {
  auto& copies = cuda_emulation::machine.current->copies;
  while (copies.size() > groups + 1) {
    cuda_emulation::finish(copies.front());
    copies.erase(copies.begin());
  }
}

// CUDA's fmaxf ignores every NaN; that of C returns NaN if one argument is a signalling NaN.
inline float cuda_fmaxf(float a, float b) {
  if (a != a) return b;
  return b > a ? b : a;
}
#define fmaxf cuda_fmaxf

template <typename T>
T __ldg(const T* place) {
  return *place;
}
template <typename T>
T __ldcs(const T* place) {
  return *place;
}
inline unsigned __float_as_uint(float value) {
  return cuda_emulation::unboxed<unsigned>(cuda_emulation::boxed(value));
}
inline float __uint_as_float(unsigned bits) {
  return cuda_emulation::unboxed<float>(cuda_emulation::boxed(bits));
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) {
  return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits));
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

#endif  // LLM_SAMPLING_CUDA_EMULATION_H_
