// The softmax work that stands between the GEMMs of the distillation loss, on the CPU: distillation_statistics.py has the
// formulas. Teacher's and student's logits, z and s, are rows x cols each.
//
// Rows are independent and every row is summed in one fixed order, so results do not depend on `threads`.
#pragma once

#include <cstdint>

namespace ufm {

constexpr int64_t kLessonColumns = 8;  // numbers per row of statistics

template <typename Z, typename S>
struct Lesson {
    Z* teacher;             // row i at teacher + i * teacher_stride
    S* student;             // row i at student + i * student_stride
    const int64_t* target;  // (rows,) column of the target, any value outside [0, cols) if it is not here
    int64_t rows, cols, teacher_stride, student_stride;
};

// What the loss of a row is made of: factors of KL(p | q), of KL(q | p) and of the labels' cross-entropy.
struct Shares {
    double temperature, forward, reverse, labels;
};

// statistics: (rows, 8). Both divergences' sums are formed, whatever the loss asks for.
template <typename T>
void distillation_statistics(const Lesson<const T, const T>& lesson, double temperature, T* statistics, int threads);

// The gradient in the student's place. statistics: (rows, 8) of the whole vocabulary; weight: (rows,), of every row's
// loss. A row of weight 0 becomes exactly zero, whatever it held.
template <typename T>
void distillation_dlogits(const Lesson<const T, T>& lesson, const Shares& shares, const T* statistics, const T* weight,
                          int threads);

}  // namespace ufm
