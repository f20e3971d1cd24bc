"""A run's options: what a TOML file and flags say, flags first, nothing unknown."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from skipstone.train import Recipe, TrainConfig
from skipstone.train.config import options, parse

NEEDED = ["--model", "m", "--out", "o"]


def config_of(*arguments: str) -> TrainConfig:
    return parse([*NEEDED, *arguments])[0]


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(
        'model = "from file"\nout = "o"\nexits = [3, 5]\nsteps = 7\nlr = 1\nprogress = false\n'
        "[options]\nwidth = 32\nother = 1\n"
    )
    return path


def test_defaults_are_the_dataclasses() -> None:
    assert parse(NEEDED) == (TrainConfig("m", "o"), False)
    assert parse([*NEEDED, "--dry-run"])[1] is True


def test_every_field_is_an_option_and_no_name_is_taken_twice() -> None:
    names = [f.name for owner in (TrainConfig, Recipe) for f in fields(owner) if f.name != "recipe"]
    assert sorted(names) == sorted(set(names)) == sorted(options())
    assert all(option.help for option in options().values())


def test_every_flag_arrives() -> None:
    """A value unlike the default through each flag. Catches: an option that is accepted and dropped."""
    texts = {
        "model": "other", "out": "there", "prompts": "p", "kind": "linear", "exits": "2,5", "options": "width=5",
        "device": "cpu", "dtype": "fp32", "tracker": "tensorboard", "remainder": "drop", "loss": "tv",
        "unreached": "0.5",
    }  # fmt: skip
    for name, option in options().items():
        if option.kind is bool:
            opposite = option.flag.replace("--", "--no-", 1) if option.default else option.flag
            given = config_of(opposite)
            assert getattr(given if hasattr(given, name) else given.recipe, name) is not option.default
            continue
        given = config_of(option.flag, texts.get(name, "1" if option.kind is int else "0.25"))
        owner = given if hasattr(given, name) else given.recipe
        default = TrainConfig("m", "o") if owner is given else Recipe()
        assert getattr(owner, name) != getattr(default, name) or name in ("rounds",), name
    assert config_of("--rounds", "4").rounds == 4


def test_flags_win_over_the_file(toml: Path) -> None:
    config, _ = parse(["--config", str(toml), "--steps", "9", "--option", "width=64", "--option", "taps=[1,2]"])
    assert (config.model, config.exits, config.recipe.steps, config.progress) == ("from file", (3, 5), 9, False)
    assert config.options == {"width": 64, "other": 1, "taps": [1, 2]}
    assert isinstance(config.recipe.lr, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("setps = 3", "unknown key 'setps'; did you mean 'steps'"),
        ("recipe = 3", "unknown key 'recipe'"),
        ('steps = "3"', "steps is '3', expected int"),
        ("steps = true", "steps is True, expected int"),
        ('exits = ["a"]', "exits is .*, expected integers"),
        ('loss = "mse"', "loss is 'mse', expected one of kl, topk, ce, tv"),
        ("options = 3", "options is 3, expected a table"),
        ("steps = ", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse([*NEEDED, "--config", str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--stpes 3", "--stpes"),
        ("--step 3", "--step"),  # no abbreviations: a new option would change what they mean
        ("--steps many", "expected int"),
        ("--exits 2,b", "expected integers"),
        ("--option width", "expected KEY=VALUE"),
        ("--loss mse", "invalid choice: 'mse'"),
        ("--rounds 0", "rounds is 0"),
        ("--rounds 9 --steps 8", "rounds is 9"),
        ("--held-out-percent 100", "held_out_percent is 100"),
        ("--save-every 0", "save_every is 0"),
        ("--draft-vocab -1", "draft_vocab is -1"),
    ],
)
def test_wrong_flags_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(*arguments.split())


def test_what_must_be_given() -> None:
    with pytest.raises(ValueError, match="--model and --out must be given"):
        parse([])
