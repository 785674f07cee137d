// Threads of the host: torch's own OpenMP team where the process has one, our pool where not.
//
// Between two of its operations torch's threads stay awake for milliseconds, on the very cores that the pool would use: what
// runs among operations of torch borrows its team instead. A decoder, which runs alone, keeps to the pool.
#pragma once
#include <cstdint>
#include <type_traits>

namespace planish {

// As run_parallel() of pool.h. In a forked child the team is gone, and the pool, which outlives a fork, serves.
void run_on_host(int threads, std::int64_t n, void (*work)(void*, std::int64_t), void* context);

template <class F>
void on_host(int threads, std::int64_t n, F&& fn) {
    using Fn = std::remove_reference_t<F>;
    run_on_host(threads, n, [](void* context, std::int64_t i) { (*static_cast<Fn*>(context))(i); },
                const_cast<void*>(static_cast<const void*>(&fn)));
}

} // namespace planish
