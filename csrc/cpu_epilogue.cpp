#include "cpu_epilogue.hpp"

#include "exp_nonpositive.hpp"
#include "over_rows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace ufm {
namespace {

// fp64 exists to check gradients, not to be fast: the library's exp will do.
UFM_INLINE double exp_nonpositive_one(double x) { return std::exp(x); }

template <typename T>
UFM_INLINE T block_maximum(const T* z, int64_t count) {
    T top = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < count; ++v) top = z[v] > top ? z[v] : top;
    return top;
}

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

// The steps of a mixture's block, in templates for both types and clones for the one that must be fast. Each clone is
// a function of its own with restricted pointers: inlined into the loop over blocks, GCC 12 leaves them scalar.

// z = w o, or z += w o.
template <typename T>
UFM_INLINE void mix(const T* __restrict o, T w, bool first, int64_t count, T* __restrict z) {
    if (first) {
#pragma omp simd
        for (int64_t v = 0; v < count; ++v) z[v] = w * o[v];
    } else {
#pragma omp simd
        for (int64_t v = 0; v < count; ++v) z[v] += w * o[v];
    }
}
UFM_MULTIVERSION void mix_block(const float* o, float w, bool first, int64_t count, float* z) {
    mix(o, w, first, count, z);
}
void mix_block(const double* o, double w, bool first, int64_t count, double* z) { mix(o, w, first, count, z); }

template <typename T>
struct Pair {
    T first, second;
};

// e = exp(z - reference); returns the sums of e and of z - reference.
template <typename T>
UFM_INLINE Pair<T> exponentials(const T* __restrict z, T reference, int64_t count, T* __restrict e) {
    T sum = 0, shift = 0;
#pragma omp simd reduction(+ : sum, shift)
    for (int64_t v = 0; v < count; ++v) {
        const T difference = z[v] - reference;
        const T value = exp_nonpositive_one(difference);
        e[v] = value;
        sum += value;
        shift += difference;
    }
    return {sum, shift};
}
UFM_MULTIVERSION Pair<float> exp_block(const float* z, float reference, int64_t count, float* e) {
    return exponentials(z, reference, count, e);
}
Pair<double> exp_block(const double* z, double reference, int64_t count, double* e) {
    return exponentials(z, reference, count, e);
}

// The sums of e (o - z) and of o - z.
template <typename T>
UFM_INLINE Pair<T> deviations(const T* __restrict o, const T* __restrict z, const T* __restrict e, int64_t count) {
    T weighted = 0, total = 0;
#pragma omp simd reduction(+ : weighted, total)
    for (int64_t v = 0; v < count; ++v) {
        const T difference = o[v] - z[v];
        weighted += e[v] * difference;
        total += difference;
    }
    return {weighted, total};
}
UFM_MULTIVERSION Pair<float> deviation_block(const float* o, const float* z, const float* e, int64_t count) {
    return deviations(o, z, e, count);
}
Pair<double> deviation_block(const double* o, const double* z, const double* e, int64_t count) {
    return deviations(o, z, e, count);
}

UFM_MULTIVERSION float max_block(const float* z, int64_t count) { return block_maximum(z, count); }
double max_block(const double* z, int64_t count) { return block_maximum(z, count); }

// The mixture's statistics of one row. Sums over blocks are kept in double, relative to the largest z so far.
template <typename T>
void one_mixture_row(const T* logits, int64_t plane_stride, int64_t specialists, int64_t cols,
                                const T* weights, int64_t target, T* statistics, double* sums) {
    alignas(64) T z[kBlock];
    alignas(64) T e[kBlock];
    const T minus_infinity = -std::numeric_limits<T>::infinity();
    const int64_t width = kColumns + 3 * specialists;
    double* const expectation = sums + kColumns;  // then the target's and the plain sums, per specialist
    double* const at_target = expectation + specialists;
    double* const plain = at_target + specialists;
    std::fill(sums, sums + width, 0.0);
    T row_max = minus_infinity, target_logit = minus_infinity;
    for (int64_t begin = 0; begin < cols; begin += kBlock) {
        const int64_t count = std::min(kBlock, cols - begin);
        const T* const o = logits + begin;
        for (int64_t j = 0; j < specialists; ++j) mix_block(o + j * plane_stride, weights[j], j == 0, count, z);
        const T top = max_block(z, count);
        const T origin = top > row_max ? top : row_max;
        const bool grows = top > row_max && row_max != minus_infinity;
        const double rescale = grows ? double(exp_nonpositive_one(row_max - top)) : 1.0;
        const double moved = grows ? double(row_max) - double(top) : 0.0;
        const auto [sum, shift] = exp_block(z, origin == minus_infinity ? T(0) : origin, count, e);
        sums[1] = sums[1] * rescale + double(sum);
        sums[3] = sums[3] + double(begin) * moved + double(shift);
        for (int64_t j = 0; j < specialists; ++j) {
            const auto [weighted, total] = deviation_block(o + j * plane_stride, z, e, count);
            expectation[j] = expectation[j] * rescale + double(weighted);
            plain[j] += double(total);
        }
        if (target >= begin && target < begin + count) {
            target_logit = z[target - begin];
            for (int64_t j = 0; j < specialists; ++j)
                at_target[j] = logits[j * plane_stride + target] - target_logit;
        }
        row_max = origin;
    }
    for (int64_t k = 0; k < width; ++k) statistics[k] = static_cast<T>(sums[k]);
    statistics[0] = row_max;
    statistics[2] = target_logit == minus_infinity ? minus_infinity : target_logit - row_max;
}

template <typename T>
void some_mixture_rows(const Chunk<const T>& chunk, int64_t begin, int64_t end, int64_t plane_stride,
                                  int64_t specialists, const T* weights, T* statistics) {
    const int64_t width = kColumns + 3 * specialists;
    std::vector<double> sums(static_cast<size_t>(width));
    for (int64_t i = begin; i < end; ++i)
        one_mixture_row(chunk.logits + i * chunk.row_stride, plane_stride, specialists, chunk.cols,
                        weights + i * specialists, chunk.target[i], statistics + i * width, sums.data());
}

// dz = a e - c.
template <typename T>
UFM_INLINE void gradient(T* __restrict e, T a, T c, int64_t count) {
#pragma omp simd
    for (int64_t v = 0; v < count; ++v) e[v] = e[v] * a - c;
}
UFM_MULTIVERSION void gradient_block(float* e, float a, float c, int64_t count) { gradient(e, a, c, count); }
void gradient_block(double* e, double a, double c, int64_t count) { gradient(e, a, c, count); }

template <typename T>
void some_mixture_dlogits(const Chunk<T>& chunk, int64_t begin, int64_t end, int64_t plane_stride, int64_t specialists,
                          const T* weights, const T* row_max, const T* a, const T* b, const T* c) {
    alignas(64) T z[kBlock];
    alignas(64) T e[kBlock];
    for (int64_t i = begin; i < end; ++i) {
        T* const row = chunk.logits + i * chunk.row_stride;
        const bool ignored = a[i] == T(0) && b[i] == T(0) && c[i] == T(0);
        for (int64_t first = 0; first < chunk.cols; first += kBlock) {
            const int64_t count = std::min(kBlock, chunk.cols - first);
            T* const o = row + first;
            if (ignored) {
                for (int64_t j = 0; j < specialists; ++j) std::fill_n(o + j * plane_stride, count, T(0));
                continue;
            }
            const T* const w = weights + i * specialists;
            for (int64_t j = 0; j < specialists; ++j) mix_block(o + j * plane_stride, w[j], j == 0, count, z);
            exp_block(z, row_max[i], count, e);
            gradient_block(e, a[i], c[i], count);
            const int64_t target = chunk.target[i] - first;
            if (target >= 0 && target < count) e[target] -= b[i];
            for (int64_t j = 0; j < specialists; ++j) mix_block(e, w[j], true, count, o + j * plane_stride);
        }
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

template <typename T>
void mixture_statistics(const Chunk<const T>& chunk, int64_t plane_stride, int64_t specialists, const T* weights,
                        T* statistics, int threads) {
    over_rows(chunk.rows, chunk.cols * specialists, threads, [&](int64_t begin, int64_t end) {
        some_mixture_rows(chunk, begin, end, plane_stride, specialists, weights, statistics);
    });
}

template <typename T>
void mixture_dlogits(const Chunk<T>& chunk, int64_t plane_stride, int64_t specialists, const T* weights,
                     const T* row_max, const T* a, const T* b, const T* c, int threads) {
    over_rows(chunk.rows, chunk.cols * specialists, threads, [&](int64_t begin, int64_t end) {
        some_mixture_dlogits(chunk, begin, end, plane_stride, specialists, weights, row_max, a, b, c);
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
template void mixture_statistics<float>(const Chunk<const float>&, int64_t, int64_t, const float*, float*, int);
template void mixture_statistics<double>(const Chunk<const double>&, int64_t, int64_t, const double*, double*, int);
template void mixture_dlogits<float>(const Chunk<float>&, int64_t, int64_t, const float*, const float*, const float*,
                                     const float*, const float*, int);
template void mixture_dlogits<double>(const Chunk<double>&, int64_t, int64_t, const double*, const double*,
                                      const double*, const double*, const double*, int);

}  // namespace ufm
