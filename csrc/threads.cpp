// Work goes to the team of the OpenMP runtime that PyTorch has loaded, found by name: its threads spin for some
// milliseconds after every parallel operator of PyTorch, and a second pool would have to share the cores with them.
// Without that runtime, and in a forked child, where its team no longer exists, a pool of our own does the work. It
// outlives every caller and is never destroyed: workers sleep until the process ends.
#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#define ON_POSIX 1
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

// Runs function(data) on every thread of a team, and returns when all have.
using Team = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

#ifdef ON_POSIX
std::atomic<bool> forked{false};

// The parent's threads and locks mean nothing in the child.
const int registered = pthread_atfork(nullptr, nullptr, [] {
  forked.store(true);
  current.store(nullptr);
});

Team openmp_team() {
  // GNU's entry point, which the runtimes of LLVM and Intel export too. PyTorch makes its runtime's names global.
  static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked.load() ? nullptr : found;
}
#else
Team openmp_team() { return nullptr; }
#endif

Pool& pool() {
  Pool* found = current.load();
  if (found == nullptr) {
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
  // As many threads as PyTorch's own operators have: a team of another size would be put together anew.
  if (Team team = openmp_team()) return team([](void* mine) { work(*static_cast<Job*>(mine)); }, &job, threads, 0);
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
