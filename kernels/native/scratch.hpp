// Memory that is kept from one use to the next, and grows to the largest.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace scone {

struct AlignedFree {
    void operator()(void* p) const { std::free(p); }
};

// Uninitialised memory at 64-byte boundaries, so that no vector straddles two cache lines.
template <class T>
std::unique_ptr<T[], AlignedFree> aligned_array(size_t count) {
    const size_t bytes = (count * sizeof(T) + 64 + 63) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes);
    if (p == nullptr) throw std::bad_alloc();
    return std::unique_ptr<T[], AlignedFree>(static_cast<T*>(p));
}

template <class T>
class Scratch {
public:
    // Room for `count` values; what was there is lost.
    void reserve(size_t count) {
        if (count <= count_) return;
        array_ = aligned_array<T>(count);
        count_ = count;
    }
    T* get() const { return array_.get(); }

private:
    std::unique_ptr<T[], AlignedFree> array_;
    size_t count_ = 0;
};

}  // namespace scone
