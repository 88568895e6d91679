// Rows by id (row_memory.hpp) and rows by their place in a buffer, for Python.
#include "row_memory.hpp"

namespace scone {

// out[i] = the row stored at bytes + offsets[i]; a negative offset leaves out[i] untouched.
static void decode_rows(Array1<uint8_t> bytes, Array1<int64_t> offsets, int codec, int dtype, int64_t dim,
                        uintptr_t out, int64_t out_stride_bytes, int out_type) {
    RowFormat format{Codec(codec), FloatType(dtype), dim};
    int64_t last = int64_t(bytes.size()) - int64_t(stored_row_bytes(format));
    for (size_t i = 0; i < offsets.size(); i++)
        if (offsets.data()[i] > last) throw std::invalid_argument("a row reaches beyond the end of the bytes");
    nb::gil_scoped_release unlocked;
    for (size_t i = 0; i < offsets.size(); i++) {
        if (offsets.data()[i] < 0) continue;
        decode_row(format, bytes.data() + offsets.data()[i],
                   reinterpret_cast<uint8_t*>(out) + int64_t(i) * out_stride_bytes, FloatType(out_type));
    }
}

void register_gather(nb::module_& m) {
    nb::class_<RowMemory>(m, "RowMemory")
        .def(nb::init<Array1<uint8_t>, Array1<uint64_t>, int64_t, int64_t, int64_t, int, int, int64_t,
                      std::optional<Array1<uint32_t>>>(),
             nb::arg("bytes"), nb::arg("block_offsets"), nb::arg("rows_per_block"), nb::arg("num_rows"),
             nb::arg("num_ids"), nb::arg("codec"), nb::arg("dtype"), nb::arg("dim"),
             nb::arg("page_sums").none(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
             nb::keep_alive<1, 10>())
        .def("gather", nb::overload_cast<Array1<int64_t>, int64_t, int64_t, uintptr_t, int64_t, int, int>(&RowMemory::gather))
        .def("absent", &RowMemory::find_absent)
        .def("will_need", &RowMemory::will_need);
    m.def("decode_rows", &decode_rows);
}

}  // namespace scone
