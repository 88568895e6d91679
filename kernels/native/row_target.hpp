// Where the rows of a decode step go, as Python has it: the tuple RowTarget (../gather.py).
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "row_memory.hpp"

namespace nb = nanobind;

namespace scone {

struct StepTarget {
    RowMemory::Target memory;
    bool by_place;  // the row of sequence i goes to row i; else the rows that there are lie one after the other
};

// Throws if rows of `dim` values of so many sequences do not fit.
inline StepTarget step_target(nb::tuple target, Py_ssize_t num_sequences, int64_t dim) {
    if (target.size() != 7) throw std::invalid_argument("out must be a RowTarget");
    auto number = [&](int i) { return nb::cast<int64_t>(target[i]); };
    if (number(1) < num_sequences || number(2) != dim)
        throw std::invalid_argument("out has shape (" + std::to_string(number(1)) + ", " + std::to_string(number(2)) +
                                    "), wanted (" + std::to_string(num_sequences) + ", " + std::to_string(dim) +
                                    ") or more rows");
    auto data = reinterpret_cast<uint8_t*>(nb::cast<uintptr_t>(target[3]));
    return {{data, number(4), FloatType(number(5))}, nb::cast<bool>(target[6])};
}

}  // namespace scone
