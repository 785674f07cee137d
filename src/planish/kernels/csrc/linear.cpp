// Preparing, cutting the work among threads, and the portable kernels.
#include "linear.h"

#include <cmath>
#include <memory>
#include <new>

#include "isa.h"
#include "linear_layout.h"
#include "pool.h"

namespace planish {
namespace {

constexpr std::int64_t kRowPanel = 64;         // rows that are rounded, and then met by every tile, at a time
constexpr std::int64_t kBytesPerThread = 49152; // codes times rows worth waking a second thread

std::uint32_t code(const std::uint32_t* words, std::int64_t k) { return (words[k / 8] >> (4 * (k % 8))) & 15u; }

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
            for (std::int64_t k = cut.begin(s); k < end; k += 8, at += kTile * 4)
                for (std::int64_t j = 0; j < std::min<std::int64_t>(8, end - k); ++j)
                    at[j % 4] = static_cast<std::uint8_t>(at[j % 4] | code(row, k + j) << (j < 4 ? 0 : 4));
        }
    }
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
    const Kernels kernel = kernels(activation_bits);
    const Segments cut(products[0].weight.in, products[0].weight.group_size);
    const RowLayout layout(cut, activation_bits);
    std::int64_t tiles = 0, codes = 0;
    for (int p = 0; p < count; ++p) tiles += (products[p].weight.out + kTile - 1) / kTile;
    codes = tiles * kTile * cut.units * 4;
    const std::int64_t panel = std::min(rows, kRowPanel);
    threads = static_cast<int>(std::min<std::int64_t>(threads, 1 + codes * panel / kBytesPerThread));
    std::uint8_t* rounded = workspace(static_cast<std::size_t>(panel * layout.bytes));
    // Parts small enough for threads to share the end evenly, large enough to stream.
    const std::int64_t step = std::max<std::int64_t>(1, tiles / (threads * 8));
    for (std::int64_t m = 0; m < rows; m += panel) {
        const std::int64_t here = std::min(panel, rows - m);
        parallel(here * cut.in < 65536 ? 1 : threads, here, [&](std::int64_t r) {
            kernel.round(x + (m + r) * x_stride, cut, layout, rounded + r * layout.bytes);
        });
        parallel(threads, threads == 1 ? 1 : (tiles + step - 1) / step, [&](std::int64_t i) {
            std::int64_t first = threads == 1 ? 0 : i * step, last = threads == 1 ? tiles : std::min(first + step, tiles);
            for (int p = 0; p < count && last > 0; ++p) {
                const Product& product = products[p];
                const std::uint8_t* data = static_cast<const std::uint8_t*>(product.weight.data);
                Header header;
                std::memcpy(&header, data, sizeof header);
                const Tiles shape(product.weight.out, cut, header.type, header.zeros != 0);
                for (std::int64_t t = std::max<std::int64_t>(first, 0); t < std::min(last, shape.count); ++t) {
                    const std::int64_t o = t * kTile;
                    kernel.multiply({&cut, &layout, data + sizeof header + t * shape.bytes, &shape, header.type,
                                     header.zeros != 0, product.bias == nullptr ? nullptr : product.bias + o,
                                     std::min(kTile, product.weight.out - o), rounded, here,
                                     product.y + m * product.y_stride + o, product.y_stride});
                }
                first -= shape.count, last -= shape.count;
            }
        });
    }
}

} // namespace planish
