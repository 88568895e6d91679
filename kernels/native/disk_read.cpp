// Many reads of one file at once: io_uring at a constant queue depth, or a pool of threads that call pread.
//
// io_uring is used through its system calls, since liburing is one more thing to build; containers often forbid
// it (seccomp), hence the pool. Both fill caller-owned memory and return only when no read is under way any more,
// so that a late completion can never land in memory that has been reused. What has arrived is checksummed while
// the rest is still under way: the processor has nothing else to do.
#include <linux/io_uring.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "crc32c.hpp"

namespace nb = nanobind;

namespace scone {

template <class T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using OutSums = nb::ndarray<uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kDone = 0;
constexpr int64_t kShortRead = -1;  // any other result is an errno

// One read: size bytes at offset of the file go to data.
struct Span {
    uint64_t offset;
    uint32_t size;
    uint8_t* data;
    uint32_t* sums;  // of each page, if wanted
};

constexpr uint32_t kPageBytes = 4096;

static void checksum(const Span& span) {
    if (span.sums == nullptr) return;
    for (uint32_t at = 0, page = 0; at < span.size; at += kPageBytes, page++)
        span.sums[page] = crc32c(0, span.data + at, std::min(kPageBytes, span.size - at));
}

class Uring {
  public:
    explicit Uring(unsigned depth) {
        io_uring_params params{};
        fd_ = int(syscall(__NR_io_uring_setup, depth, &params));
        if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "io_uring_setup");
        depth_ = std::min(depth, params.sq_entries);
        size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
        size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
        sqe_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
        // since Linux 5.4 both rings share one mapping
        ring_bytes_ = std::max(sq_bytes, cq_bytes);
        ring_ = map(ring_bytes_, IORING_OFF_SQ_RING);
        sqes_ = reinterpret_cast<io_uring_sqe*>(map(sqe_bytes_, IORING_OFF_SQES));
        if (ring_ == MAP_FAILED || sqes_ == MAP_FAILED || !(params.features & IORING_FEAT_SINGLE_MMAP)) {
            release();
            throw std::system_error(ENOSYS, std::generic_category(), "io_uring rings");
        }
        sq_tail_ = at<uint32_t>(params.sq_off.tail);
        sq_mask_ = *at<uint32_t>(params.sq_off.ring_mask);
        sq_array_ = at<uint32_t>(params.sq_off.array);
        cq_head_ = at<uint32_t>(params.cq_off.head);
        cq_tail_ = at<uint32_t>(params.cq_off.tail);
        cq_mask_ = *at<uint32_t>(params.cq_off.ring_mask);
        cqes_ = at<io_uring_cqe>(params.cq_off.cqes);
    }
    ~Uring() { release(); }
    Uring(const Uring&) = delete;
    Uring& operator=(const Uring&) = delete;

    // Reads all spans, keeping `depth` of them under way. On an error no more are begun, but all are awaited.
    int64_t read(int file, const std::vector<Span>& spans) {
        size_t next = 0, under_way = 0;
        int64_t result = kDone;
        unsigned unsubmitted = 0;
        std::vector<size_t> arrived;
        while (under_way > 0 || (result == kDone && next < spans.size())) {
            while (result == kDone && under_way < depth_ && next < spans.size()) {
                push(file, spans[next], next);
                next++;
                under_way++;
                unsubmitted++;
            }
            // the queue is filled up again before what has arrived is looked at
            unsigned wait_for = arrived.empty() ? 1 : 0;
            long entered =
                syscall(__NR_io_uring_enter, fd_, unsubmitted, wait_for, IORING_ENTER_GETEVENTS, nullptr, 0);
            if (entered < 0) {
                if (errno == EINTR || errno == EAGAIN || errno == EBUSY) continue;
                std::abort();  // reads may still be under way into memory that we do not own
            }
            unsubmitted -= unsigned(entered);
            for (size_t i : arrived) checksum(spans[i]);
            arrived.clear();
            uint32_t head = *cq_head_;
            for (uint32_t tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE); head != tail; head++, under_way--) {
                const io_uring_cqe& entry = cqes_[head & cq_mask_];
                if (result != kDone) continue;
                if (entry.res < 0) {
                    result = -entry.res;
                } else if (uint32_t(entry.res) != spans[entry.user_data].size) {
                    result = kShortRead;
                } else {
                    arrived.push_back(entry.user_data);
                }
            }
            __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
        }
        for (size_t i : arrived) checksum(spans[i]);
        return result;
    }

  private:
    template <class T>
    T* at(uint32_t offset) const {
        return reinterpret_cast<T*>(static_cast<uint8_t*>(ring_) + offset);
    }

    void* map(size_t size, uint64_t offset) const {
        return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, off_t(offset));
    }

    void push(int file, const Span& span, size_t id) {
        uint32_t tail = *sq_tail_, slot = tail & sq_mask_;
        io_uring_sqe& entry = sqes_[slot];
        std::memset(&entry, 0, sizeof entry);
        entry.opcode = IORING_OP_READ;
        entry.fd = file;
        entry.off = span.offset;
        entry.addr = reinterpret_cast<uint64_t>(span.data);
        entry.len = span.size;
        entry.user_data = id;
        sq_array_[slot] = slot;
        __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    }

    void release() {
        if (sqes_ != nullptr && sqes_ != MAP_FAILED) munmap(sqes_, sqe_bytes_);
        if (ring_ != nullptr && ring_ != MAP_FAILED) munmap(ring_, ring_bytes_);
        if (fd_ >= 0) close(fd_);
    }

    int fd_ = -1;
    unsigned depth_ = 0;
    void* ring_ = nullptr;
    io_uring_sqe* sqes_ = nullptr;
    size_t ring_bytes_ = 0, sqe_bytes_ = 0;
    uint32_t *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
    uint32_t sq_mask_ = 0, cq_mask_ = 0;
    io_uring_cqe* cqes_ = nullptr;
};

static int64_t pread_whole(int file, const Span& span) {
    for (;;) {
        ssize_t got = pread(file, span.data, span.size, off_t(span.offset));
        if (got == ssize_t(span.size)) {
            checksum(span);
            return kDone;
        }
        if (got >= 0) return kShortRead;
        if (errno != EINTR) return errno;
    }
}

static int64_t read_with_threads(int file, const std::vector<Span>& spans, unsigned depth) {
    std::atomic<size_t> next{0};
    std::atomic<int64_t> result{kDone};
    auto work = [&] {
        for (size_t i = next++; i < spans.size() && result == kDone; i = next++) {
            int64_t outcome = pread_whole(file, spans[i]);
            int64_t none = kDone;
            if (outcome != kDone) result.compare_exchange_strong(none, outcome);
        }
    };
    std::vector<std::thread> helpers;
    size_t num_threads = std::min<size_t>(depth, spans.size());
    for (size_t t = 1; t < num_threads; t++) helpers.emplace_back(work);
    work();
    for (auto& helper : helpers) helper.join();
    return result;
}

// Reads spans of one open file; several threads may read at the same time.
class SpanReader {
  public:
    SpanReader(int file, unsigned depth, bool use_uring) : file_(file), depth_(std::clamp(depth, 1u, 1024u)) {
        if (use_uring) free_rings_.push_back(std::make_unique<Uring>(depth_));
        use_uring_ = use_uring;
    }

    // Reads sizes[i] bytes at offsets[i] to address + places[i], for all i. With sums, places are those of pages,
    // and sums[p] becomes the checksum of the p-th page at address.
    int64_t read(Array1<int64_t> offsets, Array1<int64_t> sizes, Array1<int64_t> places, uintptr_t address,
                 size_t capacity, std::optional<OutSums> sums) {
        size_t n = offsets.size();
        if (sums) capacity = std::min(capacity, sums->size() * kPageBytes);
        if (sizes.size() != n || places.size() != n) throw std::invalid_argument("spans differ in number");
        std::vector<Span> spans(n);
        for (size_t i = 0; i < n; i++) {
            int64_t offset = offsets.data()[i], size = sizes.data()[i], place = places.data()[i];
            if (offset < 0 || size < 1 || size > (1 << 30) || place < 0 || size_t(place) + size_t(size) > capacity)
                throw std::invalid_argument("a span does not fit the buffer");
            if (sums && place % kPageBytes != 0) throw std::invalid_argument("a span to be checked begins within a page");
            uint32_t* span_sums = sums ? sums->data() + place / kPageBytes : nullptr;
            spans[i] = {uint64_t(offset), uint32_t(size), reinterpret_cast<uint8_t*>(address) + place, span_sums};
        }
        nb::gil_scoped_release unlocked;
        if (n == 1) return pread_whole(file_, spans[0]);
        std::unique_ptr<Uring> ring = use_uring_ ? take_ring() : nullptr;
        if (ring == nullptr) return read_with_threads(file_, spans, depth_);
        int64_t result = ring->read(file_, spans);
        std::lock_guard<std::mutex> lock(mutex_);
        free_rings_.push_back(std::move(ring));
        return result;
    }

  private:
    // None if the kernel allows no further ring (locked memory, descriptors).
    std::unique_ptr<Uring> take_ring() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!free_rings_.empty()) {
                auto ring = std::move(free_rings_.back());
                free_rings_.pop_back();
                return ring;
            }
        }
        try {
            return std::make_unique<Uring>(depth_);
        } catch (const std::system_error&) {
            return nullptr;
        }
    }

    int file_;
    unsigned depth_;
    bool use_uring_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Uring>> free_rings_;
};

static bool uring_available() {
    try {
        Uring ring(4);
        return true;
    } catch (const std::system_error&) {
        return false;
    }
}

void register_disk_read(nb::module_& m) {
    m.attr("SHORT_READ") = kShortRead;
    m.def("uring_available", &uring_available);
    nb::class_<SpanReader>(m, "SpanReader")
        .def(nb::init<int, unsigned, bool>())
        .def("read", &SpanReader::read, nb::arg("offsets"), nb::arg("sizes"), nb::arg("places"),
             nb::arg("address"), nb::arg("capacity"), nb::arg("sums").none());
}

}  // namespace scone
