// Longest f-gram match over the bucket index, many positions in flight.
//
// A probe is one cache line from memory: some 100 ns if awaited. Positions are therefore taken in blocks, and a
// block length by length: first all lines that it needs for f-grams of n tokens are asked for (prefetch), then
// they are looked at; the few searches that go on after their first bucket do so together as well. The loops run
// straight on: whether a probe hits is anybody's guess, and a wrong guess of the processor costs as much as a
// probe. In a closed set only those positions go on to n + 1 where both parts of the longer f-gram were found, the
// one that ends there and the one that ends one token earlier; that leaves about 2.1 probes a token
// (docs/lookup.md). Positions of different sequences are few, and have all their lines asked for at once.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "arrays.hpp"
#include "fault_guard.hpp"
#include "fgram_hash.hpp"

namespace nb = nanobind;

namespace scone {

constexpr int kMaxN = 16;
constexpr int64_t kBlock = 256;  // positions in flight: their lines and hashes fit in L1
constexpr int64_t kNewest = 32;  // sequences that decode: their lines of all lengths are on their way at once
constexpr int64_t kNoFault = -1;
constexpr int64_t kIndexFault = -2;

struct Index {
    const Bucket* buckets;
    uint64_t num_home_buckets, num_buckets;
    uint64_t seed_a, seed_b;
    int fingerprint_shift;
    int max_n;
    bool closed;
};

template <class Token>
bool is_token(Token token) {
    return token >= 0 && int64_t(token) <= INT32_MAX;  // others are padding: no f-gram reaches across it
}

// What one bucket says of a fingerprint; without a branch, since whether a probe hits is anybody's guess.
struct Finding {
    int64_t row;       // -1: not here
    uint32_t further;  // 1: not here, but maybe in the next bucket
    uint32_t damaged;  // 1: the bucket does not fit its check bits
};

inline Finding look_in(const Bucket& bucket, uint64_t fingerprint) {
    unsigned found = 1u << Bucket::kSlots;
    for (int i = 0; i < Bucket::kSlots; i++) found |= unsigned(bucket.fingerprint[i] == fingerprint) << i;
    // `meta` follows the rows, so that slot 5 is a place to read where nothing was found
    uint32_t row;
    auto bytes = reinterpret_cast<const uint8_t*>(&bucket) + offsetof(Bucket, row);
    std::memcpy(&row, bytes + sizeof row * size_t(__builtin_ctz(found)), sizeof row);
    // slots fill from the first on: where an empty one is the first to agree, no other does
    uint32_t hit = uint32_t(found != 1u << Bucket::kSlots) & uint32_t(row != Bucket::kEmpty);
    return {int64_t(row) | (int64_t(hit) - 1), (hit ^ 1) & passes(bucket, fingerprint),
            uint32_t(bucket_check(bucket) != bucket.meta >> 8)};
}

// Searches for f-grams of one length, of many positions at once; arrays are by position.
struct Searches {
    int64_t num;
    const int32_t* positions;
    uint64_t* buckets;  // where each search has got to
    const uint64_t* lanes_b;
    int32_t* going_on;  // room for those that go on after their first bucket
};

// Sets row and length of those positions where an f-gram of n tokens is found.
// Returns the number of a damaged bucket or kNoFault.
inline int64_t search(const Index& index, const Searches& all, int n, int64_t* rows, int8_t* lengths) {
    int64_t fault = kNoFault;
    // Looks where a search is; whether it goes on, in the next bucket, which is then asked for.
    auto look = [&](int32_t i) {
        uint64_t at = all.buckets[i];
        Finding finding = look_in(index.buckets[at], all.lanes_b[i] >> index.fingerprint_shift);
        fault = finding.damaged ? int64_t(at) : fault;
        int64_t absent = finding.row >> 63;  // all ones or all zeros
        rows[i] = (rows[i] & absent) | (finding.row & ~absent);
        lengths[i] = int8_t((lengths[i] & absent) | (n & ~absent));
        all.buckets[i] = at + finding.further;
        __builtin_prefetch(&index.buckets[at + finding.further], 0, 2);
        return finding.further;
    };
    int64_t num_going_on = 0;
    for (int64_t k = 0; k < all.num; k++) {
        int32_t i = all.positions[k];
        all.going_on[num_going_on] = i;
        num_going_on += look(i);
    }
    while (num_going_on > 0 && fault == kNoFault) {
        int64_t num_left = 0;
        for (int64_t k = 0; k < num_going_on; k++) {
            int32_t i = all.going_on[k];
            if (all.buckets[i] >= index.num_buckets) return int64_t(all.buckets[i]);
            all.going_on[num_left] = i;
            num_left += look(i);
        }
        num_going_on = num_left;
    }
    return fault;
}

// Positions that follow one another and are matched together.
struct Block {
    uint8_t reach[kBlock];  // no longer f-gram can end at the position: its sequence or run of tokens begins there
    uint64_t lane_a[kBlock], lane_b[kBlock];
    uint64_t bucket[kBlock];
    int32_t candidate[kBlock], going_on[kBlock];
};

// Fills rows[i] and lengths[i] of each position of the block; token(i, back) is the one `back` before position i.
// lengths[-1] is that of the position before the block, where that is of the same sequence.
// Returns the number of a damaged bucket or kNoFault.
template <class TokenAt>
int64_t match_block(const Index& index, Block& block, int64_t size, const TokenAt& token, int64_t* rows,
                    int8_t* lengths) {
    int64_t num_candidates = 0;
    for (int64_t i = 0; i < size; i++) {
        rows[i] = -1;
        lengths[i] = 1;
        block.candidate[num_candidates] = int32_t(i);
        num_candidates += block.reach[i] >= 2;
        if (block.reach[i] < 2) continue;
        block.lane_a[i] = extend(index.seed_a, token(i, 0), kMultiplierA);
        block.lane_b[i] = extend(index.seed_b, token(i, 0), kMultiplierB);
    }
    for (int n = 2; n <= index.max_n && num_candidates > 0; n++) {
        for (int64_t k = 0; k < num_candidates; k++) {
            int64_t i = block.candidate[k];
            uint32_t id = token(i, n - 1);
            block.lane_a[i] = extend(block.lane_a[i], id, kMultiplierA);
            block.lane_b[i] = extend(block.lane_b[i], id, kMultiplierB);
            block.bucket[i] = home_bucket(block.lane_a[i], index.num_home_buckets);
            __builtin_prefetch(&index.buckets[block.bucket[i]], 0, 2);
        }
        Searches all{num_candidates, block.candidate, block.bucket, block.lane_b, block.going_on};
        int64_t fault = search(index, all, n, rows, lengths);
        if (fault != kNoFault) return fault;
        int64_t num_left = 0;
        for (int64_t k = 0; k < num_candidates; k++) {
            int64_t i = block.candidate[k];
            int64_t goes_on = block.reach[i] > n;  // then position i - 1 is of the same sequence
            // lengths[i - 1] is looked at only where it is there
            goes_on &= int64_t(!index.closed) | ((lengths[i] == n) & (lengths[i - goes_on] >= n));
            block.candidate[num_left] = int32_t(i);
            num_left += goes_on;
        }
        num_candidates = num_left;
    }
    return kNoFault;
}

// The newest positions of sequences that know nothing of each other.
struct Newest {
    uint8_t reach[kNewest];
    uint64_t lane_b[kMaxN + 1][kNewest], bucket[kMaxN + 1][kNewest];  // by length
    int32_t candidate[kNewest], going_on[kNewest];
};

// As match_block. So few positions do not hide the wait for their lines, length by length: those of all lengths are
// asked for at once, though a third of them will not be looked at.
template <class TokenAt>
int64_t match_apart(const Index& index, Newest& newest, int64_t size, const TokenAt& token, int64_t* rows,
                    int8_t* lengths) {
    for (int64_t i = 0; i < size; i++) {
        uint64_t lane_a = index.seed_a, lane_b = index.seed_b;
        for (int n = 1; n <= newest.reach[i]; n++) {
            uint32_t id = token(i, n - 1);
            lane_a = extend(lane_a, id, kMultiplierA);
            lane_b = extend(lane_b, id, kMultiplierB);
            if (n == 1) continue;
            newest.lane_b[n][i] = lane_b;
            newest.bucket[n][i] = home_bucket(lane_a, index.num_home_buckets);
            __builtin_prefetch(&index.buckets[newest.bucket[n][i]]);
        }
    }
    int64_t num_candidates = 0;
    for (int64_t i = 0; i < size; i++) {
        rows[i] = -1;
        lengths[i] = 1;
        newest.candidate[num_candidates] = int32_t(i);
        num_candidates += newest.reach[i] >= 2;
    }
    for (int n = 2; n <= index.max_n && num_candidates > 0; n++) {
        Searches all{num_candidates, newest.candidate, newest.bucket[n], newest.lane_b[n], newest.going_on};
        int64_t fault = search(index, all, n, rows, lengths);
        if (fault != kNoFault) return fault;
        int64_t num_left = 0;
        for (int64_t k = 0; k < num_candidates; k++) {
            int32_t i = newest.candidate[k];
            newest.candidate[num_left] = i;
            num_left += (newest.reach[i] > n) & (!index.closed | (lengths[i] == n));
        }
        num_candidates = num_left;
    }
    return kNoFault;
}

class Matcher {
  public:
    // counts[n] grows by the positions whose match has length n.
    Matcher(Array1<uint8_t> buckets, uint64_t num_home_buckets, uint64_t num_buckets, uint64_t seed_a,
            uint64_t seed_b, int fp_bits, int max_n, bool closed, Out1<int64_t> counts) {
        if (buckets.size() < num_buckets * sizeof(Bucket))
            throw std::invalid_argument("the index is shorter than its number of buckets");
        if (num_home_buckets < 1 || num_home_buckets > num_buckets || num_home_buckets >= (1ull << 32))
            throw std::invalid_argument("num_home_buckets is out of range");
        if (max_n < 2 || max_n > kMaxN) throw std::invalid_argument("max_n must be 2 to 16");
        if (fp_bits < 1 || fp_bits > 64) throw std::invalid_argument("fp_bits must be 1 to 64");
        if (counts.size() != kMaxN + 1) throw std::invalid_argument("counts must have MAX_N + 1 elements");
        counts_ = counts.data();
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
        int64_t fault = match_stretches(tokens.data(), starts.data(), int64_t(starts.size()) - 1, rows.data(),
                                        lengths.data());
        return counted(fault, lengths.data(), n);
    }

    // Matches the last position of each row of windows (batch, width), any strides.
    template <class Token>
    int64_t match_last(Array2<Token> windows, Out1<int64_t> rows, Out1<int8_t> lengths) const {
        int64_t batch = int64_t(windows.shape(0)), width = int64_t(windows.shape(1));
        if (int64_t(rows.size()) != batch || int64_t(lengths.size()) != batch || width < 1)
            throw std::invalid_argument("windows, rows and lengths differ in size");
        nb::gil_scoped_release unlocked;
        return match_windows(windows.data(), windows.stride(0), windows.stride(1), batch, width, rows.data(),
                             lengths.data());
    }

    // Matches the last position of each sequence; windows are their newest tokens, padded with -1 on the left,
    // max_n of each. At most kNewest sequences; needs no GIL.
    int64_t match_windows(const int64_t* windows, int64_t batch, int64_t* rows) const {
        int8_t lengths[kNewest];
        return match_windows(windows, index_.max_n, 1, batch, index_.max_n, rows, lengths);
    }

    int max_n() const { return index_.max_n; }

  private:
    // Other threads count into the same numbers.
    int64_t counted(int64_t fault, const int8_t* lengths, int64_t n) const {
        if (fault != kNoFault) return fault;
        int64_t found[kMaxN + 1] = {};
        for (int64_t i = 0; i < n; i++) found[lengths[i]]++;
        for (int k = 1; k <= kMaxN; k++)
            if (found[k] != 0) __atomic_fetch_add(&counts_[k], found[k], __ATOMIC_RELAXED);
        return fault;
    }

    template <class Token>
    int64_t match_windows(const Token* data, int64_t stride, int64_t step, int64_t batch, int64_t width,
                          int64_t* rows, int8_t* lengths) const {
        int64_t longest = std::min<int64_t>(width, index_.max_n);
        int64_t fault = kNoFault;
        bool readable = guarded([&] {
            Newest newest;
            for (int64_t begin = 0; begin < batch && fault == kNoFault; begin += kNewest) {
                int64_t size = std::min(kNewest, batch - begin);
                const Token* last = data + begin * stride + (width - 1) * step;
                for (int64_t i = 0; i < size; i++) {
                    int reach = 0;
                    while (reach < longest && is_token(last[i * stride - reach * step])) reach++;
                    newest.reach[i] = uint8_t(reach);
                }
                auto token = [&](int64_t i, int back) { return uint32_t(last[i * stride - back * step]); };
                fault = match_apart(index_, newest, size, token, rows + begin, lengths + begin);
            }
        });
        return counted(readable ? fault : kIndexFault, lengths, batch);
    }

    template <class Token>
    int64_t match_stretches(const Token* tokens, const int64_t* starts, int64_t num_sequences, int64_t* rows,
                            int8_t* lengths) const {
        int64_t total = starts[num_sequences];
        int64_t fault = kNoFault;
        bool readable = guarded([&] {
            Block block;
            int64_t sequence = 0;
            int reach = 0;
            for (int64_t begin = 0; begin < total && fault == kNoFault; begin += kBlock) {
                int64_t size = std::min(kBlock, total - begin);
                for (int64_t i = 0; i < size; i++) {
                    for (; sequence < num_sequences && starts[sequence] == begin + i; sequence++) reach = 0;
                    reach = is_token(tokens[begin + i]) ? std::min(reach + 1, index_.max_n) : 0;
                    block.reach[i] = uint8_t(reach);
                }
                const Token* first = tokens + begin;
                auto token = [&](int64_t i, int back) { return uint32_t(first[i - back]); };
                fault = match_block(index_, block, size, token, rows + begin, lengths + begin);
            }
        });
        return readable ? fault : kIndexFault;
    }

    Index index_;
    int64_t* counts_;
};

}  // namespace scone
