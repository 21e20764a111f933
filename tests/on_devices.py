"""Tests that need four devices; `test_placement.py` runs them in a process that has them."""

import csv
import functools
import json
import os
import shutil
import sys

import jax
import numpy as np
import pytest

import test_train
from dynajax import train
from dynajax.config import assign
from dynajax.runtime.program import SharedFit, build
from dynajax.runtime.sharding import BY_ROWS, place
from dynajax.xla import backend
from test_device import config as walk_config
from test_device import walk

__all__ = ["walk"]  # the fixture, which every test here uses
train_module = sys.modules["dynajax.train"]

DEVICES = jax.local_devices()
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def assert_close(a, b, rtol=5e-3, atol=5e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def evals(folder):
    return list(csv.DictReader((folder / "eval.csv").open()))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def assert_same_logs(a, b, rows):
    """Line for line the same, but for rounding and times; and no row but the run's."""
    for x, y in zip(evals(a), evals(b), strict=True):
        assert [x[n] for n in ("variant", "seed", "step")] == [
            y[n] for n in ("variant", "seed", "step")
        ]
        assert float(x["return_mean"]) == pytest.approx(float(y["return_mean"]), abs=1e-3)
    for x, y in zip(lines(a), lines(b), strict=True):
        assert [x.get(n) for n in ("kind", "variant", "seed", "step", "dropped")] == [
            y.get(n) for n in ("kind", "variant", "seed", "step", "dropped")
        ]
    assert len({(x["variant"], x["seed"]) for x in evals(a)}) == rows
    assert len(evals(a)) % rows == 0


def test_there_are_four():
    assert len(DEVICES) == 4


@pytest.mark.parametrize(
    ("rows", "devices", "used", "each"),
    [
        (6, 4, 3, 2),
        (1, 2, 1, 1),
        (7, 4, 4, 2),
        (4, 4, 4, 1),
        (5, 2, 2, 3),
        (9, 4, 3, 3),
        (8, 3, 3, 3),
    ],
)
def test_rows_are_spread_evenly(rows, devices, used, each):
    placement = place(rows, DEVICES[:devices])
    assert (placement.num_learners, placement.mesh.size, placement.learners_per_device) == (
        rows,
        used,
        each,
    )
    assert placement.padded_size - rows < each
    np.testing.assert_array_equal(
        placement.unpad(np.arange(placement.padded_size)), np.arange(rows)
    )


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs that differ in nothing but their length share their programs."""
    cached = functools.cache(train_module.build)

    def build_once(config, spec, devices):
        return cached(assign(config, "steps", 60), spec, tuple(devices))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "build", build_once)
        yield


class Parts:
    """A run of 60 steps on one device and on several, whole and in two parts."""

    def __init__(self, folder, config, devices):
        self.folder, self.config = folder, config
        self.devices = {"one": DEVICES[:1], "many": DEVICES[:devices]}

    def train(self, name, until, on):
        run = self.config(steps=until)
        return train(run, self.folder / name, quiet=True, devices=self.devices[on]).state

    def check(self, rows, resume=True):
        one, many = (self.train(on, 60, on) for on in ("one", "many"))
        assert jax.tree.leaves(many.rows)[0].shape[0] == rows
        assert_close(one, many)
        assert_same_logs(self.folder / "one", self.folder / "many", rows)
        if not resume:
            return
        for begin in ("one", "many"):
            self.train(f"{begin}-half", 30, begin)
        # Resumed where it was: the same bits; resumed elsewhere: the rest is computed there.
        for begin, end in (("many", "many"), ("one", "many"), ("many", "one")):
            name = f"{begin}-{end}"
            shutil.copytree(self.folder / f"{begin}-half", self.folder / name)
            state = self.train(name, 60, end)
            assert_close(one, state)
            assert_same_logs(self.folder / "one", self.folder / name, rows)
            if begin == end:
                assert_same(state, many)
                texts = [(self.folder / n / "eval.csv").read_bytes() for n in ("many", name)]
                assert texts[0] == texts[1]


def test_seven_rows_on_four_devices(tmp_path):
    def config(steps):
        return walk_config(
            "host",
            seeds=7,
            steps=steps,
            settings={"model.schedule": "early_stop", "eval.every": 30},
        )

    Parts(tmp_path, config, 4).check(7)


def test_a_lone_row_and_two_cores(tmp_path):
    def config(steps):
        settings = {"model.schedule": "fixed", "eval.every": 30}
        return walk_config("host", steps=steps, settings=settings)

    Parts(tmp_path, config, 2).check(1)


def test_only_the_members_of_a_lone_row_on_the_fixed_schedule_are_shared_out(make, spec):
    """Others have no device to spare, or wait for each other."""

    def shared(settings=(), devices=DEVICES, **arguments):
        return isinstance(build(make(settings, **arguments), spec, devices).fit, SharedFit)

    assert shared()
    assert not shared({"model.schedule": "early_stop"})
    assert not shared(devices=DEVICES[:1])
    assert not shared(algo="model-free")
    assert not shared(seeds=2)


@pytest.mark.parametrize(("devices", "bounds"), [(2, True), (4, False)])
def test_cores_share_the_members_of_a_lone_row(make, spec, devices, bounds, traced):
    config = make({"model.learned_bounds": bounds}, fixes=["scale,target"])
    alone, helped = (build(config, spec, DEVICES[:n]) for n in (1, devices))
    text = helped.fit.lower(helped.shapes()).compile().as_text()
    assert [name for name in COLLECTIVES if name in text] == []
    once = traced["train_member"]
    assert not isinstance(alone.fit, SharedFit)
    # three members: on two devices a copy of the last makes four, and a fourth device is not asked
    assert helped.fit.members.mesh.size == min(devices, 3)
    (one, metrics), (other, same) = (test_train.run(config, p, p.init()) for p in (alone, helped))
    assert_close(one, other)
    assert_close(metrics, same)
    assert all(leaf.devices() == {DEVICES[0]} for leaf in jax.tree.leaves(other))
    assert traced["train_member"] == once > 0


def test_an_oracle_has_the_rows_alone(make, spec):
    program = build(make(oracle="both", seeds=3), spec, DEVICES[:2])
    arguments = program.programs()["learn"][1]
    # two rows on each device, the last one a copy
    assert program.placement.padded_size == 4
    assert {leaf.shape[0] for leaf in jax.tree.leaves(arguments[1:])} == {3}
    assert len(program.lower()) == 2


def test_six_rows_on_four_devices(tmp_path):
    def config(steps):
        return walk_config(
            "host",
            algo="model-free",
            seeds=3,
            vary={"learn.discount": [0.9, 0.99]},
            steps=steps,
            settings={"random_steps": 20, "learn.reset_every": 40, "eval.every": 30},
        )

    Parts(tmp_path, config, 4).check(6, resume=False)


def test_the_device_engine_on_two_devices(tmp_path):
    def config(steps):
        settings = {"random_steps": 20, "learn.reset_every": 30, "eval.every": 30}
        return walk_config("mjx", algo="model-free", seeds=3, steps=steps, settings=settings)

    Parts(tmp_path, config, 2).check(3)


def collectives(lowered):
    text = lowered.compile().as_text()
    assert "num_partitions=4" in text
    return [name for name in COLLECTIVES if name in text]


def test_no_device_asks_another(make, spec):
    """The loops of a row's fit and of its draws end where its own device says so."""
    for schedule in ("fixed", "early_stop"):
        config = make({"model.schedule": schedule}, seeds=7)
        program = build(config, spec)
        state, data = program.shapes(), test_train.data_at(config, 0)
        lowered = [program.fit.lower(state)]
        if schedule == "fixed":
            obs = np.zeros((7, 3), np.float32)
            lowered += [
                program.init.func.lower(*program.init.args),
                program.act.lower(state, obs, 0),
                program.deterministic_action.lower(state, obs[:, None]),
                program.insert.lower(state, *data),
                program.learn.lower(state, *data),
                program.reset.lower(state),
            ]
        for program in lowered:
            assert "while" in program.as_text() or program not in (lowered[0], lowered[-2])
            assert collectives(program) == []


def test_a_partitioner_would_ask():
    """What the one above looks for is there where rows are merely sharded."""
    placement = place(4, DEVICES)
    sharding = placement.shardings(BY_ROWS)
    loop = jax.vmap(lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x))
    rows = jax.ShapeDtypeStruct((4,), np.float32, sharding=sharding)
    assert collectives(jax.jit(loop).lower(rows)) == ["all-reduce"]
    assert collectives(placement.spread(loop, (BY_ROWS,), BY_ROWS).lower(rows)) == []


def test_sizes_are_those_of_a_device(make, spec):
    config = make(seeds=8)
    one, four = (build(config, spec, DEVICES[:n]) for n in (1, 4))
    sizes = [
        backend.memory([p.insert.lower(p.shapes(), *test_train.data_at(config, 0))])
        for p in (one, four)
    ]
    assert 3.5 < sizes[0] / sizes[1] < 4.1
    assert backend.available(4) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 3.9
