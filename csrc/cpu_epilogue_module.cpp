// Python border of cpu_epilogue.hpp and cpu_distillation.hpp: addresses and sizes only (tensor.data_ptr() and friends),
// no torch headers, so one build serves every torch. The callers (ultrafuser_mega/ops/epilogue_cpu.py and
// distillation_cpu.py) answer for shapes and lifetimes.
#include <pybind11/pybind11.h>

#include "cpu_distillation.hpp"
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
    m.def(("distillation_statistics_" + type).c_str(),
          [](std::uintptr_t teacher, std::uintptr_t student, std::uintptr_t target, int64_t rows, int64_t cols,
             int64_t teacher_stride, int64_t student_stride, double temperature, std::uintptr_t statistics,
             int threads) {
              py::gil_scoped_release unlocked;
              const ufm::Lesson<const T, const T> lesson{at<const T>(teacher), at<const T>(student),
                                                         at<const int64_t>(target), rows, cols, teacher_stride,
                                                         student_stride};
              ufm::distillation_statistics<T>(lesson, temperature, at<T>(statistics), threads);
          });
    m.def(("distillation_dlogits_" + type).c_str(),
          [](std::uintptr_t teacher, std::uintptr_t student, std::uintptr_t target, int64_t rows, int64_t cols,
             int64_t teacher_stride, int64_t student_stride, double temperature, double forward, double reverse,
             double labels, std::uintptr_t statistics, std::uintptr_t weight, int threads) {
              py::gil_scoped_release unlocked;
              const ufm::Lesson<const T, T> lesson{at<const T>(teacher), at<T>(student), at<const int64_t>(target),
                                                   rows, cols, teacher_stride, student_stride};
              ufm::distillation_dlogits<T>(lesson, {temperature, forward, reverse, labels}, at<const T>(statistics),
                                           at<const T>(weight), threads);
          });
    m.def(("exp_nonpositive_" + type).c_str(), [](std::uintptr_t x, std::uintptr_t y, int64_t count) {
        py::gil_scoped_release unlocked;
        ufm::exp_nonpositive<T>(at<const T>(x), at<T>(y), count);
    });
}

}  // namespace

PYBIND11_MODULE(_cpu_epilogue, m) {
    m.doc() = "Multi-threaded CPU epilogues of the chunked mixture cross-entropy and of the distillation loss.";
    m.attr("BLOCK_COLUMNS") = ufm::kBlock;
    bind<float>(m, "f32");
    bind<double>(m, "f64");
}
