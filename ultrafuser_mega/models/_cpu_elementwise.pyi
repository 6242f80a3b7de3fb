"""Types of the C++ module built from csrc/cpu_elementwise_module.cpp. Tensors cross as addresses, tensor.data_ptr()."""

def rms_norm_forward(
    x: int, weight: int, eps: float, rows: int, width: int, y: int, rstd: int, threads: int
) -> None: ...
def rms_norm_backward(
    dy: int, x: int, weight: int, rstd: int, rows: int, width: int, dx: int, dw: int, threads: int
) -> None: ...
def swiglu_forward(x: int, rows: int, width: int, y: int, threads: int) -> None: ...
def swiglu_backward(dy: int, x: int, rows: int, width: int, dx: int, threads: int) -> None: ...
def rotated_heads_forward(
    mixed: int,
    cos: int,
    sin: int,
    tokens: int,
    groups: int,
    each: int,
    half: int,
    q: int,
    k: int,
    v: int,
    threads: int,
) -> None: ...
def rotated_heads_backward(
    dq: int,
    dk: int,
    dv: int,
    cos: int,
    sin: int,
    tokens: int,
    groups: int,
    each: int,
    half: int,
    mixed: int,
    threads: int,
) -> None: ...
