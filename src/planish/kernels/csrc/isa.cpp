#include "isa.h"

#include <atomic>
#include <initializer_list>

#if defined(PLANISH_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace planish {

bool runs(Isa isa) {
    if (isa == Isa::portable) return true;
#if defined(PLANISH_X86)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == Isa::avx2) return avx2;
    if (isa == Isa::avx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
#endif
#if defined(PLANISH_ARM) && defined(__linux__)
    if (isa == Isa::neon) return (getauxval(AT_HWCAP) >> 20) & 1; // asimddp: the dot products
#elif defined(PLANISH_ARM) && defined(__APPLE__)
    if (isa == Isa::neon) return true; // every processor of theirs that runs this has them
#endif
    return false;
}

Isa best_isa() {
    for (const Isa isa : {Isa::avx512, Isa::avx2, Isa::neon})
        if (runs(isa)) return isa;
    return Isa::portable;
}

namespace {
std::atomic<int> chosen{-1};
}

Isa active_isa() {
    int isa = chosen.load(std::memory_order_relaxed);
    if (isa < 0) chosen.store(isa = static_cast<int>(best_isa()), std::memory_order_relaxed);
    return static_cast<Isa>(isa);
}

void use(Isa isa) { chosen.store(static_cast<int>(isa), std::memory_order_relaxed); }

} // namespace planish
