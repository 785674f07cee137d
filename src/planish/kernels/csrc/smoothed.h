// The smoothed Leaky ReLU (planish.nn.sau) and its gradients, in one pass each, on float32.
//
//     y = L_a(x) + (1 - a) s tail(|x| / s)      L_a(x) = x for x >= 0, a x below; tail as in planish/nn/profiles.py
#pragma once
#include <cstdint>

#include "isa.h"

namespace planish {

enum class Smoothing { gaussian = 0, logistic, laplace, uniform, triangular, epanechnikov, student };
constexpr int kSmoothings = 7;

struct Smoothed {
    const float* x;    // (outer, channels, inner), dense
    const float* grad; // as x: the gradient that comes; null on the way forward
    float* out;        // as x, written: y, or the gradient by x; on the way back null where that is not wanted
    const float* slope;
    std::int64_t slopes; // 1 or `channels`
    const float* sigma;
    std::int64_t sigmas; // 1 or `channels`
    std::int64_t outer, channels, inner;
    float* by_slope; // (slopes), written on the way back, or null
    float* by_sigma; // (sigmas), likewise
    Smoothing kernel;
};

// Curves are within a few units in the last place of the exact ones for the rounded |x| / s. Sums run in double over short
// sums in float, in an order that the number of threads does not change. Callers have checked shapes and runs(isa).
// Throws std::bad_alloc.
void smoothed(const Smoothed& op, int threads, Isa isa);

} // namespace planish
