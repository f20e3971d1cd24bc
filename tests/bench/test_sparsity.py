"""The sparsity bench end to end on the tiny model, and its overlaps and pairs against plain loops."""

import json

import torch
from skipstone.bench import sparsity


def test_the_document_is_whole(tiny_folder, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("a stone skips over the water and the rain falls on the stones. " * 300)
    sparsity.main(
        ["--text", str(text), "--out", str(out), "--model", str(tiny_folder), "--dtype", "float32", "--windows", "3",
         "--prompt-len", "40", "--length", "104", "--calibration-texts", "2", "--densities", "0.5", "--budget", "0.5",
         "--speed-repeats", "1"]
    )  # fmt: skip
    document = json.loads(out.read_text())
    assert str(tmp_path) not in json.dumps(document), "the command is recorded without this machine's folders"
    assert document["scored_tokens"] == 3 * 64 and len(document["settings"]) == 4
    for rows in document["settings"].values():
        assert [row["arm"] for row in rows][:2] == ["tda", "griffin, uniform"]
        assert all(row["density_by_layer"][0] == 1.0 and 0 < row["density"] <= 1 for row in rows)
    masks = {row["mask"]: row for row in document["uncertainty"]["masks"]}
    assert len({round(row["density"], 6) for row in masks.values()}) == 1, "the same count, whatever the source"
    assert set(document["inertia"]["texts"]["overlap"]) == {
        "own prompt", "own prompt, tokens shuffled", "another text's prompt",
    }  # fmt: skip
    assert [row["tokens_after_prompt"] for row in document["inertia"]["by_distance"]] == [0, 32]


def test_overlap_and_strongest():
    norms = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 1.0, 4.0]])
    masks = sparsity.strongest(norms, 0.5)
    assert masks.tolist() == [[True, False, True, False], [False, True, False, True]]
    assert sparsity.overlap(masks, masks) == 1.0 and sparsity.overlap(masks, masks.roll(1, 0)) == 0.0


def test_pairs_are_what_they_are_called():
    texts = torch.randint(9, (4, 50), generator=torch.Generator().manual_seed(0))
    pairs = sparsity.token_pairs(texts, torch.Generator().manual_seed(1))
    assert len(pairs) == 3 and all(len(one) == len(two) > 100 for one, two in pairs.values())
    for name, (one, two) in pairs.items():
        same_text = one[:, 0] == two[:, 0]
        same_token = texts[one[:, 0], one[:, 1]] == texts[two[:, 0], two[:, 1]]
        assert bool((same_text == ("places on" in name)).all()) and bool((same_token == ("same token" in name)).all())
        if "places on" in name:
            assert set((two[:, 1] - one[:, 1]).tolist()) == set(range(1, 9))
