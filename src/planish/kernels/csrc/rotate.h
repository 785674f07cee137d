// y[k B + j] = sum_i x[index[k B + i]] blocks[k, i, j] for each row.
#pragma once
#include <cstdint>

#include "isa.h"
#include "real.h"

namespace planish {

struct Rotate {
    const void* x;      // (rows, count * size) of `type`
    const void* blocks; // (count, size, size) of double if type is float64, else of float
    const std::int64_t* index; // (count * size), each in [0, count * size), or null
    void* y;            // (rows, count * size) of `type`, written
    std::int64_t rows, count, size;
    std::int64_t stride; // from block to block: size * size, or 0 where one matrix serves all
    Real type;
};

// Sums in double for float64, else in float, rounded once at the end. Callers have checked shapes and strides, and
// runs(isa); threads >= 1. Throws std::out_of_range for an index that is none, std::bad_alloc.
void rotate(const Rotate& op, int threads, Isa isa);

} // namespace planish
