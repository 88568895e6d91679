// Binds the matcher (match.hpp) to Python.
#include "match.hpp"

namespace scone {

void register_match(nb::module_& m) {
    m.attr("MAX_N") = kMaxN;
    nb::class_<Matcher>(m, "Matcher")
        .def(nb::init<Array1<uint8_t>, uint64_t, uint64_t, uint64_t, uint64_t, int, int, bool, Out1<int64_t>>(),
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 10>())
        // int64 first: to find out that an array is not of a type takes a third of a microsecond
        .def("match", &Matcher::match<int64_t>, nb::arg("tokens").noconvert(), nb::arg("starts").noconvert(),
             nb::arg("rows").noconvert(), nb::arg("lengths").noconvert())
        .def("match", &Matcher::match<int32_t>, nb::arg("tokens").noconvert(), nb::arg("starts").noconvert(),
             nb::arg("rows").noconvert(), nb::arg("lengths").noconvert())
        .def("match_last", &Matcher::match_last<int64_t>, nb::arg("windows").noconvert(),
             nb::arg("rows").noconvert(), nb::arg("lengths").noconvert())
        .def("match_last", &Matcher::match_last<int32_t>, nb::arg("windows").noconvert(),
             nb::arg("rows").noconvert(), nb::arg("lengths").noconvert());
}

}  // namespace scone
