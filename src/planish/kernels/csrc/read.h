// How fast memory can be read at all: the floor under every product with a weight that no cache holds.
#pragma once
#include <cstdint>

namespace planish {

// Reads all `bytes` at `data` in order, on up to `threads` threads; returns a value that depends on every one of them.
std::uint64_t read_all(const void* data, std::int64_t bytes, int threads);

} // namespace planish
