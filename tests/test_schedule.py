"""When things happen: by plain numbers, by traced ones, and in segments; and said in one place."""

import ast
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import dynajax
from dynajax import schedule
from dynajax.config import Config, EvalConfig, LearnConfig, ModelConfig
from dynajax.schedule import Due


def run(
    steps=60, random_steps=20, every=15, fit_every=10, reset_every=0, reset_at=(), algo="mbpo"
) -> Config:
    return Config(
        algo=algo,
        steps=steps,
        random_steps=random_steps,
        learn=LearnConfig(reset_every=reset_every, reset_at=reset_at),
        model=ModelConfig(fit_every=fit_every),
        eval=EvalConfig(every=every),
    )


def falls_due(config: Config, what: str) -> list[int]:
    return [t for t in range(config.steps) if getattr(schedule.due(config, t), what)]


def test_a_run_by_hand():
    config = run(steps=55, reset_every=24, reset_at=(20, 30))
    assert falls_due(config, "random") == list(range(20))
    assert falls_due(config, "insert") == list(range(1, 20))
    assert falls_due(config, "learn") == list(range(20, 55))
    assert falls_due(config, "fit") == [20, 30, 40, 50]
    # Not at 20, where there is nothing to forget yet.
    assert falls_due(config, "reset") == [24, 30, 48]
    # After steps 15, 30 and 45, and at the end.
    assert falls_due(config, "evaluate") == [14, 29, 44, 54]
    assert falls_due(dataclasses.replace(config, algo="model-free"), "fit") == []
    assert falls_due(run(), "reset") == []
    assert schedule.segments(config) == (1,)


configs = st.builds(
    run,
    steps=st.integers(1, 90),
    random_steps=st.integers(2, 40),
    every=st.integers(1, 40),
    fit_every=st.integers(1, 40),
    reset_every=st.sampled_from([0, 1, 4, 6, 30]),
    reset_at=st.lists(st.integers(1, 90), max_size=2).map(tuple),
    algo=st.sampled_from(["mbpo", "sac"]),
)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_traced_steps_agree_with_plain_ones(config):
    steps = np.arange(93)
    traced = schedule.due(config, jnp.asarray(steps))
    for kind in (int, np.int32):
        plain = [schedule.due(config, kind(step)) for step in steps]
        for name in Due._fields:
            values = [bool(getattr(due, name)) for due in plain]
            expected = np.broadcast_to(np.asarray(getattr(traced, name)), steps.shape)
            np.testing.assert_array_equal(values, expected, err_msg=name)


def test_steps_that_a_program_traces_agree_too():
    config = run(reset_every=6, reset_at=(25,))
    traced = jax.jit(lambda step: schedule.due(config, step))
    for step in range(config.steps):
        assert traced(step) == schedule.due(config, step)


@settings(max_examples=300, deadline=None)
@given(configs)
def test_segments_tile_a_run(config):
    """Resets, fits and evaluations fall between them, and no step is done twice or left out."""
    lengths, begins, step = schedule.segments(config), [], 0
    while step < config.steps:
        length = schedule.until_due(config, step)
        assert length in lengths
        begins.append(step)
        step += length
    assert step == config.steps
    assert list(lengths) == sorted(set(lengths), reverse=True) and len(lengths) <= 2
    for what in ("reset", "fit"):
        assert set(falls_due(config, what)) <= set(begins)
    assert {t + 1 for t in falls_due(config, "evaluate")} <= {*begins, config.steps}
    # One kind of step in a segment: random ones, or those that learn.
    assert min(config.random_steps, config.steps) in {*begins, config.steps}


@settings(max_examples=100, deadline=None)
@given(configs, st.integers(0, 89))
def test_a_run_that_goes_on_anywhere_meets_its_segments(config, step):
    """As one does that was made longer after a last interval that was shorter than the others."""
    step %= config.steps
    end = step + schedule.until_due(config, step)
    length = schedule.segments(config)[0]
    assert step < end <= config.steps
    assert end == config.steps or end % length == 0
    inside = range(step + 1, end)
    assert not {*falls_due(config, "reset"), *falls_due(config, "fit")} & set(inside)
    assert not {t + 1 for t in falls_due(config, "evaluate")} & set(inside)


#: What a step is compared with, and the files that may: they define it, check it, or decide by it.
TIMES = {"random_steps", "fit_every", "reset_every", "reset_at", "every"}
MAY = {"schedule.py", "config.py", "settings.py", "sizes.py"}


def comparisons(tree: ast.AST) -> list[int]:
    """Lines that compare, or take the remainder, with a time of the schedule."""

    def names(node: ast.AST) -> set[str]:
        return {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}

    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod))
        if names(node) & TIMES
    ]


def test_no_other_file_says_when():
    sources = Path(dynajax.__file__).parent
    elsewhere = {
        f"{path.relative_to(sources)}:{line}"
        for path in sources.rglob("*.py")
        if path.name not in MAY
        for line in comparisons(ast.parse(path.read_text()))
    }
    assert not elsewhere
    assert comparisons(ast.parse((sources / "schedule.py").read_text()))
