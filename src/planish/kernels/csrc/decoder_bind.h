#pragma once
#include <nanobind/nanobind.h>

namespace planish {

void bind_decoder(nanobind::module_& m);

} // namespace planish
