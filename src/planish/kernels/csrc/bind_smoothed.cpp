#include <nanobind/stl/string.h>

#include <cstdint>
#include <stdexcept>

#include "bind.h"
#include "smoothed.h"

namespace nb = nanobind;

namespace {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void run(std::uintptr_t x, std::uintptr_t grad, std::uintptr_t out, std::uintptr_t slope, std::int64_t slopes,
         std::uintptr_t sigma, std::int64_t sigmas, std::int64_t outer, std::int64_t channels, std::int64_t inner,
         std::uintptr_t by_slope, std::uintptr_t by_sigma, int kernel, int threads, const std::string& isa) {
    if (kernel < 0 || kernel >= planish::kSmoothings) throw std::invalid_argument("unknown kernel");
    const planish::Smoothed op{at<const float>(x),    at<const float>(grad),  at<float>(out),
                               at<const float>(slope), slopes,                at<const float>(sigma),
                               sigmas,                 outer,                 channels,
                               inner,                  at<float>(by_slope),   at<float>(by_sigma),
                               static_cast<planish::Smoothing>(kernel)};
    const planish::Isa chosen = planish::isa_named(isa);
    nb::gil_scoped_release release;
    planish::smoothed(op, threads, chosen);
}

} // namespace

void planish::bind_smoothed(nb::module_& m) { m.def("smoothed", &run); }
