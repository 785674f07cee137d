// A decoder of the Llama kind over weights that Python owns: token ids in, hidden states, next tokens or logits out.
//
// Each row of a step is a token with a slot (whose sequence it is) and a position in it; keys and values of all rows are
// written into a static cache before attention reads it, so rows of one step may belong to one prompt, to several, or be
// one token each of many sequences.
#pragma once
#include <cstdint>
#include <vector>

#include "decoder_math.h"
#include "linear.h"

namespace planish {

struct Norm {
    const float* weight = nullptr; // null: there is no such norm
    float eps = 0.0f;
};

struct Slice { // some rows of a layer: 4-bit where `weight.data` is set, else dense
    Linear weight;
    const void* dense;
    Kind kind;
    const float* bias; // of these rows, or null
    std::int64_t column; // where its outputs go in the row
};
// What each part of a team multiplies: parts differ in rows, so that each streams memory of its own, in order.
using Layer = std::vector<std::vector<Slice>>;

struct DecoderBlock {
    Norm before_attention, after_attention, before_mlp, after_mlp, q_norm, k_norm;
    Layer qkv, out, gate_up, down;
    std::vector<std::int64_t> inner; // part p makes the inner channels [inner[p], inner[p + 1])
    std::int64_t window = 0;         // positions a token sees, itself included; 0: all
    std::int64_t rope = 0;           // which table; -1: none
};

struct Rope { // cos and sin of (position, half); half = turned dimensions / 2
    const float *cos, *sin;
    std::int64_t half;
};

struct Cache {
    void *keys = nullptr, *values = nullptr;
    std::int64_t slots = 0, capacity = 0; // positions a slot, a multiple of 16
    bool half = false;
};

struct Head {
    const void* exact = nullptr; // (vocab, hidden)
    Kind kind = Kind::float32;
    const float* bias = nullptr;
    // Codes of the same rows, one scale a row, and the norm of what rounding lost of each; null: read `exact` always.
    const std::int8_t* codes = nullptr;
    const float *scale = nullptr, *lost = nullptr;
    float softcap = 0.0f;
};

struct DecoderShape {
    std::int64_t hidden, heads, kv_heads, head_dim, inner, vocab;
    float scale, softcap, embed_scale;
    int gate; // see Math::gate_up
};

class Decoder {
  public:
    Decoder(const DecoderShape& shape, std::int64_t parts);

    std::vector<DecoderBlock> blocks;
    std::vector<Rope> ropes;
    const void* embedding = nullptr;
    Kind embedding_kind = Kind::float32;
    Norm last;
    Head head;
    Cache cache;

    // Run `rows` tokens. `kept` names the rows whose hidden state, after the last norm, goes to `hidden` (n_kept, H).
    void step(const std::int64_t* tokens, const std::int64_t* slots, const std::int64_t* positions, std::int64_t rows,
              const std::int64_t* kept, std::int64_t n_kept, float* hidden, int activation_bits, int threads);
    // The most probable token of a hidden state, as the exact head has it; -1 if a logit is not a number.
    std::int64_t best(const float* hidden, int threads);
    // Logits (vocab). Those within `span` of the largest are the exact head's, the rest as the codes have them.
    void logits(const float* hidden, float span, float* out, int threads);

  private:
    struct Rows { // what is run, seen by all parts
        const std::int64_t *slots, *positions;
        std::int64_t count;
        int activation_bits;
    };
    struct Own { // what a part keeps to itself
        std::vector<float> x, normed, scores;
    };

    void embed(const std::int64_t* tokens, std::int64_t rows, float* x) const;
    void multiply(const std::vector<Slice>& slices, const float* x, std::int64_t rows, std::int64_t in, float* y,
                  std::int64_t y_stride, int activation_bits) const;
    void multiply_all(const Layer& layer, const float* x, std::int64_t rows, std::int64_t in, float* y,
                      std::int64_t y_stride, int activation_bits, int threads) const;
    void turn(const DecoderBlock& block, std::int64_t layer, const Rows& rows, std::int64_t row, std::int64_t head);
    void attend(const DecoderBlock& block, std::int64_t layer, const Rows& rows, std::int64_t row, std::int64_t first,
                std::int64_t last, std::vector<float>& scores);
    void gate(const Rows& rows, std::int64_t row, std::int64_t first, std::int64_t last);
    void few(const Rows& rows, int threads); // a team that stays together for all layers
    void many(const Rows& rows, int threads); // one fork and join an operation
    float approximate(const float* hidden, float* out, float& size, int threads) const;

    DecoderShape shape_;
    std::int64_t parts_, padded_, qkv_width_; // padded_: head_dim up to a multiple of 16
    const Math& math_;
    std::vector<float> qkv_, attended_, made_, made_down_, gates_, inner_, logits_;
    std::vector<Own> own_;
};

} // namespace planish
