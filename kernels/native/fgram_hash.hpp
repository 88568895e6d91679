// Suffix hashes of the f-gram index; the same arithmetic as kernels/fgram_hash.py. See model_store/FORMAT.md.
#pragma once

#include <algorithm>
#include <cstdint>

namespace scone {

// One bucket of index.bin: 64 bytes, little-endian.
struct Bucket {
    static constexpr int kSlots = 5;
    static constexpr uint32_t kEmpty = 0xFFFFFFFFu;
    static constexpr uint32_t kPassed = 1;  // flag: a key whose search passes through here lies further on
    static constexpr uint32_t kFlags = 0xFF;

    uint64_t fingerprint[kSlots];
    uint32_t row[kSlots];
    uint32_t meta;  // check << 8 | flags
};
static_assert(sizeof(Bucket) == 64, "a bucket is one cache line");

constexpr uint64_t kMultiplierA = 0x9E3779B97F4A7C15ull;
constexpr uint64_t kMultiplierB = 0xD6E8FEB86659FD93ull;
constexpr uint64_t kCheckMultiplier[8] = {
    0xA24BAED4963EE407ull, 0x9FB21C651E98DF25ull, 0xC2B2AE3D27D4EB4Full, 0x165667B19E3779F9ull,
    0xD1B54A32D192ED03ull, 0xAEF17502108EF2D9ull, 0xF1357AEA2E62A9C5ull, 0x8CB92BA72F3D8DD7ull,
};

// One token further back; lane A places the f-gram, lane B is its fingerprint.
inline uint64_t extend(uint64_t state, uint32_t token, uint64_t multiplier) {
    uint64_t x = (state ^ (uint64_t(token) + 1)) * multiplier;
    return x ^ (x >> 32);
}

inline uint64_t home_bucket(uint64_t lane_a, uint64_t num_home_buckets) {
    return ((lane_a >> 32) * num_home_buckets) >> 32;
}

// The flag that a key with this fingerprint sets in each bucket that its search passes through.
inline uint32_t pass_flag(uint64_t fingerprint) { return 2u << std::min<uint64_t>(fingerprint & 7, 6); }

// 1 if a search for this fingerprint may have to go on after the bucket; older tables say only that some may.
inline uint32_t passes(const Bucket& bucket, uint64_t fingerprint) {
    uint32_t flags = bucket.meta & Bucket::kFlags;
    return uint32_t((flags & pass_flag(fingerprint)) != 0) | uint32_t(flags == Bucket::kPassed);
}

// 24 bits that change with any bit of the bucket outside themselves.
inline uint32_t bucket_check(const Bucket& bucket) {
    const auto& r = bucket.row;
    uint64_t sum = 0;
    for (int i = 0; i < Bucket::kSlots; i++) sum += bucket.fingerprint[i] * kCheckMultiplier[i];
    sum += (r[0] | uint64_t(r[1]) << 32) * kCheckMultiplier[5];
    sum += (r[2] | uint64_t(r[3]) << 32) * kCheckMultiplier[6];
    sum += (r[4] | uint64_t(bucket.meta & Bucket::kFlags) << 32) * kCheckMultiplier[7];
    return uint32_t(sum >> 40);
}

}  // namespace scone
