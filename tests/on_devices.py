"""Tests on four devices; `test_placement.py` runs them in a process that has four."""

import csv
import json
import os
import shutil

import jax
import numpy as np
import pytest

import test_train
from dynajax import train
from dynajax.engines.oracle import OracleProgram
from dynajax.runtime.member_parallel import MemberParallelFit
from dynajax.runtime.program import build
from dynajax.runtime.sharding import BY_LEARNERS, place
from dynajax.xla import backend
from test_device import config as walk_config
from test_device import walk

__all__ = ["walk"]  # an autouse fixture

DEVICES = jax.local_devices()
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def assert_close(a, b, rtol=5e-3, atol=5e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def read_evals(folder):
    return list(csv.DictReader((folder / "eval.csv").open()))


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def assert_same_logs(a, b, learners):
    """Check that logs are equal except for rounding and times, and contain no padding."""
    for x, y in zip(read_evals(a), read_evals(b), strict=True):
        assert [x[n] for n in ("variant", "seed", "step")] == [
            y[n] for n in ("variant", "seed", "step")
        ]
        # Some episodes of `DeviceWalk-v0` are not finite, and have no return.
        other = pytest.approx(float(y["return_mean"]), abs=1e-3, nan_ok=True)
        assert float(x["return_mean"]) == other
    for x, y in zip(read_metrics(a), read_metrics(b), strict=True):
        assert [x.get(n) for n in ("kind", "variant", "seed", "step", "dropped")] == [
            y.get(n) for n in ("kind", "variant", "seed", "step", "dropped")
        ]
    assert len({(x["variant"], x["seed"]) for x in read_evals(a)}) == learners
    assert len(read_evals(a)) % learners == 0


def test_process_has_four_devices():
    assert len(DEVICES) == 4


@pytest.mark.parametrize(
    ("learners", "devices", "used", "per_device"),
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
def test_learners_are_placed_evenly(learners, devices, used, per_device):
    placement = place(learners, DEVICES[:devices])
    assert placement.num_learners == learners
    assert placement.mesh.size == used
    assert placement.learners_per_device == per_device
    assert placement.padded_size - learners < per_device
    indices = placement.unpad(np.arange(placement.padded_size))
    np.testing.assert_array_equal(indices, np.arange(learners))


class Runs:
    """Runs of 60 steps on one device and on several, uninterrupted and resumed."""

    def __init__(self, folder, config, devices):
        self.folder, self.config = folder, config
        self.devices = {"one": DEVICES[:1], "many": DEVICES[:devices]}

    def train(self, name, until, on):
        run = self.config(steps=until)
        return train(run, self.folder / name, quiet=True, devices=self.devices[on]).state

    def check(self, learners, resume=True):
        one, many = (self.train(on, 60, on) for on in ("one", "many"))
        assert jax.tree.leaves(many.learners)[0].shape[0] == learners
        assert_close(one, many)
        assert_same_logs(self.folder / "one", self.folder / "many", learners)
        if not resume:
            return
        for begin in ("one", "many"):
            self.train(f"{begin}-half", 30, begin)
        # A run that is resumed on as many devices is bitwise equal.
        for begin, end in (("many", "many"), ("one", "many"), ("many", "one")):
            name = f"{begin}-{end}"
            shutil.copytree(self.folder / f"{begin}-half", self.folder / name)
            state = self.train(name, 60, end)
            assert_close(one, state)
            assert_same_logs(self.folder / "one", self.folder / name, learners)
            if begin == end:
                assert_same(state, many)
                texts = [(self.folder / n / "eval.csv").read_bytes() for n in ("many", name)]
                assert texts[0] == texts[1]


def test_seven_learners_on_four_devices(tmp_path):
    def config(steps):
        return walk_config(
            "host",
            seeds=7,
            steps=steps,
            settings={"model.schedule": "early_stop", "eval.every": 30},
        )

    Runs(tmp_path, config, 4).check(7)


def test_single_learner_on_two_devices(tmp_path):
    def config(steps):
        settings = {"model.schedule": "fixed", "eval.every": 30}
        return walk_config("host", steps=steps, settings=settings)

    Runs(tmp_path, config, 2).check(1)


def test_members_are_distributed_only_for_a_single_learner_on_the_fixed_schedule(make, spec):
    """In other cases no device is idle, or devices would wait for each other."""

    def distributed(settings=(), devices=DEVICES, **arguments):
        fit = build(make(settings, **arguments), spec, devices).fit
        return isinstance(fit, MemberParallelFit)

    assert distributed()
    assert not distributed({"model.schedule": "early_stop"})
    assert not distributed(devices=DEVICES[:1])
    assert not distributed(algo="model-free")
    assert not distributed(seeds=2)


@pytest.mark.parametrize(("devices", "bounds"), [(2, True), (4, False)])
def test_devices_share_the_members_of_a_single_learner(make, spec, devices, bounds, traced):
    config = make({"model.learned_bounds": bounds}, fixes=["scale,target"])
    single, distributed = (build(config, spec, DEVICES[:n]) for n in (1, devices))
    text = distributed.fit.lower(distributed.shapes()).compile().as_text()
    assert [name for name in COLLECTIVES if name in text] == []
    once = traced["train_member"]
    assert not isinstance(single.fit, MemberParallelFit)
    # On two devices the three members are padded to four; a fourth device is not used.
    assert distributed.fit.members.mesh.size == min(devices, 3)
    (one, metrics), (other, same) = (
        test_train.run(config, p, p.init()) for p in (single, distributed)
    )
    assert_close(one, other)
    assert_close(metrics, same)
    assert all(leaf.devices() == {DEVICES[0]} for leaf in jax.tree.leaves(other))
    assert traced["train_member"] == once > 0


def test_oracle_transitions_are_not_padded(make, spec):
    program = build(make(oracle="both", seeds=3), spec, DEVICES[:2])
    propose, learn, fit = OracleProgram(program).lower()
    # Two learners on each device, of which the last one is padding.
    assert program.placement.padded_size == 4
    for lowered in (propose, learn):
        _, *others = lowered.in_avals[0]
        assert {leaf.shape[0] for leaf in jax.tree.leaves(others)} == {3}
    assert fit.in_avals


def test_six_learners_on_four_devices(tmp_path):
    def config(steps):
        return walk_config(
            "host",
            algo="model-free",
            seeds=3,
            vary={"learn.discount": [0.9, 0.99]},
            steps=steps,
            settings={"random_steps": 20, "learn.reset_every": 40, "eval.every": 30},
        )

    Runs(tmp_path, config, 4).check(6, resume=False)


def test_device_engine_on_two_devices(tmp_path):
    def config(steps):
        settings = {"random_steps": 20, "learn.reset_every": 30, "eval.every": 30}
        return walk_config("mjx", algo="model-free", seeds=3, steps=steps, settings=settings)

    Runs(tmp_path, config, 2).check(3)


def collectives(lowered):
    text = lowered.compile().as_text()
    assert "num_partitions=4" in text
    return [name for name in COLLECTIVES if name in text]


def test_programs_have_no_collectives(make, spec):
    """The loops of fits and of sampling end on each device independently."""
    for schedule in ("fixed", "early_stop"):
        config = make({"model.schedule": schedule}, seeds=7)
        program = build(config, spec)
        state, data = program.shapes(), test_train.data_at(config, 0)
        lowered = [program.fit.lower(state)]
        if schedule == "fixed":
            obs = np.zeros((7, 3), np.float32)
            lowered += [
                program.jitted.init.lower(*program._init_arguments()),
                program.act.lower(state, obs, 0),
                program.deterministic_action.lower(state, obs[:, None]),
                program.insert.lower(state, *data),
                program.learn.lower(state, *data),
                program.reset.lower(state),
            ]
        for program in lowered:
            assert "while" in program.as_text() or program not in (lowered[0], lowered[-2])
            assert collectives(program) == []


def test_partitioner_would_add_collectives():
    """Check that the test above finds the collectives of a program that is merely sharded."""
    placement = place(4, DEVICES)
    sharding = placement.shardings(BY_LEARNERS)
    loop = jax.vmap(lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x))
    numbers = jax.ShapeDtypeStruct((4,), np.float32, sharding=sharding)
    assert collectives(jax.jit(loop).lower(numbers)) == ["all-reduce"]
    assert (
        collectives(placement.jit_sharded(loop, (BY_LEARNERS,), BY_LEARNERS).lower(numbers)) == []
    )


def test_memory_is_that_of_one_device(make, spec):
    config = make(seeds=8)
    one, four = (build(config, spec, DEVICES[:n]) for n in (1, 4))
    sizes = [
        backend.memory([p.insert.lower(p.shapes(), *test_train.data_at(config, 0))])
        for p in (one, four)
    ]
    assert 3.5 < sizes[0] / sizes[1] < 4.1
    assert backend.available(4) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 3.9
