// The threads over which rows and tiles are distributed.
//
// If the process has OpenMP, as it has with torch, its threads are used: the model has just run on them, so
// they still spin for work. A thread of our own would have to be woken first and would share its core with
// one of theirs. OpenMP is looked up in the process and not linked, because a second runtime beside torch's
// would be one more pool of threads. Threads of our own are used without OpenMP, and in a child after fork,
// where OpenMP waits for ever for threads that the child does not have.
//
// The calling thread works too, so tasks start at once and a late worker only helps. One call at a time
// uses the threads; another call at the same time does its tasks alone instead of waiting for cores. A row
// takes several jobs with little time between them, so a worker of our own spins for a while before it
// sleeps, because to wake it takes longer than a job.
#ifndef LLM_SAMPLING_CPU_THREAD_POOL_H_
#define LLM_SAMPLING_CPU_THREAD_POOL_H_

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace llm_sampling {

// Sets the floating-point environment that the arithmetic needs, which rounds to nearest and keeps
// subnormals, and restores the caller's at the end of the scope.
class DefaultFloats {
 public:
  DefaultFloats() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { std::fesetenv(&saved_); }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  std::fenv_t saved_;
};

class ThreadPool {
 public:
  using Task = void (*)(void* context, int64_t index);

  // Runs task(context, i) for i in 0 .. count - 1 on up to `threads` threads, and returns when all are done.
  // Tasks must not throw.
  static void run(int64_t count, int threads, Task task, void* context) {
    if (threads > 1 && count > 1) {
      ThreadPool& pool = *current_;
      std::unique_lock<std::mutex> turn(pool.turn_, std::try_to_lock);
      if (turn.owns_lock()) {
        pool.share(count, threads, task, context);
        return;
      }
    }
    for (int64_t i = 0; i < count; ++i) task(context, i);
  }

  // Called in a child after fork. Threads do not survive it and may have left locks held, so the child gets a
  // new pool and leaks the old one. No pool is destroyed, since its threads may outlive static destructors.
  static void forked() { current_ = new ThreadPool(nullptr); }

 private:
  // The entry point of GCC's OpenMP runtime, which LLVM's and Intel's have too.
  using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

  static constexpr int kSpins = 2000;  // before a thread sleeps: some tens of microseconds

  struct Job {
    const Task task;
    void* const context;
    const int64_t count;
    int places;                   // workers that may still join
    std::atomic<int> working{0};  // workers that have joined and not finished
    std::atomic<int64_t> next{0};

    void work() {
      const DefaultFloats floats;  // a new thread inherits the environment of its creator
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i);
    }
  };

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }

  explicit ThreadPool(GompParallel openmp) : openmp_(openmp) {}

  // Runs when the library is loaded, so that the library is told of every later fork.
  static ThreadPool* first() {
    pthread_atfork(nullptr, nullptr, forked);
    return new ThreadPool(reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")));
  }

  void share(int64_t count, int threads, Task task, void* context) {
    Job job{task, context, count, static_cast<int>(count < threads ? count : threads) - 1};
    if (openmp_ != nullptr) {
      // Always all threads, because OpenMP ends those that a smaller team leaves out.
      openmp_([](void* shared) { static_cast<Job*>(shared)->work(); }, &job, threads, 0);
      return;
    }
    bool has_sleepers;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < job.places && start_worker()) ++workers_;
      job_ = &job;
      jobs_.store(jobs_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
      has_sleepers = sleeping_ > 0;
    }
    if (has_sleepers) work_.notify_all();
    job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;  // no further worker joins
    }
    for (int spins = 0; job.working.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  // Returns false if the system starts no more threads; those that exist then do the work.
  bool start_worker() {
    try {
      std::thread([this] { loop(); }).detach();
      return true;
    } catch (...) {
      return false;
    }
  }

  // What a worker does: wait for a job, join it, work, and so on for ever.
  void loop() {
    uint64_t seen = 0;  // the value of jobs_ at the last job
    std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
    for (;;) {
      for (int spins = 0; spins < kSpins && jobs_.load(std::memory_order_acquire) == seen;
           ++spins) {
        pause();
      }
      lock.lock();
      const auto is_new = [&] { return jobs_.load(std::memory_order_relaxed) != seen; };
      ++sleeping_;
      work_.wait(lock, is_new);
      --sleeping_;
      seen = jobs_.load(std::memory_order_relaxed);
      if (job_ == nullptr || job_->places == 0) {  // the job is over, or has enough workers
        lock.unlock();
        continue;
      }
      Job& job = *job_;
      --job.places;
      job.working.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job.work();
      job.working.fetch_sub(1, std::memory_order_release);  // the job may not exist after this
    }
  }

  static ThreadPool* current_;

  const GompParallel openmp_;
  std::mutex turn_;   // held by the call that uses the threads
  std::mutex mutex_;  // guards everything below
  std::condition_variable work_;
  Job* job_ = nullptr;
  int workers_ = 0;
  int sleeping_ = 0;
  std::atomic<uint64_t> jobs_{0};  // the number of jobs so far
};

inline ThreadPool* ThreadPool::current_ = ThreadPool::first();

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_THREAD_POOL_H_
