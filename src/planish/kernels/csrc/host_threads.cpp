#include "host_threads.h"

#include <algorithm>
#include <atomic>

#include "pool.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace planish {
namespace {

// What compilers call for a parallel region, in GNU's OpenMP and in LLVM's: found by name, so that none is linked.
using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};

Region region() {
#if defined(__unix__) || defined(__APPLE__)
    static const Region found = [] {
        pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
        return reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    }();
    return forked.load() ? nullptr : found;
#else
    return nullptr;
#endif
}

struct Job {
    void (*work)(void*, std::int64_t);
    void* context;
    std::int64_t n;
    std::atomic<std::int64_t> next{0};
};

void take_part(void* given) {
    Job& job = *static_cast<Job*>(given);
    for (std::int64_t i = job.next.fetch_add(1); i < job.n; i = job.next.fetch_add(1)) job.work(job.context, i);
}

} // namespace

void run_on_host(int threads, std::int64_t n, void (*work)(void*, std::int64_t), void* context) {
    threads = static_cast<int>(std::min<std::int64_t>(threads, n));
    const Region run = threads > 1 ? region() : nullptr;
    if (run == nullptr) return run_parallel(threads, n, work, context);
    Job job{work, context, n};
    run(take_part, &job, static_cast<unsigned>(threads), 0);
}

} // namespace planish
