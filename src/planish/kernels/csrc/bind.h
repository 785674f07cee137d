// What the parts of the compiled module share.
#pragma once
#include <nanobind/nanobind.h>

#include <string>

#include "isa.h"

namespace planish {

// The instruction set of that name; std::invalid_argument if there is none, or this processor does not run it.
Isa isa_named(const std::string& name);

void bind_integer(nanobind::module_& m);
void bind_smoothed(nanobind::module_& m);

} // namespace planish
