#include "rotate.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "pool.h"

namespace planish {
namespace {

constexpr double kWorkPerThread = 1 << 18; // multiplications worth waking a thread for
constexpr std::int64_t kMostRows = 96;     // that meet a block together: 384 KB of floats at the largest size in use
constexpr std::int64_t kLargeBlock = 512;  // from here on its columns are copied first, if enough rows meet them

// One block against some rows.
template <class T>
struct Turn {
    const T* x;     // (rows, size), gathered
    const T* block; // (size, size)
    T* panel;       // room for some columns of the block, or null
    T* y;           // (rows, size), written
    std::int64_t rows, size;
};

namespace portable {
constexpr int kBytes = 16, kWide = 1;
#include "rotate_body.h"
} // namespace portable
} // namespace
} // namespace planish

#if defined(PLANISH_X86)
PLANISH_TARGET("avx2,fma,f16c")
namespace planish {
namespace {
namespace avx2 {
constexpr int kBytes = 32, kWide = 2;
#include "rotate_body.h"
} // namespace avx2
} // namespace
} // namespace planish
PLANISH_TARGET_END

PLANISH_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace planish {
namespace {
namespace avx512 {
constexpr int kBytes = 64, kWide = 4;
#include "rotate_body.h"
} // namespace avx512
} // namespace
} // namespace planish
PLANISH_TARGET_END
#endif

namespace planish {
namespace {

template <class T>
void (*turning(Isa isa))(const Turn<T>&) {
#if defined(PLANISH_X86)
    if (isa == Isa::avx512) return avx512::turn_rows<T>;
    if (isa == Isa::avx2) return avx2::turn_rows<T>;
#else
    (void)isa; // the vectors of aarch64 are in every such processor
#endif
    return portable::turn_rows<T>;
}

// Element is how x and y are stored, T how they are computed.
template <class Element, class T>
void rotate_as(const Rotate& op, int threads, Isa isa) {
    const std::int64_t channels = op.count * op.size;
    const std::int64_t strips = (op.rows + kMostRows - 1) / kMostRows;
    const bool large = op.size >= kLargeBlock && op.rows >= 24;
    const Element* x = static_cast<const Element*>(op.x);
    Element* y = static_cast<Element*>(op.y);
    std::atomic<bool> failed{false};
    const double work = static_cast<double>(op.rows) * static_cast<double>(channels) * static_cast<double>(op.size);
    threads = static_cast<int>(std::min<double>(threads, 1.0 + work / kWorkPerThread));
    // one share a thread and strip at most: room is taken once for a share
    const std::int64_t shares = threads == 1 ? 1 : std::min<std::int64_t>(op.count, 4 * threads);
    parallel(threads, strips * shares, [&](std::int64_t i) {
        const std::int64_t strip = i / shares, share = i % shares;
        const std::int64_t first = strip * op.rows / strips, rows = (strip + 1) * op.rows / strips - first;
        const std::size_t part = static_cast<std::size_t>(rows * op.size);
        try {
            std::vector<T> room(2 * part + (large ? static_cast<std::size_t>(op.size) * 64 : 0));
            T *from = room.data(), *to = from + part, *panel = large ? to + part : nullptr;
            for (std::int64_t k = share * op.count / shares; k < (share + 1) * op.count / shares; ++k) {
                const std::int64_t* index = op.index == nullptr ? nullptr : op.index + k * op.size;
                for (std::int64_t r = 0; r < rows; ++r) {
                    const Element* row = x + (first + r) * channels;
                    T* gathered = from + r * op.size;
                    if (index != nullptr)
                        for (std::int64_t j = 0; j < op.size; ++j) gathered[j] = widen(row[index[j]]);
                    else
                        for (std::int64_t j = 0; j < op.size; ++j) gathered[j] = widen(row[k * op.size + j]);
                }
                turning<T>(isa)({from, static_cast<const T*>(op.blocks) + k * op.stride, panel, to, rows, op.size});
                for (std::int64_t r = 0; r < rows; ++r)
                    for (std::int64_t j = 0; j < op.size; ++j)
                        narrow(to[r * op.size + j], y[(first + r) * channels + k * op.size + j]);
            }
        } catch (const std::bad_alloc&) { // must not leave a thread
            failed = true;
        }
    });
    if (failed) throw std::bad_alloc();
}

} // namespace

void rotate(const Rotate& op, int threads, Isa isa) {
    if (op.index != nullptr)
        for (std::int64_t k = 0; k < op.count * op.size; ++k)
            if (op.index[k] < 0 || op.index[k] >= op.count * op.size)
                throw std::out_of_range("rotate: `index` is out of range");
    if (op.type == Real::float64)
        rotate_as<double, double>(op, threads, isa);
    else if (op.type == Real::float16)
        rotate_as<Half, float>(op, threads, isa);
    else if (op.type == Real::bfloat16)
        rotate_as<BFloat, float>(op, threads, isa);
    else
        rotate_as<float, float>(op, threads, isa);
}

} // namespace planish
