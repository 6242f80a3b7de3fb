// A decoder layer's own operations on a CPU, in fp32: models/elementwise.py has their formulas. Everything is contiguous.
#pragma once

#include <cstdint>

namespace ufm {

// Of a projection (tokens, groups, each + 2, 2 half): every group's queries, its key and its value.
struct Heads {
    int64_t tokens, groups, each, half;
};

// x, y (rows, width), weight (width), rstd (rows).
void rms_norm_forward(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* y,
                      float* rstd, int threads);

// dy, x, dx (rows, width), weight, dw (width), rstd (rows). dw is summed in an order that threads do not change.
void rms_norm_backward(const float* dy, const float* x, const float* weight, const float* rstd, int64_t rows,
                       int64_t width, float* dx, float* dw, int threads);

// x, dx (rows, 2 width), y, dy (rows, width).
void swiglu_forward(const float* x, int64_t rows, int64_t width, float* y, int threads);
void swiglu_backward(const float* dy, const float* x, int64_t rows, int64_t width, float* dx, int threads);

// mixed as Heads has it, cos, sin (tokens, half), q (tokens, groups each, 2 half), k, v (tokens, groups, 2 half).
void rotated_heads_forward(const float* mixed, const float* cos, const float* sin, const Heads& heads, float* q,
                           float* k, float* v, int threads);
void rotated_heads_backward(const float* dq, const float* dk, const float* dv, const float* cos, const float* sin,
                            const Heads& heads, float* mixed, int threads);

}  // namespace ufm
