// Codes of a float activation: signed integers, one scale and zero point a group of a row. The very numbers of the
// reference in ops.py, bit by bit: true division, round half to even, and its rules for what is not finite.
#pragma once
#include <cstdint>

#include "isa.h"
#include "real.h"

namespace planish {

struct QuantizeRows {
    const void* x;       // (rows, channels) of `type`: float32, float16 or bfloat16
    std::int8_t* codes;  // (rows, channels), written
    float* scale;        // (rows, groups), written
    std::int8_t* zero;   // (rows, groups), written
    std::int64_t rows, channels, group_size; // group_size in [1, channels]; the last group may be shorter
    int bits;            // 2 to 8
    bool symmetric;
    Real type;
    Real scale_type; // to which scales are rounded before codes are chosen: not float64
    float clip;      // share of the range that codes span, in (0, 1]
};

// Callers have checked shapes and strides, and runs(isa); threads >= 1.
void quantize_rows(const QuantizeRows& op, int threads, Isa isa);

} // namespace planish
