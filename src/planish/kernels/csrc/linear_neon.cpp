// NEON with dot products: one 16-byte load holds eight channels of four outputs, and one vector of the activation the
// high and low signed bytes of those eight channels (16 bits: 256 * high + low), or the bytes alone (8 bits).
#include <cmath>

#include "isa.h"
#include "linear_layout.h"

#if defined(PLANISH_ARM)
#include <arm_neon.h>

// GCC writes the architecture, clang the feature.
#if defined(__clang__)
PLANISH_TARGET("dotprod")
#else
PLANISH_TARGET("arch=armv8.2-a+dotprod")
#endif

namespace planish {
namespace {

constexpr int kQuads = kTile / 4;

template <int kBits>
void round_row(const float* x, const Segments& cut, const RowLayout& layout, std::uint8_t* row) {
    constexpr float limit = kBits == 16 ? kWide : kNarrow;
    float* steps = reinterpret_cast<float*>(row + layout.steps);
    std::int32_t* sums = reinterpret_cast<std::int32_t*>(row + layout.sums);
    std::int8_t* codes = reinterpret_cast<std::int8_t*>(row);
    for (std::int64_t s = 0; s < cut.count; ++s) {
        const std::int64_t begin = cut.begin(s), end = cut.end(s);
        std::uint32_t bits = 0; // the largest magnitude as an integer: not finite from 0x7F800000 on
        for (std::int64_t k = begin; k < end; ++k) {
            std::uint32_t word;
            std::memcpy(&word, x + k, 4);
            bits = std::max(bits, word & 0x7FFFFFFFu);
        }
        const float most = from_bits(bits);
        const bool finite = bits < 0x7F800000u, zero = !finite || !(most > kLeast);
        const float inverse = zero ? 0.0f : limit / most;
        steps[s] = !finite ? from_bits(0x7FC00000u) : zero ? 0.0f : most / limit;
        std::int32_t sum = 0;
        for (std::int64_t k = begin; k < end; k += 8, codes += kBits)
            for (int j = 0; j < 8; ++j) {
                const std::int32_t q =
                    zero || k + j >= end ? 0 : static_cast<std::int32_t>(std::lrint(x[k + j] * inverse));
                sum += q;
                if constexpr (kBits == 16) {
                    const std::int32_t high = (q + 128) >> 8;
                    codes[j] = static_cast<std::int8_t>(high);
                    codes[8 + j] = static_cast<std::int8_t>(q - 256 * high);
                } else {
                    codes[j] = static_cast<std::int8_t>(q);
                }
            }
        sums[s] = sum;
    }
}

template <int kBits>
void multiply(const TileJob& job) {
    const std::int64_t size = scale_size(job.type);
    const uint8x16_t nibble = vdupq_n_u8(15);
    for (std::int64_t m = 0; m < job.count; ++m) {
        const std::uint8_t* row = job.rows + m * job.layout->bytes;
        const std::int8_t* q = reinterpret_cast<const std::int8_t*>(row);
        const float* steps = reinterpret_cast<const float*>(row + job.layout->steps);
        const std::int32_t* sums = reinterpret_cast<const std::int32_t*>(row + job.layout->sums);
        const std::uint8_t* codes = job.tile + job.tiles->codes;
        float total[kTile] = {};
        for (std::int64_t s = 0; s < job.cut->count; ++s) {
            int32x4_t high[kQuads], low[kQuads];
            for (int i = 0; i < kQuads; ++i) high[i] = low[i] = vdupq_n_s32(0);
            for (std::int64_t u = job.cut->segment_units(s); u > 0; --u, codes += 128, q += kBits) {
                int8x16_t both = vdupq_n_s8(0);
                int8x8_t bytes = vdup_n_s8(0);
                if constexpr (kBits == 16) both = vld1q_s8(q);
                else bytes = vld1_s8(q);
                for (int i = 0; i < kQuads; ++i) {
                    const uint8x16_t w = vld1q_u8(codes + 16 * i);
                    const int8x16_t even = vreinterpretq_s8_u8(vandq_u8(w, nibble));
                    const int8x16_t odd = vreinterpretq_s8_u8(vshrq_n_u8(w, 4));
                    if constexpr (kBits == 16) {
                        high[i] = vdotq_laneq_s32(vdotq_laneq_s32(high[i], even, both, 0), odd, both, 1);
                        low[i] = vdotq_laneq_s32(vdotq_laneq_s32(low[i], even, both, 2), odd, both, 3);
                    } else {
                        low[i] = vdotq_lane_s32(vdotq_lane_s32(low[i], even, bytes, 0), odd, bytes, 1);
                    }
                }
            }
            std::int32_t dot[kTile];
            for (int i = 0; i < kQuads; ++i) vst1q_s32(dot + 4 * i, vaddq_s32(low[i], vshlq_n_s32(high[i], 8)));
            for (std::int64_t o = 0; o < kTile; ++o) {
                const std::int32_t zero = job.zeros ? job.tile[job.tiles->zeros + s * kTile + o] : 8;
                const float scale = load_scale(job.tile + (s * kTile + o) * size, job.type);
                total[o] += static_cast<float>(dot[o] - zero * sums[s]) * (scale * steps[s]);
            }
        }
        for (std::int64_t o = 0; o < job.outputs; ++o)
            job.y[m * job.y_stride + o] = total[o] + (job.bias == nullptr ? 0.0f : job.bias[o]);
    }
}

} // namespace

Kernels neon_kernels(int activation_bits) {
    if (activation_bits == 16) return {round_row<16>, multiply<16>};
    return {round_row<8>, multiply<8>};
}

} // namespace planish

PLANISH_TARGET_END
#endif
