// Python border of cpu_elementwise.hpp: addresses and sizes only, no torch headers, so one build serves every torch. The
// caller (ultrafuser_mega/models/elementwise_cpu.py) answers for shapes and lifetimes.
#include <pybind11/pybind11.h>

#include "cpu_elementwise.hpp"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

const float* in(Address address) { return reinterpret_cast<const float*>(address); }
float* out(Address address) { return reinterpret_cast<float*>(address); }

}  // namespace

PYBIND11_MODULE(_cpu_elementwise, m) {
    m.doc() = "Norm, SwiGLU and rotated heads of a decoder layer on a CPU, fp32, multi-threaded.";
    using unlocked = py::call_guard<py::gil_scoped_release>;
    m.def(
        "rms_norm_forward",
        [](Address x, Address weight, float eps, int64_t rows, int64_t width, Address y, Address rstd, int threads) {
            ufm::rms_norm_forward(in(x), in(weight), eps, rows, width, out(y), out(rstd), threads);
        },
        unlocked());
    m.def(
        "rms_norm_backward",
        [](Address dy, Address x, Address weight, Address rstd, int64_t rows, int64_t width, Address dx, Address dw,
           int threads) {
            ufm::rms_norm_backward(in(dy), in(x), in(weight), in(rstd), rows, width, out(dx), out(dw), threads);
        },
        unlocked());
    m.def(
        "swiglu_forward",
        [](Address x, int64_t rows, int64_t width, Address y, int threads) {
            ufm::swiglu_forward(in(x), rows, width, out(y), threads);
        },
        unlocked());
    m.def(
        "swiglu_backward",
        [](Address dy, Address x, int64_t rows, int64_t width, Address dx, int threads) {
            ufm::swiglu_backward(in(dy), in(x), rows, width, out(dx), threads);
        },
        unlocked());
    m.def(
        "rotated_heads_forward",
        [](Address mixed, Address cos, Address sin, int64_t tokens, int64_t groups, int64_t each, int64_t half,
           Address q, Address k, Address v, int threads) {
            ufm::rotated_heads_forward(in(mixed), in(cos), in(sin), {tokens, groups, each, half}, out(q), out(k),
                                       out(v), threads);
        },
        unlocked());
    m.def(
        "rotated_heads_backward",
        [](Address dq, Address dk, Address dv, Address cos, Address sin, int64_t tokens, int64_t groups, int64_t each,
           int64_t half, Address mixed, int threads) {
            ufm::rotated_heads_backward(in(dq), in(dk), in(dv), in(cos), in(sin), {tokens, groups, each, half},
                                        out(mixed), threads);
        },
        unlocked());
}
