// Pages of a table's rows, read while their reader does something else: submitted in one system call, looked for
// later. No thread of ours stands between the disk and who waits for it.
//
// Each read fills a slot of the caller's memory, and each page is compared with its checksum when it has arrived.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "crc32c.hpp"
#include "uring.hpp"

namespace nb = nanobind;

namespace scone {

template <class T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out1 = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kPageBytes = 4096;
// What a slot's status is; any other is the errno of its read.
constexpr int32_t kSound = 0;
constexpr int32_t kShort = -1;
constexpr int32_t kDamaged = -2;
constexpr int32_t kUnderWay = -3;

// For one thread.
class ReadQueue {
  public:
    // Slot s is memory [s * slot_bytes, (s + 1) * slot_bytes) and status[s]. Page p of the rows lies `header_bytes`
    // after p * kPageBytes of the file; `stream_bytes` are all rows': the last page's checksum covers no more.
    ReadQueue(int file, Out1<uint8_t> memory, int64_t slot_bytes, Out1<int32_t> status, Array1<uint32_t> page_sums,
              int64_t header_bytes, int64_t stream_bytes)
        : file_(file),
          memory_(memory.data()),
          slot_bytes_(slot_bytes),
          status_(status.data()),
          page_sums_(page_sums.data()),
          header_bytes_(header_bytes),
          stream_bytes_(stream_bytes),
          reads_(status.size()),
          ring_(std::make_unique<Uring>(unsigned(status.size()))) {
        int64_t num_pages = (stream_bytes + kPageBytes - 1) / kPageBytes;
        if (slot_bytes < kPageBytes || slot_bytes % kPageBytes != 0 || memory.size() != status.size() * slot_bytes)
            throw std::invalid_argument("the memory is not that of the slots");
        if (int64_t(page_sums.size()) != num_pages) throw std::invalid_argument("wrong number of checksums");
        if (!ring_->has_timeouts() || ring_->depth() < status.size())
            throw std::system_error(ENOSYS, std::generic_category(), "io_uring is too old");
        for (size_t slot = status.size(); slot-- > 0;) free_.push_back(int32_t(slot));
    }

    // All reads must have ended before their memory may go.
    ~ReadQueue() { await_all(); }

    void drain() {
        nb::gil_scoped_release unlocked;
        await_all();
    }

    // Begins to read num_pages[i] pages from first_page[i] on into slots[i], which it chooses, for all i.
    // False: there are not so many free slots; nothing was begun.
    bool submit(Array1<int64_t> first_page, Array1<int64_t> num_pages, Out1<int64_t> slots) {
        size_t n = first_page.size();
        if (num_pages.size() != n || slots.size() != n) throw std::invalid_argument("reads differ in number");
        int64_t total_pages = (stream_bytes_ + kPageBytes - 1) / kPageBytes;
        for (size_t i = 0; i < n; i++) {
            int64_t first = first_page.data()[i], pages = num_pages.data()[i];
            if (first < 0 || pages < 1 || pages * kPageBytes > slot_bytes_ || first + pages > total_pages)
                throw std::invalid_argument("a read does not fit a slot or the rows");
        }
        if (free_.size() < n) advance(0, 0);
        if (free_.size() < n) return false;
        for (size_t i = 0; i < n; i++) {
            int32_t slot = free_.back();
            free_.pop_back();
            slots.data()[i] = slot;
            status_[slot] = kUnderWay;
            reads_[size_t(slot)] = {first_page.data()[i], num_pages.data()[i], true};
            ring_->push(file_, uint64_t(header_bytes_ + first_page.data()[i] * kPageBytes),
                        uint32_t(num_pages.data()[i] * kPageBytes), data(slot), uint64_t(slot));
            num_under_way_++;
        }
        nb::gil_scoped_release unlocked;
        advance(0, 0);
        return true;
    }

    // Notes what has arrived; waits for nothing.
    void poll() {
        if (num_under_way_ > 0) reap();
    }

    // Waits until none of these slots is under way, at most so long; whether none is.
    bool wait(Array1<int64_t> slots, double seconds) {
        using Clock = std::chrono::steady_clock;
        auto deadline = Clock::now() + std::chrono::nanoseconds(int64_t(std::clamp(seconds, 0.0, 3600.0) * 1e9));
        auto pending = [&] {
            for (size_t i = 0; i < slots.size(); i++)
                if (status_[slots.data()[i]] == kUnderWay) return true;
            return false;
        };
        for (size_t i = 0; i < slots.size(); i++) check_slot(slots.data()[i]);
        poll();
        nb::gil_scoped_release unlocked;
        while (pending()) {
            int64_t left = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - Clock::now()).count();
            if (left <= 0) return false;
            advance(1, left);
        }
        return true;
    }

    // Gives slots back; one whose read is under way is free when that has ended.
    void release(Array1<int64_t> slots) {
        for (size_t i = 0; i < slots.size(); i++) {
            int32_t slot = check_slot(slots.data()[i]);
            Read& read = reads_[size_t(slot)];
            if (!read.wanted) continue;
            read.wanted = false;
            if (status_[slot] != kUnderWay) free_.push_back(slot);
        }
    }

    size_t num_free() const { return free_.size(); }

  private:
    struct Read {
        int64_t first_page, num_pages;
        bool wanted = false;
    };

    void await_all() {
        while (num_under_way_ > 0) advance(1, -1);
    }

    uint8_t* data(int32_t slot) const { return memory_ + int64_t(slot) * slot_bytes_; }

    int32_t check_slot(int64_t slot) const {
        if (slot < 0 || slot >= int64_t(reads_.size())) throw std::invalid_argument("there is no such slot");
        return int32_t(slot);
    }

    // Submits and waits as Uring::enter, then notes what has arrived.
    void advance(unsigned wait_for, int64_t timeout_ns) {
        int fault = ring_->enter(wait_for, timeout_ns);
        if (fault != 0 && fault != EINTR && fault != EAGAIN && fault != EBUSY && fault != ETIME)
            std::abort();  // reads may be under way into memory that is not ours
        reap();
    }

    void reap() {
        ring_->reap([&](uint64_t id, int32_t got) {
            auto slot = int32_t(id);
            const Read& read = reads_[size_t(slot)];
            num_under_way_--;
            status_[slot] = outcome(read, got, data(slot));
            if (!read.wanted) free_.push_back(slot);
        });
    }

    int32_t outcome(const Read& read, int32_t got, const uint8_t* bytes) const {
        if (got < 0) return -got;
        if (got != read.num_pages * kPageBytes) return kShort;
        for (int64_t i = 0; i < read.num_pages; i++) {
            int64_t page = read.first_page + i;
            auto size = size_t(std::min(kPageBytes, stream_bytes_ - page * kPageBytes));
            if (crc32c(0, bytes + i * kPageBytes, size) != page_sums_[page]) return kDamaged;
        }
        return kSound;
    }

    int file_;
    uint8_t* memory_;
    int64_t slot_bytes_;
    int32_t* status_;
    const uint32_t* page_sums_;
    int64_t header_bytes_, stream_bytes_;
    std::vector<Read> reads_;
    std::vector<int32_t> free_;
    size_t num_under_way_ = 0;
    std::unique_ptr<Uring> ring_;
};

void register_read_queue(nb::module_& m) {
    nb::class_<ReadQueue>(m, "ReadQueue")
        .def(nb::init<int, Out1<uint8_t>, int64_t, Out1<int32_t>, Array1<uint32_t>, int64_t, int64_t>(),
             nb::keep_alive<1, 3>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>())
        .def("submit", &ReadQueue::submit)
        .def("poll", &ReadQueue::poll)
        .def("wait", &ReadQueue::wait)
        .def("release", &ReadQueue::release)
        .def("drain", &ReadQueue::drain)
        .def_prop_ro("num_free", &ReadQueue::num_free);
}

}  // namespace scone
