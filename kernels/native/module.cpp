// The native extension `scone.kernels._native`: each kernel file registers itself here.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace scone {
void register_crc32c(nb::module_&);
void register_disk_read(nb::module_&);
void register_decoder(nb::module_&);
void register_gather(nb::module_&);
void register_linear_maps(nb::module_&);
void register_look_up(nb::module_&);
void register_match(nb::module_&);
void register_ngram_count(nb::module_&);
void register_read_queue(nb::module_&);
void register_row_reads(nb::module_&);
void register_state_read(nb::module_&);
void register_token_draw(nb::module_&);
}  // namespace scone

NB_MODULE(_native, m) {
    m.doc() = "Native kernels of scone-serve; each has a NumPy or torch oracle beside its Python door.";
    scone::register_crc32c(m);
    scone::register_disk_read(m);
    scone::register_decoder(m);
    scone::register_gather(m);
    scone::register_linear_maps(m);
    scone::register_match(m);
    scone::register_look_up(m);
    scone::register_ngram_count(m);
    scone::register_read_queue(m);
    scone::register_row_reads(m);
    scone::register_state_read(m);
    scone::register_token_draw(m);
}
