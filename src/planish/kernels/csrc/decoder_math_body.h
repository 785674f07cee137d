// The arithmetic of a decoder beside its matrix products, written once on vectors of sixteen floats and compiled once
// for each instruction set: decoder_math.cpp includes this file with PLANISH_MATH_SPACE naming the copy. No guard.
#ifndef PLANISH_MATH_SPACE
#error "include this file from decoder_math.cpp only"
#endif

namespace planish {
namespace PLANISH_MATH_SPACE {

#define PLANISH_INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(64)));
typedef float FloatsAnywhere __attribute__((vector_size(64), aligned(4), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::uint16_t HalvesAnywhere __attribute__((vector_size(32), aligned(2), may_alias));
typedef std::int8_t BytesAnywhere __attribute__((vector_size(16), aligned(1), may_alias));

PLANISH_INLINE void get(const float* p, Floats& v) { v = *reinterpret_cast<const FloatsAnywhere*>(p); }
PLANISH_INLINE void put(float* p, const Floats& v) { *reinterpret_cast<FloatsAnywhere*>(p) = v; }

PLANISH_INLINE void get(const Half* p, Floats& v) {
#if defined(PLANISH_MATH_AVX512)
    v = reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
    // Exponent and fraction moved into a float's place, then the exponent's bias mended by a multiplication, which
    // also brings subnormal halves right. Infinities do not occur: what is stored was finite and is clamped.
    const Words w = __builtin_convertvector(*reinterpret_cast<const HalvesAnywhere*>(p), Words);
    const Floats magnitude = reinterpret_cast<Floats>((w & 0x7fffu) << 13) * 0x1p112f;
    v = reinterpret_cast<Floats>(reinterpret_cast<Words>(magnitude) | ((w & 0x8000u) << 16));
#endif
}

PLANISH_INLINE void get(const Brain* p, Floats& v) {
    const Words w = __builtin_convertvector(*reinterpret_cast<const HalvesAnywhere*>(p), Words);
    v = reinterpret_cast<Floats>(w << 16);
}

PLANISH_INLINE void get(const std::int8_t* p, Floats& v) {
#if defined(PLANISH_MATH_AVX512)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    v = reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#else
    v = __builtin_convertvector(*reinterpret_cast<const BytesAnywhere*>(p), Floats);
#endif
}

PLANISH_INLINE float one(float v) { return v; }
PLANISH_INLINE float one(Half h) { return to_float(h); }
PLANISH_INLINE float one(Brain b) { return to_float(b); }
PLANISH_INLINE float one(std::int8_t v) { return static_cast<float>(v); }

PLANISH_INLINE float add_lanes(const Floats& v) {
    float lanes[16];
    put(lanes, v);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

// e^x to about two units in the last place; below -87 it is the smallest normal number, close enough to nothing.
PLANISH_INLINE Floats exponential(Floats x) {
    const Floats low = {} , lowest = low - 87.0f, highest = low + 88.0f;
    x = x < lowest ? lowest : x;
    x = x > highest ? highest : x;
    const Floats shifted = x * 1.44269504088896341f + 12582912.0f; // rounds to the nearest whole number in the low bits
    const Floats n = shifted - 12582912.0f;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = low + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Ints power = reinterpret_cast<Ints>(shifted) << 23;
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + power);
}

PLANISH_INLINE Floats tanh_of(const Floats& x) {
    const Floats zero = {};
    return zero + 1.0f - 2.0f / (exponential(x * 2.0f) + 1.0f);
}

static void norm(const float* x, const float* weight, float eps, std::int64_t n, float* y) {
    Floats sum = {}, other = {};
    std::int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        Floats a, b;
        get(x + i, a);
        get(x + i + 16, b);
        sum += a * a;
        other += b * b;
    }
    float total = add_lanes(sum + other);
    for (; i < n; ++i) total += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
    for (i = 0; i + 16 <= n; i += 16) {
        Floats a, w;
        get(x + i, a);
        get(weight + i, w);
        put(y + i, (a * factor) * w);
    }
    for (; i < n; ++i) y[i] = (x[i] * factor) * weight[i];
}

static void add(float* x, const float* y, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) x[i] += y[i];
}

PLANISH_INLINE Floats gated(const Floats& g, int gate) {
    if (gate == 0) return g / (exponential(-g) + 1.0f);
    const Floats inner = (g + g * g * g * 0.044715f) * 0.7978845608028654f;
    return g * 0.5f * (tanh_of(inner) + 1.0f);
}

static void gate_up(const float* g, const float* u, int gate, std::int64_t n, float* y) {
    if (gate == 2) { // the exact Gaussian: rare, so no vector form
        for (std::int64_t i = 0; i < n; ++i) y[i] = 0.5f * g[i] * (1.0f + std::erf(g[i] * 0.70710678f)) * u[i];
        return;
    }
    std::int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        Floats a, b;
        get(g + i, a);
        get(u + i, b);
        put(y + i, gated(a, gate) * b);
    }
    if (i < n) {
        float a[16] = {}, b[16] = {}, c[16];
        std::copy(g + i, g + n, a);
        std::copy(u + i, u + n, b);
        Floats va, vb;
        get(a, va);
        get(b, vb);
        put(c, gated(va, gate) * vb);
        std::copy(c, c + (n - i), y + i);
    }
}

// Attention of the query heads that share one key-value head, for one row. Keys lie in tiles of sixteen positions,
// dimension by dimension, so that sixteen scores are made at once; values lie position by position.
template <int kHeads, class Cached>
PLANISH_INLINE void attend_heads(const Attend& a, const float* q, const Cached* keys, const Cached* values, float* scores,
                                 float* out) {
    const std::int64_t d = a.head_dim, first = a.begin / 16, last = (a.end + 15) / 16, width = a.stride;
    Floats best[kHeads];
    for (int h = 0; h < kHeads; ++h) best[h] = Floats{} - 3.0e38f;
    const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (std::int64_t tile = first; tile < last; ++tile) {
        const Cached* k = keys + tile * d * 16;
        Floats sum[kHeads] = {};
        for (std::int64_t i = 0; i < d; ++i) {
            Floats key;
            get(k + i * 16, key);
            for (int h = 0; h < kHeads; ++h) sum[h] += key * q[h * d + i];
        }
        const Ints position = lanes + static_cast<std::int32_t>(tile * 16);
        const Ints inside = (position >= static_cast<std::int32_t>(a.begin)) & (position < static_cast<std::int32_t>(a.end));
        for (int h = 0; h < kHeads; ++h) {
            Floats s = sum[h] * a.scale;
            if (a.softcap > 0.0f) s = tanh_of(s / a.softcap) * a.softcap;
            const Floats never = Floats{} - 3.0e38f;
            s = inside ? s : never;
            best[h] = s > best[h] ? s : best[h];
            put(scores + h * width + (tile - first) * 16, s);
        }
    }
    float share[kHeads];
    for (int h = 0; h < kHeads; ++h) {
        float each[16];
        put(each, best[h]);
        const float top = *std::max_element(each, each + 16);
        Floats sum = {};
        for (std::int64_t tile = first; tile < last; ++tile) {
            float* p = scores + h * width + (tile - first) * 16;
            Floats s;
            get(p, s);
            const Floats weight = exponential(s - top);
            const Floats none = {};
            const Floats kept = s > Floats{} - 2.0e38f ? weight : none;
            sum += kept;
            put(p, kept);
        }
        share[h] = 1.0f / add_lanes(sum);
    }
    const std::int64_t skipped = a.begin - first * 16;
    for (std::int64_t i = 0; i < d; i += 16) { // head dimensions are padded to sixteen in the cache
        Floats sum[kHeads] = {};
        for (std::int64_t t = a.begin; t < a.end; ++t) {
            Floats v;
            get(values + t * d + i, v);
            const float* p = scores + (t - a.begin + skipped);
            for (int h = 0; h < kHeads; ++h) sum[h] += v * p[h * width];
        }
        for (int h = 0; h < kHeads; ++h) put(out + h * d + i, sum[h] * share[h]);
    }
}

template <class Cached>
PLANISH_INLINE void attend_any(const Attend& a, const float* q, const void* keys, const void* values, float* scores,
                               float* out) {
    const Cached *k = static_cast<const Cached*>(keys), *v = static_cast<const Cached*>(values);
    std::int64_t h = 0;
    for (; h + 4 <= a.heads; h += 4) attend_heads<4>(a, q + h * a.head_dim, k, v, scores, out + h * a.head_dim);
    const float* rest = q + h * a.head_dim;
    if (a.heads - h == 3) attend_heads<3>(a, rest, k, v, scores, out + h * a.head_dim);
    if (a.heads - h == 2) attend_heads<2>(a, rest, k, v, scores, out + h * a.head_dim);
    if (a.heads - h == 1) attend_heads<1>(a, rest, k, v, scores, out + h * a.head_dim);
}

static void attend(const Attend& a, const float* q, const void* keys, const void* values, float* scores, float* out) {
    if (a.half) attend_any<Half>(a, q, keys, values, scores, out);
    else attend_any<float>(a, q, keys, values, scores, out);
}

// Dot products of x with rows [first, last) of a dense matrix.
template <class Weight>
PLANISH_INLINE void dots_of(const Weight* w, const float* x, std::int64_t n, std::int64_t first, std::int64_t last,
                            float* y) {
    constexpr int kRows = 4;
    // The same place of the next four rows, and no less than is to be under way.
    const std::int64_t ahead = std::max<std::int64_t>(kRows * n, 8192 / static_cast<std::int64_t>(sizeof(Weight)));
    std::int64_t r = first;
    for (; r + kRows <= last; r += kRows) {
        const Weight* row = w + r * n;
        Floats sum[kRows] = {}, more[kRows] = {};
        std::int64_t i = 0;
        for (; i + 32 <= n; i += 32) {
            Floats a, b;
            get(x + i, a);
            get(x + i + 16, b);
            for (int k = 0; k < kRows; ++k) {
                __builtin_prefetch(row + k * n + i + ahead);
                Floats v, u;
                get(row + k * n + i, v);
                get(row + k * n + i + 16, u);
                sum[k] += a * v;
                more[k] += b * u;
            }
        }
        for (int k = 0; k < kRows; ++k) {
            float total = add_lanes(sum[k] + more[k]);
            for (std::int64_t j = i; j < n; ++j) total += x[j] * one(row[k * n + j]);
            y[r + k] = total;
        }
    }
    for (; r < last; ++r) {
        const Weight* row = w + r * n;
        Floats sum = {}, more = {};
        std::int64_t i = 0;
        for (; i + 32 <= n; i += 32) {
            Floats a, b, v, u;
            get(x + i, a);
            get(x + i + 16, b);
            get(row + i, v);
            get(row + i + 16, u);
            sum += a * v;
            more += b * u;
        }
        float total = add_lanes(sum + more);
        for (; i < n; ++i) total += x[i] * one(row[i]);
        y[r] = total;
    }
}

static void dots(const void* w, Kind kind, const float* x, std::int64_t n, std::int64_t first, std::int64_t last,
                 float* y) {
    if (kind == Kind::float32) dots_of(static_cast<const float*>(w), x, n, first, last, y);
    if (kind == Kind::float16) dots_of(static_cast<const Half*>(w), x, n, first, last, y);
    if (kind == Kind::bfloat16) dots_of(static_cast<const Brain*>(w), x, n, first, last, y);
    if (kind == Kind::int8) dots_of(static_cast<const std::int8_t*>(w), x, n, first, last, y);
}

static const Math table = {norm, add, gate_up, attend, dots};

#undef PLANISH_INLINE

} // namespace PLANISH_MATH_SPACE
} // namespace planish
