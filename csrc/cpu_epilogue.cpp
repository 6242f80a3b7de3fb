#include "cpu_epilogue.hpp"

#include "cpu_loops.hpp"
#include "over_rows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace ufm {
namespace {

// A row's statistics. Blocks are summed apart and put together in double, in order.
template <typename T, bool kKeep>
UFM_INLINE void one_row(T* z, int64_t cols, int64_t target, T* statistics, T* block_max, T* block_sum, T* block_shift) {
    const int64_t blocks = blocks_of(cols);
    const T minus_infinity = -std::numeric_limits<T>::infinity();
    const T target_logit = target >= 0 && target < cols ? z[target] : minus_infinity;
    T row_max = minus_infinity;
    for (int64_t block = 0; block < blocks; ++block) {
        T* const first = z + block * kBlock;
        const int64_t count = std::min(kBlock, cols - block * kBlock);
        const T top = block_maximum(first, count);
        const T reference = top == minus_infinity ? T(0) : top;  // a block of -inf: every exponential is 0
        T sum = 0, shift = 0;
#pragma omp simd reduction(+ : sum, shift)
        for (int64_t v = 0; v < count; ++v) {
            const T difference = first[v] - reference;
            const T e = exp_nonpositive_one(difference);
            sum += e;
            shift += difference;
            if (kKeep) first[v] = e;
        }
        block_max[block] = top;
        block_sum[block] = sum;
        block_shift[block] = shift;
        row_max = top > row_max ? top : row_max;
    }
    double sum = 0, shift = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        const bool empty = block_max[block] == minus_infinity;
        const double count = static_cast<double>(std::min(kBlock, cols - block * kBlock));
        const T reference = empty ? T(0) : block_max[block];
        sum += empty ? double(block_sum[block]) : double(block_sum[block]) * exp_nonpositive_one(reference - row_max);
        shift += double(block_shift[block]) + count * double(reference - row_max);
    }
    statistics[0] = row_max;
    statistics[1] = static_cast<T>(sum);
    statistics[2] = target_logit == minus_infinity ? minus_infinity : target_logit - row_max;
    statistics[3] = static_cast<T>(shift);
}

template <typename T, bool kKeep>
UFM_INLINE void some_rows(const Chunk<T>& chunk, int64_t begin, int64_t end, T* statistics, T* kept_max) {
    const int64_t blocks = blocks_of(chunk.cols);
    std::vector<T> scratch(static_cast<size_t>(3 * blocks));
    for (int64_t i = begin; i < end; ++i) {
        T* const block_max = kKeep ? kept_max + i * blocks : scratch.data() + 2 * blocks;
        one_row<T, kKeep>(chunk.logits + i * chunk.row_stride, chunk.cols, chunk.target[i], statistics + kColumns * i,
                          block_max, scratch.data(), scratch.data() + blocks);
    }
}

template <typename T>
UFM_INLINE void some_dlogits(const Chunk<T>& chunk, int64_t begin, int64_t end, const T* block_max, const T* row_max,
                             const T* a, const T* b, const T* c) {
    const int64_t blocks = blocks_of(chunk.cols);
    const T minus_infinity = -std::numeric_limits<T>::infinity();
    for (int64_t i = begin; i < end; ++i) {
        T* const row = chunk.logits + i * chunk.row_stride;
        if (a[i] == T(0) && b[i] == T(0) && c[i] == T(0)) {
            std::fill(row, row + chunk.cols, T(0));
            continue;
        }
        for (int64_t block = 0; block < blocks; ++block) {
            T* const first = row + block * kBlock;
            const int64_t count = std::min(kBlock, chunk.cols - block * kBlock);
            const T top = block_max[i * blocks + block];
            const T factor = top == minus_infinity ? T(0) : a[i] * exp_nonpositive_one(top - row_max[i]);
            const T constant = c[i];
#pragma omp simd
            for (int64_t v = 0; v < count; ++v) first[v] = first[v] * factor - constant;
        }
        const int64_t target = chunk.target[i];
        if (target >= 0 && target < chunk.cols) row[target] -= b[i];
    }
}

// The clones: target_clones works on plain functions, so each type has its own.
UFM_MULTIVERSION void keep_f32(const Chunk<float>& chunk, int64_t begin, int64_t end, float* stats, float* kept) {
    some_rows<float, true>(chunk, begin, end, stats, kept);
}
UFM_MULTIVERSION void look_f32(const Chunk<float>& chunk, int64_t begin, int64_t end, float* stats) {
    some_rows<float, false>(chunk, begin, end, stats, nullptr);
}
UFM_MULTIVERSION void dlogits_f32(const Chunk<float>& chunk, int64_t begin, int64_t end, const float* block_max,
                                  const float* row_max, const float* a, const float* b, const float* c) {
    some_dlogits<float>(chunk, begin, end, block_max, row_max, a, b, c);
}
UFM_MULTIVERSION void exp_f32(const float* x, float* y, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = exp_nonpositive_one(x[i]);
}

void statistics_of(const Chunk<float>& chunk, int64_t begin, int64_t end, float* stats, float* kept) {
    if (kept != nullptr)
        keep_f32(chunk, begin, end, stats, kept);
    else
        look_f32(chunk, begin, end, stats);
}
void statistics_of(const Chunk<double>& chunk, int64_t begin, int64_t end, double* stats, double* kept) {
    if (kept != nullptr)
        some_rows<double, true>(chunk, begin, end, stats, kept);
    else
        some_rows<double, false>(chunk, begin, end, stats, nullptr);
}

}  // namespace

template <typename T>
void row_statistics(const Chunk<T>& chunk, T* statistics, T* block_max, int threads) {
    over_rows(chunk.rows, chunk.cols, threads, [&](int64_t begin, int64_t end) {
        statistics_of(chunk, begin, end, statistics, block_max);
    });
}

template <>
void dlogits(const Chunk<float>& chunk, const float* block_max, const float* row_max, const float* a, const float* b,
             const float* c, int threads) {
    over_rows(chunk.rows, chunk.cols, threads, [&](int64_t begin, int64_t end) {
        dlogits_f32(chunk, begin, end, block_max, row_max, a, b, c);
    });
}
template <>
void dlogits(const Chunk<double>& chunk, const double* block_max, const double* row_max, const double* a,
             const double* b, const double* c, int threads) {
    over_rows(chunk.rows, chunk.cols, threads, [&](int64_t begin, int64_t end) {
        some_dlogits<double>(chunk, begin, end, block_max, row_max, a, b, c);
    });
}

template <>
void exp_nonpositive(const float* x, float* y, int64_t count) {
    exp_f32(x, y, count);
}
template <>
void exp_nonpositive(const double* x, double* y, int64_t count) {
    std::transform(x, x + count, y, [](double value) { return exp_nonpositive_one(value); });
}

template void row_statistics<float>(const Chunk<float>&, float*, float*, int);
template void row_statistics<double>(const Chunk<double>&, double*, double*, int);
}  // namespace ufm
