"""The command line: what stands on stdout and stderr, exit codes, and that it says what the Python API says.

Commands run in this process, on a tiny model; what needs signals, pipes or a fresh interpreter runs in another one.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from skipstone import cli
from skipstone.engine import loop
from skipstone.engine.engine import Engine
from skipstone.engine.load import load
from skipstone.engine.tree import Acceptance
from typer.testing import CliRunner

Run = Callable[..., Any]
PROMPT = "a stone skips"
SHORT = ("--max-new-tokens", "12")


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tiny_heads_folder: Path) -> Run:
    """`run(command, ..., input=None)`: a command on the tiny model with its heads, fp32, on the CPU."""

    def invoke(command: str, *args: str, model: str = "", heads: str = "", **options: Any) -> Any:
        where = ["--model", model or str(tiny_folder), "--heads", heads or str(tiny_heads_folder)]
        return CliRunner().invoke(cli.app, [command, *args, *where, "--dtype", "fp32", "--device", "cpu"], **options)

    return invoke


@pytest.fixture(scope="module")
def engine(tiny_folder: Path, tiny_heads_folder: Path) -> Engine:
    return load(tiny_folder, heads=tiny_heads_folder, dtype=torch.float32, device="cpu", progress=False)


def strict_json(text: str) -> Any:
    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def command_line(*args: str) -> list[str]:
    return [sys.executable, "-c", "from skipstone.cli import main; main()", *args]


def test_help_needs_no_torch() -> None:
    """Planted bug: an import of the engine at the top of cli.py, or an eager skipstone/__init__.py."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom skipstone import cli\n"
        "for args in (['--help'], ['generate', '--help'], ['bench', '--help'], ['--version'], ['sparsity', 'report', "
        "'--help']):\n"
        "    assert CliRunner().invoke(cli.app, args).exit_code == 0, args\n"
        "assert CliRunner().invoke(cli.app, ['generate', '--nope']).exit_code == 2\n"
        "print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_generate_prints_the_text_and_one_line_about_it(run: Run, engine: Engine) -> None:
    done = run("generate", PROMPT, "--always-speculate", *SHORT)
    out = engine.generate(PROMPT, max_new_tokens=12)
    assert done.exit_code == 0 and done.stdout == out.text + "\n"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("12 tokens, ") and "tokens/s, acceptance rate " in last
    assert "tokens per verification, speed against plain not measured" in last


def test_speed_against_plain_comes_from_timed_plain_steps(run: Run) -> None:
    done = strict_json(run("generate", PROMPT, "--json", "--max-new-tokens", "40", "--ignore-eos").stdout)
    assert done["stats"]["num_drafted"] > 0 and done["speedup"] > 0
    plain = strict_json(run("generate", PROMPT, "--json", "--no-speculation", *SHORT).stdout)
    assert plain["stats"]["num_drafted"] == 0 and plain["speedup"] is None


def test_early_exit_is_named_and_reported(run: Run, engine: Engine) -> None:
    args = (PROMPT, "--mode", "early_exit", "--accuracy", "0.9", *SHORT)
    out = engine.generate(PROMPT, mode="early_exit", accuracy=0.9, max_new_tokens=12)
    done = run("generate", *args)
    assert done.exit_code == 0 and done.stdout == out.text + "\n"
    last = done.stderr.strip().splitlines()[-1]
    share = sum(out.stats.tokens_by_exit.values()) / 12
    assert f"early exit (lossy): {share:.0%} of them by exits, depth {out.stats.mean_depth(4):.1f} of 4 layers" in last
    document = strict_json(run("generate", "--json", *args).stdout)
    assert document["mode"] == "early_exit" and document["token_ids"] == out.token_ids
    assert document["stats"]["layers_per_token"] == out.stats.layers_per_token
    assert strict_json(run("generate", PROMPT, "--json", *SHORT).stdout)["mode"] == "lossless"
    talk = run("chat", "--mode", "early_exit", "--max-new-tokens", "5", input="a stone\n")
    assert talk.exit_code == 0 and "early exit (lossy)" in talk.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--mode", "early_exit", "--always-speculate"), "takes --accuracy alone"),
        (("--mode", "early_exit", "--no-speculation"), "takes --accuracy alone"),
        (("--mode", "early_exit", "--exit", "2"), "takes --accuracy alone"),
        (("--mode", "early_exit", "--accuracy", "0.3"), "accuracy is 0.3"),
        (("--mode", "early_exit", "--heads", "none"), "needs exit heads"),
        (("--mode", "quick"), "mode is 'quick'"),
    ],
)
def test_early_exit_that_makes_no_sense_is_refused(run: Run, args: tuple[str, ...], message: str) -> None:
    heads = "none" if "none" in args else ""
    done = run("generate", PROMPT, *[a for a in args if a not in ("--heads", "none")], *SHORT, heads=heads)
    assert done.exit_code == 2 and message in done.stderr


def test_json_and_trace_hold_the_same_tokens(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    args = (PROMPT, "--always-speculate", "--json", "--trace", str(trace), "--logprobs", "2", *SHORT)
    document = strict_json(run("generate", *args).stdout)
    events = [strict_json(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    assert [e["token_id"] for e in events] == document["token_ids"]
    assert "".join(e["text"] for e in events) == document["text"]
    assert [e["exit_layer"] for e in events] == document["exit_layers"]
    assert [e["logprob"] for e in events] == [entry["logprob"] for entry in document["logprobs"]]
    assert all((e["entropy"] is not None) == e["drafted"] for e in events) and any(e["drafted"] for e in events)
    assert document["finish_reason"] == "length" and document["prompt"] == PROMPT


def test_every_sampling_option_arrives(run: Run, engine: Engine) -> None:
    """Planted bug: an option that is accepted and dropped."""
    line = (
        "--temperature 0.9 --top-k 40 --top-p 0.95 --min-p 0.01 --repetition-penalty 1.3 --presence-penalty 0.2 "
        "--frequency-penalty 0.1 --logit-bias 270=4 --logit-bias 9=-inf --bad-word stone --stop-id 77 "
        "--min-new-tokens 3 --seed 5 --max-new-tokens 24"
    )
    out = engine.generate(
        PROMPT, speculation=False, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.3,
        presence_penalty=0.2, frequency_penalty=0.1, logit_bias={270: 4.0, 9: float("-inf")}, bad_words=["stone"],
        stop_ids=(77,), min_new_tokens=3, seed=5, max_new_tokens=24,
    )  # fmt: skip
    given = line.split()
    whole = strict_json(run("generate", PROMPT, "--json", "--always-speculate", *given).stdout)
    assert whole["token_ids"] == out.token_ids
    assert out.token_ids != engine.generate(PROMPT, max_new_tokens=24).token_ids


def test_stop_and_ignore_eos_arrive(run: Run, engine: Engine) -> None:
    text = engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True).text
    done = run("generate", PROMPT, "--ignore-eos", "--stop", text[4:6], *SHORT)
    assert done.stdout == engine.generate(PROMPT, max_new_tokens=12, stop=text[4:6], ignore_eos=True).text + "\n"
    assert len(done.stdout) < len(text)


def test_stdin_and_chat_template(run: Run, engine: Engine) -> None:
    assert engine.tokenizer is not None
    done = strict_json(run("generate", "-", "--json", *SHORT, input="two words").stdout)
    assert done["prompt_ids"] == engine.tokenizer.encode("two words")
    done = strict_json(run("generate", "hi", "--chat", "--system", "be brief", "--json", *SHORT).stdout)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert done["prompt_ids"] == engine.tokenizer.encode_chat(messages)


def test_options_that_shape_drafts_shape_them_and_nothing_else(run: Run) -> None:
    """The same tokens under every policy; the statistics show that each was followed."""
    shapes = {
        "plain": ("--no-speculation",),
        "fixed": ("--exit", "3", "--length", "2"),
        "chains": ("--accuracy", "0.6", "--branch", "1"),
        "trees": ("--accuracy", "0.95", "--branch", "3", "--length", "2"),  # sure below 3 nats, branching above
        "no text": ("--always-speculate", "--no-lookup"),
        "mixed": ("--exit", "3", "--lookup"),
    }
    found = {
        name: strict_json(run("generate", PROMPT, "--json", *SHORT, *args).stdout) for name, args in shapes.items()
    }
    found["bare"] = strict_json(run("generate", PROMPT, "--json", *SHORT, "--exit", "1", heads="bare").stdout)
    text = run("generate", PROMPT, "--json", *SHORT, "--always-speculate", "--lookup", heads="none")
    found["text"] = strict_json(text.stdout)
    assert len({tuple(f["token_ids"]) for f in found.values()}) == 1
    sources = {name: set(f["exit_layers"]) - {None} for name, f in found.items()}
    assert -1 not in sources["no text"] and sources["mixed"] <= {-1, 3} and sources["text"] <= {-1}
    stats = {name: f["stats"] for name, f in found.items()}
    assert stats["plain"]["num_drafted"] == 0
    assert len(stats["fixed"]["drafted_by_position"]) == 2 and set(found["fixed"]["exit_layers"]) <= {3, None}
    assert set(found["bare"]["exit_layers"]) <= {1, None} and len(stats["bare"]["drafted_by_position"]) == 4
    assert stats["text"]["num_drafted"] > 0
    trees = stats["trees"]
    assert trees["num_drafted"] > sum(trees["drafted_by_position"]), "siblings"
    assert stats["chains"]["num_drafted"] == sum(stats["chains"]["drafted_by_position"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["x", "--model", "nosuch"], "no model named 'nosuch'"),
        (["x", "--heads", "nosuch"], "no head set at nosuch"),
        (["x", "--dtype", "int8"], "--dtype is 'int8', expected one of bf16"),
        (["x", "--temperature", "-1"], "temperature is -1.0, expected at least 0"),
        (["x", "--logit-bias", "5"], "--logit-bias is '5', expected ID=BIAS"),
        (["x", "--system", "s"], "--system needs --chat"),
        (["x", "--heads", "bare"], "--heads bare needs --exit"),
        (["x", "--no-speculation", "--exit", "2"], "--no-speculation excludes"),
        (["x", "--no-speculation", "--lookup"], "--no-speculation excludes"),
        (["x", "--mode", "early_exit", "--lookup"], "takes --accuracy alone"),
        (["x", "--exit", "2", "--branch", "2"], "excludes --accuracy and --branch"),
        (["x", "--exit", "1"], "no heads at exits [1]"),
        (["x", "--accuracy", "0.2"], "accuracy is 0.2"),
        (["x", "--heads", "none", "--accuracy", "0.8"], "need calibrated heads"),
        (["", "--max-new-tokens", "4"], "the prompt is empty"),
        (["x", "--max-new-tokens", "4", "--trace", "no/such/folder/t.jsonl"], "No such file"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_code_2(
    args: list[str], words: str, tiny_folder: Path, tiny_heads_folder: Path
) -> None:
    where = [] if "--model" in args else ["--model", str(tiny_folder)]
    where += [] if "--heads" in args else ["--heads", str(tiny_heads_folder)]
    dtype = [] if "--dtype" in args else ["--dtype", "fp32"]
    done = CliRunner().invoke(cli.app, ["generate", *args, *where, *dtype, "--device", "cpu"])
    assert done.exit_code == 2 and done.stdout == ""
    said = [line for line in done.stderr.splitlines() if not line.startswith("reading ")]
    assert len(said) == 1 and said[0].startswith("skipstone: ") and words in said[0]


@pytest.mark.hazard(14)
def test_a_failed_request_is_code_1_and_says_why(run: Run) -> None:
    banned = [item for i in range(320) for item in ("--logit-bias", f"{i}=-inf")]
    done = run("generate", PROMPT, "--json", *banned, *SHORT)
    assert done.exit_code == 1
    assert "the request failed: " in done.stderr.splitlines()[-1]
    assert strict_json(done.stdout)["finish_reason"] == "error"


def test_chat_remembers_until_reset(run: Run, engine: Engine) -> None:
    """Piped lines are turns; what follows /exit is not read."""
    assert engine.tokenizer is not None
    lines = "one\ntwo\n\n/reset\nthree\n/exit\nfour\n"
    done = run("chat", "--json", "--max-new-tokens", "6", "--seed", "2", "--temperature", "0.5", input=lines)
    assert done.exit_code == 0
    answers = [strict_json(line) for line in done.stdout.splitlines()]
    assert [a["prompt"] for a in answers] == ["one", "two", "three"]
    first = [{"role": "user", "content": "one"}, {"role": "assistant", "content": answers[0]["text"]}]
    second = [*first, {"role": "user", "content": "two"}]
    assert answers[1]["prompt_ids"] == engine.tokenizer.encode_chat(second)
    assert answers[2]["prompt_ids"] == engine.tokenizer.encode_chat([{"role": "user", "content": "three"}])
    out = engine.generate(answers[1]["prompt_ids"], max_new_tokens=6, seed=2, temperature=0.5)
    assert answers[1]["text"] == out.text


def test_inspect_counts_what_the_model_has(run: Run, tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = strict_json(run("inspect", "--json", "--context", "100", "--batch", "3").stdout)
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert found["model"]["num_parameters"] == sum(p.numel() for p in reference.parameters())
    items = {item["what"]: item["num_bytes"] for item in found["memory"]["items"]}
    assert found["memory"]["total_bytes"] == sum(items.values())
    # 100 tokens and 16 for a draft are two groups of 64; keys and values, 4 layers, 3 sequences, 2 heads of 12, fp32
    assert items["KV cache of 3 x 100 tokens"] == 2 * 4 * 3 * 128 * 2 * 12 * 4
    heads = found["heads"]
    assert [e["exit_layer"] for e in heads["exits"]] == [2, 3] == heads["exits_in_use"]
    assert heads["exits"][0]["gates"]["0.95"][0] >= 1.0
    shown = run("inspect").stdout
    assert f"{found['model']['num_parameters']:,} parameters" in shown and "adapter" in shown
    assert found["drafts_from"] == ["text", "heads"] and "where the text does not repeat itself" in shown
    assert "No exit heads: drafts come from the text alone" in run("inspect", heads="none").stdout
    refused = run("inspect", "--context", "9999")
    assert refused.exit_code == 2 and "9999" in refused.stderr


def test_prefill_attention_is_chosen_or_refused_in_a_sentence(run: Run) -> None:
    assert strict_json(run("inspect", "--json", "--prefill", "sdpa").stdout)["model"]["prefill"] == "sdpa"
    for command in (("inspect",), ("doctor",), ("generate", PROMPT), ("bench",)):
        refused = run(*command, "--prefill", "flash")
        assert refused.exit_code == 2
        assert "skipstone: prefill='flash' needs an NVIDIA GPU, and the model is on 'cpu'" in refused.stderr
    assert "expected one of ('auto', 'sdpa', 'flash', 'fused')" in run("inspect", "--prefill", "fast").stderr


def accept_everything(tree: Any, targets: Any) -> Acceptance:
    """The planted bug of hazard 15: the first child of every node is accepted, whatever the target says."""
    nodes, node = [], 0
    while (children := [i for i in range(len(tree)) if tree.parents[i] == node and i != node]) != []:
        node = children[0]
        nodes.append(node)
    return Acceptance(tuple(nodes), tuple(tree.tokens[n] for n in nodes), targets(node))


def test_doctor_finds_a_sound_machine(run: Run) -> None:
    found = strict_json(run("doctor", "--json").stdout)
    statuses = {c["name"]: c["status"] for c in found["checks"]}
    assert found["ok"] and statuses.pop("fused kernels") == "skipped" and set(statuses.values()) == {"ok"}
    assert {c["detail"] for c in found["checks"] if c["name"] == "prefill attention"} == {"sdpa"}
    assert len([c for c in found["checks"] if "speculative against plain" in c["name"]]) == 3
    assert found["versions"]["torch"] == torch.__version__ and found["device"]["type"] == "cpu"


@pytest.mark.hazard(15)
def test_doctor_and_bench_catch_a_verifier_that_accepts_everything(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "accept", accept_everything)
    done = run("doctor", "--no-transformers")
    assert done.exit_code == 1 and "failed  speculative against plain" in done.stdout
    assert "new token" in done.stdout
    done = run("bench", "--limit", "2", "--repeats", "1", "--arms", "bare:1:3", *SHORT)
    assert done.exit_code == 1
    assert "skipstone: arm bare:1:3, question 1, turn 1, repeat 1: new token" in done.stderr
    assert ", 0 different" not in done.stdout


def test_bench_measures_and_compares(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    args = ("--limit", "3", "--repeats", "2", "--arms", "default,fixed:2:3,bare:3:2", "--baseline", "hf", *SHORT)
    done = run("bench", *args, "--out", str(out))
    assert done.exit_code == 0
    document = strict_json(out.read_text(encoding="utf-8"))
    assert list(document["arms"]) == ["plain", "default", "fixed:2:3", "bare:3:2", "hf"]
    turns = sum(a["arm"] == "plain" and a["repeat"] == 0 for a in document["answers"])
    assert document["lossless"] == {"num_compared": 2 * 3 * turns, "num_different": 0, "divergences": []}
    assert f"{2 * 3 * turns} answers compared, 0 different" in done.stdout
    assert "fixed:2:3" in done.stdout and "multi_turn" in done.stdout
    assert document["equal_to_plain"]["hf"][1] == 2 * turns
    assert document["schema_version"] == 2 and document["repeats"] == 2 and document["versions"]["torch"]
    overall = document["summary"]["overall"]
    assert overall["plain"]["speedup"] == 1.0 and overall["fixed:2:3"]["num_drafted"] > 0
    assert set(overall["fixed:2:3"]["tokens_by_exit"]) == {"2"}


def test_bench_writes_a_report_goes_on_with_it_and_compares_two(run: Run, tmp_path: Path) -> None:
    """Prompts of two lengths too. Planted bug: a journal that is not asked, which would make equal times impossible."""
    questions, folder = tmp_path / "questions.jsonl", tmp_path / "report"
    lines = ({"question_id": i, "category": "qa", "turns": [text]} for i, text in enumerate(["a stone", "the rain"]))
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    args = (str(questions), "--repeats", "1", "--arms", "fixed:2:2+lookup", "--context", "40,64", *SHORT)
    done = run("bench", *args, "--report", str(folder), "--note", "a test")
    assert done.exit_code == 0 and "report.html" in done.stderr
    one = strict_json((folder / "run.json").read_text(encoding="utf-8"))
    assert set(one["summary"]) == {"context 40", "context 64", "overall"} and one["num_resumed"] == 0
    assert one["sample"]["arms"]["fixed:2:2+lookup"] and one["roofline"]["floor_ms"] > 0
    assert one["summary"]["overall"]["plain"]["first_token_ms_p50"] > 0
    again = run("bench", *args, "--report", str(folder), "--note", "a test")
    two = strict_json((folder / "run.json").read_text(encoding="utf-8"))
    assert again.exit_code == 0 and two["num_resumed"] == len(one["answers"]) and two["sessions"] == 2
    assert [a["wall_ms"] for a in two["answers"]] == [a["wall_ms"] for a in one["answers"]]
    other = run("bench", *args, "--report", str(folder), "--seed", "4")
    assert other.exit_code == 2 and "seed 0, now 4" in other.stderr
    path = str(folder / "run.json")
    found = run_compare(path, path)
    assert found.exit_code == 0 and "yes" not in found.stdout and "0 of 4 answers have other" in found.stdout
    assert run_compare(path).exit_code == 2
    lost = run_compare(path, str(tmp_path / "lost.json"))
    assert lost.exit_code == 2 and "no run at" in lost.stderr
    assert "is more than the 512 tokens of this model" in run("bench", "--context", "1k").stderr


def test_bench_is_bounded_and_takes_batches(run: Run, tmp_path: Path) -> None:
    args = ("--limit", "2", "--arms", "default", "--repeats", "1", *SHORT)
    done = run("bench", *args, "--minutes", "0", "--report", str(tmp_path))
    assert done.exit_code == 130 and "only whole questions count" in done.stdout
    whole = run("bench", *args, "--report", str(tmp_path))
    assert whole.exit_code == 0 and strict_json((tmp_path / "run.json").read_text(encoding="utf-8"))["num_resumed"] > 0
    batch = run("bench", *args, "--batch", "2")
    assert batch.exit_code == 0 and "solo" in batch.stdout and "2 questions side by side" in batch.stdout
    for wrong, words in (
        (("--batch", "2", "--baseline", "hf"), "answer one question at a time"),
        (("--baseline", "compile"), "is a CUDA graph"),
        (("--arms", "plain%cats"), "unknown target 'cats'"),
    ):
        refused = run("bench", *args, *wrong)
        assert refused.exit_code == 2 and words in refused.stderr.replace("\n", " ")


def run_compare(*paths: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "compare", *paths])


def test_bench_reads_spec_bench_files_and_refuses_others(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question_id": 81, "category": "writing", "turns": ["a stone", "again"]}\n', encoding="utf-8")
    done = run("bench", str(path), "--json", "--repeats", "1", *SHORT)
    assert done.exit_code == 0
    document = strict_json(done.stdout)
    assert {(a["question_id"], a["turn"]) for a in document["answers"]} == {(81, 0), (81, 1)}
    path.write_text("{}\n", encoding="utf-8")
    done = run("bench", str(path))
    assert done.exit_code == 2 and "line 1: expected JSON with question_id" in done.stderr
    done = run("bench", "--tasks", "cooking")
    assert done.exit_code == 2 and "no questions of ['cooking']" in done.stderr


def start(tiny_folder: Path, *args: str, **options: Any) -> subprocess.Popen[str]:
    where = ("--model", str(tiny_folder), "--heads", "none", "--dtype", "fp32", "--device", "cpu")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        command_line("generate", PROMPT, "--ignore-eos", "--max-new-tokens", "490", *where, *args),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment, **options,
    )  # fmt: skip


@pytest.mark.hazard(16)
@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_prints_what_there_is(tiny_folder: Path, tmp_path: Path, number: int) -> None:
    """Likewise where a time limit or a batch system ends it."""
    trace = tmp_path / "t.jsonl"
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    process = start(tiny_folder, "--json", "--trace", str(trace), preexec_fn=heard)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (trace.exists() and trace.stat().st_size):
        time.sleep(0.005)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    document = strict_json(stdout)
    events = [strict_json(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    assert document["finish_reason"] == "cancelled" and 0 < len(document["token_ids"]) < 490
    assert document["text"].startswith("".join(e["text"] for e in events))
    assert "interrupted; " in stderr and "Traceback" not in stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
def test_a_reader_that_leaves_is_no_error(tiny_folder: Path) -> None:
    process = start(tiny_folder)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert "Traceback" not in said and "Exception" not in said and "Broken" not in said


def test_calibrate_writes_a_set_with_pictures(
    run: Run, tiny_heads_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"a stone skips {i}"}) + "\n" for i in range(3)))
    common = ("--prompts", str(prompts), "--held-out-percent", "100", "--max-new-tokens", "6")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused = run("calibrate", *common, "--plots", str(tmp_path / "plots"))
    assert refused.exit_code == 2 and "pip install 'skipstone[plot]'" in refused.stderr
    out = tmp_path / "out"
    found = run("calibrate", *common, "--out", str(out), "--json")
    assert found.exit_code == 0, found.stderr
    document = strict_json(found.stdout)
    assert document["folder"] == str(out) and set(document["exits"]) == {"2", "3"}
    assert json.loads((out / "calibration.json").read_text())["source"] == document["source"]
    again = run("calibrate", *common, heads=str(out))
    assert again.exit_code == 0 and f"Stored in {out}" in again.stdout.replace("\n", "")
    missing = run("calibrate", *common, heads=str(tmp_path / "nowhere"))
    assert missing.exit_code == 2 and "no head set at" in missing.stderr


def test_thresholds_are_found_and_used(run: Run, engine: Engine, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "tda"
    text.write_text("a stone skips over the water and the rain falls on the stones. " * 60)
    done = run("calibrate", "--sparsity", "tda", "--text", str(text), "--out", str(out), "--density", "0.5", "--json")
    found = strict_json(done.stdout)
    assert done.exit_code == 0 and found["folder"] == str(out) and len(found["thresholds"]) == 4
    where = ["--verify", "tda", "--sparsity", str(out)]
    prompt = "the rain falls on the stones and a stone skips over the water " * 3
    answers = [
        strict_json(run("generate", prompt, "--max-new-tokens", "12", "--json", *where, *more).stdout)
        for more in ([], ["--no-speculation"], ["--always-speculate"])
    ]
    assert {answer["verify"] for answer in answers} == {"tda"}
    assert "target tda (lossy: not the whole model)" in run("generate", prompt, "--max-new-tokens", "2", *where).stderr
    assert "lossy" not in run("generate", prompt, "--max-new-tokens", "2").stderr
    assert answers[0]["token_ids"] == answers[1]["token_ids"] == answers[2]["token_ids"]
    done = run("bench", "--limit", "1", "--max-new-tokens", "6", "--repeats", "1", "--arms", "always", "--json", *where)
    assert done.exit_code == 0 and strict_json(done.stdout)["verify"] == "tda"
    beside = ("bench", "--limit", "1", "--max-new-tokens", "6", "--repeats", "1", "--sparsity", str(out), "--json")
    document = strict_json(run(*beside, "--arms", "always%tda").stdout)
    assert document["verify"] == "dense" and document["thresholds"].keys() == {"tda"} and document["sparsity"] == "tda"
    assert list(document["arms"]) == ["plain", "plain%tda", "always%tda"] and document["problems"] == []
    refused = run(*beside, "--arms", "always")
    assert refused.exit_code == 2 and "no arm uses --sparsity: name one, e.g. plain%tda" in refused.stderr


def test_inputs_are_dropped(run: Run, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "teal"
    text.write_text("a stone skips over the water and the rain falls on the stones. " * 60)
    where = ["--text", str(text), "--out", str(out), "--min-agreement", "0.01", "--allocation", "uniform"]
    done = run("calibrate", "--sparsity", "teal", "--json", *where)
    found = strict_json(done.stdout)
    assert done.exit_code == 0 and found["folder"] == str(out) and found["default"] == 0.65
    use = ["generate", "the rain falls on the stones", "--max-new-tokens", "12", "--json"]
    plain = strict_json(run(*use, "--no-speculation").stdout)
    drafted = strict_json(run(*use, "--always-speculate", "--draft", "teal", "--teal", str(out)).stdout)
    assert (drafted["verify"], drafted["draft"]) == ("dense", "teal 0.65")
    assert drafted["token_ids"] == plain["token_ids"] and drafted["stats"]["num_drafted"] > 0
    where = ["--verify", "teal", "--teal", str(out), "--teal-level", "0.5"]
    answers = [strict_json(run(*use, *where, more).stdout) for more in ("--no-speculation", "--always-speculate")]
    assert answers[0]["verify"] == "teal 0.5" and answers[0]["token_ids"] == answers[1]["token_ids"]


def test_sparsity_is_reported(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "report"
    text.write_text("a stone skips over the water and the rain falls on the stones. " * 300)
    command = ["sparsity", "report", "--text", str(text), "--model", str(tiny_folder), "--dtype", "fp32"]
    command += ["--device", "cpu", "--windows", "2", "--prompt-len", "40", "--length", "60", "--repeats", "1"]
    command += ["--calibration-texts", "1", "--questions", "0", "--densities", "0.5", "--levels", "0.5"]
    done = CliRunner().invoke(cli.app, [*command, "--out", str(out), "--methods", "tda,teal", "--json"])
    assert done.exit_code == 0, done.stderr
    document = strict_json(done.stdout)
    assert list(document["settings"]) == ["dense", "tda 0.5", "teal uniform 0.5"]
    assert json.loads((out / "report.json").read_text()) == document and (out / "loss_speed.png").is_file()
    again = CliRunner().invoke(cli.app, [*command, "--out", str(out)])
    assert again.exit_code == 2 and "choose another folder" in again.stderr
    wrong = CliRunner().invoke(cli.app, [*command, "--methods", "cats"])
    assert wrong.exit_code == 2 and "expected some of tda, prior" in wrong.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused = CliRunner().invoke(cli.app, [*command, "--out", str(tmp_path / "other")])
    assert refused.exit_code == 2 and "pip install 'skipstone[plot]'" in refused.stderr
    short = [*command, "--out", str(tmp_path / "other"), "--methods", "teal", "--no-claims"]
    assert CliRunner().invoke(cli.app, [*short, "--no-pictures"]).exit_code == 0
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["calibrate"], "--prompts is missing"),
        (["calibrate", "--sparsity", "cats"], "expected 'tda' or 'teal'"),
        (["calibrate", "--sparsity", "teal"], "--sparsity teal reads --text and writes --out"),
        (["calibrate", "--sparsity", "teal", "--text", "t", "--out", "o", "--cett", "0.1"], "at most one budget"),
        (["calibrate", "--sparsity", "teal", "--text", "t", "--out", "o"], "no text at t; expected a plain text file"),
        (["calibrate", "--sparsity", "tda", "--text", "t", "--out", "o"], "no text at t; expected a plain text file"),
        (["generate", "x", "--draft", "teal"], "'teal' needs thresholds"),
        (["calibrate", "--sparsity", "tda"], "reads --text and writes --out"),
        (["calibrate", "--prompts", "p.jsonl", "--cett", "0.1"], "need --sparsity"),
        (
            ["calibrate", "--sparsity", "tda", "--text", "t", "--out", "o", "--cett", "0.1", "--density", "0.5"],
            "at most one",
        ),
        (["generate", "x", "--sparsity", "folder"], "of verify='tda'"),
        (["bench", "--profile", "--verify", "tda"], "--profile"),
    ],
)
def test_sparsity_that_makes_no_sense_is_refused(run: Run, args: list[str], words: str) -> None:
    done = run(*args)
    assert done.exit_code == 2 and words in done.stderr
