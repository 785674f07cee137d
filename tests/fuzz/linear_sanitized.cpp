// Drives the streaming product under sanitizers: buffers of exactly the promised size, awkward shapes, every instruction
// set, several threads, two products of one activation; results are compared with a loop in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>

#include "isa.h"
#include "linear.h"
#include "read.h"

namespace {

template <class T>
struct Exact { // not a vector: its spare capacity would hide an overrun
    explicit Exact(std::int64_t n) : size(n), data(new T[static_cast<std::size_t>(n)]) {}
    std::int64_t size;
    std::unique_ptr<T[]> data;
};

struct Aligned {
    explicit Aligned(std::size_t n) : size(n), data(::operator new(n, std::align_val_t{64})) {}
    ~Aligned() { ::operator delete(data, std::align_val_t{64}); }
    std::size_t size;
    void* data;
};

} // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
    std::mt19937 random(1);
    auto draw = [&](std::int64_t low, std::int64_t high) {
        return std::uniform_int_distribution<std::int64_t>(low, high)(random);
    };
    std::normal_distribution<float> normal;
    for (int round = 0; round < rounds; ++round) {
        const bool large = round % 20 == 0; // crosses segments and starts threads
        const std::int64_t rows = large ? draw(60, 70) : draw(1, 12), in = large ? draw(1000, 2600) : draw(1, 150);
        const std::int64_t out = large ? draw(90, 200) : draw(1, 40), group_size = draw(1, in);
        const std::int64_t words = (in + 7) / 8, groups = (in + group_size - 1) / group_size;
        Exact<float> x(rows * in), scale(out * groups), bias(out), y(rows * out), y2(rows * out);
        Exact<std::uint32_t> packed(out * words);
        Exact<std::uint8_t> zero(out * groups);
        for (std::int64_t i = 0; i < x.size; ++i) x.data[i] = normal(random);
        for (std::int64_t i = 0; i < scale.size; ++i) scale.data[i] = std::fabs(normal(random));
        for (std::int64_t i = 0; i < bias.size; ++i) bias.data[i] = normal(random);
        for (std::int64_t i = 0; i < packed.size; ++i) packed.data[i] = random();
        for (std::int64_t i = 0; i < zero.size; ++i) zero.data[i] = static_cast<std::uint8_t>(draw(0, 15));
        const bool zeros = round % 3 != 0;
        const auto type = planish::ScaleType::float32;
        Aligned data(planish::prepared_bytes(out, in, group_size, type, zeros));
        planish::prepare(packed.data.get(), scale.data.get(), type, zeros ? zero.data.get() : nullptr, out, in,
                         group_size, data.data, 1 + round % 2);
        if (!planish::prepared_for(data.data, data.size, out, in, group_size) ||
            planish::prepared_for(data.data, data.size, out + 64, in, group_size) ||
            planish::prepared_for(data.data, data.size - 1, out, in, group_size))
            return std::puts("the header lies"), 1;
        const planish::Linear weight{out, in, group_size, data.data};
        for (const auto isa : {planish::Isa::portable, planish::Isa::neon, planish::Isa::avx2, planish::Isa::avx512}) {
            if (!planish::runs(isa)) continue;
            planish::use(isa);
            planish::read_all(data.data, static_cast<std::int64_t>(data.size), 1 + round % 3);
            for (const int bits : {16, 8}) {
                for (std::int64_t i = 0; i < y.size; ++i) y.data[i] = y2.data[i] = std::numeric_limits<float>::quiet_NaN();
                const planish::Product both[2] = {{weight, bias.data.get(), y.data.get(), out},
                                                  {weight, nullptr, y2.data.get(), out}};
                planish::linear(both, 2, x.data.get(), rows, in, bits, 1 + round % 3);
                for (std::int64_t m = 0; m < rows; ++m)
                    for (std::int64_t o = 0; o < out; ++o) {
                        double exact = bias.data[o], size = std::fabs(exact), most = 0;
                        for (std::int64_t k = 0; k < in; ++k) most = std::max(most, std::fabs(double(x.data[m * in + k])));
                        double weights = 0;
                        for (std::int64_t k = 0; k < in; ++k) {
                            const std::int64_t g = o * groups + k / group_size;
                            const int code = (packed.data[o * words + k / 8] >> (4 * (k % 8))) & 15;
                            const double w = (code - (zeros ? zero.data[g] : 8)) * double(scale.data[g]);
                            exact += double(x.data[m * in + k]) * w;
                            weights += std::fabs(w);
                            size += std::fabs(double(x.data[m * in + k])) * 16 * double(scale.data[g]);
                        }
                        const double step = most / (bits == 16 ? 32639 : 127);
                        const double bound = weights * step * 0.501 + (double(groups) + 12) * 1.2e-7 * size + 1e-28;
                        const double first = y.data[m * out + o], second = y2.data[m * out + o] + double(bias.data[o]);
                        if (!(std::fabs(first - exact) <= bound) || !(std::fabs(second - exact) <= bound)) {
                            std::printf("round %d isa %d bits %d: y[%d, %d] = %g and %g, exactly %g +- %g\n", round,
                                        int(isa), bits, int(m), int(o), first, second, exact, bound);
                            return 1;
                        }
                    }
            }
        }
    }
    std::puts("clean");
    return 0;
}
