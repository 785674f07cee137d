// Preparing, cutting the work among threads, and the portable kernels.
#include "linear.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "linear_layout.h"
#include "pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace planish {
namespace {

constexpr std::int64_t kBytesPerThread = 49152; // codes times rows worth waking a second thread

std::uint32_t code(const std::uint32_t* words, std::int64_t k) { return (words[k / 8] >> (4 * (k % 8))) & 15u; }

// Eight codes, element j in bits 4j..4j+3, as byte j holds them: element j low, element 4 + j high.
std::uint32_t interleaved(std::uint32_t w) {
    const auto spread = [](std::uint32_t four) { // a code in each byte
        four = (four | four << 8) & 0x00FF00FFu;
        return (four | four << 4) & 0x0F0F0F0Fu;
    };
    return spread(w & 0xFFFFu) | spread(w >> 16) << 4;
}

Kernels kernels(int activation_bits) {
    switch (active_isa()) {
#if defined(PLANISH_X86)
    case Isa::avx512: return avx512_kernels(activation_bits);
    case Isa::avx2: return avx2_kernels(activation_bits);
#endif
#if defined(PLANISH_ARM)
    case Isa::neon: return neon_kernels(activation_bits);
#endif
    default: return portable_kernels(activation_bits);
    }
}

// The row of a wide activation holds 16-bit codes in the order in which a word's halves are masked out.
constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};

template <class Code, std::int64_t kLimit>
void round_portable(const float* x, const Segments& cut, const RowLayout& layout, std::uint8_t* row) {
    Code* codes = reinterpret_cast<Code*>(row);
    float* steps = reinterpret_cast<float*>(row + layout.steps);
    std::int32_t* sums = reinterpret_cast<std::int32_t*>(row + layout.sums);
    for (std::int64_t s = 0; s < cut.count; ++s) {
        const std::int64_t begin = cut.begin(s), end = cut.end(s);
        float most = 0;
        bool finite = true;
        for (std::int64_t k = begin; k < end; ++k) {
            finite = finite && std::isfinite(x[k]);
            most = std::max(most, std::fabs(x[k]));
        }
        const bool zero = !finite || !(most > kLeast);
        const float inverse = zero ? 0.0f : static_cast<float>(kLimit) / most;
        steps[s] = !finite ? from_bits(0x7FC00000u) : zero ? 0.0f : most / static_cast<float>(kLimit);
        std::int32_t sum = 0;
        for (std::int64_t k = begin; k < begin + cut.segment_units(s) * 8; k += 8) {
            for (int j = 0; j < 8; ++j) {
                const std::int64_t at = k + (sizeof(Code) == 2 ? kOrder[j] : j);
                const std::int32_t q = zero || at >= end ? 0 : static_cast<std::int32_t>(std::lrint(x[at] * inverse));
                *codes++ = static_cast<Code>(q);
                sum += q;
            }
        }
        sums[s] = sum;
    }
}

template <class Code>
void multiply_portable(const TileJob& job) {
    const std::int64_t size = scale_size(job.type);
    for (std::int64_t m = 0; m < job.count; ++m) {
        const std::uint8_t* row = job.rows + m * job.layout->bytes;
        const Code* q = reinterpret_cast<const Code*>(row);
        const float* steps = reinterpret_cast<const float*>(row + job.layout->steps);
        const std::int32_t* sums = reinterpret_cast<const std::int32_t*>(row + job.layout->sums);
        const std::uint32_t* words = reinterpret_cast<const std::uint32_t*>(job.tile + job.tiles->codes);
        float total[kTile] = {};
        for (std::int64_t s = 0; s < job.cut->count; ++s) {
            std::int32_t dot[kTile] = {};
            for (std::int64_t u = job.cut->segment_units(s); u > 0; --u, words += kTile, q += 8) {
                const std::int32_t a = q[0], b = q[1], c = q[2], d = q[3], e = q[4], f = q[5], g = q[6], h = q[7];
                for (std::int64_t o = 0; o < kTile; ++o) {
                    const std::uint32_t w = words[o];
                    const auto at = [w](int shift) { return static_cast<std::int32_t>((w >> shift) & 15u); };
                    if constexpr (sizeof(Code) == 2)
                        dot[o] += a * at(0) + b * at(16) + c * at(4) + d * at(20) + e * at(8) + f * at(24) + g * at(12) +
                                  h * at(28);
                    else
                        dot[o] += a * at(0) + b * at(8) + c * at(16) + d * at(24) + e * at(4) + f * at(12) + g * at(20) +
                                  h * at(28);
                }
            }
            for (std::int64_t o = 0; o < kTile; ++o) {
                const std::int32_t zero = job.zeros ? job.tile[job.tiles->zeros + s * kTile + o] : 8;
                const float scale = load_scale(job.tile + (s * kTile + o) * size, job.type);
                total[o] += static_cast<float>(dot[o] - zero * sums[s]) * (scale * steps[s]);
            }
        }
        for (std::int64_t o = 0; o < job.outputs; ++o)
            job.y[m * job.y_stride + o] = total[o] + (job.bias == nullptr ? 0.0f : job.bias[o]);
    }
}

void prepare_tile(const std::uint32_t* packed, const std::uint8_t* scale, const std::uint8_t* zero, std::int64_t first,
                  std::int64_t out, const Segments& cut, const Tiles& tiles, std::int64_t size, std::uint8_t* tile) {
    const std::int64_t words = (cut.in + 7) / 8, groups = (cut.in + cut.group_size - 1) / cut.group_size;
    std::memset(tile, 0, static_cast<std::size_t>(tiles.bytes));
    for (std::int64_t o = 0; o < std::min(kTile, out - first); ++o) {
        const std::uint32_t* row = packed + (first + o) * words;
        std::uint8_t* at = tile + tiles.codes + o * 4;
        for (std::int64_t s = 0; s < cut.count; ++s) {
            const std::int64_t group = (first + o) * groups + cut.group(s);
            std::memcpy(tile + (s * kTile + o) * size, scale + group * size, static_cast<std::size_t>(size));
            if (zero != nullptr) tile[tiles.zeros + s * kTile + o] = zero[group];
            const std::int64_t end = cut.end(s);
            std::int64_t k = cut.begin(s);
            if (k % 8 == 0)
                for (; k + 8 <= end; k += 8, at += kTile * 4) {
                    const std::uint32_t word = interleaved(row[k / 8]);
                    std::memcpy(at, &word, 4);
                }
            for (; k < end; k += 8, at += kTile * 4)
                for (std::int64_t j = 0; j < std::min<std::int64_t>(8, end - k); ++j)
                    at[j % 4] = static_cast<std::uint8_t>(at[j % 4] | code(row, k + j) << (j < 4 ? 0 : 4));
        }
    }
}

// Large pages make the stream cheaper where the system grants them; a refusal costs nothing.
void ask_for_large_pages(void* data, std::size_t bytes) {
#if defined(__linux__)
    constexpr std::uintptr_t page = 4096;
    const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
    const std::uintptr_t last = (reinterpret_cast<std::uintptr_t>(data) + bytes) / page * page;
    if (last > first + (std::uintptr_t{2} << 20)) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// Memory for rounded rows, kept by the calling thread from call to call.
std::uint8_t* workspace(std::size_t bytes) {
    struct Free {
        void operator()(std::uint8_t* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    thread_local std::unique_ptr<std::uint8_t, Free> kept;
    thread_local std::size_t size = 0;
    if (size < bytes) {
        kept.reset();
        size = 0;
        kept.reset(static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{64})));
        size = bytes;
    }
    return kept.get();
}

// How many of a thread's tiles are taken.
struct alignas(64) Tally {
    std::atomic<std::int64_t> taken{0};
};

std::int64_t tiles_of(const Product& product) { return (product.weight.out + kTile - 1) / kTile; }

std::int64_t tiles_of(const Product* products, int count) {
    std::int64_t tiles = 0;
    for (int p = 0; p < count; ++p) tiles += tiles_of(products[p]);
    return tiles;
}

// Some rows of the activation, rounded, and how they meet a tile.
struct Panel {
    Kernels kernel;
    Segments cut;
    RowLayout layout;
    std::int64_t most; // rows at a time
    std::uint8_t* rounded;

    Panel(const Linear& weight, std::int64_t rows, int activation_bits)
        : kernel(kernels(activation_bits)), cut(weight.in, weight.group_size), layout(cut, activation_bits),
          most(std::min(rows, kRowPanel)), rounded(workspace(static_cast<std::size_t>(most * layout.bytes))) {}

    void round(const float* x, std::int64_t row) const { kernel.round(x, cut, layout, rounded + row * layout.bytes); }

    // Tile t of all products' tiles times the `count` rows whose results begin at row m.
    void multiply(const Product* product, std::int64_t t, std::int64_t m, std::int64_t count) const {
        for (; t >= tiles_of(*product); ++product) t -= tiles_of(*product);
        const std::uint8_t* data = static_cast<const std::uint8_t*>(product->weight.data);
        Header header;
        std::memcpy(&header, data, sizeof header);
        const Tiles shape(product->weight.out, cut, header.type, header.zeros != 0);
        const std::int64_t o = t * kTile;
        kernel.multiply({&cut, &layout, data + sizeof header + t * shape.bytes, &shape, header.type, header.zeros != 0,
                         product->bias == nullptr ? nullptr : product->bias + o, std::min(kTile, product->weight.out - o),
                         rounded, count, product->y + m * product->y_stride + o, product->y_stride});
    }
};

} // namespace

Kernels portable_kernels(int activation_bits) {
    if (activation_bits == 16) return {round_portable<std::int16_t, kWide>, multiply_portable<std::int16_t>};
    return {round_portable<std::int8_t, kNarrow>, multiply_portable<std::int8_t>};
}

std::size_t prepared_bytes(std::int64_t out, std::int64_t in, std::int64_t group_size, ScaleType type, bool zeros) {
    const Tiles tiles(out, Segments(in, group_size), type, zeros);
    return sizeof(Header) + static_cast<std::size_t>(tiles.count * tiles.bytes);
}

void prepare(const std::uint32_t* packed, const void* scale, ScaleType type, const std::uint8_t* zero, std::int64_t out,
             std::int64_t in, std::int64_t group_size, void* data, int threads) {
    const Segments cut(in, group_size);
    const Tiles tiles(out, cut, type, zero != nullptr);
    const Header header{kMagic, type, zero != nullptr, kTile, out, in, group_size,
                        static_cast<std::int64_t>(prepared_bytes(out, in, group_size, type, zero != nullptr)), {}};
    ask_for_large_pages(data, static_cast<std::size_t>(header.bytes));
    std::memcpy(data, &header, sizeof header);
    std::uint8_t* first = static_cast<std::uint8_t*>(data) + sizeof header;
    parallel(threads, tiles.count, [&](std::int64_t t) {
        prepare_tile(packed, static_cast<const std::uint8_t*>(scale), zero, t * kTile, out, cut, tiles, scale_size(type),
                     first + t * tiles.bytes);
    });
}

bool prepared_for(const void* data, std::size_t bytes, std::int64_t out, std::int64_t in, std::int64_t group_size) {
    Header header;
    if (bytes < sizeof header) return false;
    std::memcpy(&header, data, sizeof header);
    return header.magic == kMagic && header.tile == kTile && header.out == out && header.in == in &&
           header.group_size == group_size && header.type <= ScaleType::bfloat16 && header.zeros <= 1 &&
           header.bytes == static_cast<std::int64_t>(bytes) &&
           bytes == prepared_bytes(out, in, group_size, header.type, header.zeros != 0);
}

void linear(const Product* products, int count, const float* x, std::int64_t rows, std::int64_t x_stride,
            int activation_bits, int threads) {
    if (count == 0 || rows == 0) return;
    const Panel panel(products[0].weight, rows, activation_bits);
    const std::int64_t tiles = tiles_of(products, count), codes = tiles * kTile * panel.cut.units * 4;
    threads = static_cast<int>(std::min<std::int64_t>({threads, 1 + codes * panel.most / kBytesPerThread, tiles}));
    // A thread's tiles lie in a row, so that it streams them; whoever is done goes on with those of the others.
    std::vector<Tally> tallies(static_cast<std::size_t>(threads));
    for (std::int64_t m = 0; m < rows; m += panel.most) {
        const std::int64_t here = std::min(panel.most, rows - m);
        parallel(here * panel.cut.in < 65536 ? 1 : threads, here,
                 [&](std::int64_t r) { panel.round(x + (m + r) * x_stride, r); });
        for (int p = 0; p < threads; ++p) tallies[p].taken.store(p * tiles / threads, std::memory_order_relaxed);
        parallel(threads, threads, [&](std::int64_t mine) {
            for (std::int64_t i = mine; i < mine + threads; ++i) {
                const std::int64_t p = i % threads, last = (p + 1) * tiles / threads;
                for (std::int64_t t; (t = tallies[p].taken.fetch_add(1, std::memory_order_relaxed)) < last;)
                    panel.multiply(products, t, m, here);
            }
        });
    }
}

} // namespace planish
