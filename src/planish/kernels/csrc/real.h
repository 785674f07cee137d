// Half precision from and to float32, in arithmetic that compilers turn into vectors. Narrowing rounds half to even.
#pragma once
#include <cstdint>
#include <cstring>

namespace planish {

enum class Real : std::uint8_t { float32 = 0, float16 = 1, bfloat16 = 2, float64 = 3 };

struct Half {
    std::uint16_t bits;
};
struct BFloat {
    std::uint16_t bits;
};

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(BFloat x) { return float_of(std::uint32_t{x.bits} << 16); }
inline float widen(Half x) {
    const std::uint32_t magnitude = x.bits & 0x7FFFu, sign = std::uint32_t{x.bits & 0x8000u} << 16;
    const float value = float_of(magnitude << 13) * 0x1p112f; // the exponents' offsets differ by 112
    return float_of(bits_of(value) | sign | (magnitude >= 0x7C00u ? 0x7F800000u : 0u));
}

inline void narrow(float x, double& to) { to = static_cast<double>(x); }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, BFloat& to) {
    const std::uint32_t bits = bits_of(x), rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    to.bits = static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? bits >> 16 | 0x40u : rounded >> 16);
}
inline void narrow(float x, Half& to) {
    const std::uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
    const std::uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    // adding 1/2 leaves the bits of a subnormal half, rounded, at the end
    const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    std::uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477FF000u ? 0x7C00u : half; // 65520 and above
    half = magnitude > 0x7F800000u ? 0x7E00u : half;
    to.bits = static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000u));
}

} // namespace planish
