#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "pool.h"

namespace planish {
namespace {

constexpr std::int64_t kLightWork = 1 << 16; // multiplications for which waking a second thread does not pay

void grow(std::vector<float>& buffer, std::int64_t size) {
    if (static_cast<std::int64_t>(buffer.size()) < size) buffer.resize(size);
}

// Calls fn(begin, end) for contiguous parts of [0, n), one a thread.
template <class F>
void split(int threads, std::int64_t n, F&& fn) {
    const std::int64_t parts = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, n));
    parallel(threads, parts, [&](std::int64_t p) { fn(p * n / parts, (p + 1) * n / parts); });
}

std::size_t width(Kind kind) { return kind == Kind::float32 ? 4 : kind == Kind::int8 ? 1 : 2; }

const void* at_row(const void* rows, Kind kind, std::int64_t row, std::int64_t n) {
    return static_cast<const char*>(rows) + width(kind) * static_cast<std::size_t>(row * n);
}

} // namespace

Decoder::Decoder(const DecoderShape& shape)
    : shape_(shape), padded_((shape.head_dim + 15) / 16 * 16), math_(math_of(active_isa())) {}

void Decoder::multiply(const std::vector<Matrix>& parts, const float* x, std::int64_t rows, std::int64_t in, float* y,
                       std::int64_t y_stride, int activation_bits, int threads) {
    Product products[4];
    int count = 0;
    std::int64_t column = 0;
    for (const Matrix& m : parts) {
        float* here = y + column;
        column += m.weight.out;
        if (m.weight.data != nullptr) {
            products[count++] = Product{m.weight, m.bias, here, y_stride};
            continue;
        }
        // outputs in tiles that stay in the first cache while all rows pass
        const std::int64_t tile = 16, tiles = (m.weight.out + tile - 1) / tile;
        split(threads, tiles, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t t = begin; t < end; ++t)
                for (std::int64_t r = 0; r < rows; ++r) {
                    const std::int64_t first = t * tile, stop = std::min(m.weight.out, first + tile);
                    math_.dots(m.dense, m.kind, x + r * in, in, first, stop, here + r * y_stride);
                    if (m.bias != nullptr)
                        for (std::int64_t o = first; o < stop; ++o) here[r * y_stride + o] += m.bias[o];
                }
        });
    }
    // one call for all that share their segments, so that the activation is rounded once
    for (int i = 0; i < count;) {
        int j = i + 1;
        while (j < count && products[j].weight.group_size == products[i].weight.group_size) ++j;
        linear(products + i, j - i, x, rows, in, activation_bits, threads);
        i = j;
    }
}

// Norm and turn the queries and keys of a row, and put its keys and values into the cache.
void Decoder::turn(const DecoderBlock& block, float* row, std::int64_t layer, std::int64_t slot, std::int64_t position) {
    const std::int64_t d = shape_.head_dim, dp = padded_, heads = shape_.heads, kv = shape_.kv_heads;
    for (std::int64_t h = 0; h < heads + kv; ++h) {
        float* v = row + h * d;
        const Norm& norm = h < heads ? block.q_norm : block.k_norm;
        if (norm.weight != nullptr) math_.norm(v, norm.weight, norm.eps, d, v);
        if (block.rope < 0) continue;
        const Rope& rope = ropes[block.rope];
        const float *cos = rope.cos + position * rope.half, *sin = rope.sin + position * rope.half;
        for (std::int64_t i = 0; i < rope.half; ++i) {
            const float a = v[i], b = v[i + rope.half];
            v[i] = a * cos[i] - b * sin[i];
            v[i + rope.half] = b * cos[i] + a * sin[i];
        }
    }
    const std::int64_t tiles = cache.capacity / 16, tile = position / 16, lane = position % 16;
    for (std::int64_t h = 0; h < kv; ++h) {
        const std::int64_t head = (layer * cache.slots + slot) * kv + h;
        const float *k = row + (heads + h) * d, *v = row + (heads + kv + h) * d;
        const std::int64_t k_at = (head * tiles + tile) * dp * 16 + lane, v_at = (head * cache.capacity + position) * dp;
        for (std::int64_t i = 0; i < dp; ++i) {
            const float a = i < d ? k[i] : 0.0f, b = i < d ? v[i] : 0.0f;
            if (cache.half) {
                static_cast<Half*>(cache.keys)[k_at + i * 16] = to_half(a);
                static_cast<Half*>(cache.values)[v_at + i] = to_half(b);
            } else {
                static_cast<float*>(cache.keys)[k_at + i * 16] = a;
                static_cast<float*>(cache.values)[v_at + i] = b;
            }
        }
    }
}

void Decoder::attend_one(const DecoderBlock& block, std::int64_t layer, std::int64_t slot, std::int64_t position,
                         std::int64_t kv_head, const float* q, float* out, std::vector<float>& scores) const {
    const std::int64_t d = shape_.head_dim, dp = padded_, group = shape_.heads / shape_.kv_heads;
    const std::int64_t begin = block.window > 0 ? std::max<std::int64_t>(0, position + 1 - block.window) : 0;
    const std::int64_t stride = ((position + 16) / 16 - begin / 16) * 16;
    const Attend a{group, dp, begin, position + 1, stride, shape_.scale, shape_.softcap, cache.half};
    const std::int64_t head = (layer * cache.slots + slot) * shape_.kv_heads + kv_head;
    const std::size_t offset = static_cast<std::size_t>(head * cache.capacity * dp) * (cache.half ? 2 : 4);
    const void *keys = static_cast<const char*>(cache.keys) + offset, *values = static_cast<const char*>(cache.values) + offset;
    if (d == dp) {
        grow(scores, group * stride);
        math_.attend(a, q, keys, values, scores.data(), out);
        return;
    }
    grow(scores, group * (stride + 2 * dp)); // room for padded queries and outputs behind the scores
    float *wide_q = scores.data() + group * stride, *wide_out = wide_q + group * dp;
    for (std::int64_t h = 0; h < group; ++h) {
        std::copy_n(q + h * d, d, wide_q + h * dp);
        std::fill_n(wide_q + h * dp + d, dp - d, 0.0f);
    }
    math_.attend(a, wide_q, keys, values, scores.data(), wide_out);
    for (std::int64_t h = 0; h < group; ++h) std::copy_n(wide_out + h * dp, d, out + h * d);
}

void Decoder::attend(const DecoderBlock& block, std::int64_t layer, const std::int64_t* slots,
                     const std::int64_t* positions, std::int64_t rows, int threads) {
    const std::int64_t d = shape_.head_dim, kv = shape_.kv_heads, group = shape_.heads / kv, tasks = rows * kv;
    const std::int64_t row_width = (shape_.heads + 2 * kv) * d;
    std::int64_t work = 0;
    for (std::int64_t r = 0; r < rows; ++r) work += 2 * shape_.heads * padded_ * (positions[r] + 1);
    const std::int64_t parts = work < kLightWork ? 1 : std::max<std::int64_t>(1, std::min<std::int64_t>(threads, tasks));
    if (static_cast<std::int64_t>(scores_.size()) < parts) scores_.resize(parts);
    parallel(threads, parts, [&](std::int64_t part) {
        for (std::int64_t i = part; i < tasks; i += parts) { // later rows see more: dealt out in turn
            const std::int64_t r = i / kv, h = i % kv;
            attend_one(block, layer, slots[r], positions[r], h, qkv_.data() + r * row_width + h * group * d,
                       attended_.data() + (r * shape_.heads + h * group) * d, scores_[part]);
        }
    });
}

void Decoder::step(const std::int64_t* tokens, const std::int64_t* slots, const std::int64_t* positions,
                   std::int64_t rows, const std::int64_t* kept, std::int64_t n_kept, float* hidden, int activation_bits,
                   int threads) {
    const std::int64_t n = shape_.hidden, q = shape_.heads * shape_.head_dim, f = shape_.inner;
    const std::int64_t qkv = q + 2 * shape_.kv_heads * shape_.head_dim;
    grow(x_, rows * n), grow(normed_, rows * n), grow(made_, rows * n);
    grow(qkv_, rows * qkv), grow(attended_, rows * q), grow(gates_, rows * 2 * f), grow(inner_, rows * f);
    float *x = x_.data(), *normed = normed_.data(), *made = made_.data();
    const int row_threads = rows > 1 ? threads : 1;

    for (std::int64_t r = 0; r < rows; ++r) {
        const void* from = at_row(embedding, embedding_kind, tokens[r], n);
        for (std::int64_t i = 0; i < n; ++i) {
            const float v = embedding_kind == Kind::float32   ? static_cast<const float*>(from)[i]
                            : embedding_kind == Kind::float16 ? to_float(static_cast<const Half*>(from)[i])
                                                              : to_float(static_cast<const Brain*>(from)[i]);
            x[r * n + i] = v * shape_.embed_scale;
        }
    }
    auto norm_rows = [&](const Norm& norm, const float* from, float* to) {
        split(row_threads, rows, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t r = begin; r < end; ++r) {
                if (norm.weight != nullptr) math_.norm(from + r * n, norm.weight, norm.eps, n, to + r * n);
                else std::copy_n(from + r * n, n, to + r * n);
            }
        });
    };
    auto add_rows = [&](const Norm& norm) {
        split(row_threads, rows, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t r = begin; r < end; ++r) {
                if (norm.weight != nullptr) math_.norm(made + r * n, norm.weight, norm.eps, n, made + r * n);
                math_.add(x + r * n, made + r * n, n);
            }
        });
    };
    for (std::size_t layer = 0; layer < blocks.size(); ++layer) {
        const DecoderBlock& block = blocks[layer];
        norm_rows(block.before_attention, x, normed);
        multiply(block.qkv, normed, rows, n, qkv_.data(), qkv, activation_bits, threads);
        split(row_threads, rows, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t r = begin; r < end; ++r)
                turn(block, qkv_.data() + r * qkv, static_cast<std::int64_t>(layer), slots[r], positions[r]);
        });
        attend(block, static_cast<std::int64_t>(layer), slots, positions, rows, threads);
        multiply(block.out, attended_.data(), rows, q, made, n, activation_bits, threads);
        add_rows(block.after_attention);
        norm_rows(block.before_mlp, x, normed);
        multiply(block.gate_up, normed, rows, n, gates_.data(), 2 * f, activation_bits, threads);
        split(row_threads, rows, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t r = begin; r < end; ++r) {
                const float* gate = gates_.data() + r * 2 * f;
                math_.gate_up(gate, gate + f, shape_.gate, f, inner_.data() + r * f);
            }
        });
        multiply(block.down, inner_.data(), rows, f, made, n, activation_bits, threads);
        add_rows(block.after_mlp);
    }
    for (std::int64_t k = 0; k < n_kept; ++k) {
        if (last.weight != nullptr) math_.norm(x + kept[k] * n, last.weight, last.eps, n, hidden + k * n);
        else std::copy_n(x + kept[k] * n, n, hidden + k * n);
    }
}

// Logits as the codes have them; returns the least that the largest exact logit can be, and the norm of the hidden state.
float Decoder::approximate(const float* hidden, float* out, float& size, int threads) const {
    const std::int64_t n = shape_.hidden, vocab = shape_.vocab;
    double squares = 0.0;
    for (std::int64_t i = 0; i < n; ++i) squares += static_cast<double>(hidden[i]) * hidden[i];
    size = static_cast<float>(std::sqrt(squares));
    const float length = size;
    const std::int64_t parts = std::max(1, threads);
    std::vector<float> least(parts, -std::numeric_limits<float>::infinity());
    parallel(threads, parts, [&](std::int64_t p) {
        const std::int64_t first = p * vocab / parts, last_row = (p + 1) * vocab / parts;
        for (std::int64_t begin = first; begin < last_row; begin += 1024) {
            const std::int64_t end = std::min(last_row, begin + 1024);
            math_.dots(head.codes, Kind::int8, hidden, n, begin, end, out);
            float most = -std::numeric_limits<float>::infinity();
            for (std::int64_t v = begin; v < end; ++v) {
                out[v] = out[v] * head.scale[v] + (head.bias == nullptr ? 0.0f : head.bias[v]);
                const float low = out[v] - head.lost[v] * length;
                most = low > most ? low : most;
            }
            least[p] = std::max(least[p], most);
        }
    });
    return *std::max_element(least.begin(), least.end());
}

std::int64_t Decoder::best(const float* hidden, int threads) {
    const std::int64_t n = shape_.hidden, vocab = shape_.vocab;
    grow(logits_, vocab);
    float* out = logits_.data();
    float size = 0.0f, least = -std::numeric_limits<float>::infinity();
    const bool codes = head.codes != nullptr;
    if (codes) least = approximate(hidden, out, size, threads);
    struct Found {
        float value = -std::numeric_limits<float>::infinity();
        std::int64_t token = -1;
    };
    const std::int64_t parts = std::max(1, threads);
    std::vector<Found> found(parts);
    parallel(threads, parts, [&](std::int64_t p) {
        const std::int64_t first = p * vocab / parts, stop = (p + 1) * vocab / parts;
        if (!codes) math_.dots(head.exact, head.kind, hidden, n, first, stop, out);
        for (std::int64_t v = first; v < stop; ++v) {
            const float bias = head.bias == nullptr ? 0.0f : head.bias[v];
            if (codes) { // whatever cannot be the largest is passed over
                if (!(out[v] + head.lost[v] * size >= least)) continue;
                math_.dots(at_row(head.exact, head.kind, v, n), head.kind, hidden, n, 0, 1, out + v);
            }
            if (out[v] + bias > found[p].value) found[p] = Found{out[v] + bias, v};
        }
    });
    Found top;
    for (const Found& each : found)
        if (each.value > top.value) top = each;
    return std::isfinite(top.value) ? top.token : -1;
}

void Decoder::logits(const float* hidden, float span, float* out, int threads) {
    const std::int64_t n = shape_.hidden, vocab = shape_.vocab;
    float size = 0.0f, least = 0.0f;
    const bool codes = head.codes != nullptr;
    if (codes) least = approximate(hidden, out, size, threads);
    split(threads, vocab, [&](std::int64_t first, std::int64_t stop) {
        if (!codes) math_.dots(head.exact, head.kind, hidden, n, first, stop, out);
        for (std::int64_t v = first; v < stop; ++v) {
            const float bias = head.bias == nullptr ? 0.0f : head.bias[v];
            if (!codes) out[v] += bias;
            else if (out[v] + head.lost[v] * size >= least - span) {
                math_.dots(at_row(head.exact, head.kind, v, n), head.kind, hidden, n, 0, 1, out + v);
                out[v] += bias;
            }
            if (head.softcap > 0.0f) out[v] = std::tanh(out[v] / head.softcap) * head.softcap;
        }
    });
}

} // namespace planish
