// One stored state, from the places of a file where its parts lie to where it is wanted.
//
// One call a state: the parts are read past any map of the file, straight to the rows of the caller's memory, and
// the pages of what has come are summed while the processor's cache still holds them. No lock of Python is held.
#include <fcntl.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "crc32c.hpp"

namespace nb = nanobind;

namespace scone {

namespace {

using Places = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Given = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<uint8_t, nb::ndim<2>, nb::device::cpu>;  // each row's bytes follow each other
using Sums = nb::ndarray<uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int kShortRead = -1;
constexpr size_t kMaxParts = 1024;  // IOV_MAX

// Ids and the rows of a payload as one range of bytes, taken from the front.
class Destination {
  public:
    Destination(Bytes& ids, Rows& rows)
        : at_(ids.data()), left_(ids.size()), rows_(rows.data()), row_bytes_(rows.shape(1)),
          stride_(rows.stride(0)) {}

    // Calls part(address, size) for the parts that the next `size` bytes go to.
    template <class Part>
    void take(size_t size, const Part& part) {
        while (size > 0) {
            if (left_ == 0) next_row();
            size_t now = std::min(size, left_);
            part(at_, now);
            at_ += now;
            left_ -= now;
            size -= now;
        }
    }

  private:
    void next_row() {
        at_ = rows_ + int64_t(row_++) * stride_;
        left_ = row_bytes_;
    }

    uint8_t* at_;
    size_t left_;
    uint8_t* rows_;
    size_t row_bytes_;
    int64_t stride_;
    size_t row_ = 0;
};

// Fills all of `parts` from `offset` on; 0, an errno, or kShortRead.
int read_parts(int file, int64_t offset, iovec* parts, size_t num_parts) {
    while (num_parts > 0) {
        ssize_t got = preadv(file, parts, int(std::min(num_parts, kMaxParts)), off_t(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0) return kShortRead;
        offset += got;
        for (; num_parts > 0 && size_t(got) >= parts->iov_len; ++parts, --num_parts) got -= ssize_t(parts->iov_len);
        if (got > 0) {
            parts->iov_base = static_cast<uint8_t*>(parts->iov_base) + got;
            parts->iov_len -= size_t(got);
        }
    }
    return 0;
}

// Calls run(first, end) for the runs of places between which there are but `gap` bytes.
template <class Run>
int each_run(const Places& offsets, const Places& sizes, int64_t gap, const Run& run) {
    size_t first = 0;
    for (size_t i = 1; i <= offsets.size(); ++i) {
        if (i < offsets.size() && offsets.data()[i] == offsets.data()[i - 1] + sizes.data()[i - 1] + gap) continue;
        if (int fault = run(first, i)) return fault;
        first = i;
    }
    return 0;
}

void sum_pages(const Rows& rows, size_t page_bytes, uint32_t* sums) {
    size_t in_page = 0;
    uint32_t sum = 0;
    for (size_t row = 0; row < rows.shape(0); ++row) {
        const uint8_t* at = rows.data() + int64_t(row) * rows.stride(0);
        for (size_t left = rows.shape(1); left > 0;) {
            size_t now = std::min(left, page_bytes - in_page);
            sum = crc32c(sum, at, now);
            at += now;
            left -= now;
            in_page += now;
            if (in_page == page_bytes) {
                *sums++ = sum;
                in_page = sum = 0;
            }
        }
    }
    if (in_page > 0) *sums = sum;
}

void check_places(const Places& offsets, const Places& sizes) {
    if (offsets.size() != sizes.size()) throw std::invalid_argument("offsets and sizes differ in number");
    if (offsets.size() == 0) return;
    if (*std::min_element(offsets.data(), offsets.data() + offsets.size()) < 0 ||
        *std::min_element(sizes.data(), sizes.data() + sizes.size()) < 1)
        throw std::invalid_argument("a part of a state lies nowhere");
}

// ids, then the rows of payload, end to end, are filled from sizes[i] bytes at offsets[i] of the file, one place
// after the other, and at last with `tail`; places that are `gap` bytes apart are read together. sums[i] becomes the
// CRC of the payload's i-th page. 0, an errno, or kShortRead.
int read_state(int file, Places offsets, Places sizes, int64_t gap, Given tail, Bytes ids, Rows payload,
               size_t page_bytes, Sums sums) {
    check_places(offsets, sizes);
    if (payload.shape(1) > 1 && payload.stride(1) != 1) throw std::invalid_argument("a row has gaps");
    size_t num_bytes = tail.size(), payload_bytes = payload.shape(0) * payload.shape(1);
    for (size_t i = 0; i < sizes.size(); ++i) num_bytes += size_t(sizes.data()[i]);
    if (num_bytes != ids.size() + payload_bytes || gap < 0 || gap > 64)
        throw std::invalid_argument("the parts are not as long as the state");
    if (page_bytes == 0 || sums.size() != (payload_bytes + page_bytes - 1) / page_bytes)
        throw std::invalid_argument("sums does not have one element for each page");
    nb::gil_scoped_release unlocked;
    Destination destination(ids, payload);
    uint8_t between[64];
    std::vector<iovec> parts;
    const auto add = [&](uint8_t* at, size_t size) { parts.push_back({at, size}); };
    int fault = each_run(offsets, sizes, gap, [&](size_t first, size_t end) {
        parts.clear();
        for (size_t i = first; i < end; ++i) {
            if (i > first && gap > 0) add(between, size_t(gap));
            destination.take(size_t(sizes.data()[i]), add);
        }
        return read_parts(file, offsets.data()[first], parts.data(), parts.size());
    });
    if (fault != 0) return fault;
    const uint8_t* from = tail.data();
    destination.take(tail.size(), [&](uint8_t* at, size_t size) {
        std::memcpy(at, from, size);
        from += size;
    });
    sum_pages(payload, page_bytes, sums.data());
    return 0;
}

// Has the kernel read these places ahead; waits for none of them.
void will_need(int file, Places offsets, Places sizes, int64_t gap) {
    check_places(offsets, sizes);
    nb::gil_scoped_release unlocked;
    each_run(offsets, sizes, gap, [&](size_t first, size_t end) {
        int64_t begin = offsets.data()[first];
        posix_fadvise(file, off_t(begin), off_t(offsets.data()[end - 1] + sizes.data()[end - 1] - begin),
                      POSIX_FADV_WILLNEED);
        return 0;
    });
}

}  // namespace

void register_state_read(nb::module_& m) {
    m.attr("STATE_CUT_SHORT") = kShortRead;
    m.def("read_state", &read_state, nb::arg("file"), nb::arg("offsets").noconvert(), nb::arg("sizes").noconvert(),
          nb::arg("gap"), nb::arg("tail").noconvert(), nb::arg("ids").noconvert(), nb::arg("payload").noconvert(),
          nb::arg("page_bytes"), nb::arg("sums").noconvert());
    m.def("will_need", &will_need);
}

}  // namespace scone
