// AVX-512 with VNNI: one 64-byte load holds eight channels of sixteen outputs. Its low and high halves of bytes meet four
// channels each in one vpdpbusd; an activation of 16 bits is 256 * high + low, both signed bytes, in two of them.
#include <type_traits>

#include "isa.h"
#include "linear_layout.h"

#if defined(PLANISH_X86)
#include <immintrin.h>

PLANISH_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

namespace planish {
namespace {

constexpr std::int64_t kAhead = 6144; // bytes asked for before they are needed: memory answers late, products are quick

// The largest magnitude of a segment as an integer: not finite from 0x7F800000 on.
inline std::int32_t largest(const float* x, std::int64_t n) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i most = _mm512_setzero_si512();
    std::int64_t k = 0;
    for (; k + 16 <= n; k += 16) most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(x + k), magnitude));
    if (k < n) {
        const __mmask16 lanes = static_cast<__mmask16>((1u << (n - k)) - 1u);
        most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(lanes, x + k), magnitude));
    }
    return _mm512_reduce_max_epi32(most);
}

template <int kBits>
void round_row(const float* x, const Segments& cut, const RowLayout& layout, std::uint8_t* row) {
    constexpr float limit = kBits == 16 ? kWide : kNarrow;
    float* steps = reinterpret_cast<float*>(row + layout.steps);
    std::int32_t* sums = reinterpret_cast<std::int32_t*>(row + layout.sums);
    for (std::int64_t s = 0; s < cut.count; ++s) {
        const std::int64_t begin = cut.begin(s), n = cut.end(s) - begin;
        const std::int32_t bits = largest(x + begin, n);
        const float most = from_bits(static_cast<std::uint32_t>(bits));
        const bool finite = bits < 0x7F800000, zero = !finite || !(most > kLeast);
        steps[s] = !finite ? from_bits(0x7FC00000u) : zero ? 0.0f : most / limit;
        const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : limit / most);
        const __mmask16 all = zero ? 0 : 0xFFFF; // 0 * NaN is not 0: read nothing
        __m512i sum = _mm512_setzero_si512();
        for (std::int64_t k = 0; k < n; k += 16) {
            const __mmask16 lanes = n - k >= 16 ? all : all & static_cast<__mmask16>((1u << (n - k)) - 1u);
            const __m512i q =
                _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + begin + k), inverse));
            sum = _mm512_add_epi32(sum, q);
            const bool both = n - k > 8; // units of eight channels that these sixteen fill
            const __m128i low = _mm512_cvtepi32_epi8(q);
            if constexpr (kBits == 16) {
                const __m128i high =
                    _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(row), _mm_unpacklo_epi64(high, low));
                if (both) _mm_storeu_si128(reinterpret_cast<__m128i*>(row + 16), _mm_unpackhi_epi64(high, low));
            } else {
                if (both) _mm_storeu_si128(reinterpret_cast<__m128i*>(row), low);
                else _mm_storel_epi64(reinterpret_cast<__m128i*>(row), low);
            }
            row += (both ? 2 : 1) * (kBits == 16 ? 16 : 8);
        }
        sums[s] = _mm512_reduce_add_epi32(sum);
    }
}

// sum += four unsigned bytes of a times four signed ones of b, in each lane. Written out because compilers copy the sums
// of the intrinsic from register to register, twice for each product.
inline void add_products(__m512i& sum, __m512i a, __m512i b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

inline __m512i four(const std::uint8_t* at) {
    std::int32_t word;
    std::memcpy(&word, at, 4);
    return _mm512_set1_epi32(word);
}

template <ScaleType kType>
inline __m512 scales(const std::uint8_t* at) {
    if constexpr (kType == ScaleType::float32) return _mm512_loadu_ps(at);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    if constexpr (kType == ScaleType::float16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void ask(const std::uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

// One tile times kRows rows. A single row spreads its sums over two sets of registers: the latency of one would show.
// As many bytes as the tile has are asked for from `fetch` on, evenly: a distance from the codes alone would leave out, at
// the turn of a tile, as many bytes as there are scales.
template <int kBits, int kRows, ScaleType kType>
void multiply_rows(const TileJob& job, const std::uint8_t* rows, float* y, const std::uint8_t* fetch) {
    constexpr int kHalves = kBits / 8, kUnit = kBits, kSets = kRows <= 2 ? 2 : 1;
    const std::int64_t row_bytes = job.layout->bytes, size = scale_size(kType);
    const std::uint8_t *codes = job.tile + job.tiles->codes, *scale = job.tile, *zero = job.tile + job.tiles->zeros;
    const std::uint8_t* q = rows;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 total[kRows][2] = {};
    for (std::int64_t s = 0; s < job.cut->count; ++s) {
        __m512i dot[kSets][kRows][kHalves][2] = {};
        for (std::int64_t u = job.cut->segment_units(s); u > 0; --u, codes += 128, q += kUnit, fetch += 128) {
            ask(fetch);
            ask(fetch + 64);
            const __m512i w0 = _mm512_load_si512(codes), w1 = _mm512_load_si512(codes + 64);
            const __m512i even[2] = {_mm512_and_si512(w0, nibble), _mm512_and_si512(w1, nibble)};
            const __m512i odd[2] = {_mm512_and_si512(_mm512_srli_epi16(w0, 4), nibble),
                                    _mm512_and_si512(_mm512_srli_epi16(w1, 4), nibble)};
            for (int m = 0; m < kRows; ++m)
                for (int h = 0; h < kHalves; ++h) {
                    const __m512i first = four(q + m * row_bytes + 8 * h), second = four(q + m * row_bytes + 8 * h + 4);
                    for (int side = 0; side < 2; ++side) {
                        add_products(dot[0][m][h][side], even[side], first);
                        add_products(dot[kSets - 1][m][h][side], odd[side], second);
                    }
                }
        }
        ask(fetch);
        if (job.tiles->beside > 64) ask(fetch + 64);
        fetch += job.tiles->beside;
        for (int side = 0; side < 2; ++side) {
            const __m512 step_of_weight = scales<kType>(scale + (s * kTile + 16 * side) * size);
            __m512i z = _mm512_set1_epi32(8);
            if (job.zeros) {
                const std::uint8_t* at = zero + s * kTile + 16 * side;
                z = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
            }
            for (int m = 0; m < kRows; ++m) {
                const std::uint8_t* row = rows + m * row_bytes;
                __m512i sum = dot[0][m][kHalves - 1][side];
                if constexpr (kSets == 2) sum = _mm512_add_epi32(sum, dot[1][m][kHalves - 1][side]);
                if constexpr (kHalves == 2) {
                    __m512i high = dot[0][m][0][side];
                    if constexpr (kSets == 2) high = _mm512_add_epi32(high, dot[1][m][0][side]);
                    sum = _mm512_add_epi32(sum, _mm512_slli_epi32(high, 8));
                }
                sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(z, four(row + job.layout->sums + 4 * s)));
                const __m512 step = _mm512_castsi512_ps(four(row + job.layout->steps + 4 * s));
                total[m][side] =
                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(step_of_weight, step), total[m][side]);
            }
        }
    }
    for (int side = 0; side < 2; ++side) {
        const std::int64_t left = job.outputs - 16 * side;
        if (left <= 0) break;
        const __mmask16 lanes = left >= 16 ? __mmask16(0xFFFF) : static_cast<__mmask16>((1u << left) - 1u);
        const __m512 bias =
            job.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes, job.bias + 16 * side);
        for (int m = 0; m < kRows; ++m)
            _mm512_mask_storeu_ps(y + m * job.y_stride + 16 * side, lanes, _mm512_add_ps(total[m][side], bias));
    }
}

template <int kBits, ScaleType kType>
void multiply_typed(const TileJob& job) {
    constexpr int kMost = kBits == 16 ? 5 : 6; // rows whose sums fit the registers
    const std::int64_t turns = (job.count + kMost - 1) / kMost;
    for (std::int64_t turn = 0, m = 0; turn < turns; ++turn) {
        const auto next = [&](auto rows) {
            // A single turn asks for what comes soon, codes of the same tile from the start; the last of several for the next.
            const std::int64_t ahead =
                turns == 1 ? job.tiles->codes + kAhead : turn + 1 == turns ? job.tiles->bytes : 0;
            multiply_rows<kBits, rows, kType>(job, job.rows + m * job.layout->bytes, job.y + m * job.y_stride,
                                              job.tile + ahead);
            m += rows;
        };
        switch ((job.count - m + turns - turn - 1) / (turns - turn)) { // as even as can be
        case 1: next(std::integral_constant<int, 1>()); break;
        case 2: next(std::integral_constant<int, 2>()); break;
        case 3: next(std::integral_constant<int, 3>()); break;
        case 4: next(std::integral_constant<int, 4>()); break;
        case 5: next(std::integral_constant<int, 5>()); break;
        default: next(std::integral_constant<int, kMost>()); break;
        }
    }
}

template <int kBits>
void multiply(const TileJob& job) {
    if (job.type == ScaleType::float16) return multiply_typed<kBits, ScaleType::float16>(job);
    if (job.type == ScaleType::bfloat16) return multiply_typed<kBits, ScaleType::bfloat16>(job);
    multiply_typed<kBits, ScaleType::float32>(job);
}

} // namespace

Kernels avx512_kernels(int activation_bits) {
    if (activation_bits == 16) return {round_row<16>, multiply<16>};
    return {round_row<8>, multiply<8>};
}

} // namespace planish

PLANISH_TARGET_END
#endif
