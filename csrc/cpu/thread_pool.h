// The threads that rows and tiles are shared out among.
//
// Where the process has OpenMP, as it has with torch, these are OpenMP's: the model has just used them,
// so they still look for work, whereas a thread of our own would first have to be woken, and would then
// share its core with one of theirs. We look OpenMP up and do not link it, since a second runtime
// beside torch's would be one more pool. Without it, and in a child after fork, where OpenMP waits for
// ever for threads that are gone, the threads are our own.
//
// The caller works too, so tasks start at once and a late worker only helps. One call at a time has
// the threads; a call that finds them taken does its tasks alone instead of waiting for cores. A row is
// several jobs with little between them, so a worker of ours looks for the next job for a while before
// it sleeps: to wake it takes longer than a job.
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

// The floating-point environment that the arithmetic is defined in: round to nearest, subnormals kept,
// whatever the caller has set.
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

class Pool {
 public:
  using Task = void (*)(void* context, int64_t index);

  // Runs task(context, i) for i in 0 .. count - 1 on up to `threads` threads; tasks must not throw.
  static void run(int64_t count, int threads, Task task, void* context) {
    if (threads > 1 && count > 1) {
      Pool& pool = *current_;
      std::unique_lock<std::mutex> turn(pool.turn_, std::try_to_lock);
      if (turn.owns_lock()) {
        pool.share(count, threads, task, context);
        return;
      }
    }
    for (int64_t i = 0; i < count; ++i) task(context, i);
  }

  // Threads do not survive fork, and their locks may be held for ever: the child gets a new pool and
  // leaks the old one. None is ever destroyed, since its threads may outlive static destructors.
  static void forked() { current_ = new Pool(nullptr); }

 private:
  // Of GCC's runtime; LLVM's and Intel's have it too.
  using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

  static constexpr int kLooks = 2000;  // some tens of microseconds

  struct Job {
    const Task task;
    void* const context;
    const int64_t count;
    int places;                   // workers that may still join
    std::atomic<int> working{0};  // workers that have joined and not finished
    std::atomic<int64_t> next{0};

    void work() {
      const DefaultFloats floats;  // a thread begins with what its creator had set
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

  explicit Pool(GompParallel openmp) : openmp_(openmp) {}

  // When the library is loaded, so that it hears of every fork after that.
  static Pool* first() {
    pthread_atfork(nullptr, nullptr, forked);
    return new Pool(reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")));
  }

  void share(int64_t count, int threads, Task task, void* context) {
    Job job{task, context, count, static_cast<int>(count < threads ? count : threads) - 1};
    if (openmp_ != nullptr) {
      // always all of them: OpenMP ends those that a smaller team leaves out
      openmp_([](void* shared) { static_cast<Job*>(shared)->work(); }, &job, threads, 0);
      return;
    }
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

  static Pool* current_;

  const GompParallel openmp_;
  std::mutex turn_;   // held by the call that has the pool
  std::mutex mutex_;  // guards everything below
  std::condition_variable work_;
  Job* job_ = nullptr;
  int workers_ = 0;
  int sleeping_ = 0;
  std::atomic<uint64_t> jobs_{0};  // how many there have been
};

inline Pool* Pool::current_ = Pool::first();

}  // namespace llm_sampling

#endif  // LLM_SAMPLING_CPU_THREAD_POOL_H_
