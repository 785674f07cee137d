// The panel kernel on x86: four products of bytes in an instruction (AVX-512 VNNI), or two (AVX2).
#include "qgemm.h"

#if defined(PLANISH_X86)
#include <immintrin.h>

#include <cstring>

PLANISH_TARGET("avx2,fma,f16c")
namespace planish {
namespace {
namespace avx2 {

struct Vector {
    using I = __m256i;
    using F = __m256;
    static constexpr int lanes = 8, vectors = 2, rows = 4;

    static I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
    static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static I spread(std::int32_t v) { return _mm256_set1_epi32(v); }
    static F spread(float v) { return _mm256_set1_ps(v); }
    static I plus(I a, I b) { return _mm256_add_epi32(a, b); }
    static I times(I a, I b) { return _mm256_mullo_epi32(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
    static I low_nibbles(I v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    static I high_nibbles(I v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
    static I load_words(const void* p, int count) {
        if (count == lanes) return load(p);
        const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_maskload_epi32(static_cast<const int*>(p), _mm256_cmpgt_epi32(spread(count), lane));
    }
    static I load_ints(const std::int32_t* p) { return load(static_cast<const void*>(p)); }
    static I load_half(const std::uint16_t* p) {
        return _mm256_castps_si256(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static I load_bfloat(const std::uint16_t* p) {
        return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
    }
    static I load_minus_bytes(const std::uint8_t* p) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_cvtepu8_epi32(bytes));
    }
    static void transpose(I (&v)[lanes]) {
        I a[8];
        for (int i = 0; i < 4; ++i) {
            a[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
            a[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
        }
        I b[8];
        for (int i = 0; i < 2; ++i) {
            b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
            b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
            v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
        }
    }
    static I as_ints(F v) { return _mm256_castps_si256(v); }
    static F as_float(I v) { return _mm256_castsi256_ps(v); }
    // acc plus products of nibbles with what lies at x: channels of the low ones, then of the high ones.
    static I pair(I acc, I low, I high, const std::int8_t* x) {
        const I sum = _mm256_add_epi16(_mm256_maddubs_epi16(low, load(x)), _mm256_maddubs_epi16(high, load(x + 32)));
        return plus(acc, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
    static I quarters(const I* v) { // lane 4h + e: the sum of half h of v[e]
        const I a = plus(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
        const I b = plus(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
        return plus(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    }
    // Sums of eight vectors, or of the halves of four.
    static I gathered(const I (&v)[lanes], bool halves) {
        const I a = quarters(v);
        if (halves) return _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        const I b = quarters(v + 4);
        return plus(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    }
    static I quad(const std::int8_t* x) {
        std::int32_t word;
        std::memcpy(&word, x, 4);
        return _mm256_set1_epi32(word);
    }

    template <int R>
    static void dots(I (&sum)[R][vectors], const std::uint8_t* codes, const std::int8_t* x, std::int64_t quads,
                     bool narrow) {
        const std::int64_t stride = quads * 4;
        I acc[R][vectors]; // what is reached by reference would be stored at each step
        std::memcpy(acc, sum, sizeof acc);
        if (narrow) { // eight sums of two products of at most 15 * 128 stay below 2^15
            const I ones = _mm256_set1_epi16(1);
            for (std::int64_t q = 0; q < quads;) {
                const std::int64_t stop = quads - q < 8 ? quads : q + 8;
                I part[R][vectors] = {};
                for (; q < stop; ++q) {
                    const I w0 = load(codes + q * 64), w1 = load(codes + q * 64 + 32);
                    for (int r = 0; r < R; ++r) {
                        const I xq = quad(x + r * stride + q * 4);
                        part[r][0] = _mm256_add_epi16(part[r][0], _mm256_maddubs_epi16(w0, xq));
                        part[r][1] = _mm256_add_epi16(part[r][1], _mm256_maddubs_epi16(w1, xq));
                    }
                }
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < vectors; ++v)
                        acc[r][v] = plus(acc[r][v], _mm256_madd_epi16(part[r][v], ones));
            }
            std::memcpy(sum, acc, sizeof acc);
            return;
        }
        const I even = _mm256_set1_epi16(0xFF);
        for (std::int64_t q = 0; q < quads; ++q)
            for (int v = 0; v < vectors; ++v) {
                const I w = load(codes + q * 64 + v * 32);
                const I w0 = _mm256_and_si256(w, even), w1 = _mm256_srli_epi16(w, 8);
                for (int r = 0; r < R; ++r) {
                    const I xq = quad(x + r * stride + q * 4);
                    const I x0 = _mm256_srai_epi16(_mm256_slli_epi16(xq, 8), 8), x1 = _mm256_srai_epi16(xq, 8);
                    acc[r][v] = plus(acc[r][v], plus(_mm256_madd_epi16(w0, x0), _mm256_madd_epi16(w1, x1)));
                }
            }
        std::memcpy(sum, acc, sizeof acc);
    }
};

#include "qgemm_panel.h"

} // namespace avx2
} // namespace
} // namespace planish
PLANISH_TARGET_END

PLANISH_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
namespace planish {
namespace {
namespace avx512 {

struct Vector {
    using I = __m512i;
    using F = __m512;
    static constexpr int lanes = 16, vectors = 3, rows = 8;

    static I load(const void* p) { return _mm512_loadu_si512(p); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(void* p, I v) { _mm512_storeu_si512(p, v); }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static I spread(std::int32_t v) { return _mm512_set1_epi32(v); }
    static F spread(float v) { return _mm512_set1_ps(v); }
    static I plus(I a, I b) { return _mm512_add_epi32(a, b); }
    static I times(I a, I b) { return _mm512_mullo_epi32(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
    static I low_nibbles(I v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
    static I high_nibbles(I v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
    static I load_words(const void* p, int count) {
        return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1u), p);
    }
    static I load_ints(const std::int32_t* p) { return load(static_cast<const void*>(p)); }
    static I load_half(const std::uint16_t* p) {
        return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    }
    static I load_bfloat(const std::uint16_t* p) {
        return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
    }
    static I load_minus_bytes(const std::uint8_t* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_cvtepu8_epi32(bytes));
    }
    static void transpose(I (&v)[lanes]) {
        I a[16], b[16];
        for (int i = 0; i < 8; ++i) {
            a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
            a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
        }
        for (int i = 0; i < 4; ++i) { // rows 4i .. 4i+3: b[4i + j] holds columns j, j+4, j+8, j+12
            b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
            b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
        }
        for (int j = 0; j < 4; ++j) {
            const I low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), low2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
            const I high = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xDD), high2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xDD);
            v[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
            v[8 + j] = _mm512_shuffle_i32x4(low, low2, 0xDD);
            v[4 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
            v[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xDD);
        }
    }

    static I as_ints(F v) { return _mm512_castps_si512(v); }
    static F as_float(I v) { return _mm512_castsi512_ps(v); }
    // acc plus products of nibbles with what lies at x: channels of the low ones, then of the high ones.
    static I pair(I acc, I low, I high, const std::int8_t* x) {
        return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc, low, load(x)), high, load(x + 64));
    }
    static I quarters(const I* v) { // lane 4q + e: the sum of quarter q of v[e]
        const I a = plus(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
        const I b = plus(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
        return plus(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    static I joined(I a, I b) { // quarters of a in pairs, then those of b
        return plus(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
    }
    // Sums of sixteen vectors, or of the halves of eight.
    static I gathered(const I (&v)[lanes], bool halves) {
        const I a = joined(quarters(v), quarters(v + 4));
        if (halves)
            return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15), a);
        return joined(a, joined(quarters(v + 8), quarters(v + 12)));
    }

    template <int R>
    static void dots(I (&sum)[R][vectors], const std::uint8_t* codes, const std::int8_t* x, std::int64_t quads, bool) {
        const std::int64_t stride = quads * 4;
        I acc[R][vectors]; // what is reached by reference would be stored at each step
        std::memcpy(acc, sum, sizeof acc);
        for (std::int64_t q = 0; q < quads; ++q) {
            const I w0 = load(codes + q * 192), w1 = load(codes + q * 192 + 64), w2 = load(codes + q * 192 + 128);
            for (int r = 0; r < R; ++r) {
                std::int32_t word;
                std::memcpy(&word, x + r * stride + q * 4, 4);
                const I xq = _mm512_set1_epi32(word);
                acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w0, xq);
                acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w1, xq);
                acc[r][2] = _mm512_dpbusd_epi32(acc[r][2], w2, xq);
            }
        }
        std::memcpy(sum, acc, sizeof acc);
    }
};

#include "qgemm_panel.h"

} // namespace avx512
} // namespace
} // namespace planish
PLANISH_TARGET_END

namespace planish {
const PanelKernel kPanelAvx2 = avx2::kKernel;
const PanelKernel kPanelAvx512 = avx512::kKernel;
} // namespace planish
#endif
