#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "pool.h"
#include "team.h"

namespace planish {
namespace {

constexpr int kAtOnce = 64;             // slices in one call
constexpr std::int64_t kFew = 8;        // rows up to which a team stays together
constexpr std::int64_t kHeadRows = 512; // of the head, in one piece of work

void grow(std::vector<float>& buffer, std::int64_t size) {
    if (static_cast<std::int64_t>(buffer.size()) < size) buffer.resize(size);
}

// Calls fn(begin, end) for contiguous parts of [0, n), one a thread.
template <class F>
void split(int threads, std::int64_t n, F&& fn) {
    const std::int64_t parts = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, n));
    parallel(threads, parts, [&](std::int64_t p) { fn(p * n / parts, (p + 1) * n / parts); });
}

// What a thread reads next, asked for while it has nothing to read: else memory would rest between two products.
class Ahead {
  public:
    void at(const std::vector<Slice>& slices) {
        if (slices.empty()) return;
        const Slice& first = slices.front();
        at_ = static_cast<const char*>(first.weight.data != nullptr ? first.weight.data : first.dense);
        end_ = at_ + kMost;
    }
    void some() {
        for (int i = 0; i < kLines && at_ < end_; ++i, at_ += 64) __builtin_prefetch(at_, 0, kHint);
    }

  private:
    static constexpr std::int64_t kMost = 128 << 10; // bytes of a second-level cache that others use too
    static constexpr int kLines = 4;                 // at a time: the wait must not become longer by them
    static constexpr int kHint = 2;                  // into the second-level cache
    const char *at_ = nullptr, *end_ = nullptr;
};

std::size_t width(Kind kind) { return kind == Kind::float32 ? 4 : kind == Kind::int8 ? 1 : 2; }

const void* at_row(const void* rows, Kind kind, std::int64_t row, std::int64_t n) {
    return static_cast<const char*>(rows) + width(kind) * static_cast<std::size_t>(row * n);
}

} // namespace

Decoder::Decoder(const DecoderShape& shape, std::int64_t parts)
    : shape_(shape), parts_(std::max<std::int64_t>(1, parts)), padded_((shape.head_dim + 15) / 16 * 16),
      qkv_width_((shape.heads + 2 * shape.kv_heads) * shape.head_dim), math_(math_of(active_isa())),
      own_(static_cast<std::size_t>(parts_)) {}

void Decoder::embed(const std::int64_t* tokens, std::int64_t rows, float* x) const {
    const std::int64_t n = shape_.hidden;
    for (std::int64_t r = 0; r < rows; ++r) {
        const void* from = at_row(embedding, embedding_kind, tokens[r], n);
        for (std::int64_t i = 0; i < n; ++i) {
            const float v = embedding_kind == Kind::float32   ? static_cast<const float*>(from)[i]
                            : embedding_kind == Kind::float16 ? to_float(static_cast<const Half*>(from)[i])
                                                              : to_float(static_cast<const Brain*>(from)[i]);
            x[r * n + i] = v * shape_.embed_scale;
        }
    }
}

void Decoder::multiply(const std::vector<Slice>& slices, const float* x, std::int64_t rows, std::int64_t in, float* y,
                       std::int64_t y_stride, int activation_bits) const {
    Product products[kAtOnce];
    int count = 0;
    auto run = [&] { // one call for all that share their segments, so that the activation is rounded once
        if (count > 0) linear(products, count, x, rows, in, activation_bits, 1);
        count = 0;
    };
    for (const Slice& s : slices) {
        if (s.weight.data != nullptr) {
            if (count == kAtOnce || (count > 0 && products[0].weight.group_size != s.weight.group_size)) run();
            products[count++] = Product{s.weight, s.bias, y + s.column, y_stride};
            continue;
        }
        for (std::int64_t r = 0; r < rows; ++r) {
            float* here = y + s.column + r * y_stride;
            math_.dots(s.dense, s.kind, x + r * in, in, 0, s.weight.out, here);
            if (s.bias != nullptr) math_.add(here, s.bias, s.weight.out);
        }
    }
    run();
}

void Decoder::multiply_all(const Layer& layer, const float* x, std::int64_t rows, std::int64_t in, float* y,
                           std::int64_t y_stride, int activation_bits, int threads) const {
    Product products[kAtOnce];
    int count = 0;
    auto run = [&] {
        if (count > 0) linear(products, count, x, rows, in, activation_bits, threads);
        count = 0;
    };
    for (const std::vector<Slice>& slices : layer) {
        for (const Slice& s : slices) {
            if (s.weight.data != nullptr) {
                if (count == kAtOnce || (count > 0 && products[0].weight.group_size != s.weight.group_size)) run();
                products[count++] = Product{s.weight, s.bias, y + s.column, y_stride};
                continue;
            }
            // outputs in tiles that stay in the first cache while all rows pass
            const std::int64_t tile = 16, tiles = (s.weight.out + tile - 1) / tile;
            parallel(threads, tiles, [&](std::int64_t t) {
                for (std::int64_t r = 0; r < rows; ++r) {
                    float* here = y + s.column + r * y_stride;
                    const std::int64_t first = t * tile, stop = std::min(s.weight.out, first + tile);
                    math_.dots(s.dense, s.kind, x + r * in, in, first, stop, here);
                    if (s.bias != nullptr) math_.add(here + first, s.bias + first, stop - first);
                }
            });
        }
    }
    run();
}

// Norm and turn one query or key head of a row; a key head goes into the cache, and its value with it.
void Decoder::turn(const DecoderBlock& block, std::int64_t layer, const Rows& rows, std::int64_t row, std::int64_t head) {
    const std::int64_t d = shape_.head_dim, dp = padded_, heads = shape_.heads, kv = shape_.kv_heads;
    const std::int64_t position = rows.positions[row];
    float* v = qkv_.data() + row * qkv_width_ + head * d;
    const Norm& norm = head < heads ? block.q_norm : block.k_norm;
    if (norm.weight != nullptr) math_.norm(v, norm.weight, norm.eps, d, v);
    if (block.rope >= 0) {
        const Rope& rope = ropes[static_cast<std::size_t>(block.rope)];
        const float *cos = rope.cos + position * rope.half, *sin = rope.sin + position * rope.half;
        for (std::int64_t i = 0; i < rope.half; ++i) {
            const float a = v[i], b = v[i + rope.half];
            v[i] = a * cos[i] - b * sin[i];
            v[i + rope.half] = b * cos[i] + a * sin[i];
        }
    }
    if (head < heads) return;
    const float* value = v + kv * d;
    const std::int64_t place = (layer * cache.slots + rows.slots[row]) * kv + head - heads;
    const std::int64_t k_at = (place * (cache.capacity / 16) + position / 16) * dp * 16 + position % 16;
    const std::int64_t v_at = (place * cache.capacity + position) * dp;
    for (std::int64_t i = 0; i < dp; ++i) {
        const float a = i < d ? v[i] : 0.0f, b = i < d ? value[i] : 0.0f;
        if (cache.half) {
            static_cast<Half*>(cache.keys)[k_at + i * 16] = to_half(a);
            static_cast<Half*>(cache.values)[v_at + i] = to_half(b);
        } else {
            static_cast<float*>(cache.keys)[k_at + i * 16] = a;
            static_cast<float*>(cache.values)[v_at + i] = b;
        }
    }
}

// Attention of a row's query heads [first, last).
void Decoder::attend(const DecoderBlock& block, std::int64_t layer, const Rows& rows, std::int64_t row,
                     std::int64_t first, std::int64_t last, std::vector<float>& scores) {
    const std::int64_t d = shape_.head_dim, dp = padded_, group = shape_.heads / shape_.kv_heads;
    const std::int64_t position = rows.positions[row];
    const std::int64_t begin = block.window > 0 ? std::max<std::int64_t>(0, position + 1 - block.window) : 0;
    const std::int64_t stride = ((position + 16) / 16 - begin / 16) * 16;
    for (std::int64_t h = first; h < last;) {
        const std::int64_t kv_head = h / group, count = std::min(last, (kv_head + 1) * group) - h;
        const Attend a{count, dp, begin, position + 1, stride, shape_.scale, shape_.softcap, cache.half};
        const std::int64_t place = (layer * cache.slots + rows.slots[row]) * shape_.kv_heads + kv_head;
        const std::size_t offset = static_cast<std::size_t>(place * cache.capacity * dp) * (cache.half ? 2 : 4);
        const void* keys = static_cast<const char*>(cache.keys) + offset;
        const void* values = static_cast<const char*>(cache.values) + offset;
        const float* q = qkv_.data() + row * qkv_width_ + h * d;
        float* out = attended_.data() + (row * shape_.heads + h) * d;
        h += count;
        grow(scores, count * (stride + 2 * dp));
        if (d == dp) {
            math_.attend(a, q, keys, values, scores.data(), out);
            continue;
        }
        float *wide_q = scores.data() + count * stride, *wide_out = wide_q + count * dp; // room behind the scores
        for (std::int64_t i = 0; i < count; ++i) {
            std::copy_n(q + i * d, d, wide_q + i * dp);
            std::fill_n(wide_q + i * dp + d, dp - d, 0.0f);
        }
        math_.attend(a, wide_q, keys, values, scores.data(), wide_out);
        for (std::int64_t i = 0; i < count; ++i) std::copy_n(wide_out + i * dp, d, out + i * d);
    }
}

void Decoder::gate(const Rows&, std::int64_t row, std::int64_t first, std::int64_t last) {
    const std::int64_t f = shape_.inner;
    const float* g = gates_.data() + row * 2 * f + first;
    math_.gate_up(g, g + f, shape_.gate, last - first, inner_.data() + row * f + first);
}

// Each part norms for itself, which costs less than waiting for another to do it, and makes its own channels.
void Decoder::few(const Rows& rows, int threads) {
    const std::int64_t n = shape_.hidden, f = shape_.inner, q = shape_.heads * shape_.head_dim, count = rows.count;
    const std::int64_t to_turn = shape_.heads + shape_.kv_heads;
    Team team(parts_);
    auto share = [&](std::int64_t p, std::int64_t total) { return p * total / parts_; };
    auto normed = [&](const Norm& norm, const float* x, float* y) {
        if (norm.weight != nullptr) math_.norm(x, norm.weight, norm.eps, n, y);
        else std::copy_n(x, n, y);
    };
    // x += after(made), then `normed` of it
    auto next = [&](Own& own, const std::vector<float>& made, const Norm& after, const Norm& before, bool add) {
        for (std::int64_t r = 0; r < count; ++r) {
            float *x = own.x.data() + r * n, *y = own.normed.data() + r * n;
            if (add && after.weight != nullptr) {
                math_.norm(made.data() + r * n, after.weight, after.eps, n, y);
                math_.add(x, y, n);
            } else if (add) {
                math_.add(x, made.data() + r * n, n);
            }
            normed(before, x, y);
        }
    };
    parallel(static_cast<int>(std::min<std::int64_t>(threads, parts_)), parts_, [&](std::int64_t me) {
        std::int64_t phase = 0;
        Ahead ahead;
        auto together = [&](auto&& work) { team.phase(phase++, me, work, [&] { ahead.some(); }); };
        for (std::size_t l = 0; l < blocks.size(); ++l) {
            const DecoderBlock& b = blocks[l];
            const auto layer = static_cast<std::int64_t>(l);
            ahead.at(b.out[me]);
            together([&](std::int64_t p) {
                next(own_[p], made_down_, l > 0 ? blocks[l - 1].after_mlp : Norm{}, b.before_attention, l > 0);
                multiply(b.qkv[p], own_[p].normed.data(), count, n, qkv_.data(), qkv_width_, rows.activation_bits);
            });
            together([&](std::int64_t p) {
                for (std::int64_t i = share(p, count * to_turn); i < share(p + 1, count * to_turn); ++i)
                    turn(b, layer, rows, i / to_turn, i % to_turn);
            });
            together([&](std::int64_t p) {
                const std::int64_t first = share(p, count * shape_.heads), last = share(p + 1, count * shape_.heads);
                for (std::int64_t i = first; i < last;) {
                    const std::int64_t row = i / shape_.heads, end = std::min(last, (row + 1) * shape_.heads);
                    attend(b, layer, rows, row, i - row * shape_.heads, end - row * shape_.heads, own_[p].scores);
                    i = end;
                }
            });
            ahead.at(b.gate_up[me]);
            together([&](std::int64_t p) {
                multiply(b.out[p], attended_.data(), count, q, made_.data(), n, rows.activation_bits);
            });
            ahead.at(b.down[me]);
            together([&](std::int64_t p) {
                next(own_[p], made_, b.after_attention, b.before_mlp, true);
                multiply(b.gate_up[p], own_[p].normed.data(), count, n, gates_.data(), 2 * f, rows.activation_bits);
                for (std::int64_t r = 0; r < count; ++r) gate(rows, r, b.inner[p], b.inner[p + 1]);
            });
            if (l + 1 < blocks.size()) ahead.at(blocks[l + 1].qkv[me]);
            together([&](std::int64_t p) {
                multiply(b.down[p], inner_.data(), count, f, made_down_.data(), n, rows.activation_bits);
            });
        }
    });
    next(own_[0], made_down_, blocks.back().after_mlp, last, true);
}

void Decoder::many(const Rows& rows, int threads) {
    const std::int64_t n = shape_.hidden, f = shape_.inner, q = shape_.heads * shape_.head_dim, count = rows.count;
    float *x = own_[0].x.data(), *normed = own_[0].normed.data();
    auto each_row = [&](auto&& work) {
        split(threads, count, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t r = begin; r < end; ++r) work(r);
        });
    };
    auto apply = [&](const Norm& norm, const float* from, float* to) {
        if (norm.weight != nullptr) math_.norm(from, norm.weight, norm.eps, n, to);
        else if (from != to) std::copy_n(from, n, to);
    };
    auto add = [&](std::int64_t r, const Norm& after, const Norm& before) {
        apply(after, made_.data() + r * n, made_.data() + r * n);
        math_.add(x + r * n, made_.data() + r * n, n);
        apply(before, x + r * n, normed + r * n);
    };
    each_row([&](std::int64_t r) { apply(blocks[0].before_attention, x + r * n, normed + r * n); });
    for (std::size_t l = 0; l < blocks.size(); ++l) {
        const DecoderBlock& b = blocks[l];
        const auto layer = static_cast<std::int64_t>(l);
        multiply_all(b.qkv, normed, count, n, qkv_.data(), qkv_width_, rows.activation_bits, threads);
        each_row([&](std::int64_t r) {
            for (std::int64_t h = 0; h < shape_.heads + shape_.kv_heads; ++h) turn(b, layer, rows, r, h);
        });
        // later rows see more: dealt out in turn
        parallel(threads, threads, [&](std::int64_t p) {
            if (static_cast<std::size_t>(p) >= own_.size()) return;
            const std::int64_t step = std::min<std::int64_t>(threads, static_cast<std::int64_t>(own_.size()));
            for (std::int64_t r = p; r < count; r += step) attend(b, layer, rows, r, 0, shape_.heads, own_[p].scores);
        });
        multiply_all(b.out, attended_.data(), count, q, made_.data(), n, rows.activation_bits, threads);
        each_row([&](std::int64_t r) { add(r, b.after_attention, b.before_mlp); });
        multiply_all(b.gate_up, normed, count, n, gates_.data(), 2 * f, rows.activation_bits, threads);
        each_row([&](std::int64_t r) { gate(rows, r, 0, f); });
        multiply_all(b.down, inner_.data(), count, f, made_.data(), n, rows.activation_bits, threads);
        const Norm& following = l + 1 < blocks.size() ? blocks[l + 1].before_attention : last;
        each_row([&](std::int64_t r) { add(r, b.after_mlp, following); });
    }
}

void Decoder::step(const std::int64_t* tokens, const std::int64_t* slots, const std::int64_t* positions,
                   std::int64_t rows, const std::int64_t* kept, std::int64_t n_kept, float* hidden, int activation_bits,
                   int threads) {
    const std::int64_t n = shape_.hidden;
    grow(made_, rows * n), grow(made_down_, rows * n), grow(qkv_, rows * qkv_width_);
    grow(attended_, rows * shape_.heads * shape_.head_dim);
    grow(gates_, rows * 2 * shape_.inner), grow(inner_, rows * shape_.inner);
    const bool together = rows <= kFew;
    for (Own& own : own_) {
        if (!together && &own != &own_[0]) break;
        grow(own.x, rows * n), grow(own.normed, rows * n);
        if (&own == &own_[0]) embed(tokens, rows, own.x.data());
        else std::copy_n(own_[0].x.data(), rows * n, own.x.data());
    }
    const Rows all{slots, positions, rows, activation_bits};
    if (together) few(all, threads);
    else many(all, threads);
    for (std::int64_t k = 0; k < n_kept; ++k) std::copy_n(own_[0].normed.data() + kept[k] * n, n, hidden + k * n);
}

// Logits as the codes have them; returns the least that the largest exact logit can be, and the norm of the hidden state.
float Decoder::approximate(const float* hidden, float* out, float& size, int threads) const {
    const std::int64_t n = shape_.hidden, vocab = shape_.vocab;
    double squares = 0.0;
    for (std::int64_t i = 0; i < n; ++i) squares += static_cast<double>(hidden[i]) * hidden[i];
    size = static_cast<float>(std::sqrt(squares));
    const float length = size;
    // Rows of a piece are enough to stream, and few enough for threads to end together.
    const std::int64_t pieces = (vocab + kHeadRows - 1) / kHeadRows;
    std::vector<float> least(static_cast<std::size_t>(pieces), -std::numeric_limits<float>::infinity());
    parallel(threads, pieces, [&](std::int64_t p) {
        const std::int64_t begin = p * kHeadRows, end = std::min(vocab, begin + kHeadRows);
        math_.dots(head.codes, Kind::int8, hidden, n, begin, end, out);
        float most = -std::numeric_limits<float>::infinity();
        for (std::int64_t v = begin; v < end; ++v) {
            out[v] = out[v] * head.scale[v] + (head.bias == nullptr ? 0.0f : head.bias[v]);
            const float low = out[v] - head.lost[v] * length;
            most = low > most ? low : most;
        }
        least[static_cast<std::size_t>(p)] = most;
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
