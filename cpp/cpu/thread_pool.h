// The threads of the CPU backend. No OpenMP: whose runtime a process loads first would decide its
// behaviour, two runtimes in one process fight for the cores, and it hangs after a fork.
#pragma once
#include <cstdint>

namespace flashcore::cpu {

// Runs task(context, t, worker) for t in [0, tasks), started in ascending order, on at most
// `threads` threads of which the caller is worker 0; returns when all are done. Runs everything on
// the caller when there is one thread or task, when another caller has the pool, and inside a task.
using Task = void (*)(void* context, int64_t t, int worker) noexcept;
void parallel_for(int64_t tasks, int threads, Task task, void* context);

// flashcore_get_num_threads, lowered to `limit` if that is positive.
int num_threads(int limit);

}  // namespace flashcore::cpu
