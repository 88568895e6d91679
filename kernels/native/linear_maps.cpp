// Linear maps with packed weights, and the workspace that computes them, as Python has them.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

#include "arrays.hpp"
#include "best_output.hpp"
#include "workspace.hpp"

namespace scone {
namespace {

using Vector = Array1<float>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using MutableMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

WeightKind kind_named(const std::string& name) {
    if (name == "f32") return WeightKind::f32;
    if (name == "bf16") return WeightKind::bf16;
    if (name == "int8") return WeightKind::int8;
    if (name == "int4") return WeightKind::int4;
    throw std::invalid_argument("weight kind is '" + name + "', wanted f32, bf16, int8 or int4");
}

// out (rows, num_outputs) = x (rows, num_inputs) times the map
void apply(const PackedLinear& map, Workspace& space, Matrix x, MutableMatrix out) {
    want(int(x.shape(1)) == map.num_inputs() && int(out.shape(1)) == map.num_outputs() &&
             x.shape(0) == out.shape(0),
         "x is not (rows, num_inputs), or out not (rows, num_outputs)");
    const int rows = int(x.shape(0));
    if (rows == 0) return;
    Activations target = space.prepared(rows, map.num_inputs());
    nb::gil_scoped_release release;
    space.team.run([&](int) {
        space.prepare(map.weights().inputs, x.data(), rows, map.num_inputs(), target, [](int, int) {});
        multiply(space, target, rows, {{&map, out.data()}});
    });
}

// outputs, values (rows,) = where the greatest of x times the map is, and what it is
void best(const PackedLinear& map, Workspace& space, Matrix x, Out1<int64_t> outputs, Out1<float> values) {
    const size_t rows = x.shape(0);
    want(int(x.shape(1)) == map.num_inputs() && outputs.size() == rows && values.size() == rows,
         "x is not (rows, num_inputs), or outputs or values not (rows,)");
    if (rows == 0) return;
    nb::gil_scoped_release release;
    const std::vector<Best> found = find_best(space, map, x.data(), int(rows));
    for (size_t r = 0; r < rows; ++r) {
        outputs.data()[r] = found[r].output;
        values.data()[r] = found[r].value;
    }
}

}  // namespace

void register_linear_maps(nb::module_& m) {
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const DecoderKernels* kernels : available_kernels()) names.emplace_back(kernels->name);
        return names;
    });
    nb::class_<Workspace>(m, "Workspace")
        .def(nb::init<int, std::string>(), nb::arg("num_threads"), nb::arg("instruction_set"))
        .def_prop_ro("num_threads", [](const Workspace& w) { return w.team.size(); })
        .def_prop_ro("instruction_set", [](const Workspace& w) { return std::string(w.kernels->name); });
    nb::class_<PackedLinear>(m, "PackedLinear")
        .def(
            "__init__",
            [](PackedLinear* self, Matrix weight, const std::string& kind, bool round_inputs,
               std::optional<Vector> bias) {
                want(!bias || bias->size() == weight.shape(0), "bias is not (num_outputs,)");
                const WeightKind named = kind_named(kind);
                nb::gil_scoped_release unlocked;  // several maps are packed at once
                new (self) PackedLinear(weight.data(), int(weight.shape(0)), int(weight.shape(1)),
                                        named, round_inputs, bias ? bias->data() : nullptr);
            },
            nb::arg("weight"), nb::arg("kind"), nb::arg("round_inputs"), nb::arg("bias").none())
        .def_prop_ro("num_bytes", &PackedLinear::num_bytes)
        .def_prop_ro("is_exact", &PackedLinear::is_exact)
        .def("unpack",
             [](const PackedLinear& self, MutableMatrix out) {
                 want(int(out.shape(0)) == self.num_outputs() && int(out.shape(1)) == self.num_inputs(),
                      "out is not (num_outputs, num_inputs)");
                 self.unpack(out.data());
             })
        .def("apply", &apply, nb::arg("workspace"), nb::arg("x"), nb::arg("out"))
        .def("best", &best, nb::arg("workspace"), nb::arg("x"), nb::arg("outputs"), nb::arg("values"));
}

}  // namespace scone
