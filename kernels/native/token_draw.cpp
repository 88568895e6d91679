// Sampling, all rows of a step in one call: threads take rows.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "token_draw.hpp"
#include "workspace.hpp"

namespace nb = nanobind;

namespace scone {
namespace {

template <class T, int kDims>
using Array = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

// Calls body(sampler, row) for each row of logits.
template <class Body>
void for_rows(Workspace& space, const Array<const float, 2>& logits, const Body& body) {
    const int rows = int(logits.shape(0)), size = int(logits.shape(1));
    if (size < 1) throw std::invalid_argument("logits are not (rows, vocabulary)");
    nb::gil_scoped_release release;
    if (rows == 1) {  // waking the others would take as long
        RowSampler sampler(space.kernels, size);
        body(sampler, 0);
        return;
    }
    space.team.run([&](int) {
        RowSampler sampler(space.kernels, size);
        space.team.share(rows, 1, [&](int row, int) { body(sampler, row); });
    });
}

// draws (rows, 5): temperature, top_k, top_p, log of min_p, number; tokens (rows,)
void draw_tokens(Workspace& space, Array<const float, 2> logits, Array<const double, 2> draws,
                 Array<int64_t, 1> tokens) {
    const size_t rows = logits.shape(0);
    if (draws.shape(0) != rows || draws.shape(1) != 5 || tokens.shape(0) != rows)
        throw std::invalid_argument("draws are not (rows, 5), or tokens not (rows,)");
    for_rows(space, logits, [&](RowSampler& sampler, int row) {
        const double* d = draws.data() + size_t(row) * 5;
        const Draw how{float(d[0]), int(d[1]), d[2], float(d[3]), d[4]};
        tokens.data()[row] = sampler.draw(logits.data() + size_t(row) * logits.shape(1), how);
    });
}

// tokens (rows,); logprobs (rows,); top_logprobs and top_tokens (rows, num_top)
void log_probabilities(Workspace& space, Array<const float, 2> logits, Array<const int64_t, 1> tokens,
                    Array<float, 1> logprobs, Array<float, 2> top_logprobs, Array<int64_t, 2> top_tokens) {
    const size_t rows = logits.shape(0), num_top = top_tokens.shape(1);
    if (tokens.shape(0) != rows || logprobs.shape(0) != rows || top_tokens.shape(0) != rows ||
        top_logprobs.shape(0) != rows || top_logprobs.shape(1) != num_top)
        throw std::invalid_argument("tokens and logprobs are not (rows,), or their tops not (rows, num_top)");
    for (size_t row = 0; row < rows; ++row)
        if (tokens.data()[row] < 0 || size_t(tokens.data()[row]) >= logits.shape(1))
            throw std::invalid_argument("a token is not in the vocabulary");
    for_rows(space, logits, [&](RowSampler& sampler, int row) {
        std::vector<TokenValue> top(num_top);
        logprobs.data()[row] = sampler.logprob(logits.data() + size_t(row) * logits.shape(1),
                                               int(tokens.data()[row]), top.data(), int(num_top));
        for (size_t i = 0; i < num_top; ++i) {
            top_logprobs.data()[row * num_top + i] = top[i].value;
            top_tokens.data()[row * num_top + i] = top[i].token;
        }
    });
}

}  // namespace

void register_token_draw(nb::module_& m) {
    m.def("draw_tokens", &draw_tokens, nb::arg("workspace"), nb::arg("logits"), nb::arg("draws"), nb::arg("tokens"));
    m.def("log_probabilities", &log_probabilities, nb::arg("workspace"), nb::arg("logits"), nb::arg("tokens"),
          nb::arg("logprobs"), nb::arg("top_logprobs"), nb::arg("top_tokens"));
}

}  // namespace scone
