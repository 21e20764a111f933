"""Test the schedule: Python and traced steps, segments, and that no other file computes it."""

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
from dynajax.config.schema import Config, EvalConfig, LearnConfig, ModelConfig
from dynajax.schedule import Due


def make_run(
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


def due_steps(config: Config, operation: str) -> list[int]:
    return [t for t in range(config.steps) if getattr(schedule.due(config, t), operation)]


def test_due_steps_of_a_small_run():
    config = make_run(steps=55, reset_every=24, reset_at=(20, 30))
    assert due_steps(config, "random") == list(range(20))
    assert due_steps(config, "insert") == list(range(1, 20))
    assert due_steps(config, "learn") == list(range(20, 55))
    assert due_steps(config, "fit") == [20, 30, 40, 50]
    # Not at 20, because the agent has not learned anything yet.
    assert due_steps(config, "reset") == [24, 30, 48]
    # After 15, 30 and 45 steps, and at the end.
    assert due_steps(config, "evaluate") == [14, 29, 44, 54]
    assert due_steps(dataclasses.replace(config, algo="model-free"), "fit") == []
    assert due_steps(make_run(), "reset") == []
    assert schedule.segments(config) == (1,)


configs = st.builds(
    make_run,
    steps=st.integers(1, 90),
    random_steps=st.integers(2, 40),
    every=st.integers(1, 40),
    fit_every=st.integers(1, 40),
    reset_every=st.sampled_from([0, 1, 4, 6, 30]),
    reset_at=st.lists(st.integers(1, 90), max_size=2).map(tuple),
    algo=st.sampled_from(["mbpo", "model-free"]),
)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_array_steps_equal_python_steps(config):
    steps = np.arange(93)
    traced = schedule.due(config, jnp.asarray(steps))
    for kind in (int, np.int32):
        plain = [schedule.due(config, kind(step)) for step in steps]
        for name in Due._fields:
            values = [bool(getattr(due, name)) for due in plain]
            expected = np.broadcast_to(np.asarray(getattr(traced, name)), steps.shape)
            np.testing.assert_array_equal(values, expected, err_msg=name)


def test_traced_steps_equal_python_steps():
    config = make_run(reset_every=6, reset_at=(25,))
    traced = jax.jit(lambda step: schedule.due(config, step))
    for step in range(config.steps):
        assert traced(step) == schedule.due(config, step)


@settings(max_examples=300, deadline=None)
@given(configs)
def test_segments_tile_a_run(config):
    """Check that resets, fits and evaluations fall between segments, and no step is skipped."""
    lengths, begins, step = schedule.segments(config), [], 0
    while step < config.steps:
        length = schedule.segment_length(config, step)
        assert length in lengths
        begins.append(step)
        step += length
    assert step == config.steps
    assert list(lengths) == sorted(set(lengths), reverse=True) and len(lengths) <= 2
    for operation in ("reset", "fit"):
        assert set(due_steps(config, operation)) <= set(begins)
    assert {t + 1 for t in due_steps(config, "evaluate")} <= {*begins, config.steps}
    # A segment contains either random steps or steps that learn.
    assert min(config.random_steps, config.steps) in {*begins, config.steps}


@settings(max_examples=100, deadline=None)
@given(configs, st.integers(0, 89))
def test_run_resumed_at_any_step_returns_to_its_segments(config, step):
    """A run that is extended after a shorter last interval begins at any step."""
    step %= config.steps
    end = step + schedule.segment_length(config, step)
    length = schedule.segments(config)[0]
    assert step < end <= config.steps
    assert end == config.steps or end % length == 0
    inside = range(step + 1, end)
    assert not {*due_steps(config, "reset"), *due_steps(config, "fit")} & set(inside)
    assert not {t + 1 for t in due_steps(config, "evaluate")} & set(inside)


#: Settings that steps are compared with, and the files that may: they define or check them.
TIMES = {"random_steps", "fit_every", "reset_every", "reset_at", "every"}
ALLOWED = {"schedule.py", "schema.py", "settings.py", "dependent.py"}


def comparisons(tree: ast.AST) -> list[int]:
    """Return the lines that compare with a setting of the schedule, or take the remainder."""

    def names(node: ast.AST) -> set[str]:
        return {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}

    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod))
        if names(node) & TIMES
    ]


def test_no_other_file_computes_the_schedule():
    sources = Path(dynajax.__file__).parent
    elsewhere = {
        f"{path.relative_to(sources)}:{line}"
        for path in sources.rglob("*.py")
        if path.name not in ALLOWED
        for line in comparisons(ast.parse(path.read_text()))
    }
    assert not elsewhere
    assert comparisons(ast.parse((sources / "schedule.py").read_text()))
