// The native extension `scone.kernels._native`: each kernel file registers itself here.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

NB_MODULE(_native, m) {
    m.doc() = "Native kernels of scone-serve; each has a NumPy or torch oracle beside its Python door.";
}
