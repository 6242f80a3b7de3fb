#include "gate_kernels.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

namespace ufm {
namespace {

constexpr int kThreads = 128;  // per row: 16 such blocks fill an SM, and 5120 16-bit numbers are 5 vectors per thread
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ T narrow(float x);
template <>
__device__ float narrow<float>(float x) { return x; }
template <>
__device__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// kCount neighbouring numbers, a multiple of 16 bytes at a multiple of 16 bytes.
template <int kCount, typename T>
__device__ void load(const T* from, float (&to)[kCount]) {
    constexpr int kVectors = kCount / kLanes<T>;
    alignas(kVectorBytes) T raw[kCount];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = widen(raw[i]);
}
template <int kCount, typename T>
__device__ void store(T* to, const float (&from)[kCount]) {
    constexpr int kVectors = kCount / kLanes<T>;
    alignas(kVectorBytes) T raw[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) raw[i] = narrow<T>(from[i]);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(raw)[i];
}

// The same sum in every lane, in a fixed order.
__device__ float warp_sum(float x) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// One block per row.
template <typename T>
__global__ void __launch_bounds__(kThreads) scale_inputs_kernel(const __grid_constant__ ScaleArguments a) {
    const int64_t row = blockIdx.x;
    const bool kept = a.kept[row];
    const float* const logits = a.gate_logits + row * a.n;
    float top = 0.0f, sum = static_cast<float>(a.n);
    if (kept) {
        top = logits[0];
        for (int j = 1; j < a.n; ++j) top = logits[j] > top || isnan(logits[j]) ? logits[j] : top;
        sum = 0.0f;
        for (int j = 0; j < a.n; ++j) sum += expf(logits[j] - top);
    }
    for (int j = 0; j < a.n; ++j) {
        const ScaleSegment& s = a.segments[j];
        const float w = (kept ? expf(logits[j] - top) : 1.0f) / sum;
        if (threadIdx.x == 0) a.gate_weights[row * a.n + j] = w;
        const T* const h = static_cast<const T*>(s.hidden) + row * s.hidden_stride;
        T* const x = static_cast<T*>(s.inputs) + row * s.input_stride;
        constexpr int kStep = kLanes<T>;
        const int64_t in_vectors = s.aligned ? s.width / kStep * kStep : 0;
        for (int64_t k = threadIdx.x * kStep; k < in_vectors; k += kThreads * kStep) {
            float numbers[kStep] = {};
            if (kept) load(h + k, numbers);  // an ignored row may hold NaN
#pragma unroll
            for (int i = 0; i < kStep; ++i) numbers[i] *= w;
            store(x + k, numbers);
        }
        for (int64_t k = in_vectors + threadIdx.x; k < s.width; k += kThreads)
            x[k] = narrow<T>(kept ? w * widen(h[k]) : 0.0f);
    }
}

// One block per row. T: type of the hidden states, G: of their gradients.
template <typename T, typename G>
__global__ void __launch_bounds__(kThreads) unscale_gradients_kernel(const __grid_constant__ UnscaleArguments a) {
    __shared__ float partial[kMaxSpecialists][kWarps];
    const int64_t row = blockIdx.x;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int j = 0; j < a.n; ++j) {
        const UnscaleSegment& s = a.segments[j];
        if (s.d_inputs == nullptr) continue;
        const float w = a.gate_weights[row * a.n + j];
        const T* const h = static_cast<const T*>(s.hidden) + row * s.hidden_stride;
        const float* const dx = s.d_inputs + row * s.d_input_stride;
        G* const dh = s.d_hidden == nullptr ? nullptr : static_cast<G*>(s.d_hidden) + row * s.d_hidden_stride;
        float dot = 0.0f;
        constexpr int kStep = kLanes<T>;
        const int64_t in_vectors = s.aligned ? s.width / kStep * kStep : 0;
        for (int64_t k = threadIdx.x * kStep; k < in_vectors; k += kThreads * kStep) {
            float states[kStep], gradients[kStep];
            load(dx + k, gradients);
            if (a.d_gate != nullptr) {
                load(h + k, states);
#pragma unroll
                for (int i = 0; i < kStep; ++i) dot = fmaf(states[i], gradients[i], dot);
            }
            if (dh != nullptr) {
#pragma unroll
                for (int i = 0; i < kStep; ++i) gradients[i] *= w;
                store(dh + k, gradients);
            }
        }
        for (int64_t k = in_vectors + threadIdx.x; k < s.width; k += kThreads) {
            const float gradient = dx[k];
            if (a.d_gate != nullptr) dot = fmaf(widen(h[k]), gradient, dot);
            if (dh != nullptr) dh[k] = narrow<G>(w * gradient);
        }
        if (a.d_gate == nullptr) continue;
        dot = warp_sum(dot);
        if (lane == 0) partial[j][warp] = dot;
    }
    if (a.d_gate == nullptr) return;
    __syncthreads();
    if (warp > 0) return;
    float w = 0.0f, dw = 0.0f;
    if (lane < a.n && a.segments[lane].d_inputs != nullptr) {
        w = a.gate_weights[row * a.n + lane];
        for (int i = 0; i < kWarps; ++i) dw += partial[lane][i];
    }
    float from_mean = 0.0f;
    for (int k = 0; k < a.n; ++k)
        from_mean += __shfl_sync(0xffffffffu, w, k) * (dw - __shfl_sync(0xffffffffu, dw, k));
    if (lane < a.n) a.d_gate[row * a.n + lane] = a.kept[row] ? w * from_mean : 0.0f;
}

int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }
bool whole_vectors(const void* start, int64_t row_stride, int64_t element_bytes) {
    return reinterpret_cast<std::uintptr_t>(start) % kVectorBytes == 0 && row_stride * element_bytes % kVectorBytes == 0;
}

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("ultrafuser_mega: ") + what + ": " + cudaGetErrorString(status));
}

template <typename Kernel, typename Arguments>
void launch(Kernel kernel, const Arguments& arguments, int device, void* stream, const char* what) {
    if (arguments.rows == 0) return;
    check(cudaSetDevice(device), what);  // this library's own CUDA runtime does not know what PyTorch's has chosen
    const dim3 grid(static_cast<unsigned>(arguments.rows));
    kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
    check(cudaGetLastError(), what);
}

}  // namespace

void scale_inputs(Type type, ScaleArguments a, int device, void* stream) {
    for (int j = 0; j < a.n; ++j) {
        ScaleSegment& s = a.segments[j];
        s.aligned = whole_vectors(s.hidden, s.hidden_stride, bytes_of(type)) &&
                    whole_vectors(s.inputs, s.input_stride, bytes_of(type));
    }
    const auto run = [&](auto kernel) { launch(kernel, a, device, stream, "scale_inputs"); };
    switch (type) {
        case Type::f32: return run(scale_inputs_kernel<float>);
        case Type::f16: return run(scale_inputs_kernel<__half>);
        case Type::bf16: return run(scale_inputs_kernel<__nv_bfloat16>);
    }
}

void unscale_gradients(Type type, Type d_hidden_type, UnscaleArguments a, int device, void* stream) {
    for (int j = 0; j < a.n; ++j) {
        UnscaleSegment& s = a.segments[j];
        s.aligned = whole_vectors(s.hidden, s.hidden_stride, bytes_of(type)) &&
                    whole_vectors(s.d_inputs, s.d_input_stride, bytes_of(Type::f32)) &&
                    whole_vectors(s.d_hidden, s.d_hidden_stride, bytes_of(d_hidden_type));
    }
    const bool wide = d_hidden_type == Type::f32;
    if (!wide && d_hidden_type != type)
        throw std::runtime_error("ultrafuser_mega: unscale_gradients: d_hidden must have the type of hidden, or fp32");
    const auto run = [&](auto kernel) { launch(kernel, a, device, stream, "unscale_gradients"); };
    switch (type) {
        case Type::f32: return run(unscale_gradients_kernel<float, float>);
        case Type::f16:
            return wide ? run(unscale_gradients_kernel<__half, float>) : run(unscale_gradients_kernel<__half, __half>);
        case Type::bf16:
            return wide ? run(unscale_gradients_kernel<__nv_bfloat16, float>)
                        : run(unscale_gradients_kernel<__nv_bfloat16, __nv_bfloat16>);
    }
}

std::string why_unusable(int device) {
    cudaFuncAttributes attributes;
    cudaError_t status = cudaSetDevice(device);
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, scale_inputs_kernel<float>);
    cudaGetLastError();  // an answer, not an error for a later launch to report
    return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

}  // namespace ufm
