// Rows by id out of mapped or resident memory, decoded straight into the caller's tensor.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <vector>

#include "arrays.hpp"
#include "crc32c.hpp"
#include "decode_row.hpp"
#include "fault_guard.hpp"
#include "row_copy.hpp"
#include "thread_team.hpp"

namespace nb = nanobind;

namespace scone {

// Results of gather: the number of rows written, or a fault.
constexpr int64_t kRowFault = -1;
constexpr int64_t kBeyond = -2;      // an id is beyond the table; nothing was written
constexpr int64_t kDamagedRow = -3;  // kDamagedRow - r: row r does not fit its checksum
constexpr size_t kPageBytes = 4096;             // granularity of mincore and madvise; larger pages are multiples
constexpr size_t kCheckBytes = 4096;            // one checksum covers this much of the row stream
constexpr int64_t kBytesPerThread = 512 << 10;  // below this, waking a thread costs more than it saves
constexpr int64_t kLeastBytesPerChunk = 64 << 10, kMostBytesPerChunk = 1 << 20;  // what a thread takes at a time
constexpr int64_t kStreamBytes = 4 << 20;        // from here on rows are written past the caches (docs/lookup.md)
constexpr int64_t kBytesAhead = 16 << 10;       // of rows on their way while one is copied
constexpr int64_t kUnlockBytes = 256 << 10;     // a shorter copy ends before the GIL, once given away, comes back

// The rows of one table as bytes in memory. Row r lies in block r / rows_per_block; rows.bin is one block.
class RowMemory {
  public:
    // Of the table's `num_ids` rows, the first `num_rows`.
    RowMemory(Array1<uint8_t> bytes, Array1<uint64_t> block_offsets, int64_t rows_per_block, int64_t num_rows,
              int64_t num_ids, int codec, int dtype, int64_t dim, std::optional<Array1<uint32_t>> page_sums)
        : bytes_(bytes.data()),
          blocks_(block_offsets.data()),
          rows_per_block_(rows_per_block),
          num_rows_(num_rows),
          num_ids_(num_ids),
          format_{Codec(codec), FloatType(dtype), dim},
          row_bytes_(stored_row_bytes(format_)) {
        if (rows_per_block < 1 || num_rows < 1 || dim < 1) throw std::invalid_argument("empty rows");
        int64_t num_blocks = (num_rows + rows_per_block - 1) / rows_per_block;
        if (int64_t(block_offsets.size()) != num_blocks) throw std::invalid_argument("wrong number of blocks");
        for (int64_t b = 0; b < num_blocks; b++) {
            uint64_t rows = uint64_t(std::min(rows_per_block, num_rows - b * rows_per_block));
            if (blocks_[b] > bytes.size() || bytes.size() - blocks_[b] < rows * row_bytes_)
                throw std::invalid_argument("a block reaches beyond the end of the rows");
        }
        if (page_sums) {
            size_t num_pages = (size_t(num_rows) * row_bytes_ + kCheckBytes - 1) / kCheckBytes;
            if (page_sums->size() != num_pages) throw std::invalid_argument("wrong number of checksums");
            sums_ = page_sums->data();
            checked_ = std::make_unique<std::atomic<uint8_t>[]>((num_pages + 7) / 8);
        }
    }

    // Where rows go: row i to data + i * stride_bytes.
    struct Target {
        uint8_t* data;
        int64_t stride_bytes;
        FloatType type;
    };

    int64_t num_rows() const { return num_rows_; }
    int64_t dim() const { return format_.dim; }

    // out[i] = row ids[i] for begin <= ids[i] < end; other rows of out stay untouched.
    // Returns the number of rows written, kRowFault, kBeyond, or kDamagedRow - row.
    int64_t gather(Array1<int64_t> ids, int64_t begin, int64_t end, uintptr_t out, int64_t out_stride_bytes,
                   int out_type, int num_threads) {
        if (begin < 0 || end > num_rows_) throw std::invalid_argument("the range of rows exceeds the table");
        Target target{reinterpret_cast<uint8_t*>(out), out_stride_bytes, FloatType(out_type)};
        return gather(ids.data(), int64_t(ids.size()), begin, end, target, num_threads);
    }

    int64_t gather(const int64_t* ids, int64_t n, int64_t begin, int64_t end, const Target& target, int num_threads) {
        int64_t num_bytes = n * int64_t(row_bytes_);
        Job job{ids, begin, end, target, false};
        job.streams = num_bytes >= kStreamBytes && copies(target.type) &&
                      (uintptr_t(target.data) | uintptr_t(target.stride_bytes) | row_bytes_) % kStreamAlign == 0;
        int64_t largest = -1;
        for (int64_t i = 0; i < n; i++) largest = std::max(largest, ids[i]);
        if (largest >= num_ids_) return kBeyond;
        // What is mapped from a file may have to be waited for.
        std::optional<nb::gil_scoped_release> unlocked;
        if (sums_ != nullptr || num_bytes > kUnlockBytes) unlocked.emplace();
        if (num_threads > 1 && num_bytes >= 2 * kBytesPerThread) {
            std::unique_lock<std::mutex> alone(team_mutex_, std::try_to_lock);
            if (alone) return gather_together(job, n, std::min(num_threads, 64));
        }
        return gather_guarded(job, 0, n);
    }

    // Asks for all of a row's lines.
    void ask_for_row(int64_t row) const {
        for (size_t at = 0; at < row_bytes_; at += kLineBytes) ask_for_line(address(row) + at);
    }

    // absent[i] = whether row ids[i], begin <= ids[i] < end, is not wholly in memory: then reading it is slow.
    // Rows out of that range are left as they are. The answer may be outdated when it arrives.
    void find_absent(Array1<int64_t> ids, int64_t begin, int64_t end,
                     nb::ndarray<bool, nb::ndim<1>, nb::c_contig, nb::device::cpu> absent) const {
        if (begin < 0 || end > num_rows_) throw std::invalid_argument("the range of rows exceeds the table");
        if (absent.size() != ids.size()) throw std::invalid_argument("absent is not as long as ids");
        nb::gil_scoped_release unlocked;
        for (size_t i = 0; i < ids.size(); i++) {
            int64_t row = ids.data()[i];
            if (row >= begin && row < end) absent.data()[i] = !resident(row);
        }
    }

    // Asks the kernel to read the pages of these rows, many at a time, before they are touched one by one.
    void will_need(Array1<int64_t> ids, int64_t begin, int64_t end) const {
        if (begin < 0 || end > num_rows_) throw std::invalid_argument("the range of rows exceeds the table");
        nb::gil_scoped_release unlocked;
        for (size_t i = 0; i < ids.size(); i++) {
            int64_t row = ids.data()[i];
            if (row < begin || row >= end) continue;
            uintptr_t first = uintptr_t(address(row)) & ~uintptr_t(kPageBytes - 1);
            madvise(reinterpret_cast<void*>(first), uintptr_t(address(row)) + row_bytes_ - first, MADV_WILLNEED);
        }
    }

    // Whether a row is wholly in memory. The answer may be outdated when it arrives.
    bool resident(int64_t row) const {
        uintptr_t first = uintptr_t(address(row)) & ~uintptr_t(kPageBytes - 1);
        size_t size = uintptr_t(address(row)) + row_bytes_ - first;
        unsigned char pages[1 + (1 << 20) / kPageBytes];
        if (size > (1 << 20) || mincore(reinterpret_cast<void*>(first), size, pages) != 0) return false;
        for (size_t p = 0; p * kPageBytes < size; p++)
            if (!(pages[p] & 1)) return false;
        return true;
    }

  private:
    struct Job {
        const int64_t* ids;
        int64_t begin, end;
        Target target;
        bool streams;
    };

    // Whether rows are stored as they are wanted.
    bool copies(FloatType type) const { return format_.codec == Codec::raw && format_.dtype == type; }

    const uint8_t* address(int64_t row) const {
        int64_t block = row / rows_per_block_;
        return bytes_ + blocks_[block] + size_t(row - block * rows_per_block_) * row_bytes_;
    }

    int64_t gather_together(const Job& job, int64_t n, int num_threads) {
        if (!team_ || team_->size() != num_threads) team_ = std::make_unique<ThreadTeam>(num_threads);
        std::vector<int64_t> results(size_t(num_threads), 0);
        // Each piece begins without rows on their way: few of them, but enough that no thread waits long.
        int64_t num_bytes = n * int64_t(row_bytes_) / (8 * num_threads);
        int64_t chunk = std::clamp(num_bytes, kLeastBytesPerChunk, kMostBytesPerChunk) / int64_t(row_bytes_) + 1;
        team_->run_available([&](int t) {
            team_->share(int(n), int(chunk), [&](int from, int to) {
                int64_t& result = results[size_t(t)];
                if (result < 0) return;
                int64_t num_written = gather_guarded(job, from, to);
                result = num_written < 0 ? num_written : result + num_written;
            });
        });
        int64_t total = 0;
        for (int64_t result : results) {
            if (result < 0) return result;
            total += result;
        }
        return total;
    }

    int64_t gather_guarded(const Job& job, int64_t from, int64_t to) {
        int64_t result = 0;
        bool readable = guarded([&] { result = gather_range(job, from, to); });
        if (job.streams) stream_fence();
        return readable ? result : kRowFault;
    }

    int64_t gather_range(const Job& job, int64_t from, int64_t to) {
        const int64_t* ids = job.ids;
        auto wanted = [&](int64_t i) { return i < to && ids[i] >= job.begin && ids[i] < job.end; };
        int64_t ahead = std::max<int64_t>(1, kBytesAhead / int64_t(row_bytes_));
        const RowCopies& copy = row_copies();
        int64_t num_written = 0;
        for (int64_t i = from; i < from + ahead; i++)
            if (wanted(i)) ask_for_row(ids[i]);
        for (int64_t i = from; i < to; i++) {
            if (!wanted(i)) {
                if (wanted(i + ahead)) ask_for_row(ids[i + ahead]);
                continue;
            }
            int64_t row = ids[i];
            if (sums_ != nullptr && !row_is_sound(row)) return kDamagedRow - row;
            uint8_t* out = job.target.data + i * job.target.stride_bytes;
            const uint8_t* next = wanted(i + ahead) ? address(ids[i + ahead]) : nullptr;
            if (job.streams) {
                copy.streaming(out, address(row), row_bytes_, next);
            } else if (copies(job.target.type)) {
                copy.cached(out, address(row), row_bytes_, next);
            } else {
                if (next != nullptr) ask_for_row(ids[i + ahead]);
                decode_row(format_, address(row), out, job.target.type);
            }
            num_written++;
        }
        return num_written;
    }

    // Each page of the row stream is checked when it is first read; the result is remembered in one bit.
    bool row_is_sound(int64_t row) {
        size_t first = size_t(row) * row_bytes_ / kCheckBytes;
        size_t last = (size_t(row + 1) * row_bytes_ - 1) / kCheckBytes;
        for (size_t page = first; page <= last; page++) {
            uint8_t bit = uint8_t(1u << (page & 7));
            if (checked_[page >> 3].load(std::memory_order_relaxed) & bit) continue;
            if (stream_sum(page) != sums_[page]) return false;
            checked_[page >> 3].fetch_or(bit, std::memory_order_relaxed);
        }
        return true;
    }

    // CRC of one page of the row stream: the rows end to end, whatever blocks they are stored in.
    uint32_t stream_sum(size_t page) const {
        size_t at = page * kCheckBytes;
        size_t end = std::min(at + kCheckBytes, size_t(num_rows_) * row_bytes_);
        size_t block_bytes = size_t(rows_per_block_) * row_bytes_;
        uint32_t crc = 0;
        while (at < end) {
            size_t block = at / block_bytes, within = at % block_bytes;
            size_t piece = std::min(end - at, block_bytes - within);
            crc = crc32c(crc, bytes_ + blocks_[block] + within, piece);
            at += piece;
        }
        return crc;
    }

    const uint8_t* bytes_;
    const uint64_t* blocks_;
    int64_t rows_per_block_, num_rows_, num_ids_;
    RowFormat format_;
    size_t row_bytes_;
    const uint32_t* sums_ = nullptr;
    std::unique_ptr<std::atomic<uint8_t>[]> checked_;
    std::mutex team_mutex_;  // who finds the team at work does without
    std::unique_ptr<ThreadTeam> team_;
};

}  // namespace scone
