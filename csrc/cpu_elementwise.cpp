#include "cpu_elementwise.hpp"

#include "cpu_loops.hpp"
#include "over_rows.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace ufm {
namespace {

constexpr int64_t kSumRows = 64;  // rows whose weight gradients are summed together, whichever thread has them

UFM_MULTIVERSION void norm_rows(const float* __restrict x, const float* __restrict weight, float eps, int64_t rows,
                                int64_t width, float* __restrict y, float* __restrict rstd) {
    for (int64_t i = 0; i < rows; ++i, x += width, y += width) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t v = 0; v < width; ++v) squares += x[v] * x[v];
        const float r = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
#pragma omp simd
        for (int64_t v = 0; v < width; ++v) y[v] = x[v] * r * weight[v];
        rstd[i] = r;
    }
}

UFM_MULTIVERSION void norm_rows_backward(const float* __restrict dy, const float* __restrict x,
                                         const float* __restrict weight, const float* __restrict rstd, int64_t rows,
                                         int64_t width, float* __restrict dx, float* __restrict dw) {
    for (int64_t i = 0; i < rows; ++i, dy += width, x += width, dx += width) {
        const float r = rstd[i];
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t v = 0; v < width; ++v) along += dy[v] * weight[v] * (x[v] * r);
        along /= static_cast<float>(width);
#pragma omp simd
        for (int64_t v = 0; v < width; ++v) {
            const float normed = x[v] * r;
            dw[v] += dy[v] * normed;
            dx[v] = (dy[v] * weight[v] - normed * along) * r;
        }
    }
}

UFM_INLINE float sigmoid(float a) {
    const float e = exp_nonpositive_one(a < 0 ? a : -a);
    const float s = 1.0f / (1.0f + e);
    return a < 0 ? e * s : s;
}

UFM_MULTIVERSION void swiglu_rows(const float* __restrict x, int64_t rows, int64_t width, float* __restrict y) {
    for (int64_t i = 0; i < rows; ++i, x += 2 * width, y += width) {
#pragma omp simd
        for (int64_t v = 0; v < width; ++v) y[v] = x[v] * sigmoid(x[v]) * x[v + width];
    }
}

UFM_MULTIVERSION void swiglu_rows_backward(const float* __restrict dy, const float* __restrict x, int64_t rows,
                                           int64_t width, float* __restrict dx) {
    for (int64_t i = 0; i < rows; ++i, dy += width, x += 2 * width, dx += 2 * width) {
#pragma omp simd
        for (int64_t v = 0; v < width; ++v) {
            const float a = x[v], s = sigmoid(a);
            dx[v] = dy[v] * x[v + width] * (s * (1.0f + a * (1.0f - s)));
            dx[v + width] = dy[v] * (a * s);
        }
    }
}

// Pairs (x_v, x_{v + half}) turned by their angles, or back for sign = -1.
UFM_INLINE void turn(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, float sign,
                     int64_t half, float* __restrict out) {
#pragma omp simd
    for (int64_t v = 0; v < half; ++v) {
        const float first = x[v], second = x[v + half], s = sign * sin[v];
        out[v] = first * cos[v] - second * s;
        out[v + half] = second * cos[v] + first * s;
    }
}

UFM_MULTIVERSION void turn_apart(const float* __restrict mixed, const float* __restrict cos,
                                 const float* __restrict sin, const Heads& heads, float* __restrict q,
                                 float* __restrict k, float* __restrict v) {
    const int64_t half = heads.half, width = 2 * half;
    for (int64_t t = 0; t < heads.tokens; ++t, cos += half, sin += half) {
        for (int64_t g = 0; g < heads.groups; ++g) {
            for (int64_t h = 0; h < heads.each; ++h, mixed += width, q += width) turn(mixed, cos, sin, 1.0f, half, q);
            turn(mixed, cos, sin, 1.0f, half, k);
            std::copy_n(mixed + width, width, v);
            mixed += 2 * width, k += width, v += width;
        }
    }
}

UFM_MULTIVERSION void turn_back(const float* __restrict q, const float* __restrict k, const float* __restrict v,
                                const float* __restrict cos, const float* __restrict sin, const Heads& heads,
                                float* __restrict mixed) {
    const int64_t half = heads.half, width = 2 * half;
    for (int64_t t = 0; t < heads.tokens; ++t, cos += half, sin += half) {
        for (int64_t g = 0; g < heads.groups; ++g) {
            for (int64_t h = 0; h < heads.each; ++h, mixed += width, q += width) turn(q, cos, sin, -1.0f, half, mixed);
            turn(k, cos, sin, -1.0f, half, mixed);
            std::copy_n(v, width, mixed + width);
            mixed += 2 * width, k += width, v += width;
        }
    }
}

}  // namespace

void rms_norm_forward(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* y,
                      float* rstd, int threads) {
    over_rows(rows, width, threads, [&](int64_t begin, int64_t end) {
        norm_rows(x + begin * width, weight, eps, end - begin, width, y + begin * width, rstd + begin);
    });
}

void rms_norm_backward(const float* dy, const float* x, const float* weight, const float* rstd, int64_t rows,
                       int64_t width, float* dx, float* dw, int threads) {
    const int64_t sums = (rows + kSumRows - 1) / kSumRows;
    std::vector<float> parts(static_cast<size_t>(sums * width), 0.0f);
    over_rows(sums, kSumRows * width, threads, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            const int64_t first = part * kSumRows, count = std::min(kSumRows, rows - first), at = first * width;
            norm_rows_backward(dy + at, x + at, weight, rstd + first, count, width, dx + at,
                               parts.data() + part * width);
        }
    });
    std::fill_n(dw, width, 0.0f);
    for (int64_t part = 0; part < sums; ++part)
        for (int64_t v = 0; v < width; ++v) dw[v] += parts[static_cast<size_t>(part * width + v)];
}

void swiglu_forward(const float* x, int64_t rows, int64_t width, float* y, int threads) {
    over_rows(rows, 2 * width, threads, [&](int64_t begin, int64_t end) {
        swiglu_rows(x + 2 * begin * width, end - begin, width, y + begin * width);
    });
}

void swiglu_backward(const float* dy, const float* x, int64_t rows, int64_t width, float* dx, int threads) {
    over_rows(rows, 2 * width, threads, [&](int64_t begin, int64_t end) {
        swiglu_rows_backward(dy + begin * width, x + 2 * begin * width, end - begin, width, dx + 2 * begin * width);
    });
}

void rotated_heads_forward(const float* mixed, const float* cos, const float* sin, const Heads& heads, float* q,
                           float* k, float* v, int threads) {
    const int64_t group = 2 * heads.half * heads.groups, row = group * (heads.each + 2);
    over_rows(heads.tokens, row, threads, [&](int64_t begin, int64_t end) {
        turn_apart(mixed + begin * row, cos + begin * heads.half, sin + begin * heads.half,
                   {end - begin, heads.groups, heads.each, heads.half}, q + begin * group * heads.each,
                   k + begin * group, v + begin * group);
    });
}

void rotated_heads_backward(const float* dq, const float* dk, const float* dv, const float* cos, const float* sin,
                            const Heads& heads, float* mixed, int threads) {
    const int64_t group = 2 * heads.half * heads.groups, row = group * (heads.each + 2);
    over_rows(heads.tokens, row, threads, [&](int64_t begin, int64_t end) {
        turn_back(dq + begin * group * heads.each, dk + begin * group, dv + begin * group, cos + begin * heads.half,
                  sin + begin * heads.half, {end - begin, heads.groups, heads.each, heads.half}, mixed + begin * row);
    });
}

}  // namespace ufm
