// One run of numbers, once for each instruction set: smoothed.cpp includes this file inside a namespace that defines
// kBytes, the length of a vector, Floats, and root(), its square root. No guard.
//
// Comparisons are written so that NaN passes through. A compiler may fuse a product and a sum; nothing depends on it.

constexpr int kLanes = kBytes / 4;
typedef std::uint32_t Words __attribute__((vector_size(kBytes)));
typedef float Unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));

#define PLANISH_INLINE static inline __attribute__((always_inline))

PLANISH_INLINE Floats get(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
PLANISH_INLINE void put(float* p, const Floats& v) { *reinterpret_cast<Unaligned*>(p) = v; }
PLANISH_INLINE Floats all(float v) { return Floats{} + v; }

// p[0] + p[1] x + ...
template <std::size_t N>
PLANISH_INLINE Floats polynomial(const float (&p)[N], const Floats& x) {
    Floats sum = all(p[N - 1]);
    for (std::size_t i = N - 1; i-- > 0;) sum = sum * x + p[i];
    return sum;
}

// 2^(x y), times what `p` has it times, for a product in [-127, 0]; 0 from -126.5 down.
template <std::size_t N>
PLANISH_INLINE Floats power(const float (&p)[N], const Floats& x, const Floats& y) {
    const Floats shifted = x * y + 12582912.0f; // the nearest whole number stands in the low bits
    const Floats rest = x * y - (shifted - 12582912.0f);
    const Words scale = (reinterpret_cast<Words>(shifted) << 23) + 0x3F800000u; // of -127: zero
    return polynomial(p, rest) * reinterpret_cast<Floats>(scale);
}

// Of each kernel: tail, sf and gap at u in [0, reach]; at `reach` they are those of infinity.
template <Smoothing kernel>
struct Curves;

template <>
struct Curves<Smoothing::gaussian> {
    static constexpr float reach = 13.268f; // where power() has come to zero
    PLANISH_INLINE Floats density(const Floats& u) {
        return power(kDensity, u * -0.72134752f, u); // half the logarithm of e to base 2
    }
    PLANISH_INLINE Floats tail(const Floats& u) { // density (1 - u Mills(u))
        const Floats q = 1.0f / (u + kMiddle), m = 1.0f - 2.0f * kMiddle * q;
        return density(u) * q * polynomial(kTail, m);
    }
    PLANISH_INLINE void slopes(const Floats& u, Floats& tail, Floats& sf, Floats& gap) {
        const Floats q = 1.0f / (u + kMiddle), m = 1.0f - 2.0f * kMiddle * q;
        gap = density(u);
        sf = gap * q * polynomial(kMills, m);
        tail = gap - u * sf; // what is lost is lost below the rounding of the gap; only sums take it
    }
};

template <>
struct Curves<Smoothing::logistic> {
    static constexpr float reach = 88.0f; // where power() has come to zero
    PLANISH_INLINE Floats decay(const Floats& u) { return power(kPower, u, all(-1.44269504f)); }
    PLANISH_INLINE Floats grown(const Floats& z) { // log(1 + z) by the series of atanh
        const Floats w = z / (2.0f + z);
        return w * polynomial(kAtanh, w * w);
    }
    PLANISH_INLINE Floats tail(const Floats& u) { return grown(decay(u)); }
    PLANISH_INLINE void slopes(const Floats& u, Floats& tail, Floats& sf, Floats& gap) {
        const Floats z = decay(u);
        tail = grown(z);
        sf = z / (1.0f + z);
        gap = tail + u * sf;
    }
};

template <>
struct Curves<Smoothing::laplace> {
    static constexpr float reach = 88.0f;
    PLANISH_INLINE Floats tail(const Floats& u) { return 0.5f * Curves<Smoothing::logistic>::decay(u); }
    PLANISH_INLINE void slopes(const Floats& u, Floats& tail_, Floats& sf, Floats& gap) {
        tail_ = sf = tail(u);
        gap = sf * (1.0f + u);
    }
};

PLANISH_INLINE Floats inside(const Floats& u) {
    const Floats v = 1.0f - u;
    return v < 0.0f ? Floats{} : v;
}

template <>
struct Curves<Smoothing::uniform> {
    static constexpr float reach = 2.0f;
    PLANISH_INLINE Floats tail(const Floats& u) { return inside(u) * inside(u) * 0.25f; }
    PLANISH_INLINE void slopes(const Floats& u, Floats& tail_, Floats& sf, Floats& gap) {
        tail_ = tail(u);
        sf = inside(u) * 0.5f;
        gap = inside(u) * (1.0f + u) * 0.25f;
    }
};

template <>
struct Curves<Smoothing::triangular> {
    static constexpr float reach = 2.0f;
    PLANISH_INLINE Floats tail(const Floats& u) { return inside(u) * inside(u) * inside(u) * (1.0f / 6); }
    PLANISH_INLINE void slopes(const Floats& u, Floats& tail_, Floats& sf, Floats& gap) {
        tail_ = tail(u);
        sf = inside(u) * inside(u) * 0.5f;
        gap = inside(u) * inside(u) * (1.0f + 2.0f * u) * (1.0f / 6);
    }
};

template <>
struct Curves<Smoothing::epanechnikov> {
    static constexpr float reach = 2.0f;
    PLANISH_INLINE Floats tail(const Floats& u) {
        return inside(u) * inside(u) * inside(u) * (3.0f + u) * 0.0625f;
    }
    PLANISH_INLINE void slopes(const Floats& u, Floats& tail_, Floats& sf, Floats& gap) {
        const Floats both = inside(u) * (1.0f + u);
        tail_ = tail(u);
        sf = inside(u) * inside(u) * (2.0f + u) * 0.25f;
        gap = both * both * 0.1875f;
    }
};

template <>
struct Curves<Smoothing::student> {
    static constexpr float reach = 1e12f;
    PLANISH_INLINE Floats tail(const Floats& u) { return 0.5f / (root(1.0f + u * u) + u); }
    PLANISH_INLINE void slopes(const Floats& u, Floats& tail, Floats& sf, Floats& gap) {
        const Floats radius = root(1.0f + u * u);
        gap = 0.5f / radius;
        tail = 0.5f / (radius + u);
        sf = gap / (radius + u);
    }
};

// A slope, a width and its inverse for each lane.
struct Each {
    Floats a, s, inverse;
};
template <bool vary>
PLANISH_INLINE Each each(const Run& r, std::int64_t i) {
    if (vary) return {get(r.a + i), get(r.s + i), get(r.inverse + i)};
    return {all(*r.a), all(*r.s), all(*r.inverse)};
}

PLANISH_INLINE Floats distance(const Floats& x, const Floats& inverse, float reach) {
    const Floats u = reinterpret_cast<Floats>(reinterpret_cast<Words>(x) & 0x7FFFFFFFu) * inverse;
    return u > reach ? all(reach) : u;
}

template <class C>
PLANISH_INLINE Floats value(const Floats& x, const Each& p) {
    const Floats tail = C::tail(distance(x, p.inverse, C::reach));
    return (x < 0.0f ? p.a * x : x) + (1.0f - p.a) * p.s * tail;
}

// The gradients of one vector: by x into `out` where there is room, by the slope and the width added to what came.
template <class C, bool summed>
PLANISH_INLINE void slopes(const Floats& x, const Floats& g, const Each& p, float* out, Floats& by_a, Floats& by_s) {
    Floats tail, sf, gap;
    C::slopes(distance(x, p.inverse, C::reach), tail, sf, gap);
    const Floats lost = (1.0f - p.a) * sf;
    if (out != nullptr) put(out, g * (x < 0.0f ? p.a + lost : 1.0f - lost));
    if (!summed) return;
    by_a += g * ((x > 0.0f ? Floats{} : x) - p.s * tail);
    by_s += g * gap;
}

// What is left at the end of a run, with zeros behind it.
struct Rest {
    float x[kLanes] = {}, g[kLanes] = {}, out[kLanes], a[kLanes] = {}, s[kLanes] = {}, inverse[kLanes] = {};
    Rest(const Run& r, std::int64_t i, bool vary) {
        const std::size_t bytes = static_cast<std::size_t>(r.n - i) * sizeof(float);
        std::memcpy(x, r.x + i, bytes);
        if (r.grad != nullptr) std::memcpy(g, r.grad + i, bytes);
        std::memcpy(a, r.a + (vary ? i : 0), vary ? bytes : sizeof(float));
        std::memcpy(s, r.s + (vary ? i : 0), vary ? bytes : sizeof(float));
        std::memcpy(inverse, r.inverse + (vary ? i : 0), vary ? bytes : sizeof(float));
    }
    Run run() { return {x, g, out, a, s, inverse, kLanes, nullptr, nullptr, nullptr}; }
};

template <class C, bool vary>
void forward_run(const Run& run) {
    const Run r = run; // a copy of its own stays in registers
    std::int64_t i = 0;
    for (; i + kLanes <= r.n; i += kLanes) put(r.out + i, value<C>(get(r.x + i), each<vary>(r, i)));
    if (i == r.n) return;
    Rest rest(run, i, vary);
    put(rest.out, value<C>(get(rest.x), each<vary>(rest.run(), 0)));
    std::memcpy(r.out + i, rest.out, static_cast<std::size_t>(r.n - i) * sizeof(float));
}

// One slope and width: r.by_a and r.by_s are one sum each, to which is added. Else one a position.
template <class C, bool vary, bool summed>
void back_run(const Run& run) {
    const Run r = run;
    constexpr std::int64_t short_sum = 32 * kLanes;
    double wide_a[kLanes] = {}, wide_s[kLanes] = {};
    Floats by_a = {}, by_s = {};
    std::int64_t i = 0;
    while (i + kLanes <= r.n) {
        const std::int64_t end = vary ? r.n : std::min(r.n, i + short_sum);
        for (; i + kLanes <= end; i += kLanes) {
            if (vary && summed) by_a = get(r.by_a + i), by_s = get(r.by_s + i);
            slopes<C, summed>(get(r.x + i), get(r.grad + i), each<vary>(r, i), r.out == nullptr ? nullptr : r.out + i,
                              by_a, by_s);
            if (vary && summed) put(r.by_a + i, by_a), put(r.by_s + i, by_s);
        }
        if (vary || !summed) continue;
        for (int l = 0; l < kLanes; ++l) {
            wide_a[l] += static_cast<double>(by_a[l]), wide_s[l] += static_cast<double>(by_s[l]);
        }
        by_a = by_s = Floats{};
    }
    if (i < r.n) {
        Rest rest(run, i, vary);
        by_a = by_s = Floats{};
        slopes<C, summed>(get(rest.x), get(rest.g), each<vary>(rest.run(), 0), rest.out, by_a, by_s);
        const int left = static_cast<int>(r.n - i);
        if (r.out != nullptr) std::memcpy(r.out + i, rest.out, static_cast<std::size_t>(left) * sizeof(float));
        for (int l = 0; summed && l < left; ++l) {
            if (vary) {
                r.by_a[i + l] += by_a[l], r.by_s[i + l] += by_s[l];
            } else {
                wide_a[l] += static_cast<double>(by_a[l]), wide_s[l] += static_cast<double>(by_s[l]);
            }
        }
    }
    if (vary || !summed) return;
    for (int l = 0; l < kLanes; ++l) r.sums[0] += wide_a[l], r.sums[1] += wide_s[l];
}

template <Smoothing kernel>
Way way_of(bool vary, bool back, bool summed) {
    using C = Curves<kernel>;
    if (!back) return vary ? forward_run<C, true> : forward_run<C, false>;
    if (summed) return vary ? back_run<C, true, true> : back_run<C, false, true>;
    return vary ? back_run<C, true, false> : back_run<C, false, false>;
}

Way way(Smoothing kernel, bool vary, bool back, bool summed) {
    switch (kernel) {
        case Smoothing::logistic: return way_of<Smoothing::logistic>(vary, back, summed);
        case Smoothing::laplace: return way_of<Smoothing::laplace>(vary, back, summed);
        case Smoothing::uniform: return way_of<Smoothing::uniform>(vary, back, summed);
        case Smoothing::triangular: return way_of<Smoothing::triangular>(vary, back, summed);
        case Smoothing::epanechnikov: return way_of<Smoothing::epanechnikov>(vary, back, summed);
        case Smoothing::student: return way_of<Smoothing::student>(vary, back, summed);
        default: return way_of<Smoothing::gaussian>(vary, back, summed);
    }
}

#undef PLANISH_INLINE
