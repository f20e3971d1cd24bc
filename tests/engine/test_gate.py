"""The gate and the policies made of it."""

import math

import pytest
from skipstone.engine.gate import ALWAYS, NEVER, PLAIN, DraftPolicy, Gate, calibrated, every, fixed_exit, likely


@pytest.mark.parametrize(
    ("entropy", "width"), [(0.0, 1), (0.49, 1), (0.5, 3), (1.99, 3), (2.0, 0), (9.0, 0), (math.nan, 0), (math.inf, 0)]
)
def test_extend_branch_stop(entropy, width):
    assert Gate(0.5, 2.0).width(entropy, 3) == width


@pytest.mark.parametrize("entropy", [0.0, 5.0, 100.0])
def test_open_and_closed_gates(entropy):
    assert ALWAYS.width(entropy, 3) == 1
    assert NEVER.width(entropy, 3) == 0
    assert Gate(-math.inf, math.inf).width(entropy, 3) == 3


def test_a_head_that_is_not_certain_stops_at_every_gate():
    for gate in (ALWAYS, NEVER, Gate(0.5, 2.0), Gate(-math.inf, math.inf)):
        assert gate.width(math.nan, 3) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gate(2.0, 1.0),
        lambda: Gate(math.nan, 1.0),
        lambda: DraftPolicy((2, 1), {1: ALWAYS, 2: ALWAYS}),
        lambda: DraftPolicy((1, 1), {1: ALWAYS}),
        lambda: DraftPolicy((1, 2), {1: ALWAYS}),
        lambda: DraftPolicy(max_nodes=16),
        lambda: DraftPolicy(max_nodes=-1),
        lambda: DraftPolicy(max_depth=-1),
        lambda: DraftPolicy(branch=0),
        lambda: DraftPolicy(confidence="margin"),
        lambda: DraftPolicy((0,), {0: ALWAYS}, beam=2, confidence="path"),
        lambda: likely((2,), 1.0),
    ],
)
def test_what_makes_no_policy_is_refused(make):
    with pytest.raises(ValueError, match=r"got|given|needed|missing|rise|expected"):
        make()


def test_settings_of_the_same_code():
    assert PLAIN.exits == ()
    layer_skip = fixed_exit(6, 5)
    assert layer_skip.exits == (6,) and layer_skip.gates[6] is ALWAYS and layer_skip.max_depth == 5
    dssd = every((3, 6), Gate(0.1, 0.1), max_nodes=4)
    assert dssd.gates == {3: Gate(0.1, 0.1), 6: Gate(0.1, 0.1)} and dssd.max_nodes == 4
    sure = likely((3, 6), 0.25, max_depth=7)
    assert sure.confidence == "path" and sure.max_depth == 7
    assert sure.gates[3] == sure.gates[6] and sure.gates[3].low == pytest.approx(math.log(4))


class Thresholds:
    """Stands in for a calibration: exit 4 is closed at a high level."""

    exits = (8, 4)

    def gate(self, exit_layer, accuracy):
        if accuracy not in (0.7, 0.9):
            raise ValueError(f"accuracy is {accuracy}")
        return (
            (0.2, 0.0 if exit_layer == 4 and accuracy == 0.9 else 0.9) if exit_layer == 8 or accuracy == 0.7 else (0, 0)
        )

    def coverage(self, exit_layer, accuracy):
        return {4: 0.1, 8: 0.5}[exit_layer]


def test_calibrated_policy_leaves_out_closed_and_rarely_sure_exits():
    assert calibrated(Thresholds(), (8, 4), accuracy=0.7).exits == (4, 8)
    assert calibrated(Thresholds(), accuracy=0.7).exits == (8,)
    policy = calibrated(Thresholds(), (4, 8), accuracy=0.9, branch=2, max_depth=3)
    assert policy.exits == (8,) and policy.gates[8] == Gate(0.2, 0.9) and policy.max_depth == 3
    assert calibrated(Thresholds(), accuracy=0.9).gates[8] == Gate(0.2, 0.2), "one candidate: no branching"
    with pytest.raises(ValueError, match="accuracy"):
        calibrated(Thresholds(), accuracy=0.5)
