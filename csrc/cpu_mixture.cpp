// The mixture's part of the epilogue: every specialist's logits apart, in planes.
#include "cpu_epilogue.hpp"
#include "cpu_loops.hpp"
#include "over_rows.hpp"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

namespace ufm {
namespace {

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

// z = sum_j w_j o_j over the planes in their order; returns its largest. Of few planes in one pass, of more in one each:
// the same products and sums either way.
template <int kPlanes>
UFM_INLINE float mix_few(const float* __restrict o, int64_t stride, const float* w, int64_t count,
                         float* __restrict z) {
    float weights[kPlanes], top = -std::numeric_limits<float>::infinity();
    std::copy_n(w, kPlanes, weights);
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < count; ++v) {
        float sum = weights[0] * o[v];
        for (int j = 1; j < kPlanes; ++j) sum += weights[j] * o[v + j * stride];
        z[v] = sum;
        top = sum > top ? sum : top;
    }
    return top;
}
UFM_MULTIVERSION float mix_two(const float* o, int64_t stride, const float* w, int64_t count, float* z) {
    return mix_few<2>(o, stride, w, count, z);
}
UFM_MULTIVERSION float mix_three(const float* o, int64_t stride, const float* w, int64_t count, float* z) {
    return mix_few<3>(o, stride, w, count, z);
}
UFM_MULTIVERSION float mix_four(const float* o, int64_t stride, const float* w, int64_t count, float* z) {
    return mix_few<4>(o, stride, w, count, z);
}
template <typename T>
T mix_planes(const T* o, int64_t stride, int64_t planes, const T* w, int64_t count, T* z) {
    if constexpr (std::is_same_v<T, float>) {
        if (planes == 2) return mix_two(o, stride, w, count, z);
        if (planes == 3) return mix_three(o, stride, w, count, z);
        if (planes == 4) return mix_four(o, stride, w, count, z);
    }
    for (int64_t j = 0; j < planes; ++j) mix_block(o + j * stride, w[j], j == 0, count, z);
    return max_block(z, count);
}

// What a block adds to a row: the sums of e = exp(z - reference) and of z - reference, and of e (o_j - z) and of
// o_j - z for every plane.
template <typename T>
struct Sums {
    T exponentials, shifts;
    std::vector<T> weighted, plain;
};

template <int kPlanes>
UFM_INLINE void sum_few(const float* __restrict o, int64_t stride, const float* __restrict z, float reference,
                        int64_t count, Sums<float>& sums) {
    float sum = 0, shift = 0, w0 = 0, w1 = 0, w2 = 0, w3 = 0, t0 = 0, t1 = 0, t2 = 0, t3 = 0;
#pragma omp simd reduction(+ : sum, shift, w0, w1, w2, w3, t0, t1, t2, t3)
    for (int64_t v = 0; v < count; ++v) {
        const float zv = z[v], difference = zv - reference, e = exp_nonpositive_one(difference);
        sum += e;
        shift += difference;
        const float d0 = o[v] - zv, d1 = o[v + stride] - zv;
        w0 += e * d0, t0 += d0, w1 += e * d1, t1 += d1;
        if (kPlanes > 2) {
            const float d2 = o[v + 2 * stride] - zv;
            w2 += e * d2, t2 += d2;
        }
        if (kPlanes > 3) {
            const float d3 = o[v + 3 * stride] - zv;
            w3 += e * d3, t3 += d3;
        }
    }
    const float weighted[] = {w0, w1, w2, w3}, plain[] = {t0, t1, t2, t3};
    sums.exponentials = sum;
    sums.shifts = shift;
    std::copy_n(weighted, kPlanes, sums.weighted.begin());
    std::copy_n(plain, kPlanes, sums.plain.begin());
}
UFM_MULTIVERSION void sum_two(const float* o, int64_t stride, const float* z, float reference, int64_t count,
                              Sums<float>& sums) {
    sum_few<2>(o, stride, z, reference, count, sums);
}
UFM_MULTIVERSION void sum_three(const float* o, int64_t stride, const float* z, float reference, int64_t count,
                                Sums<float>& sums) {
    sum_few<3>(o, stride, z, reference, count, sums);
}
UFM_MULTIVERSION void sum_four(const float* o, int64_t stride, const float* z, float reference, int64_t count,
                               Sums<float>& sums) {
    sum_few<4>(o, stride, z, reference, count, sums);
}
template <typename T>
void sum_planes(const T* o, int64_t stride, int64_t planes, const T* z, T reference, int64_t count, Sums<T>& sums) {
    if constexpr (std::is_same_v<T, float>) {
        if (planes == 2) return sum_two(o, stride, z, reference, count, sums);
        if (planes == 3) return sum_three(o, stride, z, reference, count, sums);
        if (planes == 4) return sum_four(o, stride, z, reference, count, sums);
    }
    alignas(64) T e[kBlock];
    const auto [sum, shift] = exp_block(z, reference, count, e);
    sums.exponentials = sum;
    sums.shifts = shift;
    for (int64_t j = 0; j < planes; ++j) {
        const auto [weighted, total] = deviation_block(o + j * stride, z, e, count);
        sums.weighted[static_cast<size_t>(j)] = weighted;
        sums.plain[static_cast<size_t>(j)] = total;
    }
}

// The mixture's statistics of one row. Sums over blocks are kept in double, relative to the largest z so far.
template <typename T>
void one_mixture_row(const T* logits, int64_t plane_stride, int64_t specialists, int64_t cols,
                                const T* weights, int64_t target, T* statistics, double* sums, Sums<T>& of_block) {
    alignas(64) T z[kBlock];
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
        const T top = mix_planes(o, plane_stride, specialists, weights, count, z);
        const T origin = top > row_max ? top : row_max;
        const bool grows = top > row_max && row_max != minus_infinity;
        const double rescale = grows ? double(exp_nonpositive_one(row_max - top)) : 1.0;
        const double moved = grows ? double(row_max) - double(top) : 0.0;
        sum_planes(o, plane_stride, specialists, z, origin == minus_infinity ? T(0) : origin, count, of_block);
        sums[1] = sums[1] * rescale + double(of_block.exponentials);
        sums[3] = sums[3] + double(begin) * moved + double(of_block.shifts);
        for (int64_t j = 0; j < specialists; ++j) {
            expectation[j] = expectation[j] * rescale + double(of_block.weighted[static_cast<size_t>(j)]);
            plain[j] += double(of_block.plain[static_cast<size_t>(j)]);
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
    const std::vector<T> each(static_cast<size_t>(specialists));
    Sums<T> of_block{0, 0, each, each};
    for (int64_t i = begin; i < end; ++i)
        one_mixture_row(chunk.logits + i * chunk.row_stride, plane_stride, specialists, chunk.cols,
                        weights + i * specialists, chunk.target[i], statistics + i * width, sums.data(), of_block);
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
            mix_planes(o, plane_stride, specialists, w, count, z);
            exp_block(z, row_max[i], count, e);
            gradient_block(e, a[i], c[i], count);
            const int64_t target = chunk.target[i] - first;
            if (target >= 0 && target < count) e[target] -= b[i];
            for (int64_t j = 0; j < specialists; ++j) mix_block(e, w[j], true, count, o + j * plane_stride);
        }
    }
}

}  // namespace

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

template void mixture_statistics<float>(const Chunk<const float>&, int64_t, int64_t, const float*, float*, int);
template void mixture_statistics<double>(const Chunk<const double>&, int64_t, int64_t, const double*, double*, int);
template void mixture_dlogits<float>(const Chunk<float>&, int64_t, int64_t, const float*, const float*, const float*,
                                     const float*, const float*, int);
template void mixture_dlogits<double>(const Chunk<double>&, int64_t, int64_t, const double*, const double*,
                                      const double*, const double*, const double*, int);

}  // namespace ufm
