// Worker threads shared by all calls: tasks are numbered, any thread may run any task.
#pragma once
#include <cstddef>
#include <cstdint>

namespace residual_kernels {

using Task = void (*)(const void* context, int64_t index);

// Runs task(context, i) for every i in [0, count) on at most `threads` threads, the caller being one of them, and
// returns when all are done. A call may run its tasks alone when other calls have the workers. Tasks do not throw.
void parallel_for(int64_t count, int threads, Task task, const void* context);

// Memory of the calling thread, 64-byte aligned, valid until its next call of scratch(); null when there is none left.
void* scratch(size_t bytes);

}  // namespace residual_kernels
