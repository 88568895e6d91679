// The whole decoder as one native call: all layers over a flat batch of tokens with a paged cache.
//
// One call a step keeps Python and thread wake-ups out of the layers: a token of a 135M model takes a few
// milliseconds, of which thirty layers of small torch calls would take half.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <utility>

#include "best_output.hpp"
#include "shared_attention.hpp"
#include "wanted_tokens.hpp"
#include "workspace.hpp"

namespace nb = nanobind;

namespace scone {
namespace {

template <class T, class Shape>
using Array = nb::ndarray<T, Shape, nb::c_contig, nb::device::cpu>;
using Vector = Array<const float, nb::ndim<1>>;
using Matrix = Array<const float, nb::ndim<2>>;
using MutableMatrix = Array<float, nb::ndim<2>>;
using Cache = Array<float, nb::ndim<5>>;
using Indices = Array<const int32_t, nb::ndim<1>>;
using Tables = Array<const int32_t, nb::ndim<2>>;
using MutableVector = Array<float, nb::ndim<1>>;
using MutableIndices = Array<int64_t, nb::ndim<1>>;

WeightKind kind_named(const std::string& name) {
    if (name == "f32") return WeightKind::f32;
    if (name == "bf16") return WeightKind::bf16;
    if (name == "int8") return WeightKind::int8;
    if (name == "int4") return WeightKind::int4;
    throw std::invalid_argument("weight kind is '" + name + "', wanted f32, bf16, int8 or int4");
}

void want(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

struct Layer {
    std::vector<float> attention_norm, ffn_norm, q_norm, k_norm;
    const PackedLinear *q, *k, *v, *o, *gate, *up, *down;
    std::vector<nb::object> owners;
};

struct Shape {
    int dim, num_heads, num_kv_heads, head_dim, ffn_dim;
    float norm_eps;
};

class NativeDecoder {
public:
    NativeDecoder(Workspace& space, int dim, int num_heads, int num_kv_heads, int head_dim, int ffn_dim,
                  float norm_eps, Vector final_norm, Matrix cos, Matrix sin)
        : space_(space), shape_{dim, num_heads, num_kv_heads, head_dim, ffn_dim, norm_eps},
          attention_(space, num_heads, num_kv_heads, head_dim),
          final_norm_(final_norm.data(), final_norm.data() + final_norm.size()),
          cos_(cos.data(), cos.data() + cos.size()), sin_(sin.data(), sin.data() + sin.size()),
          max_positions_(int(cos.shape(0))) {
        want(head_dim % 8 == 0, "head_dim is not a multiple of 8");
        want(int(final_norm.size()) == dim, "final_norm is not (dim,)");
        want(int(cos.shape(1)) == head_dim / 2 && cos.size() == sin.size(),
             "cos and sin are not (positions, head_dim / 2)");
    }

    void add_layer(Vector attention_norm, Vector ffn_norm, std::optional<Vector> q_norm,
                   std::optional<Vector> k_norm, std::vector<nb::object> maps) {
        want(maps.size() == 7, "a layer has seven maps: q, k, v, o, gate, up, down");
        Layer layer;
        const auto copy = [](const Vector& v) { return std::vector<float>(v.data(), v.data() + v.size()); };
        layer.attention_norm = copy(attention_norm);
        layer.ffn_norm = copy(ffn_norm);
        if (q_norm) layer.q_norm = copy(*q_norm);
        if (k_norm) layer.k_norm = copy(*k_norm);
        const PackedLinear** targets[] = {&layer.q,    &layer.k,  &layer.v,   &layer.o,
                                          &layer.gate, &layer.up, &layer.down};
        for (int i = 0; i < 7; ++i) *targets[i] = nb::cast<const PackedLinear*>(maps[i]);
        const Shape& s = shape_;
        const int q_dim = s.num_heads * s.head_dim, kv_dim = s.num_kv_heads * s.head_dim;
        const int sizes[7][2] = {{q_dim, s.dim}, {kv_dim, s.dim},    {kv_dim, s.dim},   {s.dim, q_dim},
                                 {s.ffn_dim, s.dim}, {s.ffn_dim, s.dim}, {s.dim, s.ffn_dim}};
        for (int i = 0; i < 7; ++i)
            want((*targets[i])->num_outputs() == sizes[i][0] && (*targets[i])->num_inputs() == sizes[i][1],
                 "a map's shape does not fit the decoder");
        const auto kind = [](const PackedLinear* map) { return map->weights().inputs; };
        want(kind(layer.q) == kind(layer.k) && kind(layer.q) == kind(layer.v) && kind(layer.gate) == kind(layer.up),
             "maps that read the same inputs want different kinds of them");
        want(int(layer.attention_norm.size()) == s.dim && int(layer.ffn_norm.size()) == s.dim,
             "a norm is not (dim,)");
        layer.owners = std::move(maps);
        layers_.push_back(std::move(layer));
    }

    // hidden (num_tokens, dim): states before layer first_layer in (embeddings, where that is 0), states after
    // the first num_layers out; after all, normalised. With num_wanted (num_seqs,), only those of so many last
    // tokens of each sequence: of the others the last layer computes no more than keys and values.
    void forward(MutableMatrix hidden, Indices positions, Indices query_starts, Indices context_lens,
                 Tables block_tables, std::optional<Indices> num_wanted, Cache k_cache, Cache v_cache,
                 size_t first_layer, size_t num_layers) {
        want(num_layers <= layers_.size(), "num_layers is more than the decoder has");
        want(first_layer <= num_layers, "first_layer is more than num_layers");
        Step step;
        step.first_layer = first_layer;
        step.num_layers = num_layers;
        step.rows = int(hidden.shape(0));
        step.hidden = hidden.data();
        step.positions = positions.data();
        step.block_tables = block_tables.data();
        step.table_width = int(block_tables.shape(1));
        step.cache_layer = k_cache.shape(1) * k_cache.shape(2) * k_cache.shape(3) * k_cache.shape(4);
        step.block_size = int(k_cache.shape(3));
        step.keys = k_cache.data();
        step.values = v_cache.data();
        check(step, hidden, positions, query_starts, context_lens, block_tables, k_cache, v_cache);
        want(!num_wanted || num_wanted->size() == context_lens.size(), "num_wanted is not (num_seqs,)");
        tiles_.clear();
        wanted_.clear();
        const int per_tile = attention_.tokens_per_tile();
        for (int seq = 0; seq < int(context_lens.size()); ++seq) {
            const int begin = query_starts.data()[seq], end = query_starts.data()[seq + 1];
            const int count = num_wanted ? num_wanted->data()[seq] : end - begin;
            want(count >= 0 && count <= end - begin, "num_wanted is not from 0 to the number of queries");
            add_tiles(tiles_, begin, end, per_tile, seq);
            wanted_.add(end - count, end, per_tile, seq, positions.data());
        }
        step.tiles = &tiles_;
        step.num_spans = spans(*std::max_element(context_lens.data(), context_lens.data() + context_lens.size()));
        reserve(step);
        nb::gil_scoped_release release;
        space_.team.run([&](int thread) { run(step, thread); });
    }

private:
    struct Step : Queries {
        int rows, block_size;
        float* hidden;
        size_t cache_layer, first_layer, num_layers;
        float *keys, *values;
    };

    void check(const Step& step, const MutableMatrix& hidden, const Indices& positions, const Indices& starts,
               const Indices& contexts, const Tables& tables, const Cache& k_cache, const Cache& v_cache) const {
        const size_t num_seqs = contexts.size();
        want(num_seqs > 0 && starts.size() == num_seqs + 1 && tables.shape(0) == num_seqs,
             "query_starts, context_lens and block_tables disagree on the number of sequences");
        want(int(hidden.shape(1)) == shape_.dim, "hidden is not (num_tokens, dim)");
        want(int(positions.size()) == step.rows && starts.data()[0] == 0 && starts.data()[num_seqs] == step.rows,
             "positions or query_starts do not fit the number of tokens");
        want(k_cache.shape(0) == layers_.size() && int(k_cache.shape(2)) == shape_.num_kv_heads &&
                 int(k_cache.shape(4)) == shape_.head_dim && k_cache.size() == v_cache.size(),
             "the caches are not (num_layers, num_blocks, num_kv_heads, block_size, head_dim)");
        for (size_t s = 0; s < num_seqs; ++s) {
            const int context = contexts.data()[s], count = starts.data()[s + 1] - starts.data()[s];
            want(count > 0 && count <= context && context <= max_positions_,
                 "a sequence has more queries than tokens, or more tokens than positions");
            const int blocks = (context + step.block_size - 1) / step.block_size;
            want(blocks <= step.table_width, "a context is longer than its block table");
            for (int b = 0; b < blocks; ++b) {
                const int block = tables.data()[s * step.table_width + b];
                want(block >= 0 && size_t(block) < k_cache.shape(1), "a block id is out of range");
            }
            for (int i = 0; i < count; ++i)
                want(positions.data()[starts.data()[s] + i] == context - count + i,
                     "a position is not that of its query");
        }
    }

    void reserve(const Step& step) {
        const Shape& s = shape_;
        const int rows = step.rows;
        const int q_dim = s.num_heads * s.head_dim, kv_dim = s.num_kv_heads * s.head_dim;
        Workspace::grow(normed_, normed_size_, size_t(rows) * s.dim);
        Workspace::grow(q_, q_size_, size_t(rows) * q_dim);
        Workspace::grow(k_, k_size_, size_t(rows) * kv_dim);
        Workspace::grow(v_, v_size_, size_t(rows) * kv_dim);
        Workspace::grow(attended_, attended_size_, size_t(rows) * q_dim);
        Workspace::grow(gate_, gate_size_, size_t(rows) * s.ffn_dim);
        Workspace::grow(up_, up_size_, size_t(rows) * s.ffn_dim);
        for (const std::vector<TokenTile>* tiles : {&std::as_const(tiles_), &wanted_.tiles()}) {
            Queries some = step;
            some.tiles = tiles;
            attention_.reserve(some, step.block_size);
        }
        prepared_ = space_.prepared(rows, std::max({s.dim, q_dim, s.ffn_dim}));
    }

    // Rows of the hidden state, normed, as inputs of maps of one kind.
    void prepare_normed(const Step& step, const std::vector<float>& weight, InputKind kind) {
        space_.prepare(kind, normed_.get(), step.rows, shape_.dim, prepared_, [&](int first, int count) {
            for (int r = first; r < first + count; ++r)
                space_.kernels->rms_norm(step.hidden + size_t(r) * shape_.dim, weight.data(), shape_.norm_eps,
                                         shape_.dim, normed_.get() + size_t(r) * shape_.dim);
        });
    }

    void rotate_and_store(const Step& step, const Layer& layer, size_t cache_offset) {
        const Shape& s = shape_;
        const size_t run = size_t(step.block_size) * s.head_dim;
        space_.team.share(int(step.tiles->size()), 1, [&](int item, int) {
            const TokenTile& tile = (*step.tiles)[item];
            for (int r = tile.first_row; r < tile.first_row + tile.num_rows; ++r) {
                const int position = step.positions[r];
                const float* cos = cos_.data() + size_t(position) * (s.head_dim / 2);
                const float* sin = sin_.data() + size_t(position) * (s.head_dim / 2);
                const auto turn = [&](float* head, const std::vector<float>& norm) {
                    if (!norm.empty()) space_.kernels->rms_norm(head, norm.data(), s.norm_eps, s.head_dim, head);
                    space_.kernels->rotate(head, cos, sin, s.head_dim);
                };
                for (int h = 0; h < s.num_heads; ++h)
                    turn(q_.get() + (size_t(r) * s.num_heads + h) * s.head_dim, layer.q_norm);
                const int32_t* table = step.block_tables + size_t(tile.sequence) * step.table_width;
                const size_t block = table[position / step.block_size];
                for (int h = 0; h < s.num_kv_heads; ++h) {
                    const size_t head = (size_t(r) * s.num_kv_heads + h) * s.head_dim;
                    turn(k_.get() + head, layer.k_norm);
                    const size_t offset = cache_offset + (block * s.num_kv_heads + h) * run;
                    const size_t place = position % step.block_size;
                    float* keys = step.keys + offset + place;
                    for (int d = 0; d < s.head_dim; ++d) keys[size_t(d) * step.block_size] = k_[head + d];
                    std::copy_n(v_.get() + head, s.head_dim, step.values + offset + place * s.head_dim);
                }
            }
        });
        space_.team.barrier();
    }

    // The step with the wanted rows alone, for all that follows its queries, keys and values.
    Step narrowed(const Step& step, int thread) {
        if (thread == 0) {
            wanted_.to_front(step.hidden, shape_.dim);
            wanted_.to_front(q_.get(), size_t(shape_.num_heads) * shape_.head_dim);
        }
        space_.team.barrier();
        Step narrow = step;
        narrow.rows = wanted_.size();
        narrow.positions = wanted_.positions();
        narrow.tiles = &wanted_.tiles();
        return narrow;
    }

    void run(const Step& whole, int thread) {
        Step step = whole;
        const auto kind = [](const PackedLinear* map) { return map->weights().inputs; };
        const auto as_it_is = [](int, int) {};
        const int width = shape_.num_heads * shape_.head_dim, ffn_dim = shape_.ffn_dim;
        for (size_t i = step.first_layer; i < step.num_layers; ++i) {
            const Layer& layer = layers_[i];
            prepare_normed(step, layer.attention_norm, kind(layer.q));
            multiply(space_, prepared_, step.rows, {{layer.q, q_.get()}, {layer.k, k_.get()}, {layer.v, v_.get()}});
            rotate_and_store(step, layer, i * step.cache_layer);
            if (i + 1 == step.num_layers && wanted_.size() < step.rows) step = narrowed(step, thread);
            const CacheView cache{step.keys + i * step.cache_layer, step.values + i * step.cache_layer,
                                  shape_.num_kv_heads, step.block_size, shape_.head_dim};
            attention_.attend(step, q_.get(), attended_.get(), cache, thread);
            space_.prepare(kind(layer.o), attended_.get(), step.rows, width, prepared_, as_it_is);
            multiply(space_, prepared_, step.rows, {{layer.o, step.hidden, true}});
            prepare_normed(step, layer.ffn_norm, kind(layer.gate));
            multiply(space_, prepared_, step.rows, {{layer.gate, gate_.get()}, {layer.up, up_.get()}});
            space_.prepare(kind(layer.down), gate_.get(), step.rows, ffn_dim, prepared_, [&](int first, int count) {
                float* gate = gate_.get() + size_t(first) * ffn_dim;
                space_.kernels->silu_mul(gate, up_.get() + size_t(first) * ffn_dim, count * ffn_dim, gate);
            });
            multiply(space_, prepared_, step.rows, {{layer.down, step.hidden, true}});
        }
        if (step.num_layers == layers_.size()) {
            space_.team.share(step.rows, kStrip, [&](int begin, int end) {
                for (int r = begin; r < end; ++r) {
                    float* row = step.hidden + size_t(r) * shape_.dim;
                    space_.kernels->rms_norm(row, final_norm_.data(), shape_.norm_eps, shape_.dim, row);
                }
            });
            space_.team.barrier();
        }
        if (thread == 0 && step.rows < whole.rows) wanted_.to_places(step.hidden, shape_.dim);
    }

    Workspace& space_;
    const Shape shape_;
    SharedAttention attention_;
    const std::vector<float> final_norm_, cos_, sin_;
    const int max_positions_;
    std::vector<Layer> layers_;
    std::vector<TokenTile> tiles_;
    WantedTokens wanted_;
    Activations prepared_{};
    std::unique_ptr<float[], AlignedFree> normed_, q_, k_, v_, attended_, gate_, up_;
    size_t normed_size_ = 0, q_size_ = 0, k_size_ = 0, v_size_ = 0, attended_size_ = 0, gate_size_ = 0,
           up_size_ = 0;
};

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
void best(const PackedLinear& map, Workspace& space, Matrix x, MutableIndices outputs, MutableVector values) {
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

void register_decoder(nb::module_& m) {
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const DecoderKernels* kernels : available_kernels()) names.emplace_back(kernels->name);
        return names;
    });
    m.attr("ATTENTION_SPAN") = kSpan;
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
    nb::class_<NativeDecoder>(m, "NativeDecoder")
        .def(nb::init<Workspace&, int, int, int, int, int, float, Vector, Matrix, Matrix>(),
             nb::keep_alive<1, 2>())
        .def("add_layer", &NativeDecoder::add_layer, nb::arg("attention_norm"), nb::arg("ffn_norm"),
             nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("maps"))
        .def("forward", &NativeDecoder::forward, nb::arg("hidden"), nb::arg("positions"), nb::arg("query_starts"),
             nb::arg("context_lens"), nb::arg("block_tables"), nb::arg("num_wanted").none(), nb::arg("k_cache"),
             nb::arg("v_cache"), nb::arg("first_layer"), nb::arg("num_layers"));
}

}  // namespace scone
