// Threads that wait for work: a fork and join costs about a microsecond while they are awake, and nothing once they sleep.
#pragma once
#include <cstdint>
#include <type_traits>

namespace planish {

// Calls work(context, i) once for every i in [0, n), on the calling thread and up to threads - 1 others, in any order,
// and returns when all calls have. A call from within `work`, or while another thread's call runs, is done by the caller
// alone. `work` must not throw.
void run_parallel(int threads, std::int64_t n, void (*work)(void*, std::int64_t), void* context);

// The same with a callable: parallel(threads, n, [&](std::int64_t i) { ... }).
template <class F>
void parallel(int threads, std::int64_t n, F&& fn) {
    if (threads <= 1 || n <= 1) {
        for (std::int64_t i = 0; i < n; ++i) fn(i);
        return;
    }
    using Fn = std::remove_reference_t<F>;
    run_parallel(threads, n, [](void* context, std::int64_t i) { (*static_cast<Fn*>(context))(i); },
                 const_cast<void*>(static_cast<const void*>(&fn)));
}

} // namespace planish
