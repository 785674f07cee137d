// y = ((xq - x_zero) * x_scale) W^T + low up^T + bias, with W = (codes - zero) * scale of 1 to 8 bits and xq of int8.
//
// Channels are cut into runs: where a group of either side ends, and after kRun channels. Within a run all is integer and
// exact; a run's integer is converted to float32, and multiplied by its two scales and added to y, the second of them in
// one fused step. Runs come in their order whatever the instruction set, the number of threads and the other rows, so all
// of these give the same bits, and
//
//     |y - exact| <= (runs + rank + 4) 2^-24 (sum over runs |integer * scale * x_scale| + sum over ranks |low up| + |bias|)
//
// as long as nothing leaves the range of normal floats. `low` is the activation times the branch's first factor.
#pragma once
#include <cstdint>

#include "isa.h"
#include "real.h"

namespace planish {



struct QGemm {
    const std::int8_t* xq;     // (rows, in)
    const float* x_scale;      // (rows, x_groups)
    const std::int8_t* x_zero; // (rows, x_groups) or null for 0
    const std::uint8_t* packed; // (out, 4 * ceil(in * bits / 32) bytes), a little-endian stream of bits
    const void* scale;         // (out, groups) in scale_type: not float64
    const std::uint8_t* zero;  // (out, groups)
    const float* bias;         // (out) or null
    const float* low;          // (rows, rank) or null
    const float* up;           // (out, rank), if there is `low`
    float* y;                  // (rows, out), written
    std::int64_t rows, in, out, group_size, x_group_size, rank; // sizes of groups in [1, in]
    int bits;
    Real scale_type;
};

// Callers have checked shapes and strides, and runs(isa); threads >= 1. Throws std::bad_alloc.
void qgemm(const QGemm& op, int threads, Isa isa);

// ---- between qgemm.cpp, which walks, and the instruction sets, which compute

constexpr std::int64_t kRun = 512; // channels: 512 * 255 * 255 is far from the end of int32

// One run of channels of a panel, against some rows. A quad is four channels of each of the panel's outputs, side by side.
struct Tile {
    const std::uint8_t* codes;     // (quads, outputs, 4)
    std::int64_t quads;
    const std::int8_t* x;          // (rows, quads, 4), 0 outside the run
    std::int64_t rows;
    const std::int32_t* x_sum;     // (rows), of x
    const std::int32_t* x_zero;    // (rows) or null
    const float* x_scale;          // (rows)
    const float* scale;            // (outputs)
    const std::int32_t* minus_zero; // (outputs), the code that stands for 0, negated
    const std::int32_t* sum;       // (outputs) of code - zero over the run, if there is x_zero
    float* y;                      // (rows, outputs), added to
    bool narrow;                   // codes below 16
};

// One row against outputs [first, last): each row of codes goes by as it lies, lanes hold runs, and `lanes` sums at a time
// are turned so that lanes hold outputs. For runs that are groups of the weight, see PanelKernel::streams.
struct Stream {
    const QGemm* op;
    std::int64_t length, runs;      // channels of a run, their number
    const std::int8_t* x;           // for each vector of codes: its low nibbles' channels, then its high nibbles'
    const std::int32_t* x_sum;      // (runs), then zeros for one more vector
    const float* x_scale;           // (runs)
    std::int64_t first, last;
};

struct PanelKernel {
    int outputs; // of a panel
    int lanes;
    bool streams; // whether there is `stream`: for runs of a multiple of 8 * lanes channels, or of 4 * lanes
    // Words [first, first + count) of each row of codes; a word has one quad, or two of alternate nibbles.
    void (*decode)(const std::uint8_t* const* rows, std::int64_t first, std::int64_t count, bool nibbles,
                   std::uint8_t* codes);
    // Any bits: octets [first, first + count) of each row, of which `bytes` are there; an octet has two quads.
    void (*decode_any)(const std::uint8_t* const* rows, std::int64_t first, std::int64_t count, int bits,
                       std::int64_t bytes, std::uint8_t* codes);
    // (outputs, n) of the rows, transposed to float32 (n, outputs).
    void (*scales)(const void* const* rows, Real type, std::int64_t n, float* out);
    void (*minus_zeros)(const std::uint8_t* const* rows, std::int64_t n, std::int32_t* out);
    // Rows of x to the order of quads that decode gives, in place, by octets.
    void (*deal)(std::int8_t* x, std::int64_t octets);
    std::int32_t (*total)(const std::int8_t* x, std::int64_t n);
    void (*sums)(const std::uint8_t* codes, std::int64_t quads, const std::int8_t* ones, bool narrow, std::int32_t* sum);
    // y = bias + low up^T: bias (outputs), low (rows, rank), up (rank, outputs).
    void (*start)(const float* bias, const float* low, const float* up, std::int64_t rank, std::int64_t rows, float* y);
    void (*tile)(const Tile& tile);
    void (*stream)(const Stream& stream);
};

extern const PanelKernel kPanelPortable, kPanelAvx2, kPanelAvx512;

} // namespace planish
