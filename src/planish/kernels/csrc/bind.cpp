// The compiled module takes plain addresses: every check has been made in Python (cpu.py), where the sentences are.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#include "decoder_bind.h"
#include "linear.h"
#include "read.h"
#include "w4a16.h"

namespace nb = nanobind;
using planish::Isa;
using planish::ScaleType;

namespace {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

constexpr struct {
    const char* name;
    Isa isa;
} kNames[] = {{"portable", Isa::portable}, {"neon", Isa::neon}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}};

Isa named(const std::string& name) {
    for (const auto& known : kNames) {
        if (name != known.name) continue;
        if (!planish::runs(known.isa)) throw std::invalid_argument("this processor does not run " + name);
        return known.isa;
    }
    throw std::invalid_argument("unknown instruction set " + name);
}

std::string name_of(Isa isa) {
    for (const auto& known : kNames)
        if (isa == known.isa) return known.name;
    return "portable";
}

std::vector<std::string> runnable() {
    std::vector<std::string> names;
    for (const auto& known : kNames)
        if (planish::runs(known.isa)) names.emplace_back(known.name);
    return names;
}

void w4a16(std::uintptr_t x, std::uintptr_t packed, std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t bias,
           std::uintptr_t y, std::int64_t rows, std::int64_t in, std::int64_t out, std::int64_t group_size, int threads,
           const std::string& isa) {
    const planish::W4A16 op{at<const float>(x),         at<const std::uint32_t>(packed), at<const float>(scale),
                            at<const std::uint8_t>(zero), at<const float>(bias),           at<float>(y),
                            rows,                        in,                              out,
                            group_size};
    const Isa chosen = named(isa);
    nb::gil_scoped_release release;
    planish::w4a16(op, threads, chosen);
}

void prepare(std::uintptr_t packed, std::uintptr_t scale, int type, std::uintptr_t zero, std::int64_t out,
             std::int64_t in, std::int64_t group_size, std::uintptr_t data, int threads) {
    nb::gil_scoped_release release;
    planish::prepare(at<const std::uint32_t>(packed), at<const void>(scale), static_cast<ScaleType>(type),
                     at<const std::uint8_t>(zero), out, in, group_size, at<void>(data), threads);
}

void linear(std::uintptr_t data, std::int64_t out, std::int64_t in, std::int64_t group_size, std::uintptr_t x,
            std::int64_t rows, std::int64_t x_stride, std::uintptr_t bias, std::uintptr_t y, int activation_bits,
            int threads) {
    nb::gil_scoped_release release;
    planish::linear({out, in, group_size, at<const void>(data)}, at<const float>(x), rows, x_stride,
                    at<const float>(bias), at<float>(y), out, activation_bits, threads);
}

} // namespace

Isa planish::isa_named(const std::string& name) { return named(name); }

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false); // a server that is stopped leaves through the system, not through Python
    m.def("best_isa", [] { return name_of(planish::best_isa()); });
    m.def("active_isa", [] { return name_of(planish::active_isa()); });
    m.def("runnable", &runnable);
    m.def("use", [](const std::string& name) { planish::use(named(name)); });
    m.def("prepared_bytes",
          [](std::int64_t out, std::int64_t in, std::int64_t group_size, int type, bool zeros) {
              return planish::prepared_bytes(out, in, group_size, static_cast<ScaleType>(type), zeros);
          });
    m.def("prepared_for",
          [](std::uintptr_t data, std::size_t bytes, std::int64_t out, std::int64_t in, std::int64_t group_size) {
              return planish::prepared_for(at<const void>(data), bytes, out, in, group_size);
          });
    m.def("prepare", &prepare);
    m.def("linear", &linear);
    planish::bind_decoder(m);
    m.def("read", [](std::uintptr_t data, std::int64_t bytes, int threads) {
        nb::gil_scoped_release release;
        return planish::read_all(at<const void>(data), bytes, threads);
    });
    m.def("w4a16", &w4a16);
    planish::bind_integer(m);
    planish::bind_smoothed(m);
}
