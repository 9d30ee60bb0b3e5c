"""remend eval on the real model: batches of another size part the answers at near ties only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from remend.data import tasks
from remend.data.examples import example_of
from remend.data.templates import encode
from remend.evaluation.job import evaluate
from remend.models.find import find_model
from remend.models.load import load_tokenizer

pytestmark = pytest.mark.slow


def test_answers_in_other_batches_part_at_near_ties_only(smollm2_dir: Path, tmp_path: Path) -> None:
    runs = [
        evaluate(str(smollm2_dir), ["general"], tmp_path / f"{rows}.json", limit=12, max_new_tokens=32, batch_rows=rows)
        for rows in (12, 5)
    ]
    tokenizer, model = load_tokenizer(find_model(str(smollm2_dir))), AutoModelForCausalLM.from_pretrained(smollm2_dir)
    parted = 0
    for row, *items in zip(tasks.get("general").rows("held_out", 12), *(run["items"] for run in runs), strict=True):
        one, other = (tokenizer(item["answer"], add_special_tokens=False)["input_ids"] for item in items)
        if one == other:
            continue
        parted += 1
        at = next(i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
        context = [*encode(tokenizer, example_of(row, "row")).tokens, *one[:at]]
        with torch.no_grad():
            best = model(torch.tensor([context])).logits[0, -1].topk(2).values
        assert best[0] - best[1] < 1e-3 * best[0]
    assert parted <= 2
