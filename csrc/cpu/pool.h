// A small pool of threads. We do not use OpenMP: its pool is not usable in a child after fork, and a
// second OpenMP runtime beside torch's is a known source of trouble.
//
// The caller works too, so tasks start at once and a late worker only helps. One call at a time has
// the pool; a call that finds it taken does its tasks alone instead of waiting for cores. A row is
// several jobs with little between them, so a worker looks for the next job for a while before it
// sleeps: to wake it takes longer than a job.
#ifndef LLM_SAMPLING_CPU_POOL_H_
#define LLM_SAMPLING_CPU_POOL_H_

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace llm_sampling {

class Pool {
 public:
  using Task = void (*)(void* context, int64_t index);

  // Runs task(context, i) for i in 0 .. count - 1 on up to `threads` threads; tasks must not throw.
  static void run(int64_t count, int threads, Task task, void* context) {
    if (threads > 1 && count > 1) {
      Pool& pool = *current();
      std::unique_lock<std::mutex> turn(pool.turn_, std::try_to_lock);
      if (turn.owns_lock()) {
        pool.share(count, threads, task, context);
        return;
      }
    }
    for (int64_t i = 0; i < count; ++i) task(context, i);
  }

 private:
  static constexpr int kLooks = 2000;  // some tens of microseconds

  struct Job {
    const Task task;
    void* const context;
    const int64_t count;
    int places;                   // workers that may still join
    std::atomic<int> working{0};  // workers that have joined and not finished
    std::atomic<int64_t> next{0};

    void work() {
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

  // Threads do not survive fork, and their locks may be held for ever: the child gets a new pool and
  // leaks the old one. It is never destroyed, since its threads may outlive static destructors.
  static Pool*& current() {
    static Pool* pool = [] {
      pthread_atfork(nullptr, nullptr, [] { current() = new Pool; });
      return new Pool;
    }();
    return pool;
  }

  void share(int64_t count, int threads, Task task, void* context) {
    Job job{task, context, count, static_cast<int>(count < threads ? count : threads) - 1};
    bool somebody_sleeps;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < job.places && start_worker()) ++workers_;
      job_ = &job;
      jobs_.store(jobs_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
      somebody_sleeps = sleeping_ > 0;
    }
    if (somebody_sleeps) work_.notify_all();
    job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;  // nobody joins any more
    }
    for (int looks = 0; job.working.load(std::memory_order_acquire) != 0; ++looks) {
      if (looks < kLooks) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  // False where the system gives no more threads: those that there are do the work.
  bool start_worker() {
    try {
      std::thread([this] { loop(); }).detach();
      return true;
    } catch (...) {
      return false;
    }
  }

  void loop() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
    for (;;) {
      for (int looks = 0; looks < kLooks && jobs_.load(std::memory_order_acquire) == seen;
           ++looks) {
        pause();
      }
      lock.lock();
      const auto is_new = [&] { return jobs_.load(std::memory_order_relaxed) != seen; };
      ++sleeping_;
      work_.wait(lock, is_new);
      --sleeping_;
      seen = jobs_.load(std::memory_order_relaxed);
      if (job_ == nullptr || job_->places == 0) {  // too late
        lock.unlock();
        continue;
      }
      Job& job = *job_;
      --job.places;
      job.working.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job.work();
      job.working.fetch_sub(1, std::memory_order_release);  // the job may be gone from here on
    }
  }

  std::mutex turn_;   // held by the call that has the pool
  std::mutex mutex_;  // guards everything below
  std::condition_variable work_;
  Job* job_ = nullptr;
  int workers_ = 0;
  int sleeping_ = 0;
  std::atomic<uint64_t> jobs_{0};  // how many there have been
};

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_POOL_H_
