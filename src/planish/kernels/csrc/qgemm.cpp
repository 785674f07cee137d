// Weights are decoded once for a block of rows, a panel of outputs and a run of channels at a time, into a place that stays
// in L1 and meets every row of the block; the block of x stays in L2. Nothing is prepared: the weight is read as stored.
#include "qgemm.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "pool.h"

namespace planish {
namespace {

constexpr std::int64_t kBlockBytes = std::int64_t{640} << 10; // of x, in L2
constexpr std::int64_t kMostRows = 256;                        // of a block: with its sums it fills L1 no further
constexpr int kMostOutputs = 64, kMostLanes = 16;
constexpr std::int64_t kWorkPerThread = std::int64_t{1} << 20; // multiplications worth waking a thread for

struct Run {
    std::int64_t begin, end;         // channels
    std::int64_t x_group, group;     // whose scales they have
    std::int64_t octet, octets;      // octets of codes that hold them; the first and the last may hold others' too
    std::int64_t offset;             // octets of the runs before
};

std::vector<Run> runs_of(const QGemm& op) {
    std::vector<Run> runs;
    std::int64_t offset = 0;
    for (std::int64_t begin = 0; begin < op.in;) {
        const std::int64_t x_group = begin / op.x_group_size, group = begin / op.group_size;
        std::int64_t end = std::min(op.in, begin + kRun);
        // compare before multiplying: sizes of groups are at most `in`, products of them and their number are not
        if (op.in - x_group * op.x_group_size > op.x_group_size) end = std::min(end, (x_group + 1) * op.x_group_size);
        if (op.in - group * op.group_size > op.group_size) end = std::min(end, (group + 1) * op.group_size);
        const std::int64_t octet = begin / 8, octets = (end + 7) / 8 - octet;
        runs.push_back({begin, end, x_group, group, octet, octets, offset});
        offset += octets;
        begin = end;
    }
    return runs;
}

// Uninitialized and aligned to a cache line.
template <class T>
class Buffer {
public:
    explicit Buffer(std::int64_t n)
        : data_(static_cast<T*>(::operator new(static_cast<std::size_t>(std::max<std::int64_t>(n, 1)) * sizeof(T),
                                               std::align_val_t{64}))) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
    T* get() const { return data_; }

private:
    T* data_;
};

// Rows of the activation, run by run: within a run (rows, octets * 8), zero outside of it, in the order of the panel's quads.
struct Activation {
    Activation(const QGemm& op, const std::vector<Run>& runs, std::int64_t octets)
        : codes(op.rows * octets * 8), sum(op.rows * count(runs)), scale(op.rows * count(runs)),
          zero(op.x_zero == nullptr ? 0 : op.rows * count(runs)), ones(octets * 8) {}
    static std::int64_t count(const std::vector<Run>& runs) { return static_cast<std::int64_t>(runs.size()); }

    Buffer<std::int8_t> codes;
    Buffer<std::int32_t> sum; // (runs, rows) within a block, as are the next two
    Buffer<float> scale;
    Buffer<std::int32_t> zero;
    Buffer<std::int8_t> ones; // a row of 1, for sums of codes
};

void lay(const Run& run, const std::int8_t* from, bool dealt, const PanelKernel& kernel, std::int8_t* to) {
    const std::int64_t before = run.begin - run.octet * 8, n = run.end - run.begin;
    std::memset(to, 0, static_cast<std::size_t>(before));
    std::memcpy(to + before, from, static_cast<std::size_t>(n));
    std::memset(to + before + n, 0, static_cast<std::size_t>(run.octets * 8 - before - n));
    if (dealt) kernel.deal(to, run.octets);
}

struct Walk {
    const QGemm& op;
    const PanelKernel& kernel;
    const std::vector<Run>& runs;
    std::int64_t octets, block_rows, blocks, panels;
    const Activation& x;

    std::int64_t rows_of(std::int64_t block) const { return std::min(block_rows, op.rows - block * block_rows); }

    // Lay out the rows [first, last) of a block.
    void lay_rows(std::int64_t block, std::int64_t first, std::int64_t last) const {
        const std::int64_t start = block * block_rows, rows = rows_of(block), count = Activation::count(runs);
        const std::int64_t groups = (op.in + op.x_group_size - 1) / op.x_group_size;
        for (std::int64_t s = 0; s < count; ++s) {
            const Run& run = runs[static_cast<std::size_t>(s)];
            const std::int64_t length = run.octets * 8, at = start * count + s * rows;
            std::int8_t* to = x.codes.get() + start * octets * 8 + run.offset * 8 * rows;
            for (std::int64_t r = first; r < last; ++r) {
                const std::int64_t row = start + r;
                lay(run, op.xq + row * op.in + run.begin, op.bits == 4, kernel, to + r * length);
                x.sum.get()[at + r] = kernel.total(to + r * length, length);
                x.scale.get()[at + r] = op.x_scale[row * groups + run.x_group];
                if (op.x_zero != nullptr) x.zero.get()[at + r] = op.x_zero[row * groups + run.x_group];
            }
        }
    }

    void decode(const Run& run, const std::uint8_t* const* rows, std::int64_t words, std::uint8_t* codes) const {
        if (op.bits == 4)
            kernel.decode(rows, run.octet, run.octets, true, codes);
        else if (op.bits == 8) {
            const std::int64_t first = run.octet * 2, there = std::min(run.octets * 2, words - first);
            kernel.decode(rows, first, there, false, codes);
            if (there < run.octets * 2) // meets zeros of x, but has to be something
                std::memset(codes + there * kernel.outputs * 4, 0, static_cast<std::size_t>(kernel.outputs) * 4);
        } else
            kernel.decode_any(rows, run.octet, run.octets, op.bits, words * 4, codes);
    }

    // Panels [first, last) of a block of rows.
    void multiply(std::int64_t block, std::int64_t first, std::int64_t last) const {
        const std::int64_t P = kernel.outputs, rows = rows_of(block), start = block * block_rows;
        const std::int64_t words = (op.in * op.bits + 31) / 32, count = Activation::count(runs);
        const std::int64_t groups = (op.in + op.group_size - 1) / op.group_size;
        const std::int64_t width = op.scale_type == Real::float32 ? 4 : 2;
        std::int64_t longest = 0;
        for (const Run& run : runs) longest = std::max(longest, run.octets);
        const Buffer<std::uint8_t> codes(longest * 8 * P);
        const Buffer<float> scale(groups * P), up(op.rank * P), y(rows * P);
        const Buffer<std::int32_t> minus_zero(groups * P);
        alignas(64) std::int32_t sum[kMostOutputs];
        alignas(64) float bias[kMostOutputs];
        const std::uint8_t *code_rows[kMostOutputs], *zero_rows[kMostOutputs];
        const void *scale_rows[kMostOutputs], *up_rows[kMostOutputs];
        for (std::int64_t o = first * P; o < std::min(op.out, last * P); o += P) {
            for (std::int64_t p = 0; p < P; ++p) { // a last, narrower panel repeats its last output
                const std::int64_t out = std::min(o + p, op.out - 1);
                code_rows[p] = op.packed + out * words * 4;
                zero_rows[p] = op.zero + out * groups;
                scale_rows[p] = static_cast<const std::uint8_t*>(op.scale) + out * groups * width;
                up_rows[p] = op.up + out * op.rank;
                bias[p] = op.bias == nullptr ? 0.0f : op.bias[out];
            }
            kernel.scales(scale_rows, op.scale_type, groups, scale.get());
            kernel.minus_zeros(zero_rows, groups, minus_zero.get());
            if (op.rank > 0) kernel.scales(up_rows, Real::float32, op.rank, up.get());
            kernel.start(bias, op.low + start * op.rank, up.get(), op.rank, rows, y.get());
            for (std::int64_t s = 0; s < count; ++s) {
                const Run& run = runs[static_cast<std::size_t>(s)];
                const std::int64_t at = start * count + s * rows, quads = run.octets * 2;
                const std::int32_t* minus = minus_zero.get() + run.group * P;
                decode(run, code_rows, words, codes.get());
                if (op.x_zero != nullptr) {
                    for (std::int64_t p = 0; p < P; ++p) sum[p] = static_cast<std::int32_t>(run.end - run.begin) * minus[p];
                    kernel.sums(codes.get(), quads, x.ones.get() + run.offset * 8, op.bits <= 4, sum);
                }
                kernel.tile({codes.get(), quads, x.codes.get() + start * octets * 8 + run.offset * 8 * rows, rows,
                             x.sum.get() + at, op.x_zero == nullptr ? nullptr : x.zero.get() + at, x.scale.get() + at,
                             scale.get() + run.group * P, minus, sum, y.get(), op.bits <= 4});
            }
            const std::int64_t here = std::min(P, op.out - o);
            for (std::int64_t r = 0; r < rows; ++r)
                std::memcpy(op.y + (start + r) * op.out + o, y.get() + r * P, static_cast<std::size_t>(here) * sizeof(float));
        }
    }
};

// Whether one row can meet the weight as it lies: symmetric, of 4 bits, and each group a run that vectors hold whole.
bool streamed(const QGemm& op, const PanelKernel& kernel) {
    const std::int64_t size = op.group_size, least = 4 * kernel.lanes;
    return kernel.streams && op.rows == 1 && op.bits == 4 && op.x_zero == nullptr && size <= kRun &&
           (size == least || size % (2 * least) == 0) && (op.x_group_size % size == 0 || op.x_group_size >= op.in);
}

void stream(const QGemm& op, const PanelKernel& kernel, int threads) {
    const std::int64_t length = op.group_size, runs = (op.in + length - 1) / length, lanes = kernel.lanes;
    const std::int64_t whole = (runs + lanes - 1) / lanes * lanes * length; // channels, with those that are not there
    const Buffer<std::int8_t> x(whole);
    const Buffer<std::int32_t> sum(runs + lanes);
    const Buffer<float> scale(runs);
    std::memcpy(x.get(), op.xq, static_cast<std::size_t>(op.in));
    std::memset(x.get() + op.in, 0, static_cast<std::size_t>(whole - op.in));
    std::memset(sum.get() + runs, 0, static_cast<std::size_t>(lanes) * 4);
    for (std::int64_t run = 0; run < runs; ++run) {
        sum.get()[run] = kernel.total(x.get() + run * length, length);
        scale.get()[run] = op.x_scale[run * length / op.x_group_size];
    }
    for (std::int64_t k = 0; k < whole; k += 8 * lanes) { // a byte of codes holds channels 2j and 2j + 1
        std::int8_t odd[4 * kMostLanes], *part = x.get() + k;
        for (std::int64_t j = 0; j < 4 * lanes; ++j) {
            odd[j] = part[2 * j + 1];
            part[j] = part[2 * j];
        }
        std::memcpy(part + 4 * lanes, odd, static_cast<std::size_t>(4 * lanes));
    }
    const std::int64_t blocks = (op.out + lanes - 1) / lanes;
    const std::int64_t shares = threads == 1 ? 1 : std::min<std::int64_t>(blocks, 4 * threads);
    parallel(threads, shares, [&](std::int64_t i) {
        kernel.stream({&op, length, runs, x.get(), sum.get(), scale.get(), i * blocks / shares * lanes,
                       std::min(op.out, (i + 1) * blocks / shares * lanes)});
    });
}

} // namespace

void qgemm(const QGemm& op, int threads, Isa isa) {
    const PanelKernel* kernel = &kPanelPortable;
#if defined(PLANISH_X86)
    if (isa == Isa::avx2) kernel = &kPanelAvx2;
    if (isa == Isa::avx512) kernel = &kPanelAvx512;
#else
    (void)isa; // no kernel for other processors' dot products yet: plain C++
#endif
    const double work = static_cast<double>(op.rows) * static_cast<double>(op.out) * static_cast<double>(op.in);
    threads = static_cast<int>(std::min<double>(threads, 1.0 + work / kWorkPerThread));
    if (streamed(op, *kernel)) return stream(op, *kernel, threads);
    const std::vector<Run> runs = runs_of(op);
    const std::int64_t octets = runs.back().offset + runs.back().octets, P = kernel->outputs;
    const Activation x(op, runs, octets);
    const std::int64_t block_rows =
        std::min({op.rows, kMostRows, std::max<std::int64_t>(8, kBlockBytes / (octets * 8) / 8 * 8)});
    const Walk walk{op, *kernel, runs, octets, block_rows, (op.rows + block_rows - 1) / block_rows, (op.out + P - 1) / P, x};
    if (op.x_zero != nullptr)
        for (const Run& run : runs) {
            std::int8_t one[kRun];
            std::memset(one, 1, sizeof one);
            lay(run, one, op.bits == 4, *kernel, x.ones.get() + run.offset * 8);
        }
    // Rows of a block are laid out by several threads too: there may be only one block.
    const std::int64_t strips = op.rows * op.in < kWorkPerThread / 16 ? 1 : std::min<std::int64_t>(threads, block_rows);
    parallel(threads, walk.blocks * strips, [&](std::int64_t i) {
        const std::int64_t block = i / strips, strip = i % strips, rows = walk.rows_of(block);
        walk.lay_rows(block, strip * rows / strips, (strip + 1) * rows / strips);
    });
    // More shares than threads, as a thread may be held up; each of panels that follow one another.
    const std::int64_t shares =
        threads == 1 ? 1 : std::min(walk.panels, std::max<std::int64_t>(1, 4 * threads / walk.blocks));
    std::atomic<bool> failed{false};
    parallel(threads, walk.blocks * shares, [&](std::int64_t i) {
        const std::int64_t block = i / shares, share = i % shares;
        try {
            walk.multiply(block, share * walk.panels / shares, (share + 1) * walk.panels / shares);
        } catch (const std::bad_alloc&) { // must not leave a thread
            failed = true;
        }
    });
    if (failed) throw std::bad_alloc();
}

namespace {
namespace portable {

struct Vector { // sixteen outputs, in plain C++
    static constexpr int lanes = 16, vectors = 1, rows = 4;
    struct I {
        std::int32_t at[lanes];
    };
    struct F {
        float at[lanes];
    };

    template <class R, class Fn>
    static R each(Fn fn) {
        R out;
        for (int l = 0; l < lanes; ++l) out.at[l] = fn(l);
        return out;
    }
    static I load(const void* p) {
        I out;
        std::memcpy(&out, p, sizeof out);
        return out;
    }
    static F load(const float* p) {
        return each<F>([&](int l) { return p[l]; });
    }
    template <class V>
    static void store(void* p, const V& v) {
        std::memcpy(p, &v, sizeof v);
    }
    static I spread(std::int32_t v) {
        return each<I>([&](int) { return v; });
    }
    static F spread(float v) {
        return each<F>([&](int) { return v; });
    }
    static I plus(const I& a, const I& b) {
        return each<I>([&](int l) { return a.at[l] + b.at[l]; });
    }
    static I times(const I& a, const I& b) {
        return each<I>([&](int l) { return a.at[l] * b.at[l]; });
    }
    static F mul(const F& a, const F& b) {
        return each<F>([&](int l) { return a.at[l] * b.at[l]; });
    }
    static F fma(const F& a, const F& b, const F& c) {
        return each<F>([&](int l) { return __builtin_fmaf(a.at[l], b.at[l], c.at[l]); });
    }
    static F to_float(const I& v) {
        return each<F>([&](int l) { return static_cast<float>(v.at[l]); });
    }
    static I low_nibbles(const I& v) {
        return each<I>([&](int l) { return v.at[l] & 0x0F0F0F0F; });
    }
    static I high_nibbles(const I& v) {
        return each<I>([&](int l) { return v.at[l] >> 4 & 0x0F0F0F0F; });
    }
    static I as_ints(const F& v) { return load(static_cast<const void*>(&v)); }
    static F as_float(const I& v) {
        F out;
        std::memcpy(&out, &v, sizeof out);
        return out;
    }
    static I pair(const I& acc, const I& low, const I& high, const std::int8_t* x) {
        std::uint8_t codes[2 * sizeof(I)];
        store(codes, low);
        store(codes + sizeof(I), high);
        return each<I>([&](int l) {
            std::int32_t sum = acc.at[l];
            for (int i = 0; i < 4; ++i)
                sum += codes[4 * l + i] * x[4 * l + i] + codes[4 * (lanes + l) + i] * x[4 * (lanes + l) + i];
            return sum;
        });
    }
    static I gathered(const I (&v)[lanes], bool halves) {
        return each<I>([&](int l) {
            const int width = halves ? lanes / 2 : lanes, vector = halves ? l / 2 : l, begin = halves ? l % 2 * width : 0;
            std::int32_t sum = 0;
            for (int k = begin; k < begin + width; ++k) sum += v[vector].at[k];
            return sum;
        });
    }
    static I load_words(const void* p, int count) {
        I out = {};
        std::memcpy(&out, p, static_cast<std::size_t>(count) * 4);
        return out;
    }
    static I load_ints(const std::int32_t* p) { return load(static_cast<const void*>(p)); }
    static I load_bfloat(const std::uint16_t* p) {
        return each<I>([&](int l) { return static_cast<std::int32_t>(std::uint32_t{p[l]} << 16); });
    }
    static I load_half(const std::uint16_t* p) {
        return each<I>([&](int l) {
            const std::uint32_t magnitude = p[l] & 0x7FFFu, sign = std::uint32_t{p[l] & 0x8000u} << 16;
            const std::uint32_t shifted = magnitude << 13;
            float value;
            std::memcpy(&value, &shifted, 4);
            value *= 0x1p112f; // the bias of the exponents differs by 112; subnormals come out right too
            std::uint32_t bits;
            std::memcpy(&bits, &value, 4);
            return static_cast<std::int32_t>(bits | sign | (magnitude >= 0x7C00u ? 0x7F800000u : 0u));
        });
    }
    static I load_minus_bytes(const std::uint8_t* p) {
        return each<I>([&](int l) { return -static_cast<std::int32_t>(p[l]); });
    }
    static void transpose(I (&v)[lanes]) {
        for (int i = 0; i < lanes; ++i)
            for (int j = 0; j < i; ++j) std::swap(v[i].at[j], v[j].at[i]);
    }

    template <int R>
    static void dots(I (&acc)[R][vectors], const std::uint8_t* codes, const std::int8_t* x, std::int64_t quads, bool) {
        for (std::int64_t q = 0; q < quads; ++q)
            for (int r = 0; r < R; ++r) {
                const std::int8_t* xq = x + (r * quads + q) * 4;
                for (int l = 0; l < lanes; ++l) {
                    const std::uint8_t* w = codes + (q * lanes + l) * 4;
                    acc[r][0].at[l] += w[0] * xq[0] + w[1] * xq[1] + w[2] * xq[2] + w[3] * xq[3];
                }
            }
    }
};

#include "qgemm_panel.h"

} // namespace portable
} // namespace

const PanelKernel kPanelPortable = portable::kKernel;

} // namespace planish
