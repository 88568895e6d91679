// A team of threads that runs one function together, with barriers in it.
//
// Not OpenMP: torch brings its own copy of that runtime, and two of them would fight over the cores.
// Between two calls of `run` the threads sleep; within one they spin at barriers, since the phases of a
// decoder layer are shorter than a wake-up. Work without barriers is better given to `run_available`.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace scone {

class ThreadTeam {
public:
    explicit ThreadTeam(int num_threads) : size_(num_threads < 1 ? 1 : num_threads) {
        for (int id = 1; id < size_; ++id) threads_.emplace_back([this, id] { work(id); });
    }

    ~ThreadTeam() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    ThreadTeam(const ThreadTeam&) = delete;
    ThreadTeam& operator=(const ThreadTeam&) = delete;

    int size() const { return size_; }

    // Runs `task(thread_id)` on all threads, the caller being thread 0; returns when all are done.
    // One caller at a time.
    void run(const std::function<void(int)>& task) {
        next_.store(0, std::memory_order_relaxed);
        if (size_ > 1) start(task, true);
        task(0);
        barrier();
    }

    // Runs `task(thread_id)` on the caller and on those threads that wake up before its call returns; all of the work
    // must be handed out by `share`. One that wakes too late is not waited for: where another process has its core,
    // that takes until the end of that one's time slice, some milliseconds.
    void run_available(const std::function<void(int)>& task) {
        next_.store(0, std::memory_order_relaxed);
        start(task, false);
        task(0);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = nullptr;
        }
        for (int spins = 0; num_joined_.load(std::memory_order_acquire) > 0; ++spins) relax(spins);
    }

    // Waits for the whole team, and starts the count of `share` anew.
    void barrier() {
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) relax(spins);
    }

    // The next of `num_items` items, `chunk` at a time: calls body(begin, end) until none is left.
    template <class Body>
    void share(int num_items, int chunk, const Body& body) {
        for (;;) {
            const int begin = next_.fetch_add(chunk, std::memory_order_relaxed);
            if (begin >= num_items) return;
            body(begin, begin + chunk < num_items ? begin + chunk : num_items);
        }
    }

private:
    void start(const std::function<void(int)>& task, bool together) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = &task;
            together_ = together;
            ++round_;
        }
        wake_.notify_all();
    }

    // Between two looks at what another thread is to do.
    static void relax(int spins) {
        if (spins >= 2000) {
            std::this_thread::yield();  // another process has the core that we wait for
            return;
        }
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void work(int id) {
        uint64_t seen = 0;
        for (;;) {
            const std::function<void(int)>* task;
            bool together;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return stopping_ || round_ != seen; });
                if (stopping_) return;
                seen = round_;
                task = task_;
                together = together_;
                if (task == nullptr) continue;  // too late
                if (!together) num_joined_.fetch_add(1, std::memory_order_relaxed);
            }
            (*task)(id);
            if (together) {
                barrier();
            } else {
                num_joined_.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    const int size_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* task_ = nullptr;
    bool together_ = true;  // whether all threads take part in the task
    uint64_t round_ = 0;
    bool stopping_ = false;
    std::atomic<int> arrived_{0};
    std::atomic<int> num_joined_{0};  // threads in a task of `run_available`
    std::atomic<uint32_t> phase_{0};
    std::atomic<int> next_{0};
};

}  // namespace scone
