// The whole decoder as one native call: all layers over a flat batch of tokens with a paged cache.
//
// One call a step keeps Python and thread wake-ups out of the layers: a token of a 135M model takes a few
// milliseconds, of which thirty layers of small torch calls would take half. Here arrays are checked; the work is
// done in decoder_pass.hpp.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <utility>

#include "arrays.hpp"
#include "decoder_pass.hpp"

namespace scone {
namespace {

template <class T, class Shape>
using Array = nb::ndarray<T, Shape, nb::c_contig, nb::device::cpu>;
using Vector = Array<const float, nb::ndim<1>>;
using Matrix = Array<const float, nb::ndim<2>>;
using MutableMatrix = Array<float, nb::ndim<2>>;
using Cache = nb::ndarray<nb::ndim<5>, nb::c_contig, nb::device::cpu>;  // of float or bfloat16
using States = Array<float, nb::ndim<4>>;
using Indices = Array1<int32_t>;
using Tables = Array<const int32_t, nb::ndim<2>>;

template <class Shape>
std::vector<float> copy_of(const Array<const float, Shape>& array) {
    return {array.data(), array.data() + array.size()};
}

constexpr nb::dlpack::dtype kBfloat16{uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1};

class NativeDecoder {
public:
    NativeDecoder(Workspace& space, int dim, int num_heads, int num_kv_heads, int head_dim, int ffn_dim,
                  float norm_eps, Vector final_norm, Matrix cos, Matrix sin)
        : shape_{dim, num_heads, num_kv_heads, head_dim, ffn_dim, norm_eps}, max_positions_(int(cos.shape(0))),
          pass_(space, shape_, copy_of(final_norm), copy_of(cos), copy_of(sin)) {
        want(head_dim % 8 == 0, "head_dim is not a multiple of 8");
        want(int(final_norm.size()) == dim, "final_norm is not (dim,)");
        want(int(cos.shape(1)) == head_dim / 2 && cos.size() == sin.size(),
             "cos and sin are not (positions, head_dim / 2)");
    }

    void add_layer(Vector attention_norm, Vector ffn_norm, std::optional<Vector> q_norm,
                   std::optional<Vector> k_norm, std::vector<nb::object> maps) {
        want(maps.size() == 7, "a layer has seven maps: q, k, v, o, gate, up, down");
        DecoderLayer layer;
        layer.attention_norm = copy_of(attention_norm);
        layer.ffn_norm = copy_of(ffn_norm);
        if (q_norm) layer.q_norm = copy_of(*q_norm);
        if (k_norm) layer.k_norm = copy_of(*k_norm);
        const PackedLinear** targets[] = {&layer.q,    &layer.k,  &layer.v,   &layer.o,
                                          &layer.gate, &layer.up, &layer.down};
        for (int i = 0; i < 7; ++i) *targets[i] = nb::cast<const PackedLinear*>(maps[i]);
        const DecoderShape& s = shape_;
        const int sizes[7][2] = {{s.q_dim(), s.dim},  {s.kv_dim(), s.dim}, {s.kv_dim(), s.dim}, {s.dim, s.q_dim()},
                                 {s.ffn_dim, s.dim}, {s.ffn_dim, s.dim}, {s.dim, s.ffn_dim}};
        for (int i = 0; i < 7; ++i)
            want((*targets[i])->num_outputs() == sizes[i][0] && (*targets[i])->num_inputs() == sizes[i][1],
                 "a map's shape does not fit the decoder");
        const auto kind = [](const PackedLinear* map) { return map->weights().inputs; };
        want(kind(layer.q) == kind(layer.k) && kind(layer.q) == kind(layer.v) && kind(layer.gate) == kind(layer.up),
             "maps that read the same inputs want different kinds of them");
        want(int(layer.attention_norm.size()) == s.dim && int(layer.ffn_norm.size()) == s.dim,
             "a norm is not (dim,)");
        pass_.add_layer(std::move(layer));
        for (nb::object& map : maps) owners_.push_back(std::move(map));
    }

    // See DecoderStep. With num_wanted (num_seqs,), only the states of so many last tokens of each sequence. With
    // states and state_rows (num_tokens,) = slot * block_size + place, or -1, the inputs of the layers of such tokens
    // are kept.
    void forward(MutableMatrix hidden, Indices positions, Indices query_starts, Indices context_lens,
                 Tables block_tables, std::optional<Indices> num_wanted, Cache k_cache, Cache v_cache,
                 size_t first_layer, size_t num_layers, std::optional<States> states,
                 std::optional<Indices> state_rows) {
        want(num_layers <= pass_.num_layers(), "num_layers is more than the decoder has");
        want(first_layer <= num_layers, "first_layer is more than num_layers");
        DecoderStep step;
        step.first_layer = first_layer;
        step.num_layers = num_layers;
        step.rows = int(hidden.shape(0));
        step.hidden = hidden.data();
        step.positions = positions.data();
        step.block_tables = block_tables.data();
        step.table_width = int(block_tables.shape(1));
        step.cache = checked_cache(k_cache, v_cache);
        check_sequences(step, hidden, positions, query_starts, context_lens, block_tables, k_cache.shape(1));
        want(states.has_value() == state_rows.has_value(), "states and state_rows belong together");
        if (states) keep(step, *states, *state_rows);
        if (num_wanted) check_wanted(*num_wanted, query_starts, context_lens.size());
        const StepSequences sequences{int(context_lens.size()), query_starts.data(), context_lens.data(),
                                      num_wanted ? num_wanted->data() : nullptr};
        nb::gil_scoped_release release;
        pass_.forward(step, sequences);
    }

    // Keys and values of whole blocks as forward computed them, from what it kept: states (num_slots, num_layers,
    // block_size, dim), of which those in slots (n,) belong into blocks block_ids (n,), the first token of each at
    // position first_positions (n,).
    void restore(States states, Indices slots, Indices block_ids, Indices first_positions, Cache k_cache,
                 Cache v_cache) {
        const KvCache cache = checked_cache(k_cache, v_cache);
        const LayerInputs inputs = checked_states(states, cache);
        const size_t n = slots.size();
        want(block_ids.size() == n && first_positions.size() == n,
             "slots, block_ids and first_positions are not of one length");
        for (size_t i = 0; i < n; ++i) {
            want(slots.data()[i] >= 0 && size_t(slots.data()[i]) < states.shape(0), "a slot is out of range");
            want(block_ids.data()[i] >= 0 && size_t(block_ids.data()[i]) < k_cache.shape(1),
                 "a block id is out of range");
            want(first_positions.data()[i] >= 0 && first_positions.data()[i] + cache.block_size <= max_positions_,
                 "a block lies past the last position");
        }
        nb::gil_scoped_release release;
        pass_.restore({int(n), inputs, slots.data(), block_ids.data(), first_positions.data()}, cache);
    }

private:
    KvCache checked_cache(const Cache& k_cache, const Cache& v_cache) const {
        want(k_cache.shape(0) == pass_.num_layers() && int(k_cache.shape(2)) == shape_.num_kv_heads &&
                 int(k_cache.shape(4)) == shape_.head_dim && k_cache.size() == v_cache.size(),
             "the caches are not (num_layers, num_blocks, num_kv_heads, block_size, head_dim)");
        want(k_cache.dtype() == v_cache.dtype() && (k_cache.dtype() == nb::dtype<float>() || k_cache.dtype() == kBfloat16),
             "the caches are not both float32 or both bfloat16");
        return {k_cache.dtype() == kBfloat16 ? CacheKind::bf16 : CacheKind::f32,
                static_cast<char*>(k_cache.data()),
                static_cast<char*>(v_cache.data()),
                k_cache.size() / pass_.num_layers(),
                shape_.num_kv_heads,
                int(k_cache.shape(3)),
                shape_.head_dim};
    }

    LayerInputs checked_states(const States& states, const KvCache& cache) const {
        want(states.shape(1) == pass_.num_layers() && int(states.shape(2)) == cache.block_size &&
                 int(states.shape(3)) == shape_.dim,
             "states are not (num_slots, num_layers, block_size, dim)");
        return {states.data(), pass_.num_layers(), cache.block_size, shape_.dim};
    }

    void keep(DecoderStep& step, const States& states, const Indices& rows) const {
        step.kept = checked_states(states, step.cache);
        want(int(rows.size()) == step.rows, "state_rows is not (num_tokens,)");
        for (int r = 0; r < step.rows; ++r)
            want(rows.data()[r] >= -1 && rows.data()[r] < int(states.shape(0)) * step.cache.block_size,
                 "a state row is out of range");
        step.kept_rows = rows.data();
    }

    void check_sequences(const DecoderStep& step, const MutableMatrix& hidden, const Indices& positions,
                         const Indices& starts, const Indices& contexts, const Tables& tables,
                         size_t num_blocks) const {
        const size_t num_seqs = contexts.size();
        want(num_seqs > 0 && starts.size() == num_seqs + 1 && tables.shape(0) == num_seqs,
             "query_starts, context_lens and block_tables disagree on the number of sequences");
        want(int(hidden.shape(1)) == shape_.dim, "hidden is not (num_tokens, dim)");
        want(int(positions.size()) == step.rows && starts.data()[0] == 0 && starts.data()[num_seqs] == step.rows,
             "positions or query_starts do not fit the number of tokens");
        for (size_t s = 0; s < num_seqs; ++s) {
            const int context = contexts.data()[s], count = starts.data()[s + 1] - starts.data()[s];
            want(count > 0 && count <= context && context <= max_positions_,
                 "a sequence has more queries than tokens, or more tokens than positions");
            const int blocks = (context + step.cache.block_size - 1) / step.cache.block_size;
            want(blocks <= step.table_width, "a context is longer than its block table");
            for (int b = 0; b < blocks; ++b) {
                const int block = tables.data()[s * step.table_width + b];
                want(block >= 0 && size_t(block) < num_blocks, "a block id is out of range");
            }
            for (int i = 0; i < count; ++i)
                want(positions.data()[starts.data()[s] + i] == context - count + i,
                     "a position is not that of its query");
        }
    }

    static void check_wanted(const Indices& num_wanted, const Indices& starts, size_t num_seqs) {
        want(num_wanted.size() == num_seqs, "num_wanted is not (num_seqs,)");
        for (size_t s = 0; s < num_seqs; ++s)
            want(num_wanted.data()[s] >= 0 && num_wanted.data()[s] <= starts.data()[s + 1] - starts.data()[s],
                 "num_wanted is not from 0 to the number of queries");
    }

    const DecoderShape shape_;
    const int max_positions_;
    DecoderPass pass_;
    std::vector<nb::object> owners_;  // of the maps
};

}  // namespace

void register_decoder(nb::module_& m) {
    m.attr("ATTENTION_SPAN") = kSpan;
    nb::class_<NativeDecoder>(m, "NativeDecoder")
        .def(nb::init<Workspace&, int, int, int, int, int, float, Vector, Matrix, Matrix>(),
             nb::keep_alive<1, 2>())
        .def("add_layer", &NativeDecoder::add_layer, nb::arg("attention_norm"), nb::arg("ffn_norm"),
             nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("maps"))
        .def("forward", &NativeDecoder::forward, nb::arg("hidden"), nb::arg("positions"), nb::arg("query_starts"),
             nb::arg("context_lens"), nb::arg("block_tables"), nb::arg("num_wanted").none(), nb::arg("k_cache"),
             nb::arg("v_cache"), nb::arg("first_layer"), nb::arg("num_layers"), nb::arg("states").none(),
             nb::arg("state_rows").none())
        .def("restore", &NativeDecoder::restore, nb::arg("states"), nb::arg("slots"), nb::arg("block_ids"),
             nb::arg("first_positions"), nb::arg("k_cache"), nb::arg("v_cache"));
}

}  // namespace scone
