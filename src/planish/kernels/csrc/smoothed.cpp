#include "smoothed.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include "host_threads.h"

#if defined(PLANISH_X86)
#include <immintrin.h>
#endif

namespace planish {
namespace {

constexpr std::int64_t kWorkPerThread = 1 << 15; // numbers worth waking a thread for
constexpr std::int64_t kPiece = 1 << 13;         // numbers of a run that share a slope and a width, done at a time
constexpr std::int64_t kShortRun = 64;           // shorter ones: slopes and widths are written out, one a position
constexpr std::int64_t kPeriod = 256, kColumns = 1024; // positions at least, for rows worth a loop; and done at a time
constexpr std::int64_t kRows = 32;               // summed in float before they join a sum in double
constexpr std::int64_t kShares = 64;             // of rows, at most: each has sums of its own

// With m = (u - 4) / (u + 4): Mills's ratio, and 1 - u times that ratio, both times u + 4, for u in [0, 13.27].
constexpr float kMiddle = 4.0f;
constexpr float kMills[] = {1.893219113e+00f, -1.523771405e+00f, 9.704024196e-01f, -4.675287008e-01f, 1.514877379e-01f,
                            -1.895148121e-02f, -9.172399528e-03f, 3.972650971e-03f, 1.040518750e-03f};
constexpr float kTail[] = {4.271237552e-01f, -1.050668955e+00f, 1.162775397e+00f, -8.486950397e-01f, 4.159192145e-01f,
                           -1.140987873e-01f, -3.715374041e-03f, 1.507475879e-02f, -2.275318140e-03f, -1.784207183e-03f};
// 2^x / sqrt(2 pi) and 2^x for x in [-1/2, 1/2]; 2 atanh(sqrt(x)) / sqrt(x) for x in [0, 1/9].
constexpr float kDensity[] = {3.989423215e-01f, 2.765256464e-01f, 9.583438933e-02f, 2.214414254e-02f, 3.859982360e-03f,
                              5.296539748e-04f};
constexpr float kPower[] = {1.000000000e+00f, 6.931471825e-01f, 2.402264625e-01f, 5.550328642e-02f,
                            9.618489072e-03f, 1.339993090e-03f, 1.534581097e-04f};
constexpr float kAtanh[] = {2.000000000e+00f, 6.666631699e-01f, 4.002490938e-01f, 2.796060145e-01f, 2.817833424e-01f};

struct Run {
    const float *x, *grad;
    float* out;
    const float *a, *s, *inverse; // slope, width and 1 / width: one, or one a position
    std::int64_t n;
    float *by_a, *by_s; // sums, one a position
    double* sums;       // or two for all
};
using Way = void (*)(const Run&);

namespace portable {
constexpr int kBytes = 16;
typedef float Floats __attribute__((vector_size(kBytes)));
inline Floats root(const Floats& v) {
    return Floats{std::sqrt(v[0]), std::sqrt(v[1]), std::sqrt(v[2]), std::sqrt(v[3])};
}
#include "smoothed_body.h"
} // namespace portable
} // namespace
} // namespace planish

#if defined(PLANISH_X86)
PLANISH_TARGET("avx2,fma,f16c")
namespace planish {
namespace {
namespace avx2 {
constexpr int kBytes = 32;
typedef float Floats __attribute__((vector_size(kBytes)));
inline Floats root(const Floats& v) { return _mm256_sqrt_ps(v); }
#include "smoothed_body.h"
} // namespace avx2
} // namespace
} // namespace planish
PLANISH_TARGET_END

PLANISH_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace planish {
namespace {
namespace avx512 {
constexpr int kBytes = 64;
typedef float Floats __attribute__((vector_size(kBytes)));
inline Floats root(const Floats& v) { return _mm512_sqrt_ps(v); }
#include "smoothed_body.h"
} // namespace avx512
} // namespace
} // namespace planish
PLANISH_TARGET_END
#endif

namespace planish {
namespace {

Way way(const Smoothed& op, bool vary, Isa isa) {
    const bool back = op.grad != nullptr, summed = op.by_slope != nullptr || op.by_sigma != nullptr;
#if defined(PLANISH_X86)
    if (isa == Isa::avx512) return avx512::way(op.kernel, vary, back, summed);
    if (isa == Isa::avx2) return avx2::way(op.kernel, vary, back, summed);
#else
    (void)isa; // the vectors of aarch64 are in every such processor
#endif
    return portable::way(op.kernel, vary, back, summed);
}

// Slopes, widths and inverses of `count` positions, of which `same` in a row belong to one channel.
struct Table {
    std::vector<float> a, s, inverse;
    Table(const Smoothed& op, std::int64_t count, std::int64_t same) : a(count), s(count), inverse(count) {
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t c = i / same % op.channels;
            a[i] = op.slope[op.slopes == 1 ? 0 : c];
            s[i] = op.sigma[op.sigmas == 1 ? 0 : c];
            const float least = std::numeric_limits<float>::min();
            inverse[i] = 1.0f / (s[i] < least ? least : s[i]);
        }
    }
};

// Sums of grad (min(x, 0) - s tail) and of grad gap, by channel.
struct Sums {
    std::vector<double> by_a, by_s;
    explicit Sums(std::int64_t channels) : by_a(channels), by_s(channels) {}

    void write(const Smoothed& op) const {
        std::vector<double> slope(op.slopes), sigma(op.sigmas);
        for (std::int64_t c = 0; c < op.channels; ++c) {
            slope[op.slopes == 1 ? 0 : c] += by_a[c];
            sigma[op.sigmas == 1 ? 0 : c] += (1.0 - static_cast<double>(op.slope[op.slopes == 1 ? 0 : c])) * by_s[c];
        }
        for (std::int64_t c = 0; op.by_slope != nullptr && c < op.slopes; ++c)
            op.by_slope[c] = static_cast<float>(slope[c]);
        for (std::int64_t c = 0; op.by_sigma != nullptr && c < op.sigmas; ++c)
            op.by_sigma[c] = static_cast<float>(sigma[c]);
    }
};

float* shifted(float* p, std::int64_t by) { return p == nullptr ? nullptr : p + by; }
const float* shifted(const float* p, std::int64_t by) { return p == nullptr ? nullptr : p + by; }

// Long runs of one slope and width: in pieces, some of them a task.
void by_runs(const Smoothed& op, int threads, Isa isa) {
    const Table table(op, op.channels, 1);
    const Way go = way(op, false, isa);
    const std::int64_t parts = (op.inner + kPiece - 1) / kPiece, pieces = op.outer * op.channels * parts;
    const std::int64_t group = std::max<std::int64_t>(1, kPiece / op.inner);
    std::vector<double> sums(op.grad == nullptr ? 0 : 2 * pieces);
    on_host(threads, (pieces + group - 1) / group, [&](std::int64_t task) {
        for (std::int64_t k = task * group; k < std::min(pieces, (task + 1) * group); ++k) {
            const std::int64_t run = k / parts, c = run % op.channels, first = k % parts * kPiece;
            const std::int64_t at = run * op.inner + first;
            go({op.x + at, shifted(op.grad, at), shifted(op.out, at), &table.a[c], &table.s[c], &table.inverse[c],
                std::min(kPiece, op.inner - first), nullptr, nullptr, sums.empty() ? nullptr : &sums[2 * k]});
        }
    });
    if (op.grad == nullptr) return;
    Sums total(op.channels);
    for (std::int64_t k = 0; k < pieces; ++k) {
        total.by_a[k / parts % op.channels] += sums[2 * k];
        total.by_s[k / parts % op.channels] += sums[2 * k + 1];
    }
    total.write(op);
}

// Short runs: rows of whole periods of channels, where slope and width change with the position.
void by_rows(const Smoothed& op, int threads, Isa isa) {
    const std::int64_t once = op.channels * op.inner, n = op.outer * once;
    const std::int64_t period = std::min((kPeriod + once - 1) / once, op.outer) * once, rows = (n + period - 1) / period;
    const Table table(op, period, op.inner);
    const Way go = way(op, true, isa);
    const std::int64_t strips = (period + kColumns - 1) / kColumns;
    const std::int64_t share = std::max((rows + kShares - 1) / kShares, 2 * kPiece / std::min(period, kColumns));
    const std::int64_t shares = (rows + share - 1) / share;
    std::vector<double> sums(op.grad == nullptr ? 0 : 2 * shares * period);
    on_host(threads, shares * strips, [&](std::int64_t task) {
        const std::int64_t first = task % strips * kColumns, end = std::min(period, first + kColumns);
        double *wide_a = sums.data() + 2 * (task / strips) * period, *wide_s = wide_a + period;
        float by_a[kColumns] = {}, by_s[kColumns] = {};
        const std::int64_t begin = task / strips * share, last = std::min(rows, begin + share);
        for (std::int64_t row = begin; row < last; ++row) {
            const std::int64_t at = row * period + first, count = std::min(end - first, n - at);
            if (count > 0)
                go({op.x + at, shifted(op.grad, at), shifted(op.out, at), &table.a[first], &table.s[first],
                    &table.inverse[first], count, by_a, by_s, nullptr});
            if (op.grad == nullptr || ((row - begin) % kRows != kRows - 1 && row != last - 1)) continue;
            for (std::int64_t i = first; i < end; ++i) {
                wide_a[i] += static_cast<double>(by_a[i - first]), wide_s[i] += static_cast<double>(by_s[i - first]);
                by_a[i - first] = by_s[i - first] = 0;
            }
        }
    });
    if (op.grad == nullptr) return;
    Sums total(op.channels);
    for (std::int64_t k = 0; k < shares; ++k)
        for (std::int64_t i = 0; i < period; ++i) {
            total.by_a[i / op.inner % op.channels] += sums[2 * k * period + i];
            total.by_s[i / op.inner % op.channels] += sums[(2 * k + 1) * period + i];
        }
    total.write(op);
}

} // namespace

void smoothed(const Smoothed& op, int threads, Isa isa) {
    const std::int64_t n = op.outer * op.channels * op.inner;
    threads = static_cast<int>(std::min<std::int64_t>(threads, 1 + n / kWorkPerThread));
    if (op.channels == 1 || op.inner >= kShortRun)
        by_runs(op, threads, isa);
    else
        by_rows(op, threads, isa);
}

} // namespace planish
