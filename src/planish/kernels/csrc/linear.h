// y = x W^T + bias with 4-bit weights, repacked once into the order in which they are streamed.
//
// The activation is rounded, a segment of the row at a time, to 16-bit integers (relative error about 1e-5 of the
// segment's largest entry) or, if asked for, to 8 bits; products and sums of a segment are then exact integers:
//
//     y[o] = bias[o] + sum over segments of scale[o] * step * (sum_k code[o, k] q[k] - zero[o] * sum_k q[k])
//
// A segment is a group of the weight, or an equal part of it where the group is longer than kSegment. A row's result
// depends neither on the number of threads nor on the other rows. A segment that holds NaN or infinity gives NaN.
#pragma once
#include <cstddef>
#include <cstdint>

namespace planish {

enum class ScaleType : std::uint8_t { float32 = 0, float16 = 1, bfloat16 = 2 };

struct Linear {
    std::int64_t out, in, group_size; // 1 <= group_size <= in; the last group may be shorter
    const void* data;                 // what prepare() wrote; 64-byte aligned
};

// Bytes of the prepared weight. Without zeros every code is relative to 8.
std::size_t prepared_bytes(std::int64_t out, std::int64_t in, std::int64_t group_size, ScaleType type, bool zeros);

// Repack. `packed`: (out, ceil(in / 8)) words, element 8k+j in bits 4j..4j+3 of word k; `scale`: (out, groups) in `type`;
// `zero`: (out, groups) of 0..15, or null for 8 everywhere; `data`: prepared_bytes() long, 64-byte aligned.
void prepare(const std::uint32_t* packed, const void* scale, ScaleType type, const std::uint8_t* zero, std::int64_t out,
             std::int64_t in, std::int64_t group_size, void* data, int threads);

// Whether `data`, `bytes` long, was prepared for this shape.
bool prepared_for(const void* data, std::size_t bytes, std::int64_t out, std::int64_t in, std::int64_t group_size);

// One of several products of the same activation. Strides are in elements, from row to row.
struct Product {
    Linear weight;
    const float* bias; // (out) or null
    float* y;          // (rows, out), written; must not overlap x
    std::int64_t y_stride;
};

// All products of x (rows, in); in, and the segments, must be the same for all. activation_bits is 16 or 8, threads >= 1.
void linear(const Product* products, int count, const float* x, std::int64_t rows, std::int64_t x_stride,
            int activation_bits, int threads);

inline void linear(const Linear& weight, const float* x, std::int64_t rows, std::int64_t x_stride, const float* bias,
                   float* y, std::int64_t y_stride, int activation_bits, int threads) {
    const Product one{weight, bias, y, y_stride};
    linear(&one, 1, x, rows, x_stride, activation_bits, threads);
}

} // namespace planish
