// Rows of a table's file, read while their reader does something else: submitted in one system call, looked for
// later. No thread of ours stands between the disk and who waits for it.
//
// Each read fills a slot of the caller's memory with the pages that a row touches, and each page is compared with
// its checksum when it has arrived.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "crc32c.hpp"
#include "decode_row.hpp"
#include "row_memory.hpp"
#include "uring.hpp"

namespace nb = nanobind;

namespace scone {

// What a slot's status is; any other is the errno of its read.
constexpr int32_t kSound = 0;
constexpr int32_t kShort = -1;
constexpr int32_t kDamaged = -2;
constexpr int32_t kUnderWay = -3;

constexpr int64_t kNoSlot = -1;  // the row is not read here
constexpr int64_t kNoRoom = -1;  // there are not so many free slots

// For one thread.
class ReadQueue {
  public:
    // Slot s is memory [s * slot_bytes, (s + 1) * slot_bytes) and status[s]. The rows begin `header_bytes` after the
    // beginning of the file, and take `stream_bytes`: the last page's checksum covers no more.
    ReadQueue(int file, Out1<uint8_t> memory, int64_t slot_bytes, Out1<int32_t> status, Array1<uint32_t> page_sums,
              int64_t header_bytes, int64_t stream_bytes, int codec, int dtype, int64_t dim)
        : file_(file),
          memory_(memory.data()),
          slot_bytes_(slot_bytes),
          status_(status.data()),
          page_sums_(page_sums.data()),
          header_bytes_(header_bytes),
          stream_bytes_(stream_bytes),
          format_{Codec(codec), FloatType(dtype), dim},
          row_bytes_(int64_t(stored_row_bytes(format_))),
          reads_(status.size()),
          ring_(std::make_unique<Uring>(unsigned(status.size()))) {
        int64_t num_pages = (stream_bytes + kPage - 1) / kPage;
        if (slot_bytes % kPage != 0 || slot_bytes < (row_bytes_ + 2 * kPage - 2) / kPage * kPage ||
            memory.size() != status.size() * slot_bytes)
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

    // Begins to read rows row_ids[i] that are not in memory: from `first_row` on, and not wholly in the mapping
    // `mapped`, if there is one. slots[i] is where each goes, equal ones to the same, and begins[i] where in the
    // memory it will begin; rows that are in memory, and ids below 0, get kNoSlot, and -1 in `row_ids`.
    // Returns how many slots were taken, or kNoRoom, and nothing was begun; and how many rows they are for.
    std::pair<int64_t, int64_t> submit(Out1<int64_t> row_ids, int64_t first_row, const RowMemory* mapped, Out1<int64_t> slots,
                   Out1<int64_t> begins) {
        size_t n = row_ids.size();
        int64_t* ids = row_ids.data();
        if (slots.size() != n || begins.size() != n) throw std::invalid_argument("slots or begins differ in number");
        for (size_t i = 0; i < n; i++)
            if ((ids[i] + 1) * row_bytes_ > stream_bytes_) throw std::invalid_argument("a row is beyond the table");
        nb::gil_scoped_release unlocked;
        std::vector<std::pair<int64_t, size_t>> wanted;
        wanted.reserve(n);
        for (size_t i = 0; i < n; i++) {
            slots.data()[i] = begins.data()[i] = kNoSlot;
            bool is_there = ids[i] < first_row || (mapped != nullptr && mapped->resident(ids[i]));
            if (!is_there) wanted.emplace_back(ids[i], i);
        }
        std::sort(wanted.begin(), wanted.end());  // file order; equal rows side by side
        size_t num_reads = 0;
        for (size_t k = 0; k < wanted.size(); k++) num_reads += k == 0 || wanted[k].first != wanted[k - 1].first;
        if (free_.size() < num_reads) advance(0, 0);
        if (free_.size() < num_reads) return {kNoRoom, 0};
        for (size_t k = 0; k < wanted.size(); k++) {
            auto [row, i] = wanted[k];
            bool is_new = k == 0 || row != wanted[k - 1].first;
            slots.data()[i] = is_new ? begin_read(row) : slots.data()[wanted[k - 1].second];
            begins.data()[i] = slots.data()[i] * slot_bytes_ + row * row_bytes_ % kPage;
        }
        for (size_t i = 0; i < n; i++)
            if (slots.data()[i] == kNoSlot) ids[i] = -1;
        if (num_reads > 0) advance(0, 0);
        return {int64_t(num_reads), int64_t(wanted.size())};
    }

    // Notes what has arrived; waits for nothing.
    void poll() {
        if (num_under_way_ > 0) reap();
    }

    // How many of these slots are under way; kNoSlot counts as none.
    int64_t num_under_way(const Array1<int64_t>& slots) {
        check_slots(slots);
        poll();
        return count_under_way(slots);
    }

    // Waits until none of these slots is under way, at most so long; how many are.
    int64_t wait(Array1<int64_t> slots, double seconds) {
        using Clock = std::chrono::steady_clock;
        auto deadline = Clock::now() + std::chrono::nanoseconds(int64_t(std::clamp(seconds, 0.0, 3600.0) * 1e9));
        int64_t num_left = num_under_way(slots);
        if (num_left == 0) return 0;
        nb::gil_scoped_release unlocked;
        while ((num_left = count_under_way(slots)) > 0) {
            int64_t left = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - Clock::now()).count();
            if (left <= 0) break;
            advance(1, left);
        }
        return num_left;
    }

    // Gives slots back; one whose read is under way is free when that has ended.
    void release(Array1<int64_t> slots) {
        check_slots(slots);
        for (size_t i = 0; i < slots.size(); i++) {
            int64_t slot = slots.data()[i];
            if (slot == kNoSlot || !reads_[size_t(slot)].wanted) continue;
            reads_[size_t(slot)].wanted = false;
            if (status_[slot] != kUnderWay) free_.push_back(int32_t(slot));
        }
    }

    size_t num_free() const { return free_.size(); }

    // Whether all of these slots have been read and are sound.
    bool are_sound(const Array1<int64_t>& slots) {
        check_slots(slots);
        poll();
        for (size_t i = 0; i < slots.size(); i++)
            if (int64_t slot = slots.data()[i]; slot != kNoSlot && status_[slot] != kSound) return false;
        return true;
    }

    // Writes the row that begins at `begin` of the memory, a sound one, to `out`.
    void copy_row(int64_t begin, void* out, FloatType type) const {
        if (begin < 0 || begin + row_bytes_ > int64_t(reads_.size()) * slot_bytes_)
            throw std::invalid_argument("a row is not in the memory");
        decode_row(format_, memory_ + begin, out, type);
    }

    int64_t dim() const { return format_.dim; }

  private:
    static constexpr int64_t kPage = int64_t(kCheckBytes);

    struct Read {
        int64_t first_page, num_pages;
        bool wanted = false;
    };

    int64_t begin_read(int64_t row) {
        int32_t slot = free_.back();
        free_.pop_back();
        int64_t first = row * row_bytes_ / kPage, last = ((row + 1) * row_bytes_ - 1) / kPage;
        status_[slot] = kUnderWay;
        reads_[size_t(slot)] = {first, last - first + 1, true};
        ring_->push(file_, uint64_t(header_bytes_ + first * kPage), uint32_t((last - first + 1) * kPage), data(slot),
                    uint64_t(slot));
        num_under_way_++;
        return slot;
    }

    void await_all() {
        while (num_under_way_ > 0) advance(1, -1);
    }

    uint8_t* data(int32_t slot) const { return memory_ + int64_t(slot) * slot_bytes_; }

    void check_slots(const Array1<int64_t>& slots) const {
        for (size_t i = 0; i < slots.size(); i++)
            if (slots.data()[i] < kNoSlot || slots.data()[i] >= int64_t(reads_.size()))
                throw std::invalid_argument("there is no such slot");
    }

    int64_t count_under_way(const Array1<int64_t>& slots) const {
        int64_t num = 0;
        for (size_t i = 0; i < slots.size(); i++)
            num += slots.data()[i] != kNoSlot && status_[slots.data()[i]] == kUnderWay;
        return num;
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
        if (got != read.num_pages * kPage) return kShort;
        for (int64_t i = 0; i < read.num_pages; i++) {
            int64_t page = read.first_page + i;
            auto size = size_t(std::min(kPage, stream_bytes_ - page * kPage));
            if (crc32c(0, bytes + i * kPage, size) != page_sums_[page]) return kDamaged;
        }
        return kSound;
    }

    int file_;
    uint8_t* memory_;
    int64_t slot_bytes_;
    int32_t* status_;
    const uint32_t* page_sums_;
    int64_t header_bytes_, stream_bytes_;
    RowFormat format_;
    int64_t row_bytes_;
    std::vector<Read> reads_;
    std::vector<int32_t> free_;
    size_t num_under_way_ = 0;
    std::unique_ptr<Uring> ring_;
};

}  // namespace scone
