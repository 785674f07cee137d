// Included once for an instruction set, inside an anonymous namespace and its PLANISH_TARGET: plain loops that the
// compiler turns into vectors. Floats are compared as integers, which keep their order and put NaN beyond infinity.

inline std::int32_t key_of(float x) {
    const std::int32_t bits = static_cast<std::int32_t>(bits_of(x));
    return bits ^ (bits >> 31 & 0x7FFFFFFF);
}

inline float of_key(std::int32_t key) { return float_of(static_cast<std::uint32_t>(key ^ (key >> 31 & 0x7FFFFFFF))); }

template <class T>
inline float largest(const T* x, std::int64_t n) {
    std::int32_t most = 0;
    for (std::int64_t k = 0; k < n; ++k) {
        const std::int32_t here = static_cast<std::int32_t>(bits_of(widen(x[k])) & 0x7FFFFFFFu);
        most = here > most ? here : most;
    }
    return float_of(static_cast<std::uint32_t>(most));
}

template <class T>
inline void extremes(const T* x, std::int64_t n, float& least, float& most) {
    std::int32_t low = 0, high = 0; // 0 is in every range
    for (std::int64_t k = 0; k < n; ++k) {
        const std::int32_t here = key_of(widen(x[k]));
        low = here < low ? here : low;
        high = here > high ? here : high;
    }
    least = of_key(low), most = of_key(high);
}

template <class T>
inline void encode(const T* x, std::int64_t n, float scale, float zero, float low, float high, std::int8_t* codes) {
    constexpr float shift = 0x1.8p23f; // adding it rounds to an integer, half to even: |x / scale| stays far below 2^22
    for (std::int64_t k = 0; k < n; ++k) {
        float code = ((widen(x[k]) / scale + shift) - shift) + zero;
        code = code == code ? code : 0.0f;
        code = code < low ? low : code;
        code = code > high ? high : code;
        codes[k] = static_cast<std::int8_t>(static_cast<std::int32_t>(code));
    }
}

template <class T>
void rows_of(const QuantizeRows& op, std::int64_t first, std::int64_t last) {
    const std::int64_t groups = (op.channels + op.group_size - 1) / op.group_size;
    const float low = -static_cast<float>(1 << (op.bits - 1)), high = -low - 1.0f;
    for (std::int64_t row = first; row < last; ++row)
        for (std::int64_t g = 0, begin = 0; g < groups; ++g, begin += op.group_size) {
            const std::int64_t n = op.channels - begin < op.group_size ? op.channels - begin : op.group_size;
            const T* x = static_cast<const T*>(op.x) + row * op.channels + begin;
            float scale, zero = 0.0f;
            if (op.symmetric)
                scale = stored(largest(x, n) * op.clip / (high + 0.5f), op.scale_type);
            else {
                float least, most;
                extremes(x, n, least, most);
                least *= op.clip, most *= op.clip;
                scale = stored((most - least) / (high - low), op.scale_type);
                zero = within(__builtin_nearbyintf(-least / scale) + low, low, high);
            }
            op.scale[row * groups + g] = scale;
            op.zero[row * groups + g] = static_cast<std::int8_t>(zero);
            encode(x, n, scale, zero, low, high, op.codes + row * op.channels + begin);
        }
}

void some_rows(const QuantizeRows& op, std::int64_t first, std::int64_t last) {
    if (op.type == Real::float16)
        rows_of<Half>(op, first, last);
    else if (op.type == Real::bfloat16)
        rows_of<BFloat>(op, first, last);
    else
        rows_of<float>(op, first, last);
}
