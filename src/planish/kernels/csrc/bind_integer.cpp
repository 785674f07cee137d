// The ops of integer activations, by plain addresses: every check has been made in Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>

#include "bind.h"
#include "qgemm.h"
#include "quantize_rows.h"
#include "rotate.h"

namespace planish {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void bound_qgemm(Address xq, Address x_scale, Address x_zero, Address packed, Address scale, Address zero, Address bias,
                 Address low, Address up, Address y, std::int64_t rows, std::int64_t in, std::int64_t out,
                 std::int64_t group_size, std::int64_t x_group_size, std::int64_t rank, int bits, int scale_type,
                 int threads, const std::string& isa) {
    const QGemm op{at<const std::int8_t>(xq),
                   at<const float>(x_scale),
                   at<const std::int8_t>(x_zero),
                   at<const std::uint8_t>(packed),
                   at<const void>(scale),
                   at<const std::uint8_t>(zero),
                   at<const float>(bias),
                   at<const float>(low),
                   at<const float>(up),
                   at<float>(y),
                   rows,
                   in,
                   out,
                   group_size,
                   x_group_size,
                   rank,
                   bits,
                   static_cast<Real>(scale_type)};
    const Isa chosen = isa_named(isa);
    nanobind::gil_scoped_release release;
    qgemm(op, threads, chosen);
}

void bound_quantize_rows(Address x, Address codes, Address scale, Address zero, std::int64_t rows, std::int64_t channels,
                         std::int64_t group_size, int bits, bool symmetric, int type, int scale_type, int threads,
                         const std::string& isa, float clip) {
    const QuantizeRows op{at<const void>(x), at<std::int8_t>(codes),  at<float>(scale),              at<std::int8_t>(zero),
                          rows,              channels,                group_size,                    bits,
                          symmetric,         static_cast<Real>(type), static_cast<Real>(scale_type), clip};
    const Isa chosen = isa_named(isa);
    nanobind::gil_scoped_release release;
    quantize_rows(op, threads, chosen);
}

void bound_rotate(Address x, Address blocks, Address index, Address y, std::int64_t rows, std::int64_t count,
                  std::int64_t size, std::int64_t stride, int type, int threads, const std::string& isa) {
    const Rotate op{at<const void>(x), at<const void>(blocks), at<const std::int64_t>(index), at<void>(y), rows, count,
                    size,              stride,                 static_cast<Real>(type)};
    const Isa chosen = isa_named(isa);
    nanobind::gil_scoped_release release;
    rotate(op, threads, chosen);
}

} // namespace

void bind_integer(nanobind::module_& m) {
    m.def("qgemm", &bound_qgemm);
    m.def("quantize_rows", &bound_quantize_rows);
    m.def("rotate", &bound_rotate);
}

} // namespace planish
