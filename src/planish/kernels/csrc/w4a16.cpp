// Weights are decoded once into a small panel that stays in L1 and then meets every row of x, so the cost of decoding
// is shared by all rows. The panel holds exactly the float32 weights of the reference: only the order of summation differs.
#include "w4a16.h"

#include <algorithm>

#include "pool.h"

#if defined(PLANISH_X86)
#include <immintrin.h>
#endif

namespace planish {
namespace {

constexpr std::int64_t kPanelRows = 4;   // output channels decoded together
constexpr std::int64_t kPanelCols = 1024; // input channels of a panel: 16 KB in all; a multiple of 8
constexpr std::int64_t kWorkPerThread = std::int64_t{1} << 20; // multiplications worth a thread

// One run of channels [begin, end) of one output channel, all in the same group: w[k - begin] = (code - zero) * scale.
using DecodeRun = void (*)(const std::uint32_t* words, std::int64_t begin, std::int64_t end, float scale, float zero,
                           float* w);
// Four dot products of x with the rows of a panel, added to sum[0..3].
using DotPanel = void (*)(const float* x, const float* panel, std::int64_t cols, float* sum);

inline float decode_one(const std::uint32_t* words, std::int64_t k, float scale, float zero) {
    return (static_cast<float>((words[k / 8] >> (4 * (k % 8))) & 15u) - zero) * scale;
}

void decode_portable(const std::uint32_t* words, std::int64_t begin, std::int64_t end, float scale, float zero,
                     float* w) {
    for (std::int64_t k = begin; k < end; ++k) w[k - begin] = decode_one(words, k, scale, zero);
}

void dot_portable(const float* x, const float* panel, std::int64_t cols, float* sum) {
    for (std::int64_t r = 0; r < kPanelRows; ++r) {
        const float* w = panel + r * kPanelCols;
        float lanes[8] = {};
        std::int64_t k = 0;
        for (; k + 8 <= cols; k += 8)
            for (int j = 0; j < 8; ++j) lanes[j] += x[k + j] * w[k + j];
        for (; k < cols; ++k) lanes[k % 8] += x[k] * w[k];
        sum[r] += ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    }
}

#if defined(PLANISH_X86)

__attribute__((target("avx2,fma"))) void decode_avx2(const std::uint32_t* words, std::int64_t begin, std::int64_t end,
                                                     float scale, float zero, float* w) {
    std::int64_t k = begin;
    for (; k < end && k % 8 != 0; ++k) w[k - begin] = decode_one(words, k, scale, zero);
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i low = _mm256_set1_epi32(15);
    const __m256 z = _mm256_set1_ps(zero), s = _mm256_set1_ps(scale);
    for (; k + 8 <= end; k += 8) {
        const __m256i word = _mm256_set1_epi32(static_cast<int>(words[k / 8]));
        const __m256i code = _mm256_and_si256(_mm256_srlv_epi32(word, shifts), low);
        _mm256_storeu_ps(w + (k - begin), _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(code), z), s));
    }
    for (; k < end; ++k) w[k - begin] = decode_one(words, k, scale, zero);
}

__attribute__((target("avx2,fma"))) inline float add_lanes(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

__attribute__((target("avx2,fma"))) void dot_avx2(const float* x, const float* panel, std::int64_t cols, float* sum) {
    __m256 acc[kPanelRows][2] = {};
    std::int64_t k = 0;
    for (; k + 16 <= cols; k += 16) {
        const __m256 x0 = _mm256_loadu_ps(x + k), x1 = _mm256_loadu_ps(x + k + 8);
        for (std::int64_t r = 0; r < kPanelRows; ++r) {
            const float* w = panel + r * kPanelCols + k;
            acc[r][0] = _mm256_fmadd_ps(x0, _mm256_loadu_ps(w), acc[r][0]);
            acc[r][1] = _mm256_fmadd_ps(x1, _mm256_loadu_ps(w + 8), acc[r][1]);
        }
    }
    for (std::int64_t r = 0; r < kPanelRows; ++r) {
        float tail = add_lanes(_mm256_add_ps(acc[r][0], acc[r][1]));
        for (std::int64_t j = k; j < cols; ++j) tail += x[j] * panel[r * kPanelCols + j];
        sum[r] += tail;
    }
}

__attribute__((target("avx512f"))) void decode_avx512(const std::uint32_t* words, std::int64_t begin, std::int64_t end,
                                                      float scale, float zero, float* w) {
    std::int64_t k = begin;
    for (; k < end && k % 8 != 0; ++k) w[k - begin] = decode_one(words, k, scale, zero);
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i low = _mm512_set1_epi32(15);
    const __m512 z = _mm512_set1_ps(zero), s = _mm512_set1_ps(scale);
    for (; k + 16 <= end; k += 16) {
        const __m512i word = _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int>(words[k / 8])), 0xFF00,
                                                    static_cast<int>(words[k / 8 + 1]));
        const __m512i code = _mm512_and_epi32(_mm512_srlv_epi32(word, shifts), low);
        _mm512_storeu_ps(w + (k - begin), _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(code), z), s));
    }
    for (; k < end; ++k) w[k - begin] = decode_one(words, k, scale, zero);
}

__attribute__((target("avx512f"))) void dot_avx512(const float* x, const float* panel, std::int64_t cols, float* sum) {
    __m512 acc[kPanelRows][2] = {};
    std::int64_t k = 0;
    for (; k + 32 <= cols; k += 32) {
        const __m512 x0 = _mm512_loadu_ps(x + k), x1 = _mm512_loadu_ps(x + k + 16);
        for (std::int64_t r = 0; r < kPanelRows; ++r) {
            const float* w = panel + r * kPanelCols + k;
            acc[r][0] = _mm512_fmadd_ps(x0, _mm512_loadu_ps(w), acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(x1, _mm512_loadu_ps(w + 16), acc[r][1]);
        }
    }
    for (; k < cols; k += 16) {
        const __mmask16 lanes = cols - k >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (cols - k)) - 1u);
        const __m512 x0 = _mm512_maskz_loadu_ps(lanes, x + k);
        for (std::int64_t r = 0; r < kPanelRows; ++r)
            acc[r][0] = _mm512_fmadd_ps(x0, _mm512_maskz_loadu_ps(lanes, panel + r * kPanelCols + k), acc[r][0]);
    }
    for (std::int64_t r = 0; r < kPanelRows; ++r) sum[r] += _mm512_reduce_add_ps(_mm512_add_ps(acc[r][0], acc[r][1]));
}

#endif

void decode_panel(const W4A16& op, DecodeRun decode, std::int64_t o, std::int64_t begin, std::int64_t end,
                  float* panel) {
    const std::int64_t words = (op.in + 7) / 8, groups = (op.in + op.group_size - 1) / op.group_size;
    const std::uint32_t* row = op.packed + o * words;
    for (std::int64_t k = begin; k < end;) {
        const std::int64_t g = k / op.group_size;
        // compare before multiplying: a group may be as long as the caller's integer
        const std::int64_t stop = g + 1 == groups ? end : std::min(end, (g + 1) * op.group_size);
        decode(row, k, stop, op.scale[o * groups + g], static_cast<float>(op.zero[o * groups + g]), panel + (k - begin));
        k = stop;
    }
}

void outputs(const W4A16& op, DecodeRun decode, DotPanel dot, std::int64_t first, std::int64_t last) {
    alignas(64) float panel[kPanelRows * kPanelCols];
    std::fill_n(panel, kPanelRows * kPanelCols, 0.0f); // the rows that a last, narrower panel leaves unused are read too
    for (std::int64_t o = first; o < last; o += kPanelRows) {
        const std::int64_t here = std::min(kPanelRows, last - o);
        for (std::int64_t m = 0; m < op.rows; ++m)
            for (std::int64_t r = 0; r < here; ++r)
                op.y[m * op.out + o + r] = op.bias == nullptr ? 0.0f : op.bias[o + r];
        for (std::int64_t k = 0; k < op.in; k += kPanelCols) {
            const std::int64_t cols = std::min(kPanelCols, op.in - k);
            for (std::int64_t r = 0; r < here; ++r) decode_panel(op, decode, o + r, k, k + cols, panel + r * kPanelCols);
            for (std::int64_t m = 0; m < op.rows; ++m) {
                float sum[kPanelRows] = {};
                dot(op.x + m * op.in + k, panel, cols, sum);
                for (std::int64_t r = 0; r < here; ++r) op.y[m * op.out + o + r] += sum[r];
            }
        }
    }
}

} // namespace

void w4a16(const W4A16& op, int threads, Isa isa) {
    DecodeRun decode = decode_portable;
    DotPanel dot = dot_portable;
#if defined(PLANISH_X86)
    if (isa == Isa::avx2) decode = decode_avx2, dot = dot_avx2;
    if (isa == Isa::avx512) decode = decode_avx512, dot = dot_avx512;
#endif
    const std::int64_t panels = (op.out + kPanelRows - 1) / kPanelRows;
    const std::int64_t worth = 1 + op.out * op.in / kWorkPerThread * std::max<std::int64_t>(op.rows, 1);
    const std::int64_t parts = std::max<std::int64_t>(1, std::min({std::int64_t{threads}, worth, panels}));
    parallel(threads, parts, [&](std::int64_t p) {
        outputs(op, decode, dot, p * panels / parts * kPanelRows,
                std::min(op.out, (p + 1) * panels / parts * kPanelRows));
    });
}

} // namespace planish
