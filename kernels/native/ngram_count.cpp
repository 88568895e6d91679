// Counting n-grams one token longer than those that are known: keys, their counts, and their ids.
//
// An n-gram's key is (id of its prefix) << 32 | last token. Keys are dealt into partitions by hash, so that
// equal keys meet in one partition and each partition is counted in a table that stays in the cache.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace scone {
namespace {

template <class T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Array = nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>;

constexpr int64_t kCachedKeys = 1 << 15;  // a table of twice as many 16-byte slots lies in a 1 MiB L2 cache
constexpr int kLookAhead = 32;            // look-ups in flight

// The finalizer of splitmix64; partitions take the high bits, table slots the low ones.
inline uint64_t hash_key(int64_t key) {
    uint64_t x = uint64_t(key);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

inline int64_t partition_of(uint64_t hash, int64_t num_partitions) {
    return int64_t((unsigned __int128)(hash) * uint64_t(num_partitions) >> 64);
}

struct Slot {
    int64_t key;
    int64_t value;  // 0: free
};

class Table {
   public:
    explicit Table(size_t num_slots) : slots_(num_slots), mask_(num_slots - 1) {}

    Slot& find(int64_t key, uint64_t hash) {
        size_t at = hash & mask_;
        while (slots_[at].value != 0 && slots_[at].key != key) at = (at + 1) & mask_;
        return slots_[at];
    }
    const Slot& find(int64_t key, uint64_t hash) const { return const_cast<Table*>(this)->find(key, hash); }

    void prefetch(uint64_t hash) const { __builtin_prefetch(&slots_[hash & mask_]); }

    void add(int64_t key, uint64_t hash) {
        Slot& slot = find(key, hash);
        slot.key = key;
        if (slot.value++ == 0 && ++num_used_ * 2 > slots_.size()) grow();
    }

    const std::vector<Slot>& slots() const { return slots_; }

    void clear() {
        std::fill(slots_.begin(), slots_.end(), Slot{0, 0});
        num_used_ = 0;
    }

   private:
    void grow() {
        std::vector<Slot> old(slots_.size() * 2);
        old.swap(slots_);
        mask_ = slots_.size() - 1;
        for (const Slot& slot : old)
            if (slot.value != 0) find(slot.key, hash_key(slot.key)) = slot;
    }

    std::vector<Slot> slots_;
    size_t mask_;
    size_t num_used_ = 0;
};

// Walks the n-grams that begin in [start, end): those whose prefix and suffix are known and that lie within one
// document. A longer n-gram over a border has a part that crosses it and has no id; so only pairs need the test,
// and it costs nothing to make it always.
class Walk {
   public:
    Walk(const In<int32_t>& tokens, const In<int32_t>& gram_ids, const In<int64_t>& borders, int64_t n, int64_t start)
        : tokens_(tokens.data() + n - 1), ids_(gram_ids.data()) {
        next_ = std::lower_bound(borders.data(), borders.data() + borders.size(), start + 1);
        last_ = borders.data() + borders.size();
    }

    // Positions must come in rising order. Returns -1 where no n-gram begins.
    int64_t key_at(int64_t i) {
        while (next_ != last_ && *next_ <= i) ++next_;
        bool crosses = next_ != last_ && *next_ == i + 1;
        if (ids_[i] < 0 || ids_[i + 1] < 0 || crosses) return -1;
        return int64_t(ids_[i]) << 32 | uint32_t(tokens_[i]);
    }

   private:
    const int32_t* tokens_;
    const int32_t* ids_;
    const int64_t* next_;
    const int64_t* last_;
};

// Deals `keys` into partitions; `bounds` (num_partitions + 1) says where each begins in `out`.
void deal(const int64_t* keys, int64_t num_keys, int64_t* out, int64_t* bounds, int64_t num_partitions) {
    std::vector<int64_t> next(num_partitions + 1, 0);
    for (int64_t i = 0; i < num_keys; i++) next[partition_of(hash_key(keys[i]), num_partitions) + 1]++;
    for (int64_t p = 0; p < num_partitions; p++) next[p + 1] += next[p];
    std::copy(next.begin(), next.end(), bounds);
    for (int64_t i = 0; i < num_keys; i++) out[next[partition_of(hash_key(keys[i]), num_partitions)]++] = keys[i];
}

int64_t ngram_keys(In<int32_t> tokens, In<int32_t> gram_ids, In<int64_t> borders, int64_t n, int64_t start,
                   int64_t end, Out<int64_t> out, Out<int64_t> bounds) {
    nb::gil_scoped_release unlocked;
    std::vector<int64_t> keys(end - start);
    int64_t num_keys = 0;
    Walk walk(tokens, gram_ids, borders, n, start);
    for (int64_t i = start; i < end; i++) {
        keys[num_keys] = walk.key_at(i);
        num_keys += keys[num_keys] >= 0;
    }
    deal(keys.data(), num_keys, out.data(), bounds.data(), int64_t(bounds.size()) - 1);
    return num_keys;
}

Array to_numpy(const std::vector<std::pair<int64_t, int64_t>>& pairs, bool second) {
    auto* data = new int64_t[pairs.size()];
    for (size_t i = 0; i < pairs.size(); i++) data[i] = second ? pairs[i].second : pairs[i].first;
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<int64_t*>(p); });
    return Array(data, {pairs.size()}, owner);
}

// The keys of one partition share the high bits of their hash; a factor spreads them again.
inline int64_t respread(int64_t key, int64_t num_parts) {
    return partition_of(hash_key(key) * 0x9e3779b97f4a7c15ull, num_parts);
}

std::pair<Array, Array> count_keys(In<int64_t> keys, int64_t min_count) {
    std::vector<std::pair<int64_t, int64_t>> found;
    {
        nb::gil_scoped_release unlocked;
        const int64_t num_keys = int64_t(keys.size());
        const int64_t num_parts = num_keys / kCachedKeys + 1;
        std::vector<int64_t> next(num_parts + 1, 0), dealt(num_keys);
        for (int64_t i = 0; i < num_keys; i++) next[respread(keys.data()[i], num_parts) + 1]++;
        for (int64_t p = 0; p < num_parts; p++) next[p + 1] += next[p];
        for (int64_t i = 0; i < num_keys; i++) dealt[next[respread(keys.data()[i], num_parts)]++] = keys.data()[i];
        Table table(2 * kCachedKeys);
        for (int64_t p = 0, begin = 0; p < num_parts; begin = next[p++]) {
            for (int64_t i = begin; i < next[p]; i++) table.add(dealt[i], hash_key(dealt[i]));
            for (const Slot& slot : table.slots())
                if (slot.value >= min_count) found.emplace_back(slot.key, slot.value);
            table.clear();
        }
        std::sort(found.begin(), found.end());
    }
    return {to_numpy(found, false), to_numpy(found, true)};
}

size_t slots_for(size_t num_keys) {
    size_t num_slots = 16;
    while (num_slots < 2 * num_keys) num_slots *= 2;
    return num_slots;
}

// Key -> its place among the sorted keys.
class KeyIndex {
   public:
    explicit KeyIndex(In<int64_t> keys) : table_(slots_for(keys.size())) {
        nb::gil_scoped_release unlocked;
        for (size_t i = 0; i < keys.size(); i++)
            table_.find(keys.data()[i], hash_key(keys.data()[i])) = Slot{keys.data()[i], int64_t(i) + 1};
    }

    void next_ids(In<int32_t> tokens, In<int32_t> gram_ids, In<int64_t> borders, int64_t n, int64_t start, int64_t end,
                  Out<int32_t> out) const {
        nb::gil_scoped_release unlocked;
        Walk walk(tokens, gram_ids, borders, n, start);
        int64_t keys[kLookAhead];
        uint64_t hashes[kLookAhead];
        for (int64_t first = start; first < end; first += kLookAhead) {
            const int num = int(std::min<int64_t>(kLookAhead, end - first));
            for (int j = 0; j < num; j++) {
                keys[j] = walk.key_at(first + j);
                hashes[j] = hash_key(keys[j]);
                if (keys[j] >= 0) table_.prefetch(hashes[j]);
            }
            for (int j = 0; j < num; j++)
                out.data()[first - start + j] = keys[j] < 0 ? -1 : int32_t(table_.find(keys[j], hashes[j]).value) - 1;
        }
    }

   private:
    Table table_;
};

}  // namespace

void register_ngram_count(nb::module_& m) {
    m.def("ngram_keys", &ngram_keys, nb::arg("tokens").noconvert(), nb::arg("gram_ids").noconvert(),
          nb::arg("borders").noconvert(), nb::arg("n"), nb::arg("start"), nb::arg("end"), nb::arg("out").noconvert(),
          nb::arg("bounds").noconvert());
    m.def("count_keys", &count_keys, nb::arg("keys").noconvert(), nb::arg("min_count"));
    nb::class_<KeyIndex>(m, "KeyIndex")
        .def(nb::init<In<int64_t>>(), nb::arg("keys").noconvert())
        .def("next_ids", &KeyIndex::next_ids, nb::arg("tokens").noconvert(), nb::arg("gram_ids").noconvert(),
             nb::arg("borders").noconvert(), nb::arg("n"), nb::arg("start"), nb::arg("end"),
             nb::arg("out").noconvert());
}

}  // namespace scone
