#include "cpu/thread_pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "flashcore/flashcore.h"

namespace flashcore::cpu {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits a little for a change that is likely near: a sleep and a wake-up cost about as much.
template <class F>
bool spin_until(F ready) {
  using Clock = std::chrono::steady_clock;
  for (auto const end = Clock::now() + std::chrono::microseconds(10); !ready();) {
    if (Clock::now() >= end) return false;
    for (int i = 0; i < 16; ++i) pause();
  }
  return true;
}

thread_local bool inside_task = false;

class Pool {
 public:
  // False if another caller has the pool: the work is then still to be done.
  bool run(int64_t tasks, int threads, Task task, void* context) {
    std::unique_lock turn(turn_, std::try_to_lock);
    if (!turn) return false;
    start_helpers(threads - 1);
    {
      std::lock_guard lock(mutex_);
      task_ = task;
      context_ = context;
      tasks_ = tasks;
      helpers_ = threads - 1;
      next_.store(0, std::memory_order_relaxed);
      open_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(0);
    // A helper that has not woken up by now is not waited for: it finds the job closed.
    std::unique_lock lock(mutex_);
    open_ = false;
    if (running_.load() > 0) {
      lock.unlock();
      spin_until([this] { return running_.load(std::memory_order_acquire) == 0; });
      lock.lock();
      done_.wait(lock, [this] { return running_.load() == 0; });
    }
    return true;
  }

  pid_t const pid = getpid();

 private:
  void work(int worker) {
    inside_task = true;
    for (int64_t t; (t = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;)
      task_(context_, t, worker);
    inside_task = false;
  }

  void start_helpers(int wanted) {
    if (started_ >= wanted) return;
    // Signals belong to the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; started_ < wanted; ++started_)
        std::thread([this, index = started_] { help(index); }).detach();
    } catch (const std::system_error&) {  // no more threads to be had: go on with fewer
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void help(int index) {
    uint64_t seen = 0;
    for (;;) {
      auto const called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      bool const hot = spin_until(called);
      std::unique_lock lock(mutex_);
      if (!hot) wake_.wait(lock, called);
      seen = generation_.load(std::memory_order_relaxed);
      if (!open_ || index >= helpers_) continue;
      running_.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      work(index + 1);
      lock.lock();
      if (running_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  std::mutex turn_;  // held by the caller whose job runs
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> running_{0};  // helpers inside the job; changes under mutex_
  bool open_ = false;
  int helpers_ = 0, started_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int64_t tasks_ = 0;
};

// Never destroyed: helpers may still wait in it when the process exits. A forked child has none of
// its parent's threads and perhaps its locks in mid-air, so it leaves that pool behind.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* p = current.load(std::memory_order_acquire);
  if (p && p->pid == getpid()) return *p;
  Pool* fresh = new Pool;
  if (current.compare_exchange_strong(p, fresh)) return *fresh;
  delete fresh;
  return *p;
}

constexpr int kMostThreads = 4096;

// The whole of text as a number from 1 on; 0 if it is not one.
int positive_number(const std::string& text) {
  int64_t n = 0;
  auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error == std::errc::result_out_of_range) return text[0] == '-' ? 0 : kMostThreads;
  if (error != std::errc() || end != text.data() + text.size() || n < 1) return 0;
  return static_cast<int>(std::min<int64_t>(n, kMostThreads));
}

// Our own variable: what it cannot mean is said once, and then it is as if it were not set. Nobody
// loses a run to a slip in a setting that changes no result.
int own_threads() {
  const char* const text = std::getenv("FLASHCORE_NUM_THREADS");
  if (!text || !*text) return 0;
  int const n = positive_number(text);
  if (n == 0)
    std::fprintf(stderr,
                 "flashcore: FLASHCORE_NUM_THREADS='%s' is ignored: it must be an integer from 1 "
                 "to %d\n",
                 text, kMostThreads);
  return n;
}

// OpenMP's variable is a list, one number for each level of nesting, and OpenMP's to complain
// about.
int omp_threads() {
  const char* const text = std::getenv("OMP_NUM_THREADS");
  if (!text) return 0;
  std::string const list = text;
  return positive_number(list.substr(0, list.find(',')));
}

#if defined(__linux__)
// The CPU quota of the control groups (v2) around this process; 0 = none.
int cgroup_limit() {
  std::string path, line;
  for (std::ifstream f("/proc/self/cgroup"); std::getline(f, line);)
    if (line.rfind("0::", 0) == 0) path = line.substr(3);
  int limit = 0;
  for (;;) {
    std::ifstream f("/sys/fs/cgroup" + path + "/cpu.max");
    double quota = 0, period = 0;
    if (f >> quota >> period && quota > 0 && period > 0) {  // "max 100000" fails the first read
      int const cores = std::max(1, static_cast<int>(quota / period + 0.999));
      limit = limit ? std::min(limit, cores) : cores;
    }
    if (path.empty()) return limit;
    path.erase(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
  }
}
#endif

int default_threads() {
  static const int n = [] {
    if (int const ours = own_threads()) return ours;
    if (int const omp = omp_threads()) return omp;
    int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cores = std::max(1, CPU_COUNT(&set));
    if (int const limit = cgroup_limit()) cores = std::min(cores, limit);
#endif
    return cores;
  }();
  return n;
}

std::atomic<int> chosen_threads{0};  // 0 = the default

}  // namespace

void parallel_for(int64_t tasks, int threads, Task task, void* context) {
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads > 1 && !inside_task && pool().run(tasks, threads, task, context)) return;
  bool const outer = std::exchange(inside_task, true);
  for (int64_t t = 0; t < tasks; ++t) task(context, t, 0);
  inside_task = outer;
}

int num_threads(int limit) {
  int const n = flashcore_get_num_threads();
  return limit > 0 ? std::min(limit, n) : n;
}

}  // namespace flashcore::cpu

extern "C" void flashcore_set_num_threads(int32_t n) {
  flashcore::cpu::chosen_threads.store(std::clamp(n, 0, flashcore::cpu::kMostThreads));
}

extern "C" int32_t flashcore_get_num_threads(void) {
  int const n = flashcore::cpu::chosen_threads.load();
  return n > 0 ? n : flashcore::cpu::default_threads();
}
