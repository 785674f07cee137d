#include "read.h"

#include <atomic>
#include <cstring>

#include "isa.h"
#include "pool.h"

#if defined(PLANISH_X86)
#include <immintrin.h>
#endif

namespace planish {
namespace {

constexpr std::int64_t kStep = 256;

std::uint64_t read_portable(const unsigned char* at, std::int64_t bytes) {
    std::uint64_t sum[8] = {};
    for (; bytes >= 64; bytes -= 64, at += 64) {
        std::uint64_t words[8];
        std::memcpy(words, at, 64);
        for (int i = 0; i < 8; ++i) sum[i] ^= words[i];
    }
    std::uint64_t all = 0;
    for (const std::uint64_t part : sum) all ^= part;
    for (; bytes > 0; --bytes) all ^= *at++;
    return all;
}

#if defined(PLANISH_X86)
PLANISH_TARGET("avx512f")
std::uint64_t read_avx512(const unsigned char* at, std::int64_t bytes) {
    __m512i sum[4] = {};
    for (; bytes >= kStep; bytes -= kStep, at += kStep)
        for (int i = 0; i < 4; ++i) sum[i] = _mm512_xor_si512(sum[i], _mm512_loadu_si512(at + 64 * i));
    const __m512i all = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
    std::uint64_t words[8], result = read_portable(at, bytes);
    _mm512_storeu_si512(words, all);
    for (const std::uint64_t word : words) result ^= word;
    return result;
}
PLANISH_TARGET_END

PLANISH_TARGET("avx2")
std::uint64_t read_avx2(const unsigned char* at, std::int64_t bytes) {
    __m256i sum[8] = {};
    for (; bytes >= kStep; bytes -= kStep, at += kStep)
        for (int i = 0; i < 8; ++i)
            sum[i] = _mm256_xor_si256(sum[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * i)));
    std::uint64_t result = read_portable(at, bytes);
    for (const __m256i part : sum) {
        std::uint64_t words[4];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), part);
        for (const std::uint64_t word : words) result ^= word;
    }
    return result;
}
PLANISH_TARGET_END
#endif

} // namespace

std::uint64_t read_all(const void* data, std::int64_t bytes, int threads) {
    auto read = read_portable;
#if defined(PLANISH_X86)
    if (active_isa() == Isa::avx2) read = read_avx2;
    if (active_isa() == Isa::avx512) read = read_avx512;
#endif
    const std::int64_t parts = threads <= 1 ? 1 : threads * 8, share = bytes / parts / kStep * kStep;
    std::atomic<std::uint64_t> result{0};
    parallel(threads, parts, [&](std::int64_t i) {
        const std::int64_t length = i + 1 < parts ? share : bytes - i * share;
        result.fetch_xor(read(static_cast<const unsigned char*>(data) + i * share, length));
    });
    return result.load();
}

} // namespace planish
