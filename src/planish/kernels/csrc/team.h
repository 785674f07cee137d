// A team that goes through phases in lock step: each phase has one piece of work a part, and ends when all are done.
//
// Between phases lies a barrier of some tenths of a microsecond instead of a fork and join. Whoever is absent, because its
// thread sleeps, was never started or serves another, is stood in for: a piece that stays unclaimed is done by a waiter.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace planish {

class Team {
  public:
    explicit Team(std::int64_t parts) : parts_(parts), claimed_(new Claim[static_cast<std::size_t>(parts)]) {}

    std::int64_t parts() const { return parts_; }

    // Member `me` at phase `phase` (0, 1, 2 ... the same for all): work(p) is called once for every part p, and idle()
    // again and again by whoever waits.
    template <class F, class G>
    void phase(std::int64_t phase, std::int64_t me, F&& work, G&& idle) {
        const std::int64_t enough = (phase + 1) * parts_;
        take(phase, me, work);
        for (int spin = 1; done_.load(std::memory_order_acquire) < enough; ++spin) {
            idle();
            pause_briefly();
            if (spin % kPatience != 0) continue;
            for (std::int64_t p = 0; p < parts_; ++p) take(phase, p, work);
        }
    }

  private:
    static constexpr int kPatience = 256; // looks at the others' progress before their work is taken

    struct alignas(64) Claim {
        std::atomic<std::int64_t> phases{0}; // how many of this part's phases are taken
    };

    template <class F>
    void take(std::int64_t phase, std::int64_t part, F&& work) {
        std::int64_t expected = phase;
        if (claimed_[part].phases.load(std::memory_order_relaxed) != phase) return;
        if (!claimed_[part].phases.compare_exchange_strong(expected, phase + 1, std::memory_order_acq_rel)) return;
        work(part);
        done_.fetch_add(1, std::memory_order_acq_rel);
    }

    static void pause_briefly() {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        __asm__ __volatile__("yield");
#endif
    }

    std::int64_t parts_;
    std::unique_ptr<Claim[]> claimed_;
    alignas(64) std::atomic<std::int64_t> done_{0};
};

} // namespace planish
