"""Bad input is refused in one line that names the argument, what it is, and what would work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.ops import mixture_cross_entropy


def good() -> Any:
    return {
        "hidden": [torch.randn(4, 3), torch.randn(4, 5)],
        "head_weight": [torch.randn(7, 3), torch.randn(7, 5)],
        "gate_logits": torch.randn(4, 2),
        "target": torch.tensor([0, 6, -100, 3]),
    }


BAD = {
    "one head too few": ({"head_weight": [torch.randn(7, 3)]}, r"hidden, head_weight: 2 and 1 tensors"),
    "no specialist": ({"hidden": [], "head_weight": []}, "needed one of each per specialist"),
    "integer states": ({"hidden": [torch.ones(4, 3).long()] * 2}, r"hidden\[0\]: dtype torch.int64"),
    "rows differ": ({"hidden": [torch.randn(4, 3), torch.randn(5, 5)]}, r"hidden\[1\]: shape \(5, 5\).*N = 4"),
    "head too narrow": ({"head_weight": [torch.randn(7, 3), torch.randn(7, 4)]}, r"head_weight\[1\]: shape \(7, 4\)"),
    "heads of different rows": (
        {"head_weight": [torch.randn(7, 3), torch.randn(8, 5)]},
        r"head_weight\[1\]: shape \(8, 5\), needed \(7, 5\)",
    ),
    "mixed types": (
        {"hidden": [torch.randn(4, 3), torch.randn(4, 5).bfloat16()]},
        r"hidden\[1\]: dtype torch.bfloat16, needed torch.float32",
    ),
    "gate of another shape": ({"gate_logits": torch.randn(4, 3)}, r"gate_logits: shape \(4, 3\), needed \(4, 2\)"),
    "gate in 16 bits": ({"gate_logits": torch.randn(4, 2).half()}, "gate_logits: dtype torch.float16"),
    "target too short": ({"target": torch.tensor([0, 1])}, r"target: shape \(2,\), needed \(4,\)"),
    "target of 32 bits": ({"target": torch.zeros(4, dtype=torch.int32)}, "target: dtype torch.int32"),
    "target outside": ({"target": torch.tensor([0, 1, 7, 2])}, r"target: row 2 is 7, outside \[0, 7\)"),
    "negative target": ({"target": torch.tensor([0, -1, 3, 2])}, r"target: row 1 is -1"),
    "target in the padding": ({"vocab_size": 6}, r"target: row 1 is 6, outside \[0, 6\)"),
    "another device": ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, "target: on meta, needed cpu"),
    "unknown reduction": ({"reduction": "avg"}, "reduction: 'avg' is none of mean, sum, none"),
    "smoothing above one": ({"label_smoothing": 1.5}, r"label_smoothing: 1.5 lies outside \[0, 1\]"),
    "negative z-loss": ({"z_loss": -1.0}, "z_loss: -1.0"),
    "unknown backend": ({"backend": "fast"}, "backend: 'fast' is none of auto, reference"),
    "vocabulary without a holder": ({"vocab_size": 9}, "vocab_size: 9 exceeds the 7 head rows given"),
    "empty vocabulary": ({"vocab_size": 0}, "vocab_size: 0 must be at least 1"),
    "hidden is None": ({"hidden": None}, "hidden: None, needed a list of tensors"),
    "hidden is one tensor": ({"hidden": torch.randn(2, 4, 3)}, "hidden: a Tensor, needed a list of tensors"),
    "hidden is a generator": ({"hidden": (h for h in list[int]())}, "hidden: a generator, needed a list of tensors"),
    "heads by name": ({"head_weight": {"text": torch.randn(7, 3)}}, "head_weight: a dict, needed a list of tensors"),
    "a hidden is None": ({"hidden": [torch.randn(4, 3), None]}, r"hidden\[1\]: None, needed a tensor"),
    "a head is a list": ({"head_weight": [[1.0], torch.randn(7, 5)]}, r"head_weight\[0\]: a list, needed a tensor"),
    "gate is None": ({"gate_logits": None}, "gate_logits: None, needed a tensor"),
    "target is a list": ({"target": [0, 6, -100, 3]}, "target: a list, needed a tensor"),
    "smoothing is text": ({"label_smoothing": "0.1"}, "label_smoothing: '0.1', needed a number"),
    "smoothing is a flag": ({"label_smoothing": True}, "label_smoothing: True, needed a number"),
    "z-loss is None": ({"z_loss": None}, "z_loss: None, needed a number"),
    "vocabulary is text": ({"vocab_size": "7"}, "vocab_size: '7', needed an integer"),
    "vocabulary is a fraction": ({"vocab_size": 7.0}, "vocab_size: 7.0, needed an integer"),
    "start is None": ({"vocab_start": None}, "vocab_start: None, needed an integer"),
    "ignored id is None": ({"ignore_index": None}, "ignore_index: None, needed an integer"),
    "reduction is None": ({"reduction": None}, "reduction: None is none of mean, sum, none"),
    "group is a name": ({"group": "fusion"}, "group: 'fusion', needed a process group or None"),
    "buffers are text": ({"head_main_grad": ["x", None]}, r"head_main_grad\[0\]: 'x', needed a tensor"),
    "buffers are a generator": (
        {"head_main_grad": (b for b in list[int]())},
        "head_main_grad: a generator, needed a list",
    ),
    "start without a group": ({"vocab_start": 2}, "vocab_start: 2 must be 0 without a group"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_in_one_line(what: Any) -> None:
    change, message = BAD[what]
    with pytest.raises(InputError, match=message) as caught:
        mixture_cross_entropy(**(good() | change))
    assert "\n" not in str(caught.value)


def test_the_good_input_these_differ_from_is_accepted() -> None:
    assert torch.isfinite(mixture_cross_entropy(**good()))


def test_lists_numbers_and_heads_may_come_in_their_usual_other_forms() -> None:
    given = good()
    given["hidden"] = tuple(given["hidden"])
    given["head_weight"] = torch.nn.ParameterList(given["head_weight"])
    numbers: dict[str, Any] = {"label_smoothing": np.float32(0.1), "z_loss": 0, "vocab_size": np.int64(7)}
    loss = mixture_cross_entropy(**given, **numbers)
    assert torch.isfinite(loss)
