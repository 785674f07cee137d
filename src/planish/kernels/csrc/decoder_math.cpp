// One source, compiled for each instruction set (decoder_math_body.h) and chosen at run time.
#include "decoder_math.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(PLANISH_X86)
#include <immintrin.h>
#endif

namespace planish {

float to_float(Half h) {
    const std::uint32_t rest = std::uint32_t(h.bits & 0x7fffu) << 13;
    float v;
    std::memcpy(&v, &rest, 4);
    v *= 0x1p112f;
    return h.bits & 0x8000u ? -v : v;
}

float to_float(Brain b) {
    const std::uint32_t bits = std::uint32_t(b.bits) << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}

Half to_half(float v) {
    const bool negative = std::signbit(v);
    const float size = std::min(std::fabs(v), 65504.0f) * 0x1p-112f; // a float's exponent where a half's would be
    std::uint32_t bits;
    std::memcpy(&bits, &size, 4);
    if (bits < 0x00800000u) { // a subnormal half: round the value itself to a multiple of the smallest
        bits = static_cast<std::uint32_t>(std::lrint(std::fabs(v) * 0x1p24f));
    } else {
        bits = (bits + 0x0fffu + ((bits >> 13) & 1u)) >> 13;
    }
    return Half{static_cast<std::uint16_t>(bits | (negative ? 0x8000u : 0u))};
}

} // namespace planish

// The standard headers are above: their inline functions must not be compiled for a richer processor than runs them.
#define PLANISH_MATH_SPACE plain
#include "decoder_math_body.h"
#undef PLANISH_MATH_SPACE

#if defined(PLANISH_X86)

PLANISH_TARGET("avx2,fma")
#define PLANISH_MATH_SPACE with_avx2
#include "decoder_math_body.h"
#undef PLANISH_MATH_SPACE
PLANISH_TARGET_END

PLANISH_TARGET("avx2,fma,avx512f")
#define PLANISH_MATH_SPACE with_avx512
#define PLANISH_MATH_AVX512 1
#include "decoder_math_body.h"
#undef PLANISH_MATH_AVX512
#undef PLANISH_MATH_SPACE
PLANISH_TARGET_END

#endif

namespace planish {

const Math& math_of(Isa isa) {
#if defined(PLANISH_X86)
    if (isa == Isa::avx512) return with_avx512::table;
    if (isa == Isa::avx2) return with_avx2::table;
#endif
    (void)isa;
    return plain::table;
}

} // namespace planish
