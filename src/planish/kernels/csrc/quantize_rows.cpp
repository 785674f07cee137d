#include "quantize_rows.h"

#include <algorithm>

#include "pool.h"

namespace planish {
namespace {

constexpr std::int64_t kWorkPerThread = std::int64_t{1} << 15; // channels worth waking a thread for

// A scale as it is stored: rounded to its type, no smaller than the least normal number; 1 for a group of zeros.
float stored(float scale, Real type) {
    if (scale == 0.0f) return 1.0f;
    if (type == Real::float16) {
        if (scale < 0x1p-14f) return 0x1p-14f;
        Half half;
        narrow(scale, half);
        return widen(half);
    }
    if (type == Real::bfloat16 && scale == scale) {
        BFloat rounded;
        narrow(scale, rounded);
        scale = widen(rounded);
    }
    return scale < 0x1p-126f ? 0x1p-126f : scale; // NaN stays
}

float within(float code, float low, float high) { return code == code ? std::min(std::max(code, low), high) : 0.0f; }

namespace portable {
#include "quantize_rows_body.h"
} // namespace portable
} // namespace
} // namespace planish

#if defined(PLANISH_X86)
PLANISH_TARGET("avx2,fma,f16c")
namespace planish {
namespace {
namespace avx2 {
#include "quantize_rows_body.h"
} // namespace avx2
} // namespace
} // namespace planish
PLANISH_TARGET_END

PLANISH_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace planish {
namespace {
namespace avx512 {
#include "quantize_rows_body.h"
} // namespace avx512
} // namespace
} // namespace planish
PLANISH_TARGET_END
#endif

namespace planish {

void quantize_rows(const QuantizeRows& op, int threads, Isa isa) {
    void (*some)(const QuantizeRows&, std::int64_t, std::int64_t) = portable::some_rows;
#if defined(PLANISH_X86)
    if (isa == Isa::avx2) some = avx2::some_rows;
    if (isa == Isa::avx512) some = avx512::some_rows;
#else
    (void)isa; // the vectors of aarch64 are in every such processor: the portable loops have them
#endif
    const std::int64_t worth = 1 + op.rows * op.channels / kWorkPerThread;
    const std::int64_t shares = std::min({worth, op.rows, threads == 1 ? std::int64_t{1} : std::int64_t{4} * threads});
    parallel(threads, shares, [&](std::int64_t i) { some(op, i * op.rows / shares, (i + 1) * op.rows / shares); });
}

} // namespace planish
