// The look-up of a decode step: which f-gram ends at the newest token of each sequence, and its row, in one call.
//
// Sequences come as the lists of token ids that an engine keeps: arrays to carry them would cost more than the
// match. All of it has left the processor's caches since the step before, lists and integers too: what is needed
// is asked for on the way, one level of pointers for all sequences at a time.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "arrays.hpp"
#include "match.hpp"
#include "row_target.hpp"

namespace nb = nanobind;

namespace scone {

constexpr int64_t kNotNewest = -1;  // some sequence's input is not its newest token, or was matched before
constexpr int64_t kElsewhere = -2;  // some row is not in this memory
constexpr int64_t kFaults = -3;     // kFaults - fault: the index is damaged; see Matcher

struct NewestMatches {
    std::vector<int64_t> rows;
    int64_t fault;
};

static Py_ssize_t checked_batch(nb::list sequences, nb::list row_ids) {
    Py_ssize_t batch = PyList_GET_SIZE(sequences.ptr());
    if (PyList_GET_SIZE(row_ids.ptr()) != batch)
        throw std::invalid_argument("there are not as many lists of row ids as of token ids");
    for (nb::list lists : {sequences, row_ids})
        for (Py_ssize_t i = 0; i < batch; i++) __builtin_prefetch(PyList_GET_ITEM(lists.ptr(), i));
    for (Py_ssize_t i = 0; i < batch; i++) {
        PyObject *tokens = PyList_GET_ITEM(sequences.ptr(), i), *ids = PyList_GET_ITEM(row_ids.ptr(), i);
        if (!PyList_Check(tokens) || !PyList_Check(ids))
            throw nb::type_error("the token ids and the row ids of a sequence must be lists");
        for (PyObject* list : {tokens, ids})
            if (Py_ssize_t size = PyList_GET_SIZE(list); size > 0)
                __builtin_prefetch(&reinterpret_cast<PyListObject*>(list)->ob_item[size - 1]);
    }
    return batch;
}

// A token id; PyLong_AsLongLong is a call for each of them.
static int64_t token_value(PyObject* token) {
#if PY_VERSION_HEX >= 0x030C0000
    if (PyLong_CheckExact(token) && PyUnstable_Long_IsCompact(reinterpret_cast<PyLongObject*>(token)))
        return PyUnstable_Long_CompactValue(reinterpret_cast<PyLongObject*>(token));
#else
    if (PyLong_CheckExact(token) && Py_SIZE(token) == 1)
        return int64_t(reinterpret_cast<PyLongObject*>(token)->ob_digit[0]);
#endif
    int64_t value = PyLong_AsLongLong(token);
    if (value == -1 && PyErr_Occurred()) throw nb::python_error();
    return value;
}

// The newest tokens of a sequence, padded with -1 on the left.
static void fill_window(int64_t* window, Py_ssize_t width, PyObject* tokens) {
    Py_ssize_t size = PyList_GET_SIZE(tokens), num = std::min(size, width);
    std::fill_n(window, width - num, -1);
    for (Py_ssize_t k = 0; k < num; k++)
        window[width - num + k] = token_value(PyList_GET_ITEM(tokens, size - num + k));
}

static NewestMatches match_lists(const Matcher& matcher, nb::list sequences, Py_ssize_t batch) {
    Py_ssize_t width = matcher.max_n();
    for (Py_ssize_t i = 0; i < batch; i++) {
        PyObject* tokens = PyList_GET_ITEM(sequences.ptr(), i);
        Py_ssize_t size = PyList_GET_SIZE(tokens);
        for (Py_ssize_t k = std::max<Py_ssize_t>(0, size - width); k < size; k++)
            __builtin_prefetch(PyList_GET_ITEM(tokens, k));
    }
    NewestMatches found{std::vector<int64_t>(static_cast<size_t>(batch)), kNoFault};
    int64_t windows[kNewest * kMaxN];
    for (Py_ssize_t first = 0; first < batch && found.fault == kNoFault; first += kNewest) {
        Py_ssize_t num = std::min<Py_ssize_t>(kNewest, batch - first);
        for (Py_ssize_t i = 0; i < num; i++)
            fill_window(windows + i * width, width, PyList_GET_ITEM(sequences.ptr(), first + i));
        found.fault = matcher.match_windows(windows, num, &found.rows[size_t(first)]);
    }
    return found;
}

// Appends each sequence's row id to its list; those that are rows go to `out` as well, and whose they are.
// Returns how many these are.
static int64_t append_rows(const std::vector<int64_t>& rows, nb::list row_ids, const IdTarget& out) {
    int64_t *wanted = out.row_ids(), *places = out.places();
    int64_t num_wanted = 0;
    for (size_t i = 0; i < rows.size(); i++) {
        nb::object id = nb::steal(PyLong_FromLongLong(rows[i]));
        if (!id.is_valid() || PyList_Append(PyList_GET_ITEM(row_ids.ptr(), Py_ssize_t(i)), id.ptr()) != 0)
            throw nb::python_error();
        if (rows[i] < 0) continue;
        wanted[num_wanted] = rows[i];
        places[num_wanted++] = int64_t(i);
    }
    return num_wanted;
}

// Returns the number of rows, or kFaults - fault; then nothing was appended.
static int64_t match_newest(const Matcher& matcher, nb::list sequences, nb::list row_ids, const IdTarget& out) {
    Py_ssize_t batch = checked_batch(sequences, row_ids);
    if (out.room() < batch) throw std::invalid_argument("out has less room than there are sequences");
    NewestMatches found = match_lists(matcher, sequences, batch);
    if (found.fault != kNoFault) return kFaults - found.fault;
    return append_rows(found.rows, row_ids, out);
}

// The same, for inputs positions[i] of the sequences, and the rows: all that there is to know of them goes to `out`.
// Returns the number of rows, or kNotNewest, kElsewhere or kFaults - fault; then nothing was appended or written.
static int64_t look_up_newest(const Matcher& matcher, RowMemory& memory, nb::list sequences, nb::list row_ids,
                              nb::list positions, const RowTarget& out) {
    Py_ssize_t batch = checked_batch(sequences, row_ids);
    out.check(batch, memory.dim());
    if (PyList_GET_SIZE(positions.ptr()) != batch) throw std::invalid_argument("positions is not as long as sequences");
    for (Py_ssize_t i = 0; i < batch; i++) {
        long long position = PyLong_AsLongLong(PyList_GET_ITEM(positions.ptr(), i));
        if (position == -1 && PyErr_Occurred()) throw nb::python_error();
        if (position + 1 != PyList_GET_SIZE(PyList_GET_ITEM(sequences.ptr(), i)) ||
            position != PyList_GET_SIZE(PyList_GET_ITEM(row_ids.ptr(), i)))
            return kNotNewest;
    }
    NewestMatches found = match_lists(matcher, sequences, batch);
    if (found.fault != kNoFault) return kFaults - found.fault;
    for (int64_t row : found.rows)
        if (row >= memory.num_rows()) return kElsewhere;
    for (int64_t row : found.rows)
        if (row >= 0) memory.ask_for_row(row);
    int64_t num_wanted = append_rows(found.rows, row_ids, out);
    if (out.by_place)
        memory.gather(found.rows.data(), batch, 0, memory.num_rows(), out.memory, 1);
    else
        memory.gather(out.row_ids(), num_wanted, 0, memory.num_rows(), out.memory, 1);
    return num_wanted;
}

void register_look_up(nb::module_& m) {
    nb::class_<IdTarget>(m, "IdTarget")
        .def(nb::init<Out1<int64_t>, Out1<int64_t>>(), nb::arg("row_ids").noconvert(), nb::arg("places").noconvert());
    nb::class_<RowTarget, IdTarget>(m, "RowTarget")
        .def(nb::init<uintptr_t, int64_t, int64_t, int64_t, int, bool, Out1<int64_t>, Out1<int64_t>>(), nb::arg("rows"),
             nb::arg("num_rows"), nb::arg("dim"), nb::arg("stride_bytes"), nb::arg("dtype"), nb::arg("by_place"),
             nb::arg("row_ids").noconvert(), nb::arg("places").noconvert())
        .def("move_to", &RowTarget::move_to);
    m.def("match_newest", &match_newest, nb::arg("matcher"), nb::arg("sequences").noconvert(),
          nb::arg("row_ids").noconvert(), nb::arg("out"));
    m.def("look_up_newest", &look_up_newest, nb::arg("matcher"), nb::arg("memory"),
          nb::arg("sequences").noconvert(), nb::arg("row_ids").noconvert(), nb::arg("positions").noconvert(),
          nb::arg("out"));
}

}  // namespace scone
