// Python border of gate_kernels.hpp: addresses, sizes and a stream only, no torch headers, so one build serves every
// torch. The caller (ultrafuser_mega/ops/gate_scale_cuda.py) answers for shapes, types and lifetimes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "gate_kernels.hpp"

namespace py = pybind11;

namespace {

template <typename T>
T* at(int64_t address) {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

template <typename Rows>
int count(const Rows& segments) {
    if (segments.empty() || segments.size() > ufm::kMaxSpecialists)
        throw py::value_error("ultrafuser_mega: 1 to " + std::to_string(ufm::kMaxSpecialists) + " specialists, not " +
                              std::to_string(segments.size()));
    return static_cast<int>(segments.size());
}

// Each segment: hidden, its row stride, inputs, their row stride, width.
void scale_inputs(ufm::Type type, int64_t gate_logits, int64_t kept, int64_t gate_weights, int64_t rows,
                  const std::vector<std::array<int64_t, 5>>& segments, int device, int64_t stream) {
    ufm::ScaleArguments a{at<const float>(gate_logits), at<const bool>(kept), at<float>(gate_weights), rows,
                          count(segments), {}};
    for (int j = 0; j < a.n; ++j) {
        const auto& [hidden, hidden_stride, inputs, input_stride, width] = segments[j];
        a.segments[j] = {at<const void>(hidden), at<void>(inputs), hidden_stride, input_stride, width, false};
    }
    ufm::scale_inputs(type, a, device, at<void>(stream));
}

// Each segment: hidden, its row stride, d_inputs (0: none), their row stride, d_hidden (0: none), its row stride, width.
void unscale_gradients(ufm::Type type, ufm::Type d_hidden_type, int64_t gate_weights, int64_t kept, int64_t d_gate,
                       int64_t rows, const std::vector<std::array<int64_t, 7>>& segments, int device, int64_t stream) {
    ufm::UnscaleArguments a{at<const float>(gate_weights), at<const bool>(kept), at<float>(d_gate), rows,
                            count(segments), {}};
    for (int j = 0; j < a.n; ++j) {
        const auto& [hidden, hidden_stride, d_inputs, d_input_stride, d_hidden, d_hidden_stride, width] = segments[j];
        a.segments[j] = {at<const void>(hidden), at<const float>(d_inputs), at<void>(d_hidden), hidden_stride,
                         d_input_stride,         d_hidden_stride,           width,              false};
    }
    ufm::unscale_gradients(type, d_hidden_type, a, device, at<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda_gate, m) {
    m.doc() = "The gate's softmax and scaling around the GEMMs of the mixture cross-entropy, on the GPU.";
    m.attr("MAX_SPECIALISTS") = ufm::kMaxSpecialists;
    py::enum_<ufm::Type>(m, "Type")
        .value("f32", ufm::Type::f32)
        .value("f16", ufm::Type::f16)
        .value("bf16", ufm::Type::bf16);
    m.def("scale_inputs", &scale_inputs);
    m.def("unscale_gradients", &unscale_gradients);
    m.def("why_unusable", &ufm::why_unusable);
}
