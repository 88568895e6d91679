// io_uring through its system calls: one ring, its queues mapped. Reads only; what they mean is the user's business.
//
// liburing would be one more thing to build. A ring is for one thread at a time.
#pragma once

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <system_error>

namespace scone {

class Uring {
  public:
    // Throws std::system_error where the kernel has no ring for us.
    explicit Uring(unsigned depth) {
        io_uring_params params{};
        fd_ = int(syscall(__NR_io_uring_setup, depth, &params));
        if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "io_uring_setup");
        depth_ = std::min(depth, params.sq_entries);
        features_ = params.features;
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

    // Reads that may be under way at a time; the caller counts them.
    unsigned depth() const { return depth_; }

    // Whether `enter` can give up after a while (Linux 5.11).
    bool has_timeouts() const { return (features_ & IORING_FEAT_EXT_ARG) != 0; }

    // Adds a read to those that the next `enter` submits.
    void push(int file, uint64_t offset, uint32_t size, uint8_t* data, uint64_t id) {
        uint32_t tail = *sq_tail_, slot = tail & sq_mask_;
        io_uring_sqe& entry = sqes_[slot];
        std::memset(&entry, 0, sizeof entry);
        entry.opcode = IORING_OP_READ;
        entry.fd = file;
        entry.off = offset;
        entry.addr = reinterpret_cast<uint64_t>(data);
        entry.len = size;
        entry.user_data = id;
        sq_array_[slot] = slot;
        __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
        unsubmitted_++;
    }

    // Submits what was pushed and waits for `wait_for` results, at most `timeout_ns` if that is not negative.
    // Returns an errno: ETIME if the time is over, EINTR and its like if it should be called again.
    int enter(unsigned wait_for, int64_t timeout_ns = -1) {
        __kernel_timespec time{timeout_ns / 1000000000, timeout_ns % 1000000000};
        io_uring_getevents_arg argument{};
        argument.ts = reinterpret_cast<uint64_t>(&time);
        unsigned flags = IORING_ENTER_GETEVENTS | (timeout_ns >= 0 ? IORING_ENTER_EXT_ARG : 0);
        long entered = timeout_ns >= 0 ? syscall(__NR_io_uring_enter, fd_, unsubmitted_, wait_for, flags, &argument,
                                                 sizeof argument)
                                       : syscall(__NR_io_uring_enter, fd_, unsubmitted_, wait_for, flags, nullptr, 0);
        if (entered < 0) return errno;
        unsubmitted_ -= unsigned(entered);
        return 0;
    }

    // Calls done(id, result) for each read that has ended; a negative result is an errno.
    template <class Done>
    void reap(const Done& done) {
        uint32_t head = *cq_head_;
        for (uint32_t tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE); head != tail; head++) {
            const io_uring_cqe& entry = cqes_[head & cq_mask_];
            done(entry.user_data, entry.res);
        }
        __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
    }

  private:
    template <class T>
    T* at(uint32_t offset) const {
        return reinterpret_cast<T*>(static_cast<uint8_t*>(ring_) + offset);
    }

    void* map(size_t size, uint64_t offset) const {
        return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, off_t(offset));
    }

    void release() {
        if (sqes_ != nullptr && sqes_ != MAP_FAILED) munmap(sqes_, sqe_bytes_);
        if (ring_ != nullptr && ring_ != MAP_FAILED) munmap(ring_, ring_bytes_);
        if (fd_ >= 0) close(fd_);
    }

    int fd_ = -1;
    unsigned depth_ = 0, features_ = 0, unsubmitted_ = 0;
    void* ring_ = nullptr;
    io_uring_sqe* sqes_ = nullptr;
    size_t ring_bytes_ = 0, sqe_bytes_ = 0;
    uint32_t *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
    uint32_t sq_mask_ = 0, cq_mask_ = 0;
    io_uring_cqe* cqes_ = nullptr;
};

}  // namespace scone
