// How the threads of a step share its work.

#pragma once

#include <atomic>
#include <climits>
#include <cstdint>

#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One stage of the work, in pieces that go to whichever thread is free. It is over when its pieces are done, not when
// all threads have come: one that the system does not let run holds up nothing but the piece it has begun.
// Threads that wait longer than a piece takes are put to sleep. OpenMP's own barrier would keep a processor busy for
// milliseconds, which the last thread may need.
class Stage {
public:
    bool is_taken(int64_t pieces) const { return next.load(std::memory_order_relaxed) >= pieces; }

    // Take part until all pieces are done. `last` is run once, by the thread that finishes the last piece.
    template <class Piece, class Last>
    void run(int64_t pieces, const Piece& piece, const Last& last) {
        int64_t own = 0;
        for (int64_t i = next.fetch_add(1); i < pieces; i = next.fetch_add(1), own++) piece(i);
        if (own && done.fetch_add(own) + own == pieces) {
            last();
            is_over.store(1);
            if (sleepers.load()) call(FUTEX_WAKE_PRIVATE, INT_MAX);
            return;
        }
        for (int i = 0; i < PAUSES; i++) {
            if (is_over.load(std::memory_order_acquire)) return;
            pause_briefly();
        }
        sleepers.fetch_add(1);
        while (!is_over.load()) call(FUTEX_WAIT_PRIVATE, 0);
        sleepers.fetch_sub(1);
    }

private:
    static constexpr int PAUSES = 2000;  // 20 to 100 microseconds
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
    std::atomic<uint32_t> is_over{0};
    std::atomic<int> sleepers{0};

    void call(int operation, uint32_t value) {
        static_assert(sizeof is_over == sizeof(uint32_t));
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&is_over), operation, value, nullptr, nullptr, 0);
    }
};

template <class Work>
void in_parallel(int64_t num_threads, const Work& work) {
    if (num_threads > 1) {
#pragma omp parallel num_threads(num_threads)
        work();
    } else {
        work();
    }
}

}  // namespace
