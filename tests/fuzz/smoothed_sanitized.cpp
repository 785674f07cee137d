// Random shapes through the smooth unit, on buffers of exactly the promised size; the sums of all instruction sets agree.
#include "smoothed.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using namespace planish;

int main(int, char** argv) {
    std::mt19937 random(7);
    const auto upto = [&](int n) { return static_cast<std::int64_t>(random() % static_cast<unsigned>(n)) + 1; };
    std::normal_distribution<float> normal;
    for (int round = 0; round < std::atoi(argv[1]); ++round) {
        const bool shared = round % 3 == 0;
        const std::int64_t outer = shared ? 1 : upto(40), channels = shared ? 1 : upto(round % 5 == 0 ? 1500 : 40);
        const std::int64_t inner = shared ? upto(40000) : upto(round % 2 ? 4 : 150), n = outer * channels * inner;
        std::vector<float> x(n), grad(n), out(n), slope(upto(2) == 1 ? 1 : channels), sigma(upto(2) == 1 ? 1 : channels);
        for (std::vector<float>* v : {&x, &grad, &slope}) {
            for (float& value : *v) value = normal(random);
        }
        for (float& value : sigma) value = std::fabs(normal(random)) + 0.1f;
        const std::int64_t slopes = static_cast<std::int64_t>(slope.size()), sigmas = static_cast<std::int64_t>(sigma.size());
        const std::int64_t used = slopes == 1 && sigmas == 1 ? 1 : channels; // as the caller has it: one run for all
        const Smoothing kernel = static_cast<Smoothing>(round % kSmoothings);
        std::vector<float> expected;
        for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
            if (!runs(isa)) continue;
            std::vector<float> by_slope(slope.size()), by_sigma(sigma.size());
            Smoothed op{x.data(),  nullptr,  out.data(), slope.data(), slopes,
                        sigma.data(), sigmas, used == 1 ? 1 : outer, used, used == 1 ? n : inner,
                        nullptr,   nullptr,  kernel};
            smoothed(op, 3, isa);
            op.grad = grad.data(), op.by_slope = by_slope.data(), op.by_sigma = by_sigma.data();
            if (round % 4 == 0) op.out = nullptr;
            smoothed(op, 3, isa);
            by_slope.insert(by_slope.end(), by_sigma.begin(), by_sigma.end());
            if (expected.empty()) expected = by_slope;
            for (std::size_t i = 0; i < expected.size(); ++i)
                if (!(std::fabs(expected[i] - by_slope[i]) <= 1e-3f * (1 + std::fabs(expected[i])))) {
                    std::printf("round %d: a sum of %g and one of %g\n", round, static_cast<double>(expected[i]),
                                static_cast<double>(by_slope[i]));
                    return 1;
                }
        }
    }
    std::puts("clean");
}
