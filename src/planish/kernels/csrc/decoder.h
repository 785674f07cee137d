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

struct Matrix { // 4-bit where `weight.data` is set, else dense rows
    Linear weight;
    const void* dense;
    Kind kind;
    const float* bias; // or null
};

struct DecoderBlock {
    Norm before_attention, after_attention, before_mlp, after_mlp, q_norm, k_norm;
    std::vector<Matrix> qkv, out, gate_up, down; // side by side where there are several
    std::int64_t window = 0;                     // positions a token sees, itself included; 0: all
    std::int64_t rope = 0;                       // which table
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
    explicit Decoder(const DecoderShape& shape);

    std::vector<DecoderBlock> blocks;
    std::vector<Rope> ropes;
    const void* embedding = nullptr;
    Kind embedding_kind = Kind::float32;
    Norm last;
    Head head;
    Cache cache;

    std::int64_t padded_head() const { return padded_; }
    std::int64_t keys_of_a_position() const { return shape_.kv_heads * padded_; }

    // Run `rows` tokens. `kept` names the rows whose hidden state, after the last norm, goes to `hidden` (n_kept, H).
    void step(const std::int64_t* tokens, const std::int64_t* slots, const std::int64_t* positions, std::int64_t rows,
              const std::int64_t* kept, std::int64_t n_kept, float* hidden, int activation_bits, int threads);
    // The most probable token of a hidden state, as the exact head has it; -1 if a logit is not a number.
    std::int64_t best(const float* hidden, int threads);
    // Logits (vocab). Those within `span` of the largest are the exact head's, the rest as the codes have them.
    void logits(const float* hidden, float span, float* out, int threads);

  private:
    void multiply(const std::vector<Matrix>& parts, const float* x, std::int64_t rows, std::int64_t in, float* y,
                  std::int64_t y_stride, int activation_bits, int threads);
    void turn(const DecoderBlock& block, float* row, std::int64_t layer, std::int64_t slot, std::int64_t position);
    void attend(const DecoderBlock& block, std::int64_t layer, const std::int64_t* slots, const std::int64_t* positions,
                std::int64_t rows, int threads);
    void attend_one(const DecoderBlock& block, std::int64_t layer, std::int64_t slot, std::int64_t position,
                    std::int64_t kv_head, const float* q, float* out, std::vector<float>& scores) const;
    float approximate(const float* hidden, float* out, float& size, int threads) const;

    DecoderShape shape_;
    std::int64_t padded_; // head_dim up to a multiple of 16
    const Math& math_;
    std::vector<float> x_, normed_, qkv_, attended_, made_, gates_, inner_, logits_;
    std::vector<std::vector<float>> scores_;
};

} // namespace planish
