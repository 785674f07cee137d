// Drives the compiled w4a16 under the address and undefined-behaviour sanitizers: buffers of exactly the promised size,
// on the heap, at any element alignment, with awkward shapes; every result is compared with a loop in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>

#include "w4a16.h"

namespace {

template <class T>
struct Exact { // not a vector: its spare capacity would hide an overrun
    explicit Exact(std::int64_t n) : size(n), data(new T[static_cast<std::size_t>(n)]) {}
    std::int64_t size;
    std::unique_ptr<T[]> data;
};

} // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
    std::mt19937 random(1);
    auto draw = [&](std::int64_t low, std::int64_t high) {
        return std::uniform_int_distribution<std::int64_t>(low, high)(random);
    };
    std::normal_distribution<float> normal;
    for (int round = 0; round < rounds; ++round) {
        const bool large = round % 25 == 0; // crosses panels and starts threads
        const std::int64_t rows = draw(1, 5), in = large ? draw(1000, 2100) : draw(1, 150);
        const std::int64_t out = large ? draw(900, 1100) : draw(1, 10), group_size = draw(1, in);
        const std::int64_t words = (in + 7) / 8, groups = (in + group_size - 1) / group_size;
        Exact<float> x(rows * in), scale(out * groups), bias(out), y(rows * out);
        Exact<std::uint32_t> packed(out * words);
        Exact<std::uint8_t> zero(out * groups);
        for (std::int64_t i = 0; i < x.size; ++i) x.data[i] = normal(random);
        for (std::int64_t i = 0; i < scale.size; ++i) scale.data[i] = std::fabs(normal(random));
        for (std::int64_t i = 0; i < bias.size; ++i) bias.data[i] = normal(random);
        for (std::int64_t i = 0; i < packed.size; ++i) packed.data[i] = random();
        for (std::int64_t i = 0; i < zero.size; ++i) zero.data[i] = static_cast<std::uint8_t>(draw(0, 15));
        for (int isa = 0; isa <= static_cast<int>(planish::best_isa()); ++isa) {
            if (!planish::runs(static_cast<planish::Isa>(isa))) continue;
            for (std::int64_t i = 0; i < y.size; ++i) y.data[i] = std::numeric_limits<float>::quiet_NaN();
            planish::w4a16({x.data.get(), packed.data.get(), scale.data.get(), zero.data.get(),
                            round % 2 == 0 ? bias.data.get() : nullptr, y.data.get(), rows, in, out, group_size},
                           1 + round % 3, static_cast<planish::Isa>(isa));
            for (std::int64_t m = 0; m < rows; ++m)
                for (std::int64_t o = 0; o < out; ++o) {
                    double exact = round % 2 == 0 ? bias.data[o] : 0.0, size = std::fabs(exact);
                    for (std::int64_t k = 0; k < in; ++k) {
                        const std::int64_t g = o * groups + k / group_size;
                        const int code = (packed.data[o * words + k / 8] >> (4 * (k % 8))) & 15;
                        const double term = double(x.data[m * in + k]) * (code - zero.data[g]) * double(scale.data[g]);
                        exact += term;
                        size += std::fabs(term);
                    }
                    if (!(std::fabs(y.data[m * out + o] - exact) <= 1e-30 + (double(in) + 3) * 6e-8 * size)) {
                        std::printf("round %d isa %d: y[%d, %d] = %g, exactly %g\n", round, isa, int(m), int(o),
                                    double(y.data[m * out + o]), exact);
                        return 1;
                    }
                }
        }
    }
    std::puts("clean");
    return 0;
}
