// Independent rows of a matrix, spread over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

// PyTorch's products leave the threads of its OpenMP runtime spinning on their cores for milliseconds; threads of our
// own would share those cores with them. So the work goes to that very team, through the entry point that GCC compiles
// parallel regions to: weak, since a PyTorch without it must do, and no header or library is needed to build.
#if defined(__linux__)
extern "C" __attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* argument, unsigned threads, unsigned);
#else
constexpr void (*GOMP_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
#endif

namespace ufm {
namespace {

// Run work() on `workers` threads, the caller's own among them.
template <typename Work>
void on_threads(int64_t workers, Work& work) {
    if (workers > 1 && GOMP_parallel != nullptr) {
        GOMP_parallel([](void* w) { (*static_cast<Work*>(w))(); }, &work, static_cast<unsigned>(workers), 0);
        return;
    }
    std::vector<std::thread> others;
    try {
        for (int64_t w = 1; w < workers; ++w) others.emplace_back(std::ref(work));
    } catch (const std::system_error&) {  // no more threads to be had: those there are do all of it
    }
    work();
    for (auto& thread : others) thread.join();
}

// Run body(begin, end) over [0, rows) on up to `threads` threads. Each takes the next few rows until none are left.
template <typename Body>
void over_rows(int64_t rows, int64_t cols, int threads, const Body& body) {
    constexpr int64_t kSlice = 1 << 15;  // elements taken at once: about 20 us of work
    const int64_t step = std::max<int64_t>(1, kSlice / std::max<int64_t>(1, cols));
    // All or one: a smaller team would make the runtime end threads that the next product has to start again.
    const int64_t workers = rows > step ? std::max(1, threads) : 1;
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t begin; (begin = next.fetch_add(step, std::memory_order_relaxed)) < rows;)
            body(begin, std::min(begin + step, rows));
    };
    on_threads(workers, work);
}

}  // namespace
}  // namespace ufm
