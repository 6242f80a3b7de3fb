// The gate's work around the GEMMs of the mixture cross-entropy, on the GPU: one read and one write of every number.
//
// Forward, scale_inputs: per row the gate's softmax w = softmax(a_1 .. a_n) and the GEMMs' inputs x_j = w_j h_j.
// Backward, unscale_gradients: from dx_j, the gradient of those inputs, in one pass
//     dw_j = <h_j, dx_j>      dh_j = w_j dx_j      da_j = w_j sum_k w_k (dw_j - dw_k)
// The widths d_j differ. Arithmetic is fp32 whatever the tensors' type; a row is summed in an order that depends on d_j
// alone, so repeating a call, or cutting its rows differently, repeats every bit. Nothing waits for the device.
//
// 16-byte accesses where a specialist's tensors allow them (start and row stride multiples of 16 bytes), single numbers
// for the rest of such a row and for the tensors of a specialist that do not.
//
// No CUDA type crosses this header: module and callers are plain C++.
#pragma once

#include <cstdint>
#include <string>

namespace ufm {

constexpr int kMaxSpecialists = 16;  // what the kernels' parameters and shared memory are laid out for

// One specialist's tensors, rows x width; strides in elements, columns contiguous.
struct ScaleSegment {
    const void* hidden;  // h_j
    void* inputs;        // x_j, same type
    int64_t hidden_stride, input_stride, width;
    bool aligned;  // set by scale_inputs
};
struct ScaleArguments {
    const float* gate_logits;  // rows x n
    const bool* kept;          // (rows,): an ignored row gets x = 0 and equal weights, whatever it and its gate hold
    float* gate_weights;       // rows x n, out
    int64_t rows;
    int n;
    ScaleSegment segments[kMaxSpecialists];
};

struct UnscaleSegment {
    const void* hidden;     // h_j
    const float* d_inputs;  // dx_j, exactly 0 on ignored rows; null: nothing to do for this specialist
    void* d_hidden;         // dh_j; null: not wanted. May be fp32 beside 16-bit hidden
    int64_t hidden_stride, d_input_stride, d_hidden_stride, width;
    bool aligned;  // set by unscale_gradients
};
struct UnscaleArguments {
    const float* gate_weights;  // rows x n
    const bool* kept;           // (rows,): an ignored row gets da = 0
    float* d_gate;              // rows x n, the da_j; null: not wanted
    int64_t rows;
    int n;
    UnscaleSegment segments[kMaxSpecialists];
};

enum class Type { f32, f16, bf16 };

// Both launch on `stream` (a cudaStream_t) of `device` and throw std::runtime_error if the launch is refused.
void scale_inputs(Type type, ScaleArguments arguments, int device, void* stream);
// d_hidden is of type `type`, or fp32.
void unscale_gradients(Type type, Type d_hidden_type, UnscaleArguments arguments, int device, void* stream);

// "" if these kernels can run on `device`, else CUDA's reason (driver too old, no code for this GPU).
//
// All three leave `device` as the thread's current one. The caller restores the one before: only the CUDA runtime that
// the caller uses knows it for certain, this library has one of its own.
std::string why_unusable(int device);

}  // namespace ufm
