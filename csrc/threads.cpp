// The pool outlives every caller and is never destroyed: workers sleep until the process ends. A forked child starts with
// an empty pool of its own, since only the forking thread lives on in it.
#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define HAS_FORK 1
#endif

namespace residual_kernels {
namespace {

struct Job {
  Task task = nullptr;
  const void* context = nullptr;
  int64_t count = 0;
  std::atomic<int64_t> next{0};
  int seats = 0;    // workers that may still join; guarded by Pool::mutex
  int running = 0;  // workers inside; guarded by Pool::mutex
};

void work(Job& job) {
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.task(job.context, i);
}

struct Pool {
  std::mutex owner;  // held by the call that uses the pool
  std::mutex mutex;
  std::condition_variable wake, done;
  Job* job = nullptr;  // guarded by mutex, as are the two below
  int workers = 0;

  void run_worker() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      wake.wait(lock, [this] { return job != nullptr && job->seats > 0; });
      Job& mine = *job;
      --mine.seats;
      ++mine.running;
      lock.unlock();
      work(mine);
      lock.lock();
      if (--mine.running == 0) done.notify_one();
    }
  }

  void grow_to(int wanted) {
    std::lock_guard<std::mutex> lock(mutex);
    try {
      for (; workers < wanted; ++workers) std::thread([this] { run_worker(); }).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: the ones there are do the work.
    }
  }
};

std::atomic<Pool*> current{nullptr};

#ifdef HAS_FORK
void forget_pool() { current.store(nullptr); }  // the parent's threads and locks mean nothing in the child
#endif

Pool& pool() {
  Pool* found = current.load();
  if (found == nullptr) {
#ifdef HAS_FORK
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
#endif
    Pool* made = new Pool;
    if (current.compare_exchange_strong(found, made)) {
      found = made;
    } else {
      delete made;
    }
  }
  return *found;
}

struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(memory); }
};

thread_local Scratch own_scratch;

}  // namespace

void parallel_for(int64_t count, int threads, Task task, const void* context) {
  Job job;
  job.task = task;
  job.context = context;
  job.count = count;
  const int helpers = static_cast<int>(count < threads ? count : threads) - 1;
  if (helpers <= 0) return work(job);
  Pool& all = pool();
  std::unique_lock<std::mutex> mine(all.owner, std::try_to_lock);
  if (!mine.owns_lock()) return work(job);
  all.grow_to(helpers);
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    job.seats = helpers;
    all.job = &job;
  }
  all.wake.notify_all();
  work(job);
  std::unique_lock<std::mutex> lock(all.mutex);
  all.job = nullptr;  // nobody joins any more
  all.done.wait(lock, [&job] { return job.running == 0; });
}

void* scratch(size_t bytes) {
  Scratch& mine = own_scratch;
  if (bytes > mine.size) {
    std::free(mine.memory);
    mine.size = (bytes + 63) / 64 * 64;
    mine.memory = std::aligned_alloc(64, mine.size);
    if (mine.memory == nullptr) mine.size = 0;
  }
  return mine.memory;
}

}  // namespace residual_kernels
