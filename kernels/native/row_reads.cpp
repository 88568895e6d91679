// Which pages are read for some rows, and where the rows then lie (../row_reads.py): one pass over the sorted ids.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "arrays.hpp"

namespace nb = nanobind;

namespace scone {

struct PagePlan {
    int64_t page_bytes, max_span_pages;
    Out1<int64_t> pages, offsets, sizes, places;
    size_t num_pages = 0, num_spans = 0;

    // Where in the buffer page `first` begins, which is read now if it was not before, as are those up to `last`.
    // Calls come with rising pages: what lies between `first` and the newest page is there already.
    int64_t place_of(int64_t first, int64_t last) {
        int64_t next = num_pages == 0 ? first : std::max(first, pages.data()[num_pages - 1] + 1);
        int64_t place = (int64_t(num_pages) - (next - first)) * page_bytes;
        for (int64_t page = next; page <= last; page++) add(page);
        return place;
    }

  private:
    void add(int64_t page) {
        int64_t* size = num_spans == 0 ? nullptr : sizes.data() + num_spans - 1;
        bool goes_on = size != nullptr && pages.data()[num_pages - 1] + 1 == page && *size < max_span_pages * page_bytes;
        if (goes_on) {
            *size += page_bytes;
        } else {
            offsets.data()[num_spans] = page * page_bytes;
            sizes.data()[num_spans] = page_bytes;
            places.data()[num_spans++] = int64_t(num_pages) * page_bytes;
        }
        pages.data()[num_pages++] = page;
    }
};

static nb::tuple plan_row_reads(Array1<int64_t> row_ids, int64_t begin, int64_t end, int64_t row_bytes, int64_t page_bytes,
                                int64_t max_span_pages, Out1<int64_t> pages, Out1<int64_t> offsets, Out1<int64_t> sizes,
                                Out1<int64_t> places, Out1<int64_t> row_offsets, Out1<int64_t> targets) {
    want(row_bytes > 0 && page_bytes > 0 && max_span_pages > 0, "row_bytes, page_bytes and max_span_pages must be positive");
    want(begin >= 0, "begin must not be negative");
    size_t n = row_ids.size();
    size_t most_pages = n * size_t(row_bytes % page_bytes == 0 ? row_bytes / page_bytes
                                                               : (row_bytes + page_bytes - 2) / page_bytes + 1);
    for (const auto* out : {&pages, &offsets, &sizes, &places}) want(out->size() >= most_pages, "no room for the pages");
    want(row_offsets.size() >= n && targets.size() >= n, "no room for the rows");
    std::vector<std::pair<int64_t, int64_t>> wanted;  // row id, whose it is
    wanted.reserve(n);
    for (size_t i = 0; i < n; i++)
        if (int64_t id = row_ids.data()[i]; id >= begin && id < end) wanted.emplace_back(id, int64_t(i));
    std::sort(wanted.begin(), wanted.end());
    PagePlan plan{page_bytes, max_span_pages, pages, offsets, sizes, places};
    for (size_t i = 0; i < wanted.size(); i++) {
        int64_t first_byte = wanted[i].first * row_bytes, first = first_byte / page_bytes;
        int64_t place = plan.place_of(first, (first_byte + row_bytes - 1) / page_bytes);
        row_offsets.data()[i] = place + first_byte % page_bytes;
        targets.data()[i] = wanted[i].second;
    }
    return nb::make_tuple(plan.num_pages, plan.num_spans, wanted.size());
}

void register_row_reads(nb::module_& m) { m.def("plan_row_reads", &plan_row_reads); }

}  // namespace scone
