"""The lossless check counts every token that differs, and runs each prompt with its own seed whatever the batch."""

import pytest
from skipstone.bench.lossless import differing, main, run_arm


def test_every_difference_counts():
    assert differing([1, 2, 3], [1, 2, 3]) == 0
    assert differing([1, 9, 3], [1, 2, 3]) == 1
    assert differing([1, 2], [1, 2, 3]) == 1 and differing([1, 2, 3, 4], [1]) == 3


def test_a_prompt_keeps_its_seed_in_any_batch(engine_of):
    engine, prompts = engine_of(), [[3, 1], [4, 1, 5], [9, 2, 6]]
    options = {"temperature": 1.0, "max_new_tokens": 8, "speculation": False}
    alone, together = (run_arm(engine, prompts, batch, **options) for batch in (1, 3))
    assert [out.token_ids for out in alone] == [out.token_ids for out in together]
    assert len({tuple(out.token_ids) for out in alone}) == 3


def test_a_model_without_heads_is_refused(tiny_folder, tmp_path):
    with pytest.raises(SystemExit, match="no shipped heads"):
        main([str(tmp_path / "none.jsonl"), "--model", str(tiny_folder)])
