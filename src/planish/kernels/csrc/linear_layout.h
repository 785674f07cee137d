// What lies in a prepared weight, and in a rounded row; shared by the kernels of linear.h. Not for other users.
//
//   header, then one tile after another, each of kTile outputs (the last one padded with zeros):
//     scales of segment 0 (kTile of them), of segment 1, ...; then zeros the same way; padded to 64 bytes
//     codes: for each segment, for each eight channels of it: kTile words of 32 bits, one an output; byte j of a word
//     holds channel j in its low and channel 4 + j in its high half. Segments are padded to a multiple of eight channels.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "linear.h"

namespace planish {

constexpr std::int64_t kTile = 32;       // outputs side by side: two registers of sixteen
constexpr std::int64_t kSegment = 1024;  // channels whose sums of products stay within 32 bits, with room
constexpr std::int64_t kRowPanel = 64;  // rows that are rounded, and then met by every tile, at a time
constexpr std::int64_t kWide = 32639;    // 127 * 256 + 127: the largest 16-bit code whose two halves are signed bytes
constexpr std::int64_t kNarrow = 127;
constexpr float kLeast = 1e-30f;          // a segment whose entries are all smaller counts as zero

struct Header {
    std::uint32_t magic;
    ScaleType type;
    std::uint8_t zeros;
    std::uint16_t tile;
    std::int64_t out, in, group_size, bytes;
    std::int64_t reserved[3];
};
static_assert(sizeof(Header) == 64, "the codes behind it are aligned");
constexpr std::uint32_t kMagic = 0x31344c50; // "PL41"

inline std::int64_t up(std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline std::int64_t scale_size(ScaleType type) { return type == ScaleType::float32 ? 4 : 2; }

// How a row is cut: groups into equal parts of at most kSegment channels.
struct Segments {
    std::int64_t in, group_size, parts, part, count, units; // units: eights of channels in a row, padding included
    std::int64_t even; // this many segments, the first, are whole groups: where they lie is known without a division
    Segments(std::int64_t in, std::int64_t group_size)
        : in(in), group_size(group_size) {
        parts = (group_size + kSegment - 1) / kSegment;
        part = up((group_size + parts - 1) / parts, 8);
        parts = (group_size + part - 1) / part; // rounding up may have made one needless
        const std::int64_t whole = in / group_size, rest = in % group_size;
        count = whole * parts + (rest + part - 1) / part;
        units = whole * units_of(group_size) + units_of(rest);
        even = parts == 1 ? whole : 0;
    }
    // Units of n channels of one group.
    std::int64_t units_of(std::int64_t n) const { return n / part * (part / 8) + (n % part + 7) / 8; }
    std::int64_t group(std::int64_t s) const { return s / parts; }
    std::int64_t begin(std::int64_t s) const {
        return s < even ? s * group_size : s / parts * group_size + s % parts * part;
    }
    std::int64_t end(std::int64_t s) const {
        if (s < even) return (s + 1) * group_size;
        const std::int64_t group_start = s / parts * group_size;
        return std::min({begin(s) + part, std::min(in - group_start, group_size) + group_start});
    }
    std::int64_t segment_units(std::int64_t s) const { return s < even ? part / 8 : (end(s) - begin(s) + 7) / 8; }
};

struct Tiles {
    std::int64_t count, scales, zeros, codes, bytes; // offsets in a tile and bytes of it
    std::int64_t beside; // bytes of one segment in front of the codes
    Tiles(std::int64_t out, const Segments& cut, ScaleType type, bool with_zeros)
        : count((out + kTile - 1) / kTile), scales(0), zeros(cut.count * kTile * scale_size(type)),
          codes(up(zeros + (with_zeros ? cut.count * kTile : 0), 64)), bytes(codes + cut.units * kTile * 4),
          beside(kTile * (scale_size(type) + (with_zeros ? 1 : 0))) {}
};

// A rounded row: its codes, `unit` bytes for eight channels, then the segments' steps and sums.
struct RowLayout {
    std::int64_t unit, steps, sums, bytes;
    RowLayout(const Segments& cut, int activation_bits)
        : unit(activation_bits == 16 ? 16 : 8), steps(up(cut.units * unit, 64)), sums(steps + up(cut.count * 4, 64)),
          bytes(sums + up(cut.count * 4, 64)) {}
};

// One tile times some rows. `rows` are rounded by the same instruction set's `round`.
struct TileJob {
    const Segments* cut;
    const RowLayout* layout;
    const std::uint8_t* tile;
    const Tiles* tiles;
    ScaleType type;
    bool zeros;
    const float* bias; // of this tile's outputs, or null
    std::int64_t outputs; // <= kTile
    const std::uint8_t* rows;
    std::int64_t count;
    float* y;
    std::int64_t y_stride;
};

struct Kernels {
    void (*round)(const float* x, const Segments& cut, const RowLayout& layout, std::uint8_t* row);
    void (*multiply)(const TileJob& job);
};
Kernels portable_kernels(int activation_bits);
#if defined(__GNUC__) && defined(__x86_64__)
Kernels avx2_kernels(int activation_bits);
Kernels avx512_kernels(int activation_bits);
#endif
#if defined(__GNUC__) && defined(__aarch64__)
Kernels neon_kernels(int activation_bits);
#endif

inline float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float load_scale(const std::uint8_t* at, ScaleType type) {
    if (type == ScaleType::float32) {
        float value;
        std::memcpy(&value, at, 4);
        return value;
    }
    std::uint16_t h;
    std::memcpy(&h, at, 2);
    if (type == ScaleType::bfloat16) return from_bits(std::uint32_t{h} << 16);
    const std::uint32_t sign = std::uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u) return from_bits(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
    // shifted into place the exponent is too small by 112: multiplying by 2^112 mends normal and subnormal numbers alike
    return from_bits(sign | 0u) + (sign ? -1.0f : 1.0f) * from_bits(magnitude << 13) * from_bits(0x77800000u);
}

} // namespace planish
