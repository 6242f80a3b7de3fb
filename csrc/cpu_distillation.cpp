#include "cpu_distillation.hpp"

#include "cpu_loops.hpp"
#include "over_rows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ufm {
namespace {

constexpr int64_t kStep = 1024;  // columns between two looks at the maxima: both models' stay in L1 meanwhile
enum { kTeacherMax, kStudentMax, kTeacherSum, kStudentSum, kForward, kReverse, kLabelSum, kLabel };

// As in cpu_mixture.cpp each loop is in a function of its own with restricted pointers, a template for both types, and
// has clones for the one that must be fast.

// A logit relative to its row's largest, no lower than -1e30: -inf times a probability of 0 would be NaN.
template <typename T>
UFM_INLINE T floored(T relative) {
    constexpr T kFloor = T(-1e30);
    return relative < kFloor ? kFloor : relative;
}

template <typename T>
struct Tops {
    T teacher, student;
};

template <typename T>
UFM_INLINE Tops<T> maxima(const T* __restrict z, const T* __restrict s, int64_t count) {
    T z_top = -std::numeric_limits<T>::infinity(), s_top = z_top;
#pragma omp simd reduction(max : z_top, s_top)
    for (int64_t v = 0; v < count; ++v) {
        z_top = z[v] > z_top ? z[v] : z_top;
        s_top = s[v] > s_top ? s[v] : s_top;
    }
    return {z_top, s_top};
}
UFM_MULTIVERSION Tops<float> tops_of(const float* z, const float* s, int64_t count) { return maxima(z, s, count); }
Tops<double> tops_of(const double* z, const double* s, int64_t count) { return maxima(z, s, count); }

template <typename T>
struct Sums {
    T teacher, student, forward, reverse, labels;
};

template <typename T, bool kTempered>
UFM_INLINE Sums<T> sums(const T* __restrict z, const T* __restrict s, Tops<T> origins, T inverse, int64_t count) {
    const auto [z_top, s_top] = origins;
    T teacher = 0, student = 0, forward = 0, reverse = 0, labels = 0;
#pragma omp simd reduction(+ : teacher, student, forward, reverse, labels)
    for (int64_t v = 0; v < count; ++v) {
        const T own = s[v] - s_top, y = (z[v] - z_top) * inverse, r = own * inverse;
        const T known = exp_nonpositive_one(y), e = exp_nonpositive_one(r), apart = floored(y) - floored(r);
        teacher += known;
        student += e;
        forward += known * apart;
        reverse += e * apart;
        if (kTempered) labels += exp_nonpositive_one(own);
    }
    return {teacher, student, forward, -reverse, kTempered ? labels : student};
}
UFM_MULTIVERSION Sums<float> plain_sums(const float* z, const float* s, Tops<float> origins, int64_t count) {
    return sums<float, false>(z, s, origins, 1.0f, count);
}
UFM_MULTIVERSION Sums<float> tempered_sums(const float* z, const float* s, Tops<float> origins, float inverse,
                                           int64_t count) {
    return sums<float, true>(z, s, origins, inverse, count);
}
Sums<float> sums_of(const float* z, const float* s, Tops<float> origins, float inverse, int64_t count) {
    return inverse == 1.0f ? plain_sums(z, s, origins, count) : tempered_sums(z, s, origins, inverse, count);
}
Sums<double> sums_of(const double* z, const double* s, Tops<double> origins, double inverse, int64_t count) {
    return sums<double, true>(z, s, origins, inverse, count);
}

// The sums of some of a row's columns, with the maxima that they are relative to.
struct Part {
    double teacher_max, student_max;
    Sums<double> sums;
};

// exp of what a maximum lies below a larger one; 0 where there was none.
double rescale(double top, double below) { return std::isinf(top) ? 0.0 : below == 0.0 ? 1.0 : std::exp(below); }

// The same columns' sums, relative to maxima that are no smaller.
Sums<double> relative_to(double teacher_max, double student_max, const Part& part, double temperature) {
    const double z_below = (part.teacher_max - teacher_max) / temperature;
    const double s_below = (part.student_max - student_max) / temperature;
    const double known = rescale(part.teacher_max, z_below), own = rescale(part.student_max, s_below);
    const bool both = !std::isinf(part.teacher_max) && !std::isinf(part.student_max);
    const double apart = both ? z_below - s_below : 0.0;
    const Sums<double>& of = part.sums;
    return {known * of.teacher, own * of.student, known * (of.forward + apart * of.teacher),
            own * (of.reverse - apart * of.student),
            rescale(part.student_max, part.student_max - student_max) * of.labels};
}

Part together(const Part& a, const Part& b, double temperature) {
    const double z_top = std::max(a.teacher_max, b.teacher_max), s_top = std::max(a.student_max, b.student_max);
    const Sums<double> x = relative_to(z_top, s_top, a, temperature), y = relative_to(z_top, s_top, b, temperature);
    return {z_top, s_top, {x.teacher + y.teacher, x.student + y.student, x.forward + y.forward,
                           x.reverse + y.reverse, x.labels + y.labels}};
}

template <typename T>
void one_row(const T* z, const T* s, int64_t cols, int64_t target, double temperature, T* statistics) {
    const T minus_infinity = -std::numeric_limits<T>::infinity(), inverse = static_cast<T>(1.0 / temperature);
    Part row{minus_infinity, minus_infinity, {0, 0, 0, 0, 0}};
    for (int64_t begin = 0; begin < cols; begin += kStep) {
        const int64_t count = std::min(kStep, cols - begin);
        const Tops<T> tops = tops_of(z + begin, s + begin, count);
        const Tops<T> origins{tops.teacher == minus_infinity ? T(0) : tops.teacher,
                              tops.student == minus_infinity ? T(0) : tops.student};
        const Sums<T> found = sums_of(z + begin, s + begin, origins, inverse, count);
        const Part part{tops.teacher, tops.student,
                        {found.teacher, found.student, found.forward, found.reverse, found.labels}};
        row = begin == 0 ? part : together(row, part, temperature);
    }
    statistics[kTeacherMax] = static_cast<T>(row.teacher_max);
    statistics[kStudentMax] = static_cast<T>(row.student_max);
    statistics[kTeacherSum] = static_cast<T>(row.sums.teacher);
    statistics[kStudentSum] = static_cast<T>(row.sums.student);
    statistics[kForward] = static_cast<T>(row.sums.forward);
    statistics[kReverse] = static_cast<T>(row.sums.reverse);
    statistics[kLabelSum] = static_cast<T>(row.sums.labels);
    const bool here = target >= 0 && target < cols && row.student_max != minus_infinity;
    statistics[kLabel] = here ? s[target] - statistics[kStudentMax] : minus_infinity;
}

// Of a row: ds = exp(r) (own - apart D) - exp(y) known + exp(r T) labels.
template <typename T>
struct Factors {
    T teacher_max, student_max, inverse, own, apart, known, labels;
};

template <typename T, bool kForwardShare, bool kReverseShare, bool kLabelsApart>
UFM_INLINE void gradient(const T* __restrict z, T* __restrict s, const Factors<T>& factors, int64_t count) {
    const auto [z_top, s_top, inverse, own, apart, known, labels] = factors;
#pragma omp simd
    for (int64_t v = 0; v < count; ++v) {
        const T plain = s[v] - s_top, y = (z[v] - z_top) * inverse, r = plain * inverse;
        T factor = own;
        if (kReverseShare) factor -= apart * (floored(y) - floored(r));
        T ds = exp_nonpositive_one(r) * factor;
        if (kForwardShare) ds -= exp_nonpositive_one(y) * known;
        if (kLabelsApart) ds += exp_nonpositive_one(plain) * labels;
        s[v] = ds;
    }
}
UFM_MULTIVERSION void forward_gradient(const float* z, float* s, const Factors<float>& factors, int64_t count) {
    gradient<float, true, false, false>(z, s, factors, count);
}
UFM_MULTIVERSION void reverse_gradient(const float* z, float* s, const Factors<float>& factors, int64_t count) {
    gradient<float, false, true, false>(z, s, factors, count);
}
UFM_MULTIVERSION void both_gradient(const float* z, float* s, const Factors<float>& factors, int64_t count) {
    gradient<float, true, true, false>(z, s, factors, count);
}
UFM_MULTIVERSION void whole_gradient(const float* z, float* s, const Factors<float>& factors, int64_t count) {
    gradient<float, true, true, true>(z, s, factors, count);
}
void gradient_of(const float* z, float* s, const Factors<float>& factors, int64_t count) {
    if (factors.labels != 0) return whole_gradient(z, s, factors, count);
    if (factors.apart == 0) return forward_gradient(z, s, factors, count);
    if (factors.known == 0) return reverse_gradient(z, s, factors, count);
    both_gradient(z, s, factors, count);
}
void gradient_of(const double* z, double* s, const Factors<double>& factors, int64_t count) {
    gradient<double, true, true, true>(z, s, factors, count);
}

template <typename T>
Factors<T> factors_of(const Shares& shares, const T* statistics, double weight) {
    const double inverse = 1.0 / shares.temperature;
    const double own_sum = statistics[kStudentSum], known_sum = statistics[kTeacherSum];
    const double forward = weight * shares.forward * inverse, reverse = weight * shares.reverse * inverse;
    const double labels = weight * shares.labels;
    const bool tempered = shares.temperature != 1.0 && labels != 0;
    const double mean = reverse == 0 ? 0.0 : statistics[kReverse] / own_sum;
    const double own = forward + (tempered ? 0.0 : labels) - reverse * mean;
    const auto origin = [](T top) { return std::isinf(top) && top < 0 ? T(0) : top; };
    return {origin(statistics[kTeacherMax]),
            origin(statistics[kStudentMax]),
            static_cast<T>(inverse),
            static_cast<T>(own / own_sum),
            static_cast<T>(reverse / own_sum),
            static_cast<T>(forward / known_sum),
            tempered ? static_cast<T>(labels / double(statistics[kLabelSum])) : T(0)};
}

}  // namespace

template <typename T>
void distillation_statistics(const Lesson<const T, const T>& lesson, double temperature, T* statistics, int threads) {
    over_rows(lesson.rows, 2 * lesson.cols, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            one_row(lesson.teacher + i * lesson.teacher_stride, lesson.student + i * lesson.student_stride, lesson.cols,
                    lesson.target[i], temperature, statistics + i * kLessonColumns);
    });
}

template <typename T>
void distillation_dlogits(const Lesson<const T, T>& lesson, const Shares& shares, const T* statistics, const T* weight,
                          int threads) {
    over_rows(lesson.rows, 2 * lesson.cols, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            T* const s = lesson.student + i * lesson.student_stride;
            if (weight[i] == T(0)) {
                std::fill_n(s, lesson.cols, T(0));
                continue;
            }
            const Factors<T> factors = factors_of(shares, statistics + i * kLessonColumns, double(weight[i]));
            gradient_of(lesson.teacher + i * lesson.teacher_stride, s, factors, lesson.cols);
            const int64_t target = lesson.target[i];
            if (target >= 0 && target < lesson.cols) s[target] -= static_cast<T>(weight[i] * shares.labels);
        }
    });
}

template void distillation_statistics<float>(const Lesson<const float, const float>&, double, float*, int);
template void distillation_statistics<double>(const Lesson<const double, const double>&, double, double*, int);
template void distillation_dlogits<float>(const Lesson<const float, float>&, const Shares&, const float*, const float*,
                                          int);
template void distillation_dlogits<double>(const Lesson<const double, double>&, const Shares&, const double*,
                                           const double*, int);

}  // namespace ufm
