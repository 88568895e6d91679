// Where the rows of a decode step go (../row_target.py): memory and arrays that Python tells of once.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "arrays.hpp"
#include "row_memory.hpp"

namespace nb = nanobind;

namespace scone {

class IdTarget {
  public:
    IdTarget(Out1<int64_t> row_ids, Out1<int64_t> places) : row_ids_(row_ids), places_(places) {}

    int64_t room() const { return int64_t(std::min(row_ids_.size(), places_.size())); }
    int64_t* row_ids() const { return row_ids_.data(); }
    int64_t* places() const { return places_.data(); }

  private:
    Out1<int64_t> row_ids_, places_;
};

class RowTarget : public IdTarget {
  public:
    RowTarget(uintptr_t rows, int64_t num_rows, int64_t dim, int64_t stride_bytes, int type, bool by_place,
              Out1<int64_t> row_ids, Out1<int64_t> places)
        : IdTarget(row_ids, places),
          memory{reinterpret_cast<uint8_t*>(rows), stride_bytes, FloatType(type)},
          by_place(by_place),
          dim_(dim) {
        move_to(rows, num_rows);
    }

    void move_to(uintptr_t rows, int64_t num_rows) {
        if (num_rows > room())
            throw std::invalid_argument("row_ids or places is shorter than the rows");
        memory.data = reinterpret_cast<uint8_t*>(rows);
        num_rows_ = num_rows;
    }

    // Throws if rows of so many values, of so many sequences, do not fit.
    void check(int64_t num_sequences, int64_t dim) const {
        if (num_rows_ < num_sequences || dim_ != dim)
            throw std::invalid_argument("out has shape (" + std::to_string(num_rows_) + ", " + std::to_string(dim_) +
                                        "), wanted (" + std::to_string(num_sequences) + ", " + std::to_string(dim) +
                                        ") or more rows");
    }

    RowMemory::Target memory;
    const bool by_place;  // the row of sequence i goes to row i; else the rows that there are lie one after the other

  private:
    int64_t dim_, num_rows_ = 0;
};

}  // namespace scone
