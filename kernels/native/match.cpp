// Longest f-gram match over the bucket index, many positions in flight.
//
// A probe is one cache line from memory: some 100 ns if awaited. The tokens are therefore cut into lanes, each
// walking its own stretch from left to right; a lane asks for the next line (prefetch) and the turn goes to the
// next lane. Within a lane the match at t is at most one longer than the match at t-1 when the set is closed,
// which saves about half of the probes (docs/lookup.md).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "fault_guard.hpp"
#include "fgram_hash.hpp"

namespace nb = nanobind;

namespace scone {

template <class T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out1 = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Array2 = nb::ndarray<const T, nb::ndim<2>, nb::device::cpu>;

constexpr int kMaxN = 16;
constexpr int kLanes = 16;  // as many as line-fill buffers keep busy; 8 and 32 measured slower
constexpr int64_t kNoFault = -1;
constexpr int64_t kPageFault = -2;

struct Index {
    const Bucket* buckets;
    uint64_t num_home_buckets, num_buckets;
    uint64_t seed_a, seed_b;
    int fingerprint_shift;
    int max_n;
    bool closed;
};

// A stretch [position, end) of one sequence, whose history reaches back to `first`.
template <class Token>
struct Lane {
    const Token* tokens;
    int64_t first, position, end;
    int64_t* out_row;
    int8_t* out_len;
    int longest;  // no longer f-gram can end at `position`
    int n;        // length being probed
    uint64_t bucket;
    uint64_t lane_a[kMaxN + 1], lane_b[kMaxN + 1];

    bool done() const { return position >= end; }
};

template <class Token>
inline void aim(const Index& index, Lane<Token>& lane) {
    lane.bucket = home_bucket(lane.lane_a[lane.n], index.num_home_buckets);
    __builtin_prefetch(&index.buckets[lane.bucket]);
}

// Settles the current position and moves to the next one that needs a probe.
template <class Token>
inline void settle(const Index& index, Lane<Token>& lane, int64_t row, int length) {
    lane.out_row[lane.position] = row;
    lane.out_len[lane.position] = int8_t(length);
    lane.longest = index.closed ? std::min(length + 1, index.max_n) : index.max_n;
    lane.position++;
}

template <class Token>
inline void start(const Index& index, Lane<Token>& lane) {
    while (!lane.done()) {
        int64_t reach = std::min<int64_t>(lane.longest, lane.position - lane.first + 1);
        uint64_t a = index.seed_a, b = index.seed_b;
        int n = 0;
        for (; n < reach; n++) {
            int64_t token = int64_t(lane.tokens[lane.position - n]);
            if (token < 0 || token > INT32_MAX) break;  // padding: no f-gram reaches across it
            a = extend(a, uint32_t(token), kMultiplierA);
            b = extend(b, uint32_t(token), kMultiplierB);
            lane.lane_a[n + 1] = a;
            lane.lane_b[n + 1] = b;
        }
        if (n >= 2) {
            lane.n = n;
            aim(index, lane);
            return;
        }
        settle(index, lane, -1, 1);
    }
}

// Looks at the bucket the lane has aimed at. False: the bucket is damaged.
template <class Token>
inline bool probe(const Index& index, Lane<Token>& lane) {
    const Bucket& bucket = index.buckets[lane.bucket];
    if (bucket_check(bucket) != bucket.meta >> 8) return false;
    uint64_t fingerprint = lane.lane_b[lane.n] >> index.fingerprint_shift;
    for (int i = 0; i < Bucket::kSlots; i++) {
        if (bucket.fingerprint[i] == fingerprint && bucket.row[i] != Bucket::kEmpty) {
            settle(index, lane, int64_t(bucket.row[i]), lane.n);
            start(index, lane);
            return true;
        }
    }
    if (bucket.meta & Bucket::kPassed) {
        if (++lane.bucket >= index.num_buckets) return false;
        __builtin_prefetch(&index.buckets[lane.bucket]);
    } else if (--lane.n >= 2) {
        aim(index, lane);
    } else {
        settle(index, lane, -1, 1);
        start(index, lane);
    }
    return true;
}

// Runs lanes[0..num) to their ends; returns the number of a damaged bucket or kNoFault.
template <class Token>
int64_t run_lanes(const Index& index, Lane<Token>* lanes, int num) {
    Lane<Token>* active[kLanes];
    int num_active = 0;
    for (int i = 0; i < num; i++) {
        start(index, lanes[i]);
        if (!lanes[i].done()) active[num_active++] = &lanes[i];
    }
    while (num_active > 0) {
        for (int i = 0; i < num_active;) {
            Lane<Token>& lane = *active[i];
            if (!probe(index, lane)) return int64_t(lane.bucket);
            if (lane.done()) {
                active[i] = active[--num_active];
            } else {
                i++;
            }
        }
    }
    return kNoFault;
}

class Matcher {
  public:
    Matcher(Array1<uint8_t> buckets, uint64_t num_home_buckets, uint64_t num_buckets, uint64_t seed_a,
            uint64_t seed_b, int fp_bits, int max_n, bool closed) {
        if (buckets.size() < num_buckets * sizeof(Bucket))
            throw std::invalid_argument("the index is shorter than its number of buckets");
        if (num_home_buckets < 1 || num_home_buckets > num_buckets || num_home_buckets >= (1ull << 32))
            throw std::invalid_argument("num_home_buckets is out of range");
        if (max_n < 2 || max_n > kMaxN) throw std::invalid_argument("max_n must be 2 to 16");
        if (fp_bits < 1 || fp_bits > 64) throw std::invalid_argument("fp_bits must be 1 to 64");
        index_ = {reinterpret_cast<const Bucket*>(buckets.data()), num_home_buckets, num_buckets, seed_a, seed_b,
                  64 - fp_bits, max_n, closed};
    }

    // Matches every position of the sequences tokens[starts[i], starts[i+1]).
    template <class Token>
    int64_t match(Array1<Token> tokens, Array1<int64_t> starts, Out1<int64_t> rows, Out1<int8_t> lengths) const {
        int64_t n = int64_t(tokens.size());
        if (int64_t(rows.size()) != n || int64_t(lengths.size()) != n || starts.size() < 1)
            throw std::invalid_argument("tokens, rows and lengths differ in size");
        for (size_t i = 0; i + 1 < starts.size(); i++)
            if (starts.data()[i] > starts.data()[i + 1]) throw std::invalid_argument("starts must not fall");
        if (starts.data()[0] != 0 || starts.data()[starts.size() - 1] != n)
            throw std::invalid_argument("starts must run from 0 to the number of tokens");
        nb::gil_scoped_release unlocked;
        return match_stretches(tokens.data(), starts.data(), int64_t(starts.size()) - 1, rows.data(),
                               lengths.data());
    }

    // Matches the last position of each row of windows (batch, width), any strides.
    template <class Token>
    int64_t match_last(Array2<Token> windows, Out1<int64_t> rows, Out1<int8_t> lengths) const {
        int64_t batch = int64_t(windows.shape(0)), width = int64_t(windows.shape(1));
        if (int64_t(rows.size()) != batch || int64_t(lengths.size()) != batch || width < 1)
            throw std::invalid_argument("windows, rows and lengths differ in size");
        if (batch > 0 && width > 1 && windows.stride(1) != 1)
            throw std::invalid_argument("the tokens of a window must lie side by side");
        nb::gil_scoped_release unlocked;
        const Token* data = windows.data();
        int64_t stride = windows.stride(0);
        int64_t fault = kNoFault;
        bool readable = guarded([&] {
            for (int64_t begin = 0; begin < batch && fault == kNoFault; begin += kLanes) {
                int num = int(std::min<int64_t>(kLanes, batch - begin));
                Lane<Token> lanes[kLanes];
                for (int i = 0; i < num; i++) {
                    int64_t k = begin + i, last = width - 1;
                    // out pointers are shifted so that position `last` lands on element k
                    lanes[i].tokens = data + k * stride;
                    lanes[i].first = 0;
                    lanes[i].position = last;
                    lanes[i].end = width;
                    lanes[i].out_row = rows.data() + k - last;
                    lanes[i].out_len = lengths.data() + k - last;
                    lanes[i].longest = index_.max_n;
                }
                fault = run_lanes(index_, lanes, num);
            }
        });
        return readable ? fault : kPageFault;
    }

  private:
    template <class Token>
    int64_t match_stretches(const Token* tokens, const int64_t* starts, int64_t num_sequences, int64_t* rows,
                            int8_t* lengths) const {
        int64_t total = starts[num_sequences];
        // Short enough that every lane has work, long enough that the bound len(t) <= len(t-1)+1 pays.
        int64_t stretch = std::clamp<int64_t>(total / kLanes, 8, 4096);
        int64_t fault = kNoFault;
        bool readable = guarded([&] {
            Lane<Token> lanes[kLanes];
            int num = 0;
            for (int64_t s = 0; s < num_sequences && fault == kNoFault; s++) {
                for (int64_t begin = starts[s]; begin < starts[s + 1]; begin += stretch) {
                    Lane<Token>& lane = lanes[num++];
                    lane.tokens = tokens;
                    lane.first = starts[s];
                    lane.position = begin;
                    lane.end = std::min(begin + stretch, starts[s + 1]);
                    lane.out_row = rows;
                    lane.out_len = lengths;
                    lane.longest = index_.max_n;
                    if (num == kLanes) {
                        fault = run_lanes(index_, lanes, num);
                        num = 0;
                        if (fault != kNoFault) break;
                    }
                }
            }
            if (fault == kNoFault) fault = run_lanes(index_, lanes, num);
        });
        return readable ? fault : kPageFault;
    }

    Index index_;
};

void register_match(nb::module_& m) {
    m.attr("MAX_N") = kMaxN;
    nb::class_<Matcher>(m, "Matcher")
        .def(nb::init<Array1<uint8_t>, uint64_t, uint64_t, uint64_t, uint64_t, int, int, bool>(),
             nb::keep_alive<1, 2>())
        .def("match", &Matcher::match<int32_t>, nb::arg("tokens").noconvert(), nb::arg("starts").noconvert(),
             nb::arg("rows").noconvert(), nb::arg("lengths").noconvert())
        .def("match", &Matcher::match<int64_t>, nb::arg("tokens").noconvert(), nb::arg("starts").noconvert(),
             nb::arg("rows").noconvert(), nb::arg("lengths").noconvert())
        .def("match_last", &Matcher::match_last<int32_t>, nb::arg("windows").noconvert(),
             nb::arg("rows").noconvert(), nb::arg("lengths").noconvert())
        .def("match_last", &Matcher::match_last<int64_t>, nb::arg("windows").noconvert(),
             nb::arg("rows").noconvert(), nb::arg("lengths").noconvert());
}

}  // namespace scone
