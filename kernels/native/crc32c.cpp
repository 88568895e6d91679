#include "crc32c.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <array>
#include <cstring>
#include <stdexcept>

#include "fault_guard.hpp"

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace nb = nanobind;

namespace scone {

constexpr uint32_t kPolynomial = 0x82F63B78u;

// table[k][b]: the effect of byte b followed by k zero bytes (slicing by eight)
static std::array<std::array<uint32_t, 256>, 8> make_table() {
    std::array<std::array<uint32_t, 256>, 8> table{};
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t crc = b;
        for (int i = 0; i < 8; i++) crc = crc & 1 ? (crc >> 1) ^ kPolynomial : crc >> 1;
        table[0][b] = crc;
    }
    for (uint32_t b = 0; b < 256; b++)
        for (int k = 1; k < 8; k++) table[k][b] = table[0][table[k - 1][b] & 0xFF] ^ (table[k - 1][b] >> 8);
    return table;
}

static uint32_t crc_scalar(uint32_t crc, const uint8_t* p, size_t size) {
    static const auto table = make_table();
    for (; size >= 8; p += 8, size -= 8) {
        uint64_t word;
        std::memcpy(&word, p, 8);
        word ^= crc;
        crc = 0;
        for (int k = 0; k < 8; k++) crc ^= table[7 - k][(word >> (8 * k)) & 0xFF];
    }
    for (; size > 0; p++, size--) crc = table[0][(crc ^ *p) & 0xFF] ^ (crc >> 8);
    return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc_hardware(uint32_t crc, const uint8_t* p, size_t size) {
    uint64_t wide = crc;
    for (; size >= 8; p += 8, size -= 8) {
        uint64_t word;
        std::memcpy(&word, p, 8);
        wide = _mm_crc32_u64(wide, word);
    }
    crc = uint32_t(wide);
    for (; size > 0; p++, size--) crc = _mm_crc32_u8(crc, *p);
    return crc;
}
static bool has_hardware() { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__) && defined(__linux__)
__attribute__((target("+crc"))) static uint32_t crc_hardware(uint32_t crc, const uint8_t* p, size_t size) {
    for (; size >= 8; p += 8, size -= 8) {
        uint64_t word;
        std::memcpy(&word, p, 8);
        crc = __builtin_aarch64_crc32cx(crc, word);
    }
    for (; size > 0; p++, size--) crc = __builtin_aarch64_crc32cb(crc, *p);
    return crc;
}
static bool has_hardware() { return getauxval(AT_HWCAP) & HWCAP_CRC32; }
#else
static uint32_t crc_hardware(uint32_t crc, const uint8_t* p, size_t size) { return crc_scalar(crc, p, size); }
static bool has_hardware() { return false; }
#endif

uint32_t crc32c(uint32_t crc, const void* data, size_t size) {
    static const bool hardware = has_hardware();
    auto bytes = static_cast<const uint8_t*>(data);
    return ~(hardware ? crc_hardware(~crc, bytes, size) : crc_scalar(~crc, bytes, size));
}

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// out[i] = CRC of the i-th page of data; the last page may be short. False: data could not be read.
static bool crc32c_pages(Bytes data, size_t page_bytes, Sums out) {
    if (page_bytes == 0 || out.size() != (data.size() + page_bytes - 1) / page_bytes)
        throw std::invalid_argument("out does not have one element for each page");
    nb::gil_scoped_release unlocked;
    return guarded([&] {
        for (size_t i = 0; i < out.size(); i++) {
            size_t begin = i * page_bytes, end = begin + page_bytes;
            if (end > data.size()) end = data.size();
            out.data()[i] = crc32c(0, data.data() + begin, end - begin);
        }
    });
}

static uint32_t crc32c_scalar(Bytes data) { return ~crc_scalar(~0u, data.data(), data.size()); }

void register_crc32c(nb::module_& m) {
    m.def("crc32c_pages", &crc32c_pages, nb::arg("data").noconvert(), nb::arg("page_bytes"),
          nb::arg("out").noconvert());
    m.def("crc32c_scalar", &crc32c_scalar, nb::arg("data").noconvert());
}

}  // namespace scone
