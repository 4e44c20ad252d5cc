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

// Pieces of one stage, handed out to whichever thread is free.
struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
    int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// All threads wait for the last. Those that wait longer than a piece of work takes are put to sleep: OpenMP's own
// barrier would keep a processor busy for milliseconds, which the last thread may need to run at all.
class Barrier {
public:
    void wait(int num_threads) {
        if (num_threads == 1) return;
        const uint32_t turn = turns.load();
        if (arrived.fetch_add(1) + 1 == num_threads) {
            arrived.store(0);
            turns.store(turn + 1);
            if (sleepers.load()) call(FUTEX_WAKE_PRIVATE, INT_MAX);
            return;
        }
        for (int i = 0; i < PAUSES; i++) {
            if (turns.load(std::memory_order_acquire) != turn) return;
            pause_briefly();
        }
        sleepers.fetch_add(1);
        while (turns.load() == turn) call(FUTEX_WAIT_PRIVATE, turn);
        sleepers.fetch_sub(1);
    }

private:
    static constexpr int PAUSES = 2000;  // 20 to 100 microseconds
    std::atomic<int> arrived{0}, sleepers{0};
    alignas(64) std::atomic<uint32_t> turns{0};

    void call(int operation, uint32_t value) {
        static_assert(sizeof turns == sizeof(uint32_t));
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&turns), operation, value, nullptr, nullptr, 0);
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
