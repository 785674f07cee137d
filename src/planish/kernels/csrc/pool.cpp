// One job at a time. Its owner publishes it by a ticket in `open`, works through it together with whoever is awake, closes
// it, and waits for those inside. A thread that wakes up late finds the job closed and goes back: nobody waits for it.
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace planish {
namespace {

constexpr auto kAwake = std::chrono::microseconds(100); // how long a thread looks for work before it sleeps
constexpr int kMostThreads = 256;

inline void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

struct Pool {
    std::mutex owner; // held by the thread whose job is open
    // The job; read only by threads that have entered and found it open.
    void (*work)(void*, std::int64_t) = nullptr;
    void* context = nullptr;
    std::int64_t n = 0;
    alignas(64) std::atomic<std::int64_t> next{0};
    alignas(64) std::atomic<std::uint64_t> open{0}; // ticket of the open job * 512 + its threads; 0 if there is none
    alignas(64) std::atomic<int> inside{0};
    alignas(64) std::atomic<int> asleep{0};
    std::uint64_t tickets = 0;
    int others = 0; // threads started
    std::mutex bed;
    std::condition_variable bell;

    void take_part() {
        for (std::int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) work(context, i);
    }

    bool wanted(std::uint64_t job, std::uint64_t seen, int index) const {
        return job != 0 && job != seen && index < static_cast<int>(job % 512);
    }

    void serve(int index) {
        std::uint64_t seen = 0;
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + kAwake;
            std::uint64_t job = open.load();
            for (int spin = 1; !wanted(job, seen, index); job = open.load(), ++spin) {
                pause_briefly();
                if (spin % 64 == 0 && std::chrono::steady_clock::now() > until) break;
            }
            if (!wanted(job, seen, index)) {
                std::unique_lock<std::mutex> lock(bed);
                ++asleep;
                bell.wait(lock, [&] { return wanted(open.load(), seen, index); });
                --asleep;
            }
            ++inside; // sequentially consistent, as is `open`: either the owner sees us inside or we see the job closed
            job = open.load();
            if (wanted(job, seen, index)) {
                seen = job;
                take_part();
            }
            --inside;
        }
    }

    void start(int count) {
        try {
            for (; others < count; ++others) std::thread(&Pool::serve, this, others + 1).detach();
        } catch (const std::system_error&) {
            // no more threads to be had: those that are there, and the caller, do the work
        }
    }

    void run(int threads, std::int64_t count, void (*fn)(void*, std::int64_t), void* argument) {
        start(threads - 1);
        work = fn, context = argument, n = count;
        next.store(0);
        open.store(++tickets * 512 + static_cast<std::uint64_t>(threads));
        if (asleep.load() > 0) {
            { const std::lock_guard<std::mutex> lock(bed); } // none is between its last look and its sleep
            bell.notify_all();
        }
        take_part();
        open.store(0);
        for (int spin = 1; inside.load() != 0; ++spin) {
            pause_briefly();
            if (spin % 4096 == 0) std::this_thread::yield(); // more threads than processors
        }
    }
};

// Never destroyed: its threads may outlive every static object. A forked child has none of them and takes a new pool.
std::atomic<Pool*> current{nullptr};
std::mutex making;
thread_local bool within = false;

Pool& pool() {
    Pool* p = current.load();
    if (p != nullptr) return *p;
    const std::lock_guard<std::mutex> lock(making);
    if (current.load() == nullptr) {
#if defined(__unix__) || defined(__APPLE__)
        static const int registered = pthread_atfork(nullptr, nullptr, [] {
            current.store(nullptr);
            within = false;
        });
        (void)registered;
#endif
        current.store(new Pool);
    }
    return *current.load();
}

} // namespace

void run_parallel(int threads, std::int64_t n, void (*work)(void*, std::int64_t), void* context) {
    threads = static_cast<int>(std::min<std::int64_t>({threads, n, kMostThreads}));
    if (threads > 1 && !within) {
        Pool& p = pool();
        const std::unique_lock<std::mutex> mine(p.owner, std::try_to_lock);
        if (mine.owns_lock()) {
            within = true;
            p.run(threads, n, work, context);
            within = false;
            return;
        }
    }
    for (std::int64_t i = 0; i < n; ++i) work(context, i);
}

} // namespace planish
