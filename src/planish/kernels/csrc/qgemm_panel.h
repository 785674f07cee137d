// The panel kernel over a `Vector` that the including file defines: lanes hold outputs, so that no sum crosses them.
// Included once for an instruction set, inside an anonymous namespace and its PLANISH_TARGET.

constexpr int kLanes = Vector::lanes, kVectors = Vector::vectors, kOutputs = kLanes * kVectors;

// Decoding reads weights for the first and only time; the panel after this one is on its way meanwhile.
inline void fetch_ahead(const std::uint8_t* const* rows, int row, std::int64_t byte) {
    const std::uintptr_t panel = reinterpret_cast<std::uintptr_t>(rows[kOutputs - 1]) -
                                 reinterpret_cast<std::uintptr_t>(rows[0]);
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(rows[row]) + panel + byte), 0, 2);
}

void decode(const std::uint8_t* const* rows, std::int64_t first, std::int64_t count, bool nibbles,
            std::uint8_t* codes) {
    using I = Vector::I;
    const std::int64_t step = kOutputs * 4;
    for (std::int64_t w = 0; w < count; w += kLanes) {
        const int here = static_cast<int>(count - w < kLanes ? count - w : kLanes);
        for (int v = 0; v < kVectors; ++v) {
            I part[kLanes];
            for (int l = 0; l < kLanes; ++l) {
                part[l] = Vector::load_words(rows[v * kLanes + l] + (first + w) * 4, here);
                fetch_ahead(rows, v * kLanes + l, (first + w) * 4);
            }
            Vector::transpose(part);
            std::uint8_t* to = codes + (nibbles ? 2 * w : w) * step + v * kLanes * 4;
            if (nibbles)
                for (int j = 0; j < here; ++j) {
                    Vector::store(to + 2 * j * step, Vector::low_nibbles(part[j]));
                    Vector::store(to + (2 * j + 1) * step, Vector::high_nibbles(part[j]));
                }
            else
                for (int j = 0; j < here; ++j) Vector::store(to + j * step, part[j]);
        }
    }
}

void decode_any(const std::uint8_t* const* rows, std::int64_t first, std::int64_t count, int bits, std::int64_t bytes,
                std::uint8_t* codes) {
    const std::uint64_t mask = (1u << bits) - 1u;
    for (std::int64_t j = 0; j < count; ++j)
        for (int o = 0; o < kOutputs; ++o) {
            std::uint64_t octet = 0;
            const std::int64_t begin = (first + j) * bits, rest = bytes - begin;
            std::memcpy(&octet, rows[o] + begin, static_cast<std::size_t>(rest < bits ? rest : bits));
            std::uint8_t* to = codes + 2 * j * kOutputs * 4 + o * 4;
            for (int i = 0; i < 8; ++i, octet >>= bits)
                to[(i / 4) * kOutputs * 4 + i % 4] = static_cast<std::uint8_t>(octet & mask);
        }
}

template <class T, auto load>
void transposed(const void* const* rows, std::int64_t n, void* out) {
    for (std::int64_t g = 0; g < n; g += kLanes) {
        const int here = static_cast<int>(n - g < kLanes ? n - g : kLanes);
        for (int v = 0; v < kVectors; ++v) {
            Vector::I part[kLanes];
            for (int l = 0; l < kLanes; ++l) {
                const T* from = static_cast<const T*>(rows[v * kLanes + l]) + g;
                T copy[kLanes] = {};
                if (here < kLanes) {
                    std::memcpy(copy, from, sizeof(T) * static_cast<std::size_t>(here));
                    from = copy;
                }
                part[l] = load(from);
            }
            Vector::transpose(part);
            for (int j = 0; j < here; ++j)
                Vector::store(static_cast<std::int32_t*>(out) + (g + j) * kOutputs + v * kLanes, part[j]);
        }
    }
}

void scales(const void* const* rows, Real type, std::int64_t n, float* out) {
    if (type == Real::float16)
        transposed<std::uint16_t, Vector::load_half>(rows, n, out);
    else if (type == Real::bfloat16)
        transposed<std::uint16_t, Vector::load_bfloat>(rows, n, out);
    else
        transposed<std::int32_t, Vector::load_ints>(rows, n, out);
}

void minus_zeros(const std::uint8_t* const* rows, std::int64_t n, std::int32_t* out) {
    transposed<std::uint8_t, Vector::load_minus_bytes>(reinterpret_cast<const void* const*>(rows), n, out);
}

// Channels 0, 2, 4, 6 of an octet lie in the low nibbles of a word, 1, 3, 5, 7 in the high ones.
void deal(std::int8_t* x, std::int64_t octets) {
    for (std::int64_t j = 0; j < octets; ++j, x += 8) {
        std::uint64_t octet;
        std::memcpy(&octet, x, 8);
        std::uint64_t even = octet & 0x00FF00FF00FF00FFu, odd = (octet >> 8) & 0x00FF00FF00FF00FFu;
        even = (even | even >> 8) & 0x0000FFFF0000FFFFu;
        odd = (odd | odd >> 8) & 0x0000FFFF0000FFFFu;
        even = (even | even >> 16) & 0xFFFFFFFFu;
        odd = (odd | odd >> 16) & 0xFFFFFFFFu;
        octet = even | odd << 32;
        std::memcpy(x, &octet, 8);
    }
}

std::int32_t total(const std::int8_t* x, std::int64_t n) {
    std::int32_t sum = 0;
    for (std::int64_t k = 0; k < n; ++k) sum += x[k];
    return sum;
}

void sums(const std::uint8_t* codes, std::int64_t quads, const std::int8_t* ones, bool narrow, std::int32_t* sum) {
    Vector::I acc[1][kVectors];
    for (int v = 0; v < kVectors; ++v) acc[0][v] = Vector::load(sum + v * kLanes);
    Vector::dots<1>(acc, codes, ones, quads, narrow);
    for (int v = 0; v < kVectors; ++v) Vector::store(sum + v * kLanes, acc[0][v]);
}

void start(const float* bias, const float* low, const float* up, std::int64_t rank, std::int64_t rows, float* y) {
    for (std::int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < kVectors; ++v) {
            Vector::F sum = Vector::load(bias + v * kLanes);
            for (std::int64_t j = 0; j < rank; ++j)
                sum = Vector::fma(Vector::load(up + j * kOutputs + v * kLanes), Vector::spread(low[r * rank + j]), sum);
            Vector::store(y + r * kOutputs + v * kLanes, sum);
        }
}

template <int R>
void tile_rows(const Tile& t, std::int64_t row) {
    Vector::I acc[R][kVectors];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v)
            acc[r][v] = Vector::times(Vector::load(t.minus_zero + v * kLanes), Vector::spread(t.x_sum[row + r]));
    if (t.x_zero != nullptr)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < kVectors; ++v)
                acc[r][v] = Vector::plus(
                    acc[r][v], Vector::times(Vector::load(t.sum + v * kLanes), Vector::spread(-t.x_zero[row + r])));
    Vector::dots<R>(acc, t.codes, t.x + row * t.quads * 4, t.quads, t.narrow);
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) {
            float* y = t.y + (row + r) * kOutputs + v * kLanes;
            const Vector::F scaled = Vector::mul(Vector::to_float(acc[r][v]), Vector::load(t.scale + v * kLanes));
            Vector::store(y, Vector::fma(scaled, Vector::spread(t.x_scale[row + r]), Vector::load(y)));
        }
}

void tile(const Tile& t) {
    std::int64_t row = 0;
    for (; row + Vector::rows <= t.rows; row += Vector::rows) tile_rows<Vector::rows>(t, row);
    if constexpr (Vector::rows > 4)
        for (; row + 4 <= t.rows; row += 4) tile_rows<4>(t, row);
    for (; row + 2 <= t.rows; row += 2) tile_rows<2>(t, row);
    for (; row < t.rows; ++row) tile_rows<1>(t, row);
}

// `load` of n entries, and zeros.
template <class T, auto load>
inline Vector::I some(const void* from, std::int64_t at, std::int64_t n) {
    const T* p = static_cast<const T*>(from) + at;
    if (n >= kLanes) return load(p);
    T copy[kLanes] = {};
    std::memcpy(copy, p, sizeof(T) * static_cast<std::size_t>(n));
    return load(copy);
}

// `Accs` sums of products over `vectors` of codes each, all of which are there.
template <int Accs>
inline void whole_sums(const std::uint8_t* codes, const std::int8_t* x, std::int64_t vectors, std::int64_t ahead,
                       Vector::I (&acc)[kLanes]) {
    for (int a = 0; a < Accs; ++a) {
        acc[a] = Vector::spread(0);
        std::int64_t v = 0;
        do {
            __builtin_prefetch(codes + ahead, 0, 2); // what comes next
            const Vector::I here = Vector::load(static_cast<const void*>(codes));
            acc[a] = Vector::pair(acc[a], Vector::low_nibbles(here), Vector::high_nibbles(here), x);
            codes += 4 * kLanes, x += 8 * kLanes;
        } while (++v < vectors);
    }
}

// The exact sums of the runs [run, run + lanes) of one output, times their scales.
inline Vector::F scaled_sums(const Stream& s, std::int64_t out, std::int64_t run) {
    const QGemm& op = *s.op;
    const std::int64_t words = (op.in + 7) / 8, left = s.runs - run;
    const bool half = s.length < 8 * kLanes; // two runs to a vector of codes
    const std::int64_t vectors = half ? 1 : s.length / (8 * kLanes), accs = half ? kLanes / 2 : kLanes;
    const std::uint8_t* row = op.packed + out * words * 4;
    std::int64_t word = run * s.length / 8;
    const std::int8_t* x = s.x + word * 8;
    constexpr std::int64_t ahead = 4096; // bytes: a page, which hardware does not cross by itself
    Vector::I acc[kLanes];
    if (words - word >= accs * vectors * kLanes) {
        if (half)
            whole_sums<kLanes / 2>(row + word * 4, x, 1, ahead, acc);
        else if (vectors == 1)
            whole_sums<kLanes>(row + word * 4, x, 1, ahead, acc);
        else
            whole_sums<kLanes>(row + word * 4, x, vectors, ahead, acc);
    } else
        for (std::int64_t a = 0; a < accs; ++a) {
            acc[a] = Vector::spread(0);
            for (std::int64_t v = 0; v < vectors && word < words; ++v, word += kLanes, x += 8 * kLanes) {
                const Vector::I here =
                    Vector::load_words(row + word * 4, words - word < kLanes ? static_cast<int>(words - word) : kLanes);
                acc[a] = Vector::pair(acc[a], Vector::low_nibbles(here), Vector::high_nibbles(here), x);
            }
        }
    const Vector::I zero = some<std::uint8_t, Vector::load_minus_bytes>(op.zero, out * s.runs + run, left);
    const Vector::I sum = Vector::plus(Vector::gathered(acc, half), Vector::times(zero, Vector::load(s.x_sum + run)));
    const std::int64_t at = out * s.runs + run;
    const Vector::I scale = op.scale_type == Real::float16    ? some<std::uint16_t, Vector::load_half>(op.scale, at, left)
                            : op.scale_type == Real::bfloat16 ? some<std::uint16_t, Vector::load_bfloat>(op.scale, at, left)
                                                              : some<std::int32_t, Vector::load_ints>(op.scale, at, left);
    return Vector::mul(Vector::to_float(sum), Vector::as_float(scale));
}

void stream(const Stream& s) {
    const QGemm& op = *s.op;
    for (std::int64_t o = s.first; o < s.last; o += kLanes) {
        const int here = static_cast<int>(s.last - o < kLanes ? s.last - o : kLanes);
        alignas(64) float y[kLanes] = {};
        for (int l = 0; l < here; ++l) {
            y[l] = op.bias == nullptr ? 0.0f : op.bias[o + l];
            for (std::int64_t j = 0; j < op.rank; ++j) y[l] = __builtin_fmaf(op.up[(o + l) * op.rank + j], op.low[j], y[l]);
        }
        Vector::F sum = Vector::load(y);
        constexpr int kBlocks = 8; // of runs: a row of codes goes by in long pieces, which is what memory is quick at
        for (std::int64_t run = 0; run < s.runs; run += kBlocks * kLanes) {
            Vector::I turned[kBlocks][kLanes];
            for (int l = 0; l < kLanes; ++l)
                for (int b = 0; b < kBlocks && run + b * kLanes < s.runs; ++b)
                    turned[b][l] =
                        l < here ? Vector::as_ints(scaled_sums(s, o + l, run + b * kLanes)) : Vector::spread(0);
            for (int b = 0; b < kBlocks && run + b * kLanes < s.runs; ++b) {
                Vector::transpose(turned[b]);
                for (std::int64_t j = 0; j < kLanes && run + b * kLanes + j < s.runs; ++j)
                    sum = Vector::fma(Vector::as_float(turned[b][j]), Vector::spread(s.x_scale[run + b * kLanes + j]), sum);
            }
        }
        Vector::store(y, sum);
        std::memcpy(op.y + o, y, sizeof(float) * static_cast<std::size_t>(here));
    }
}

constexpr PanelKernel kKernel{kOutputs, kLanes, true,  decode, decode_any, scales, minus_zeros,
                              deal,     total,  sums, start,  tile,       stream};
