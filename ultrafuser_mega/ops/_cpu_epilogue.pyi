"""Types of the C++ module built from csrc/cpu_epilogue_module.cpp. Tensors cross as addresses (tensor.data_ptr())."""

BLOCK_COLUMNS: int

def row_statistics_f32(
    logits: int, target: int, rows: int, cols: int, row_stride: int, statistics: int, block_max: int, threads: int
) -> None: ...
def row_statistics_f64(
    logits: int, target: int, rows: int, cols: int, row_stride: int, statistics: int, block_max: int, threads: int
) -> None: ...
def dlogits_f32(
    logits: int,
    target: int,
    rows: int,
    cols: int,
    row_stride: int,
    block_max: int,
    row_max: int,
    a: int,
    b: int,
    c: int,
    threads: int,
) -> None: ...
def dlogits_f64(
    logits: int,
    target: int,
    rows: int,
    cols: int,
    row_stride: int,
    block_max: int,
    row_max: int,
    a: int,
    b: int,
    c: int,
    threads: int,
) -> None: ...
def mixture_statistics_f32(
    logits: int,
    target: int,
    rows: int,
    cols: int,
    row_stride: int,
    plane_stride: int,
    specialists: int,
    weights: int,
    statistics: int,
    threads: int,
) -> None: ...
def mixture_statistics_f64(
    logits: int,
    target: int,
    rows: int,
    cols: int,
    row_stride: int,
    plane_stride: int,
    specialists: int,
    weights: int,
    statistics: int,
    threads: int,
) -> None: ...
def mixture_dlogits_f32(
    logits: int,
    target: int,
    rows: int,
    cols: int,
    row_stride: int,
    plane_stride: int,
    specialists: int,
    weights: int,
    row_max: int,
    a: int,
    b: int,
    c: int,
    threads: int,
) -> None: ...
def mixture_dlogits_f64(
    logits: int,
    target: int,
    rows: int,
    cols: int,
    row_stride: int,
    plane_stride: int,
    specialists: int,
    weights: int,
    row_max: int,
    a: int,
    b: int,
    c: int,
    threads: int,
) -> None: ...
def distillation_statistics_f32(
    teacher: int,
    student: int,
    target: int,
    rows: int,
    cols: int,
    teacher_stride: int,
    student_stride: int,
    temperature: float,
    statistics: int,
    threads: int,
) -> None: ...

distillation_statistics_f64 = distillation_statistics_f32

def distillation_dlogits_f32(
    teacher: int,
    student: int,
    target: int,
    rows: int,
    cols: int,
    teacher_stride: int,
    student_stride: int,
    temperature: float,
    forward: float,
    reverse: float,
    labels: float,
    statistics: int,
    weight: int,
    threads: int,
) -> None: ...

distillation_dlogits_f64 = distillation_dlogits_f32

def exp_nonpositive_f32(x: int, y: int, count: int) -> None: ...
def exp_nonpositive_f64(x: int, y: int, count: int) -> None: ...
