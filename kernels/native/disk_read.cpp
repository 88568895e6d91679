// Many reads of one file at once: io_uring at a constant queue depth, or a pool of threads that call pread.
//
// Containers often forbid io_uring (seccomp), hence the pool. Both fill caller-owned memory and return only when
// no read is under way any more, so that a late completion can never land in memory that has been reused. What has
// arrived is checksummed, and its rows are decoded, while the rest is still under way: the processor has nothing
// else to do.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
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
#include "decode_row.hpp"
#include "uring.hpp"

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
    size_t first_row = 0, end_row = 0;  // the rows that lie wholly in it
};

// Rows to be decoded out of what is read: row i begins at data + offsets[i] and goes to the targets[i]-th of `out`.
struct Rows {
    RowFormat format;
    const uint8_t* data;
    const int64_t* offsets;  // rising
    const int64_t* targets;
    size_t num_rows;
    uint8_t* out;
    int64_t stride_bytes;
    FloatType type;

    void decode(size_t i) const {
        decode_row(format, data + offsets[i], out + targets[i] * stride_bytes, type);
    }
};

constexpr uint32_t kPageBytes = 4096;

// What is to be done with a span that has arrived.
static void take(const Span& span, const Rows& rows) {
    if (span.sums != nullptr)
        for (uint32_t at = 0, page = 0; at < span.size; at += kPageBytes, page++)
            span.sums[page] = crc32c(0, span.data + at, std::min(kPageBytes, span.size - at));
    for (size_t i = span.first_row; i < span.end_row; i++) rows.decode(i);
}

// Reads all spans, keeping as many under way as the ring takes. On an error no more are begun, but all are awaited.
static int64_t read_with_ring(Uring& ring, int file, const std::vector<Span>& spans, const Rows& rows) {
    size_t next = 0, under_way = 0;
    int64_t result = kDone;
    std::vector<size_t> arrived;
    while (under_way > 0 || (result == kDone && next < spans.size())) {
        for (; result == kDone && under_way < ring.depth() && next < spans.size(); next++, under_way++)
            ring.push(file, spans[next].offset, spans[next].size, spans[next].data, next);
        // the queue is filled up again before what has arrived is looked at
        int fault = ring.enter(arrived.empty() ? 1 : 0);
        if (fault == EINTR || fault == EAGAIN || fault == EBUSY) continue;
        if (fault != 0) std::abort();  // reads may still be under way into memory that we do not own
        for (size_t i : arrived) take(spans[i], rows);
        arrived.clear();
        ring.reap([&](uint64_t i, int32_t got) {
            under_way--;
            if (result != kDone) return;
            if (got < 0) {
                result = -got;
            } else if (uint32_t(got) != spans[i].size) {
                result = kShortRead;
            } else {
                arrived.push_back(i);
            }
        });
    }
    for (size_t i : arrived) take(spans[i], rows);
    return result;
}

static int64_t pread_whole(int file, const Span& span, const Rows& rows) {
    for (;;) {
        ssize_t got = pread(file, span.data, span.size, off_t(span.offset));
        if (got == ssize_t(span.size)) {
            take(span, rows);
            return kDone;
        }
        if (got >= 0) return kShortRead;
        if (errno != EINTR) return errno;
    }
}

static int64_t read_with_threads(int file, const std::vector<Span>& spans, const Rows& rows, unsigned depth) {
    std::atomic<size_t> next{0};
    std::atomic<int64_t> result{kDone};
    auto work = [&] {
        for (size_t i = next++; i < spans.size() && result == kDone; i = next++) {
            int64_t outcome = pread_whole(file, spans[i], rows);
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
        return read_rows(offsets, sizes, places, address, capacity, sums, Rows{});
    }

    // As `read`; the rows that begin at address + row_offsets[i], which rise, are decoded to the row_targets[i]-th row
    // of `out`. Where two spans meet within a row, it waits for both.
    int64_t read_and_decode(Array1<int64_t> offsets, Array1<int64_t> sizes, Array1<int64_t> places, uintptr_t address,
                            size_t capacity, std::optional<OutSums> sums, Array1<int64_t> row_offsets,
                            Array1<int64_t> row_targets, int codec, int dtype, int64_t dim, uintptr_t out,
                            int64_t stride_bytes, int out_type) {
        Rows rows{RowFormat{Codec(codec), FloatType(dtype), dim},
                  reinterpret_cast<const uint8_t*>(address),
                  row_offsets.data(),
                  row_targets.data(),
                  row_offsets.size(),
                  reinterpret_cast<uint8_t*>(out),
                  stride_bytes,
                  FloatType(out_type)};
        if (row_targets.size() != rows.num_rows) throw std::invalid_argument("rows and targets differ in number");
        auto row_bytes = int64_t(stored_row_bytes(rows.format));
        for (size_t i = 0; i < rows.num_rows; i++) {
            int64_t before = i == 0 ? 0 : rows.offsets[i - 1];
            if (rows.offsets[i] < before || rows.offsets[i] + row_bytes > int64_t(capacity))
                throw std::invalid_argument("a row lies beyond the buffer, or they are not in order");
        }
        return read_rows(offsets, sizes, places, address, capacity, sums, rows);
    }

  private:
    int64_t read_rows(Array1<int64_t> offsets, Array1<int64_t> sizes, Array1<int64_t> places, uintptr_t address,
                      size_t capacity, std::optional<OutSums> sums, const Rows& rows) {
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
        std::vector<size_t> between = share_out(rows, spans);
        int64_t result = read_spans(spans, rows);
        if (result == kDone)
            for (size_t i : between) rows.decode(i);
        return result;
    }

    int64_t read_spans(const std::vector<Span>& spans, const Rows& rows) {
        if (spans.size() == 1) return pread_whole(file_, spans[0], rows);
        std::unique_ptr<Uring> ring = use_uring_ ? take_ring() : nullptr;
        if (ring == nullptr) return read_with_threads(file_, spans, rows, depth_);
        int64_t result = read_with_ring(*ring, file_, spans, rows);
        std::lock_guard<std::mutex> lock(mutex_);
        free_rings_.push_back(std::move(ring));
        return result;
    }

    // Gives each span the rows that lie in it, spans lying one after the other; returns those that lie in two.
    static std::vector<size_t> share_out(const Rows& rows, std::vector<Span>& spans) {
        std::vector<size_t> between;
        if (rows.num_rows == 0) return between;
        auto row_bytes = int64_t(stored_row_bytes(rows.format));
        size_t row = 0;
        for (Span& span : spans) {
            int64_t begin = span.data - rows.data, end = begin + span.size;
            for (; row < rows.num_rows && rows.offsets[row] < begin; row++) between.push_back(row);
            span.first_row = row;
            while (row < rows.num_rows && rows.offsets[row] + row_bytes <= end) row++;
            span.end_row = row;
        }
        for (; row < rows.num_rows; row++) between.push_back(row);
        return between;
    }

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
             nb::arg("address"), nb::arg("capacity"), nb::arg("sums").none())
        .def("read_and_decode", &SpanReader::read_and_decode);
}

}  // namespace scone
