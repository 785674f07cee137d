// AVX2: sums of 16-bit products in pairs (vpmaddwd) for activations of 16 bits, of bytes (vpmaddubsw) for 8 bits.
#include "isa.h"
#include "linear_layout.h"

#if defined(PLANISH_X86)
#include <immintrin.h>

PLANISH_TARGET("avx2,fma,f16c")

namespace planish {
namespace {

inline __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

inline __m256i four(const std::uint8_t* at) {
    std::int32_t word;
    std::memcpy(&word, at, 4);
    return _mm256_set1_epi32(word);
}

template <class Combine>
inline std::int32_t fold(__m256i v, Combine combine) {
    alignas(32) std::int32_t lane[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), v);
    std::int32_t result = lane[0];
    for (int i = 1; i < 8; ++i) result = combine(result, lane[i]);
    return result;
}

// Eight floats of a segment, zeros behind its end.
inline __m256 eight(const float* x, std::int64_t left) {
    if (left >= 8) return _mm256_loadu_ps(x);
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(x, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)), index));
}

template <int kBits>
void round_row(const float* x, const Segments& cut, const RowLayout& layout, std::uint8_t* row) {
    constexpr float limit = kBits == 16 ? kWide : kNarrow;
    float* steps = reinterpret_cast<float*>(row + layout.steps);
    std::int32_t* sums = reinterpret_cast<std::int32_t*>(row + layout.sums);
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    // Channels 0 2 4 6 1 3 5 7, the order in which the halves of a word are masked out, two bytes each.
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    for (std::int64_t s = 0; s < cut.count; ++s) {
        const std::int64_t begin = cut.begin(s), n = cut.end(s) - begin;
        __m256i most_bits = _mm256_setzero_si256();
        for (std::int64_t k = 0; k < n; k += 8)
            most_bits = _mm256_max_epi32(
                most_bits, _mm256_and_si256(_mm256_castps_si256(eight(x + begin + k, n - k)), magnitude));
        const std::int32_t bits = fold(most_bits, [](std::int32_t a, std::int32_t b) { return a > b ? a : b; });
        const float most = from_bits(static_cast<std::uint32_t>(bits));
        const bool finite = bits < 0x7F800000, zero = !finite || !(most > kLeast);
        steps[s] = !finite ? from_bits(0x7FC00000u) : zero ? 0.0f : most / limit;
        const __m256 inverse = _mm256_set1_ps(zero ? 0.0f : limit / most);
        __m256i sum = _mm256_setzero_si256();
        for (std::int64_t k = 0; k < n; k += 8, row += kBits) {
            __m256i q = _mm256_setzero_si256(); // 0 * NaN is not 0: such a segment is not read
            if (!zero) q = _mm256_cvtps_epi32(_mm256_mul_ps(eight(x + begin + k, n - k), inverse));
            sum = _mm256_add_epi32(sum, q);
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
            if constexpr (kBits == 16)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(row), _mm_shuffle_epi8(words, order));
            else
                _mm_storel_epi64(reinterpret_cast<__m128i*>(row), _mm_packs_epi16(words, words));
        }
        sums[s] = fold(sum, [](std::int32_t a, std::int32_t b) { return a + b; });
    }
}

template <ScaleType kType>
inline __m256 scales(const std::uint8_t* at) {
    if constexpr (kType == ScaleType::float32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    if constexpr (kType == ScaleType::float16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

constexpr std::int64_t kAhead = 6144; // bytes asked for before they are needed: memory answers late, products are quick

inline void ask(const std::uint8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(at + 64), _MM_HINT_T0);
}

// Eight outputs for each side of one segment times kRows rows, added up in dot[row][side].
template <int kRows, int kSides>
inline void dot_wide(const std::uint8_t* codes, const std::uint8_t* q, std::int64_t row_bytes, std::int64_t units,
                     const std::uint8_t* fetch, __m256i (&dot)[kRows][kSides]) {
    const __m256i nibble = _mm256_set1_epi16(15);
    for (; units > 0; --units, codes += 128, fetch += 128, q += 16) {
        if constexpr (kRows == 1) ask(fetch);
        for (int side = 0; side < kSides; ++side) {
            const __m256i w = load(codes + 32 * side);
            const __m256i part[4] = {
                _mm256_and_si256(w, nibble), _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble),
                _mm256_and_si256(_mm256_srli_epi16(w, 8), nibble), _mm256_srli_epi16(w, 12)};
            for (int m = 0; m < kRows; ++m)
                for (int j = 0; j < 4; ++j)
                    dot[m][side] = _mm256_add_epi32(
                        dot[m][side], _mm256_madd_epi16(part[j], four(q + m * row_bytes + 4 * j)));
        }
    }
}

// The same with bytes. A pair of products is at most 2 * 15 * 127: eight of them fit 16 bits, four units' worth.
template <int kRows, int kSides>
inline void dot_narrow(const std::uint8_t* codes, const std::uint8_t* q, std::int64_t row_bytes, std::int64_t units,
                       const std::uint8_t* fetch, __m256i (&dot)[kRows][kSides]) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    while (units > 0) {
        const std::int64_t run = std::min<std::int64_t>(4, units);
        __m256i sum[kRows][kSides] = {};
        for (std::int64_t u = 0; u < run; ++u, codes += 128, fetch += 128, q += 8) {
            if constexpr (kRows == 1) ask(fetch);
            for (int side = 0; side < kSides; ++side) {
                const __m256i w = load(codes + 32 * side);
                const __m256i even = _mm256_and_si256(w, nibble);
                const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
                for (int m = 0; m < kRows; ++m) {
                    const std::uint8_t* at = q + m * row_bytes;
                    sum[m][side] = _mm256_add_epi16(sum[m][side], _mm256_maddubs_epi16(even, four(at)));
                    sum[m][side] = _mm256_add_epi16(sum[m][side], _mm256_maddubs_epi16(odd, four(at + 4)));
                }
            }
        }
        for (int m = 0; m < kRows; ++m)
            for (int side = 0; side < kSides; ++side)
                dot[m][side] = _mm256_add_epi32(dot[m][side], _mm256_madd_epi16(sum[m][side], ones));
        units -= run;
    }
}

template <int kBits, int kRows, ScaleType kType>
void multiply_rows(const TileJob& job, const std::uint8_t* rows, float* y) {
    // One row meets the whole tile at once, in the order in which it lies in memory; the sums of more rows need the
    // registers, and meet one half of it after the other.
    constexpr int kSides = kRows == 1 ? 4 : 2;
    const std::int64_t row_bytes = job.layout->bytes, size = scale_size(kType);
    for (std::int64_t first = 0; first < job.outputs; first += 8 * kSides) {
        const std::uint8_t *codes = job.tile + job.tiles->codes + 4 * first, *q = rows;
        const std::uint8_t* fetch = job.tile + job.tiles->codes + kAhead; // goes evenly through scales and codes
        __m256 total[kRows][kSides] = {};
        for (std::int64_t s = 0; s < job.cut->count; ++s) {
            __m256i dot[kRows][kSides] = {};
            const std::int64_t units = job.cut->segment_units(s);
            if constexpr (kBits == 16) dot_wide<kRows, kSides>(codes, q, row_bytes, units, fetch, dot);
            else dot_narrow<kRows, kSides>(codes, q, row_bytes, units, fetch, dot);
            codes += units * 128, fetch += units * 128, q += units * kBits;
            if constexpr (kRows == 1) ask(fetch);
            fetch += job.tiles->beside;
            for (int side = 0; side < kSides; ++side) {
                const std::int64_t o = s * kTile + first + 8 * side;
                const __m256 step_of_weight = scales<kType>(job.tile + o * size);
                __m256i z = _mm256_set1_epi32(8);
                if (job.zeros)
                    z = _mm256_cvtepu8_epi32(
                        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(job.tile + job.tiles->zeros + o)));
                for (int m = 0; m < kRows; ++m) {
                    const std::uint8_t* row = rows + m * row_bytes;
                    const __m256i sum = _mm256_sub_epi32(
                        dot[m][side], _mm256_mullo_epi32(z, four(row + job.layout->sums + 4 * s)));
                    const __m256 step = _mm256_castsi256_ps(four(row + job.layout->steps + 4 * s));
                    total[m][side] =
                        _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(step_of_weight, step), total[m][side]);
                }
            }
        }
        for (int side = 0; side < kSides; ++side) {
            const std::int64_t o = first + 8 * side, left = job.outputs - o;
            if (left <= 0) break;
            const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)),
                                                     _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            const __m256 bias = job.bias == nullptr ? _mm256_setzero_ps() : _mm256_maskload_ps(job.bias + o, lanes);
            for (int m = 0; m < kRows; ++m)
                _mm256_maskstore_ps(y + m * job.y_stride + o, lanes, _mm256_add_ps(total[m][side], bias));
        }
    }
}

template <int kBits, ScaleType kType>
void multiply_typed(const TileJob& job) {
    const auto at = [&](std::int64_t m) { return job.rows + m * job.layout->bytes; };
    std::int64_t m = 0;
    for (; m + 4 <= job.count; m += 4) multiply_rows<kBits, 4, kType>(job, at(m), job.y + m * job.y_stride);
    for (; m < job.count; ++m) multiply_rows<kBits, 1, kType>(job, at(m), job.y + m * job.y_stride);
}

template <int kBits>
void multiply(const TileJob& job) {
    if (job.type == ScaleType::float16) return multiply_typed<kBits, ScaleType::float16>(job);
    if (job.type == ScaleType::bfloat16) return multiply_typed<kBits, ScaleType::bfloat16>(job);
    multiply_typed<kBits, ScaleType::float32>(job);
}

} // namespace

Kernels avx2_kernels(int activation_bits) {
    if (activation_bits == 16) return {round_row<16>, multiply<16>};
    return {round_row<8>, multiply<8>};
}

} // namespace planish

PLANISH_TARGET_END
#endif
