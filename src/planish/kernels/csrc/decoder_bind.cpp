// The decoder for Python: plain addresses, checked in decoding.py.
#include "decoder_bind.h"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "decoder.h"

namespace nb = nanobind;

namespace planish {
namespace {

using Address = std::uintptr_t;
using NormFields = std::tuple<Address, float>;
// out, in, group_size, prepared, dense, kind, bias, column
using SliceFields =
    std::tuple<std::int64_t, std::int64_t, std::int64_t, Address, Address, int, Address, std::int64_t>;
using LayerFields = std::vector<std::vector<SliceFields>>; // part by part

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Norm norm_of(const NormFields& f) { return Norm{at<const float>(std::get<0>(f)), std::get<1>(f)}; }

Layer layer_of(const LayerFields& all) {
    Layer made;
    for (const auto& part : all) {
        made.emplace_back();
        for (const auto& [out, in, group, prepared, dense, kind, bias, column] : part)
            made.back().push_back(Slice{Linear{out, in, group, at<const void>(prepared)}, at<const void>(dense),
                                        static_cast<Kind>(kind), at<const float>(bias), column});
    }
    return made;
}

void add_block(Decoder& d, const std::vector<NormFields>& norms, const std::vector<LayerFields>& layers,
               const std::vector<std::int64_t>& inner, std::int64_t window, std::int64_t rope) {
    if (norms.size() != 6 || layers.size() != 4) throw std::invalid_argument("a block has 6 norms and 4 layers");
    if (rope >= static_cast<std::int64_t>(d.ropes.size())) throw std::invalid_argument("no such rope");
    for (const auto& layer : layers)
        if (layer.size() + 1 != inner.size()) throw std::invalid_argument("a layer lacks a part");
    DecoderBlock b;
    b.before_attention = norm_of(norms[0]), b.after_attention = norm_of(norms[1]);
    b.before_mlp = norm_of(norms[2]), b.after_mlp = norm_of(norms[3]);
    b.q_norm = norm_of(norms[4]), b.k_norm = norm_of(norms[5]);
    b.qkv = layer_of(layers[0]), b.out = layer_of(layers[1]);
    b.gate_up = layer_of(layers[2]), b.down = layer_of(layers[3]);
    b.inner = inner, b.window = window, b.rope = rope;
    d.blocks.push_back(std::move(b));
}

} // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<Decoder>(m, "Decoder")
        .def("__init__",
             [](Decoder* self, std::int64_t hidden, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
                std::int64_t inner, std::int64_t vocab, float scale, float softcap, float embed_scale, int gate,
                std::int64_t parts) {
                 new (self) Decoder(DecoderShape{hidden, heads, kv_heads, head_dim, inner, vocab, scale, softcap,
                                                 embed_scale, gate},
                                    parts);
             })
        .def("add_rope",
             [](Decoder& d, Address cos, Address sin, std::int64_t half) {
                 d.ropes.push_back(Rope{at<const float>(cos), at<const float>(sin), half});
             })
        .def("add_block", &add_block)
        .def("set_ends",
             [](Decoder& d, Address embedding, int embedding_kind, const NormFields& last, Address exact, int kind,
                Address bias, Address codes, Address scale, Address lost, float softcap) {
                 d.embedding = at<const void>(embedding), d.embedding_kind = static_cast<Kind>(embedding_kind);
                 d.last = norm_of(last);
                 d.head = Head{at<const void>(exact),        static_cast<Kind>(kind),    at<const float>(bias),
                               at<const std::int8_t>(codes), at<const float>(scale),     at<const float>(lost),
                               softcap};
             })
        .def("set_cache",
             [](Decoder& d, Address keys, Address values, std::int64_t slots, std::int64_t capacity, bool half) {
                 d.cache = Cache{at<void>(keys), at<void>(values), slots, capacity, half};
             })
        .def("step",
             [](Decoder& d, Address tokens, Address slots, Address positions, std::int64_t rows, Address kept,
                std::int64_t n_kept, Address hidden, int activation_bits, int threads) {
                 nb::gil_scoped_release release;
                 d.step(at<const std::int64_t>(tokens), at<const std::int64_t>(slots),
                        at<const std::int64_t>(positions), rows, at<const std::int64_t>(kept), n_kept,
                        at<float>(hidden), activation_bits, threads);
             })
        .def("best",
             [](Decoder& d, Address hidden, int threads) {
                 nb::gil_scoped_release release;
                 return d.best(at<const float>(hidden), threads);
             })
        .def("next",
             [](Decoder& d, std::int64_t token, std::int64_t slot, std::int64_t position, Address hidden,
                int activation_bits, int threads) {
                 nb::gil_scoped_release release;
                 const std::int64_t row = 0;
                 d.step(&token, &slot, &position, 1, &row, 1, at<float>(hidden), activation_bits, threads);
                 return d.best(at<const float>(hidden), threads);
             })
        .def("logits", [](Decoder& d, Address hidden, float span, Address out, int threads) {
            nb::gil_scoped_release release;
            d.logits(at<const float>(hidden), span, at<float>(out), threads);
        });
}

} // namespace planish
