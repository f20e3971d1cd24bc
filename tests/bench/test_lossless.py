"""The lossless check counts every token that differs, and runs each prompt with its own seed whatever the batch.

Planted bugs seen to fail here: a speculative answer with one wrong token, seeds that follow the place in the batch, a
plain run that is made with the drafting policy.
"""

import json

import pytest
import torch
from skipstone.bench.arms import with_bare_heads
from skipstone.bench.lossless import MODES, SAMPLINGS, Arm, Comparison, differing, main, parse_arms, run_arm

PROMPTS = [[3, 1], [4, 1, 5], [9, 2, 6]]


def test_every_difference_counts():
    assert differing([1, 2, 3], [1, 2, 3]) == 0
    assert differing([1, 9, 3], [1, 2, 3]) == 1
    assert differing([1, 2], [1, 2, 3]) == 1 and differing([1, 2, 3, 4], [1]) == 3


def test_a_prompt_keeps_its_seed_in_any_batch(engine_of):
    engine = engine_of()
    options = {"temperature": 1.0, "max_new_tokens": 8, "speculation": False}
    alone, together = (run_arm(engine, PROMPTS, batch, **options) for batch in (1, 3))
    assert [out.token_ids for out in alone] == [out.token_ids for out in together]
    assert len({tuple(out.token_ids) for out in alone}) == 3


def test_arms_from_their_names():
    found = parse_arms("chain,tree:1,8:greedy recurrent:3:sampled,filtered chain:1:greedy")
    assert [(arm.mode, arm.batch, arm.sampling) for arm in found] == [
        ("chain", 1, "greedy"), ("tree", 1, "greedy"), ("chain", 8, "greedy"), ("tree", 8, "greedy"),
        ("recurrent", 3, "sampled"), ("recurrent", 3, "filtered"),
    ]  # fmt: skip
    for wrong in ("chain", "chain:0:greedy", "chain:x:greedy", "chains:1:greedy", "chain:1:hot"):
        with pytest.raises(ValueError, match="expected MODES:BATCHES:SAMPLINGS"):
            parse_arms(wrong)


@pytest.fixture
def engines(engine_of, stateful):
    """One model's weights with untrained heads of each kind."""
    recurrent = engine_of()
    stateful(recurrent, "recurrent")
    return {"adapter": with_bare_heads(engine_of(), [1, 2, 3]), "recurrent": recurrent}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_mode_is_lossless_and_drafts(sampling, engines):
    comparison = Comparison(engines.__getitem__, PROMPTS, 10)
    rows = [row for mode in MODES for row in comparison.rows(Arm(mode, 2, sampling))]
    assert [row["mode"] for row in rows] == ["plain", *MODES], "plain decoding is run once"
    assert rows[0]["acceptance_rate"] is None and "differing_tokens" not in rows[0]
    for row in rows[1:]:
        assert row["differing_tokens"] == 0 and row["differing_prompts"] == [] and row["errors"] == 0, row
        assert row["tokens"] == 30 and row["acceptance_rate"] is not None and row["seconds"] >= 0.0


def test_a_target_that_skips_neurons_is_compared_with_its_own_plain_decoding(tiny_folder, tmp_path, monkeypatch):
    from skipstone.bench import lossless
    from skipstone.engine.load import load
    from skipstone.engine.sparsity.recipe import Recipe, follow
    from skipstone.engine.sparsity.selection import MaskOptions

    text, questions, out = (tmp_path / name for name in ("text.txt", "questions.jsonl", "out.json"))
    text.write_text("a stone skips over the water and the rain falls on the stones. " * 60)
    questions.write_text(
        json.dumps({"question_id": 1, "category": "qa", "turns": ["rain falls on stones " * 8]}) + "\n"
    )
    options = MaskOptions(refresh=8)
    follow(Recipe(str(tiny_folder), text, tmp_path / "tda", density=0.5, options=options), torch.float32)

    def bare(model, **given):
        return with_bare_heads(load(model, **given | {"heads": None, "progress": False}), [1, 2, 3])

    monkeypatch.setattr(lossless, "load", bare)
    given = [str(questions), "--model", str(tiny_folder), "--dtype", "fp32", "--device", "cpu", "--out", str(out)]
    given += ["--arms", "chain,tree:1:greedy,sampled", "--max-new-tokens", "12"]
    assert main([*given, "--verify", "tda", "--sparsity", str(tmp_path / "tda")]) == 0
    found = json.loads(out.read_text())
    assert found["verify"] == "tda" and found["skipping"]["density"] == 0.5
    assert found["skipping"]["options"]["refresh"] == 8
    assert [row.get("differing_tokens") for row in found["rows"]] == [None, 0, 0] * 2


def test_a_wrong_token_is_counted(engines):
    engine = engines["adapter"]
    generate = engine.generate

    def wrong(prompts, **options):
        outs = generate(prompts, **options)
        if options["speculation"] == "always" and len(outs[-1].token_ids) > 8:
            outs[-1].token_ids[4] += 1
        return outs

    engine.generate = wrong
    row = Comparison(engines.__getitem__, PROMPTS, 10).rows(Arm("tree", 8, "greedy"))[-1]
    assert row["differing_tokens"] == 1 and row["differing_prompts"] == [2]


def test_results_are_written_after_every_arm(tiny_folder, tmp_path, monkeypatch, capsys):
    """The second arm breaks; the first one's row is on disk, marked as not complete."""
    from skipstone.bench import lossless
    from skipstone.engine.load import load

    adapter = with_bare_heads(load(tiny_folder, heads=None, dtype=torch.float32, device="cpu"), [1, 2, 3])

    def fail(engine):
        raise KeyboardInterrupt

    monkeypatch.setattr(lossless, "load", lambda *_, **__: adapter)
    monkeypatch.setitem(MODES, "tree", ("adapter", fail))
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out.json"
    questions.write_text(json.dumps({"question_id": 1, "category": "qa", "turns": ["rain"]}) + "\n")
    given = [str(questions), "--max-new-tokens", "6", "--out", str(out), "--arms"]
    assert main([*given, "chain:1:greedy,sampled"]) == 0
    found = json.loads(out.read_text())
    assert found["complete"] and [row["mode"] for row in found["rows"]] == ["plain", "chain"] * 2
    with pytest.raises(KeyboardInterrupt):
        main([*given, "chain,tree:1:greedy"])
    found = json.loads(out.read_text())
    assert not found["complete"] and [row["mode"] for row in found["rows"]] == ["plain", "chain"]


def test_a_model_without_heads_is_refused(tiny_folder, tmp_path):
    with pytest.raises(SystemExit, match="no adapter heads are shipped"):
        main([str(tmp_path / "none.jsonl"), "--model", str(tiny_folder)])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--arms", "besides:1:greedy"], "of modes chain"),
        (["--heads", "recurrent"], "KIND=FOLDER"),
    ],
)
def test_bad_input_is_refused_with_a_sentence_before_a_model_is_read(given, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["no_such_file.jsonl", "--model", "none", *given])
    assert ended.value.code == 2 and said in capsys.readouterr().err
