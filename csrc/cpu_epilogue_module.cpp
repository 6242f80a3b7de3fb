// Python border of cpu_epilogue.hpp: addresses and sizes only (tensor.data_ptr() and friends), no torch headers, so
// one build serves every torch. The caller (ultrafuser_mega/ops/epilogue_cpu.py) answers for shapes and lifetimes.
#include <pybind11/pybind11.h>

#include "cpu_epilogue.hpp"

namespace py = pybind11;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <typename T>
ufm::Chunk<T> chunk_at(std::uintptr_t logits, std::uintptr_t target, int64_t rows, int64_t cols, int64_t row_stride) {
    return {at<T>(logits), at<const int64_t>(target), rows, cols, row_stride};
}

template <typename T>
void bind(py::module_& m, const char* suffix) {
    const std::string type(suffix);
    m.def(("row_statistics_" + type).c_str(),
          [](std::uintptr_t logits, std::uintptr_t target, int64_t rows, int64_t cols, int64_t row_stride,
             std::uintptr_t statistics, std::uintptr_t block_max, int threads) {
              py::gil_scoped_release unlocked;
              ufm::row_statistics<T>(chunk_at<T>(logits, target, rows, cols, row_stride), at<T>(statistics),
                                     at<T>(block_max), threads);
          });
    m.def(("dlogits_" + type).c_str(),
          [](std::uintptr_t logits, std::uintptr_t target, int64_t rows, int64_t cols, int64_t row_stride,
             std::uintptr_t block_max, std::uintptr_t row_max, std::uintptr_t a, std::uintptr_t b, std::uintptr_t c,
             int threads) {
              py::gil_scoped_release unlocked;
              ufm::dlogits<T>(chunk_at<T>(logits, target, rows, cols, row_stride), at<const T>(block_max),
                              at<const T>(row_max), at<const T>(a), at<const T>(b), at<const T>(c), threads);
          });
    m.def(("mixture_statistics_" + type).c_str(),
          [](std::uintptr_t logits, std::uintptr_t target, int64_t rows, int64_t cols, int64_t row_stride,
             int64_t plane_stride, int64_t specialists, std::uintptr_t weights, std::uintptr_t statistics,
             int threads) {
              py::gil_scoped_release unlocked;
              ufm::mixture_statistics<T>(chunk_at<const T>(logits, target, rows, cols, row_stride), plane_stride,
                                         specialists, at<const T>(weights), at<T>(statistics), threads);
          });
    m.def(("mixture_dlogits_" + type).c_str(),
          [](std::uintptr_t logits, std::uintptr_t target, int64_t rows, int64_t cols, int64_t row_stride,
             int64_t plane_stride, int64_t specialists, std::uintptr_t weights, std::uintptr_t row_max,
             std::uintptr_t a, std::uintptr_t b, std::uintptr_t c, int threads) {
              py::gil_scoped_release unlocked;
              ufm::mixture_dlogits<T>(chunk_at<T>(logits, target, rows, cols, row_stride), plane_stride, specialists,
                                      at<const T>(weights), at<const T>(row_max), at<const T>(a), at<const T>(b),
                                      at<const T>(c), threads);
          });
    m.def(("exp_nonpositive_" + type).c_str(), [](std::uintptr_t x, std::uintptr_t y, int64_t count) {
        py::gil_scoped_release unlocked;
        ufm::exp_nonpositive<T>(at<const T>(x), at<T>(y), count);
    });
}

}  // namespace

PYBIND11_MODULE(_cpu_epilogue, m) {
    m.doc() = "Multi-threaded CPU epilogue of the chunked mixture cross-entropy.";
    m.attr("BLOCK_COLUMNS") = ufm::kBlock;
    bind<float>(m, "f32");
    bind<double>(m, "f64");
}
