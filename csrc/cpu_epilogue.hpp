// The softmax work that stands between the GEMMs of the chunked mixture cross-entropy, on the CPU.
//
// Pass 1, row_statistics: one sweep over a chunk of fused logits z (rows x cols) yields per row
//     max m, sum-exp sum_v exp(z_v - m), target z_y - m (-inf where another rank holds y), sum_v (z_v - m)
// and, when asked to keep, overwrites z by scaled exponentials e_v = exp(z_v - r), r = the max of v's block
// of kBlock columns. A scaled exponential is in [0, 1], so it loses nothing however large z is.
// Pass 2, dlogits: e -> dz in place, once the normaliser over ALL ranks is known:
//     dz_v = a exp(r - M) e_v - c - b [v = y]            (M: the global max; a, b, c: one number per row)
// which costs no second exponential. An ignored row has a = b = c = 0 and becomes exactly zero, whatever it held.
//
// Rows are independent and every row is summed in one fixed order, so results do not depend on `threads`.
#pragma once

#include <cstdint>

namespace ufm {

constexpr int64_t kBlock = 1024;  // columns per scaling block: 4 KiB of fp32, so a block stays in L1 between its sweeps
constexpr int64_t kColumns = 4;   // numbers per row of statistics

template <typename T>
struct Chunk {
    T* logits;              // rows x cols, row i at logits + i * row_stride
    const int64_t* target;  // (rows,) column of the target, any value outside [0, cols) if it is not here
    int64_t rows, cols, row_stride;
};

inline int64_t blocks_of(int64_t cols) { return (cols + kBlock - 1) / kBlock; }

// statistics: (rows, 4). block_max: (rows, blocks_of(cols)) when the exponentials are kept, else null: logits stay.
template <typename T>
void row_statistics(const Chunk<T>& chunk, T* statistics, T* block_max, int threads);

// row_max, a, b, c: (rows,). block_max: what row_statistics wrote.
template <typename T>
void dlogits(const Chunk<T>& chunk, const T* block_max, const T* row_max, const T* a, const T* b, const T* c,
             int threads);

// The statistics of the mixture itself, for a gate that trains alone: one sweep over the n specialists' logits o_j
// (n planes of rows x cols; plane j at logits + j * plane_stride) with z = sum_j w_j o_j formed on the way. Beside the
// four numbers above, per specialist and with d_j = o_j - z (so that what all o_j share cancels):
//     sum_v exp(z_v - m) d_jv,      d_j at the target (0 if it is not here),      sum_v d_jv
// weights: (rows, specialists), the w_j. statistics: (rows, 4 + 3 * specialists), each triple's kind together.
template <typename T>
void mixture_statistics(const Chunk<const T>& chunk, int64_t plane_stride, int64_t specialists, const T* weights,
                        T* statistics, int threads);

// The gradients of the n planes, w_j dz, in their place: z as mixture_statistics formed it, to the last bit, and dz of it
// as dlogits has it, b at the target's column. A row with a = b = c = 0 becomes exactly zero in every plane.
template <typename T>
void mixture_dlogits(const Chunk<T>& chunk, int64_t plane_stride, int64_t specialists, const T* weights,
                     const T* row_max, const T* a, const T* b, const T* c, int threads);

// exp of non-positive numbers as the kernels above compute it, exported for its own test.
template <typename T>
void exp_nonpositive(const T* x, T* y, int64_t count);

}  // namespace ufm
