// The compiled module takes plain addresses: every check has been made in Python (cpu.py), where the sentences are.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "w4a16.h"

namespace nb = nanobind;
using planish::Isa;

namespace {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Isa named(const std::string& isa) {
    const Isa wanted = isa == "avx512" ? Isa::avx512 : isa == "avx2" ? Isa::avx2 : Isa::portable;
    if (wanted == Isa::portable && isa != "portable") throw std::invalid_argument("unknown instruction set " + isa);
    if (wanted > planish::best_isa()) throw std::invalid_argument("this processor does not run " + isa);
    return wanted;
}

std::string best() {
    const Isa isa = planish::best_isa();
    return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
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

} // namespace

NB_MODULE(_native, m) {
    m.def("best_isa", &best);
    m.def("w4a16", &w4a16);
}
