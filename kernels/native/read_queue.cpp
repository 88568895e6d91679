// The queue of reads (read_queue.hpp), and its rows with those that are in memory, for Python.
#include "read_queue.hpp"

#include "row_target.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <optional>

namespace scone {

// The rows of a decode step that were asked for when its tokens were sampled: row ids[k], of the sequence places[k],
// to `out`, and ids and places as well. Those without a slot come from `memory`, as far as its first `num_loaded` rows go, or from
// `mapped`.
//
// Nothing, and what was written has no meaning, if some sequence's input positions[i] is not the last one that has
// a row id, or that id is another; or if some row has not arrived, has failed, or is not there: who asks finds out
// whose, one by one. Else how many came from `memory` and from `mapped`.
static std::optional<std::pair<int64_t, int64_t>> gather_newest(
    ReadQueue& queue, RowMemory* memory, int64_t num_loaded, RowMemory* mapped, nb::list row_ids, nb::list positions,
    Array1<int64_t> ids, Array1<int64_t> places, Array1<int64_t> slots, Array1<int64_t> begins,
    const RowTarget& out) {
    int64_t n = int64_t(ids.size()), k = 0;
    if (int64_t(places.size()) != n || int64_t(slots.size()) != n || int64_t(begins.size()) != n)
        throw std::invalid_argument("ids, places, slots and begins differ in number");
    Py_ssize_t batch = PyList_GET_SIZE(row_ids.ptr());
    out.check(batch, queue.dim());
    if (PyList_GET_SIZE(positions.ptr()) != batch) throw std::invalid_argument("positions is not as long as row_ids");
    for (Py_ssize_t i = 0; i < batch; i++) {
        PyObject* list = PyList_GET_ITEM(row_ids.ptr(), i);
        if (!PyList_Check(list)) throw nb::type_error("the row ids of a sequence must be a list");
        long long position = PyLong_AsLongLong(PyList_GET_ITEM(positions.ptr(), i));
        if (position == -1 && PyErr_Occurred()) throw nb::python_error();
        if (position < 0 || position + 1 != PyList_GET_SIZE(list)) return std::nullopt;
        long long id = PyLong_AsLongLong(PyList_GET_ITEM(list, position));
        if (id == -1 && PyErr_Occurred()) throw nb::python_error();
        if (id < 0) continue;
        if (k == n || ids.data()[k] != id || places.data()[k] != i) return std::nullopt;
        k++;
    }
    if (k != n || !queue.are_sound(slots)) return std::nullopt;
    std::vector<int64_t> others(size_t(out.by_place ? batch : n), -1);  // from memory or the mapping
    int64_t num_in_memory = 0, num_mapped = 0;
    for (k = 0; k < n; k++) {
        int64_t at = out.by_place ? places.data()[k] : k;
        if (slots.data()[k] != kNoSlot) {
            queue.copy_row(begins.data()[k], out.memory.data + at * out.memory.stride_bytes, out.memory.type);
            continue;
        }
        others[size_t(at)] = ids.data()[k];
        bool is_in_memory = memory != nullptr && ids.data()[k] < num_loaded;
        if (!is_in_memory && mapped == nullptr) return std::nullopt;
        (is_in_memory ? num_in_memory : num_mapped)++;
    }
    auto num_others = int64_t(others.size());
    if (num_in_memory > 0 && memory->gather(others.data(), num_others, 0, num_loaded, out.memory, 1) != num_in_memory)
        return std::nullopt;
    int64_t first_mapped = memory == nullptr ? 0 : num_loaded;
    if (num_mapped > 0 &&
        mapped->gather(others.data(), num_others, first_mapped, mapped->num_rows(), out.memory, 1) != num_mapped)
        return std::nullopt;
    std::copy_n(ids.data(), n, out.row_ids());
    std::copy_n(places.data(), n, out.places());
    return std::pair{num_in_memory, num_mapped};
}

void register_read_queue(nb::module_& m) {
    nb::class_<ReadQueue>(m, "ReadQueue")
        .def(nb::init<int, Out1<uint8_t>, int64_t, Out1<int32_t>, Array1<uint32_t>, int64_t, int64_t, int, int,
                      int64_t>(),
             nb::keep_alive<1, 3>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>())
        .def("submit", &ReadQueue::submit, nb::arg("row_ids").noconvert(), nb::arg("first_row"),
             nb::arg("mapped").none(), nb::arg("slots").noconvert(), nb::arg("begins").noconvert())
        .def("num_under_way", &ReadQueue::num_under_way)
        .def("poll", &ReadQueue::poll)
        .def("wait", &ReadQueue::wait)
        .def("release", &ReadQueue::release)
        .def("drain", &ReadQueue::drain)
        .def_prop_ro("num_free", &ReadQueue::num_free);
    m.def("gather_newest", &gather_newest, nb::arg("queue"), nb::arg("memory").none(), nb::arg("num_loaded"),
          nb::arg("mapped").none(), nb::arg("row_ids").noconvert(), nb::arg("positions").noconvert(),
          nb::arg("ids").noconvert(), nb::arg("places").noconvert(), nb::arg("slots").noconvert(),
          nb::arg("begins").noconvert(), nb::arg("out"));
}

}  // namespace scone
