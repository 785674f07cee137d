// Which instruction sets this processor runs, and which one the kernels use: chosen at run time, never at build time.
#pragma once

#if defined(__GNUC__) && defined(__x86_64__)
#define PLANISH_X86 1
#endif
#if defined(__GNUC__) && defined(__aarch64__)
#define PLANISH_ARM 1
#endif

// PLANISH_TARGET("avx2,fma") ... PLANISH_TARGET_END: functions between the two may use those instructions. Standard
// headers come before: what they define inline must stay fit for every processor.
#define PLANISH_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PLANISH_TARGET(set) \
    PLANISH_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define PLANISH_TARGET_END PLANISH_PRAGMA(clang attribute pop)
#else
#define PLANISH_TARGET(set) PLANISH_PRAGMA(GCC push_options) PLANISH_PRAGMA(GCC target(set))
#define PLANISH_TARGET_END PLANISH_PRAGMA(GCC pop_options)
#endif

namespace planish {

// In rising order on one architecture. avx2 includes fma and f16c; avx512 includes f, bw, vl, dq and vnni; neon dotprod.
enum class Isa { portable = 0, neon = 1, avx2 = 2, avx512 = 3 };

// The best instruction set that this processor runs and this build holds.
Isa best_isa();
// Whether it can be used here.
bool runs(Isa isa);
// The one in use: the best, unless use() named another.
Isa active_isa();
// The caller has checked runs(isa).
void use(Isa isa);

} // namespace planish
