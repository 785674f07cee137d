// y = x W^T + bias with W held as 4-bit codes: float32 activations, one scale and zero point per group of input channels.
#pragma once
#include <cstdint>

#include "isa.h"

namespace planish {

struct W4A16 {
    const float* x;              // (rows, in), contiguous
    const std::uint32_t* packed; // (out, words), element 8k+j in bits 4j..4j+3 of word k
    const float* scale;          // (out, groups)
    const std::uint8_t* zero;    // (out, groups)
    const float* bias;           // (out) or null
    float* y;                    // (rows, out), contiguous, written
    std::int64_t rows, in, out, group_size;
};

// Callers have checked shapes and strides; runs(isa) must hold; threads >= 1.
void w4a16(const W4A16& op, int threads, Isa isa);

} // namespace planish
