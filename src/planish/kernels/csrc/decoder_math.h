// What a decoder computes beside its matrix products, in versions for each instruction set.
#pragma once
#include <cstdint>

#include "isa.h"

namespace planish {

enum class Kind { float32 = 0, float16 = 1, bfloat16 = 2, int8 = 3 }; // of a dense matrix's entries
struct Half {
    std::uint16_t bits;
};
struct Brain {
    std::uint16_t bits;
};
float to_float(Half h);
float to_float(Brain b);
Half to_half(float v); // to nearest even; larger values become the largest half

struct Attend { // one row against the cached positions [begin, end) of one key-value head
    std::int64_t heads, head_dim; // query heads that share it; padded to a multiple of 16
    std::int64_t begin, end, stride; // stride: scores kept for one head
    float scale, softcap; // softcap 0: none
    bool half; // the cache holds float16
};

struct Math {
    // y = x / rms(x) * weight
    void (*norm)(const float* x, const float* weight, float eps, std::int64_t n, float* y);
    void (*add)(float* x, const float* y, std::int64_t n);
    // y = act(g) * u; gate 0: silu, 1: gelu by tanh, 2: gelu
    void (*gate_up)(const float* g, const float* u, int gate, std::int64_t n, float* y);
    void (*attend)(const Attend& a, const float* q, const void* keys, const void* values, float* scores, float* out);
    // y[r] = w[r] . x for rows [first, last)
    void (*dots)(const void* w, Kind kind, const float* x, std::int64_t n, std::int64_t first, std::int64_t last,
                 float* y);
};

const Math& math_of(Isa isa);

} // namespace planish
