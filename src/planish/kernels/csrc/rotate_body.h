// Included once for an instruction set, inside an anonymous namespace and its PLANISH_TARGET, with kBytes of a vector and
// kWide, how many vectors of outputs a tile of six rows keeps in registers.

template <class T>
struct Vectors {
    typedef T V __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
    static constexpr int lanes = kBytes / static_cast<int>(sizeof(T));
};

// R rows by N vectors of outputs: y[r, j] = sum_i x[r, i] b[i, j].
template <class T, int R, int N>
inline void tile(const T* x, std::int64_t x_stride, const T* b, std::int64_t b_stride, std::int64_t size, T* y,
                 std::int64_t y_stride) {
    using V = typename Vectors<T>::V;
    constexpr int lanes = Vectors<T>::lanes;
    V sum[R][N] = {};
    for (std::int64_t i = 0; i < size; ++i) {
        V row[N];
        for (int n = 0; n < N; ++n) row[n] = *reinterpret_cast<const V*>(b + i * b_stride + n * lanes);
        for (int r = 0; r < R; ++r) {
            const T value = x[r * x_stride + i];
            for (int n = 0; n < N; ++n) sum[r][n] += value * row[n];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) *reinterpret_cast<V*>(y + r * y_stride + n * lanes) = sum[r][n];
}

// One row: the block goes by once, from its first byte to its last. The sums are those of `tile`, in its order.
template <class T>
inline void sweep(const T* __restrict x, const T* __restrict b, std::int64_t size, T* __restrict y) {
    for (std::int64_t j = 0; j < size; ++j) y[j] = 0;
    std::int64_t i = 0;
    for (; i + 4 <= size; i += 4, b += 4 * size)
        for (std::int64_t j = 0; j < size; ++j)
            y[j] = y[j] + x[i] * b[j] + x[i + 1] * b[size + j] + x[i + 2] * b[2 * size + j] + x[i + 3] * b[3 * size + j];
    for (; i < size; ++i, b += size)
        for (std::int64_t j = 0; j < size; ++j) y[j] = y[j] + x[i] * b[j];
}

// N vectors of outputs for all rows: R at a time, then fewer.
template <class T, int R, int N>
inline void columns(const Turn<T>& turn, const T* b, std::int64_t b_stride, T* y) {
    std::int64_t r = 0;
    for (; r + R <= turn.rows; r += R)
        tile<T, R, N>(turn.x + r * turn.size, turn.size, b, b_stride, turn.size, y + r * turn.size, turn.size);
    for (; r + 2 <= turn.rows; r += 2)
        tile<T, 2, N>(turn.x + r * turn.size, turn.size, b, b_stride, turn.size, y + r * turn.size, turn.size);
    for (; r < turn.rows; ++r)
        tile<T, 1, N>(turn.x + r * turn.size, turn.size, b, b_stride, turn.size, y + r * turn.size, turn.size);
}

template <class T>
void turn_rows(const Turn<T>& t) {
    if (t.rows <= 2) {
        for (std::int64_t r = 0; r < t.rows; ++r) sweep(t.x + r * t.size, t.block, t.size, t.y + r * t.size);
        return;
    }
    constexpr int lanes = Vectors<T>::lanes;
    const std::int64_t wide = kWide * lanes;
    std::int64_t j = 0;
    for (; j + wide <= t.size; j += wide) {
        const T* b = t.block + j;
        std::int64_t stride = t.size;
        if (t.panel != nullptr) { // a power of two between rows of a large block would fill few sets of the cache
            for (std::int64_t i = 0; i < t.size; ++i)
                std::memcpy(t.panel + i * wide, b + i * t.size, static_cast<std::size_t>(wide) * sizeof(T));
            b = t.panel, stride = wide;
        }
        columns<T, 6, kWide>(t, b, stride, t.y + j);
    }
    for (; j + lanes <= t.size; j += lanes) columns<T, 12, 1>(t, t.block + j, t.size, t.y + j);
    for (; j < t.size; ++j)
        for (std::int64_t r = 0; r < t.rows; ++r) {
            T sum = 0;
            for (std::int64_t i = 0; i < t.size; ++i) sum += t.x[r * t.size + i] * t.block[i * t.size + j];
            t.y[r * t.size + j] = sum;
        }
}
