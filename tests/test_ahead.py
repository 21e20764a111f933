"""Ahead-of-time compilation: reading the compiled text, and the command."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import scripts
from dynajax import UsageError
from dynajax.profiling import aot, devices, hlo
from dynajax.xla import backend
from sizes import SMALL, as_flags

SCRIPT = Path(__file__).parents[1] / "experiments" / "ahead.py"

#: A loop of three iterations around a loop of data-dependent length, as a GPU's compiler writes it.
GPU = """
HloModule jit_f, is_scheduled=true

%fused (param_0: f32[100,4], param_1: s32[]) -> f32[2,4] {
  %param_1 = s32[] parameter(1)
  %param_0 = f32[100,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={2,4}
}

%inner_body (p.1: (s32[], f32[2,4])) -> (s32[], f32[2,4]) {
  %p.1 = (s32[], f32[2,4]{1,0}) parameter(0)
  %x.1 = f32[2,4]{1,0} get-tuple-element(%p.1), index=1
  %n.1 = s32[] get-tuple-element(%p.1), index=0
  %sum.1 = f32[2,4]{1,0} all-reduce(%x.1), replica_groups={}, to_apply=%add
  ROOT %t.1 = (s32[], /*index=1*/f32[2,4]{1,0}) tuple(%n.1, %sum.1)
}

%inner_condition (p.2: (s32[], f32[2,4])) -> pred[] {
  %p.2 = (s32[], f32[2,4]{1,0}) parameter(0)
  %n.2 = s32[] get-tuple-element(%p.2), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%n.2, %five), direction=LT
}

%body (p.3: (s32[], f32[100,4], s32[])) -> (s32[], f32[100,4], s32[]) {
  %p.3 = (s32[], f32[100,4]{1,0}, s32[]) parameter(0)
  %n.3 = s32[] get-tuple-element(%p.3), index=0
  %ring = f32[100,4]{1,0} get-tuple-element(%p.3), index=1
  %at = s32[] get-tuple-element(%p.3), index=2
  %taken = f32[2,4]{1,0} fusion(%ring, %at), kind=kLoop, calls=%fused
  %begin = (s32[], f32[2,4]{1,0}) tuple(%at, %taken)
  %inner = (s32[], f32[2,4]{1,0}) while(%begin), condition=%inner_condition, body=%inner_body
  ROOT %t.3 = (s32[], f32[100,4]{1,0}, s32[]) tuple(%n.3, %ring, %at)
}

ENTRY %main (a: f32[100,4], b: s32[]) -> f32[100,4] {
  %a = f32[100,4]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %copied = f32[100,4]{1,0} copy(%a)
  %first = (s32[], f32[100,4]{1,0}, s32[]) tuple(%zero.1, %copied, %b)
  %outer = (s32[], f32[100,4]{1,0}, s32[]) while(%first), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %out = f32[100,4]{1,0} get-tuple-element(%outer), index=1
}
"""
#: A loop from 2 up to 9, as a TPU's compiler writes it: its end is one of the loop's values.
TPU = """
HloModule jit_f, is_scheduled=true

%body (p.1: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %p.1 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) parameter(0)
  %n.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %end.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=1
  %x.1 = f32[8]{0:T(256)S(1)} get-tuple-element(%p.1), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%n.1, %one)
  %y.1 = f32[8]{0:T(256)S(1)} sine(%x.1)
  ROOT %t.1 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) tuple(%next, %end.1, %y.1)
}

%condition (p.2: (s32[], s32[], f32[8])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) parameter(0)
  %n.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %end.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=1
  ROOT %less = pred[]{:T(512)} compare(%n.2, %end.2), direction=LT
}

ENTRY %main (x: f32[8], n: s32[]) -> f32[8] {
  %x = f32[8]{0:T(256)} parameter(0)
  %n = s32[]{:T(128)} parameter(1)
  %two = s32[]{:T(128)} constant(2)
  %nine = s32[]{:T(128)} constant(9)
  %begin = s32[]{:T(128)} copy(%two)
  %first = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) tuple(%begin, %END, %x)
  %loop = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) while(%first), \
condition=%condition, body=%body
  ROOT %out = f32[8]{0:T(256)} get-tuple-element(%loop), index=2
}
"""


def test_parts_of_a_program_are_counted():
    program = hlo.summarize(GPU)
    (outer,) = program.loops
    (inner,) = outer.loops
    assert (program.kernels, outer.kernels, inner.kernels) == (1, 1, 1)
    assert (outer.trip_count, inner.trip_count) == (3, None)
    assert program.copies == (100 * 4 * 4,) and outer.copies == ()
    assert inner.all_reduces == 1 and program.total("all_reduces", 2) == 3 * 2
    assert program.total("kernels", 2) == 1 + 3 * (1 + 2 * 1)
    assert program.main_loop() is outer


def test_slice_counts_only_the_bytes_it_reads():
    outer = hlo.summarize(GPU).loops[0]
    # The slice, its position, and the output.
    assert outer.kernel_bytes == 2 * 4 * 4 + 4 + 2 * 4 * 4
    # The output stays in the iteration.
    assert outer.boundary_bytes == 2 * 4 * 4 + 4


@pytest.mark.parametrize("end, trips", [("nine", 7), ("n", None)])
def test_loop_between_constants_has_known_length(end, trips):
    (loop,) = hlo.summarize(TPU.replace("END", end)).loops
    assert loop.trip_count == trips
    # The loop's counter is not a kernel.
    assert loop.kernels == 1


def test_cache_reduces_traffic_of_carried_values():
    loop = hlo.Summary("loop", 10, 1, (), 0, 300, 300, ())
    program = hlo.Summary("program", 1, 1, (), 0, 100, 100, (loop,))
    assert program.min_bytes(0) == 100 + 10 * 300
    assert program.min_bytes(100) == 0 + 10 * 100


@pytest.mark.parametrize(
    "shape, size",
    [("f32[2,3]{1,0:T(8,128)S(1)}", 24), ("(pred[5], bf16[2]{0})", 9), ("s32[]", 4), ("u8[0]", 0)],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.shape_bytes(shape) == size


def test_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        hlo.summarize("nothing")


def test_program_compiled_for_the_cpu_is_read():
    def function(x):
        return jax.lax.fori_loop(0, 7, lambda _, y: jnp.sin(y @ y), x)

    text = jax.jit(function).lower(jnp.ones((64, 64))).compile().as_text()
    (loop,) = hlo.summarize(text).loops
    assert loop.trip_count == 7 and loop.kernels >= 1


def test_target_platform_can_be_overridden():
    assert backend.target_is_cpu()
    with backend.compiling_for("gpu"):
        assert not backend.target_is_cpu() and backend.options() == {}
    assert backend.target_is_cpu()


def test_search_finds_the_most_learners_that_fit(make, spec, monkeypatch):
    tried = []

    class Needs:
        def __init__(self, rows):
            tried.append(rows)
            # Not linear, so that extrapolation is not enough.
            self.needed_bytes = 1000 + 90 * rows + rows**2

    monkeypatch.setattr(aot, "build", lambda config, *_: config.seeds)
    monkeypatch.setattr(aot, "compile_jobs", lambda rows: {"fit": rows})
    monkeypatch.setattr(aot, "measure", lambda rows, *_, **__: Needs(rows))
    accelerator = devices.ACCELERATORS["cpu"]._replace(memory=10_000)
    monkeypatch.setitem(devices.ACCELERATORS, "cpu", accelerator)
    fits = aot.max_learners(make(), spec, "cpu", 2, {"fit": 1000 + 180 + 4})
    limit = backend.FILLED * 10_000
    assert fits.needed_bytes <= limit < fits.bytes_with_one_more
    assert fits.learners + 1 in tried and len(tried) <= 8


def test_command_compiles_for_the_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    with scripts.loaded(SCRIPT) as script:
        arguments = [
            "--device=cpu",
            "--env=pendulum-swingup",
            "--preset=paper",
            f"--out={tmp_path}",
            *as_flags(SMALL),
        ]
        assert scripts.run(script, monkeypatch, *arguments) == 0
        printed = capsys.readouterr().out
        assert scripts.run(script, monkeypatch, "--device=h1000") == 2
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    learn = report["programs"]["learn"]
    assert learn["kernels"]["main_loop_trips"] == 2 and learn["kernels"]["in_main_loop"] > 0
    assert report["programs"]["learn"]["data_dependent_loops"] == 0
    assert report["programs"]["fit"]["data_dependent_loops"] == 0
    assert report["environment_step"]["operations"] > 0
    assert "An environment step" in printed and "learn" in printed
    assert "--device=h1000: choose one of h100" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--fields", "--process=auto", "--video", "--wandb"])
def test_flags_of_training_alone_are_refused(flag, monkeypatch, capsys):
    with scripts.loaded(SCRIPT) as script:
        assert scripts.run(script, monkeypatch, "--device=cpu", flag) == 2
    text = f"error: {flag}: it has no effect on what is compiled; leave it out\n"
    assert "".join(capsys.readouterr()) == text


def test_missing_compiler_is_named(monkeypatch):
    def fails(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(devices.topologies, "get_topology_desc", fails)
    with pytest.raises(UsageError, match=r"--device=h100: .*pip install -e '.\[cuda\]'"):
        devices.devices("h100")


def test_folder_that_cannot_be_written_is_refused_before_the_compilation(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(aot, "report", lambda *_, **__: pytest.fail("it compiles"))
    (tmp_path / "file").touch()
    with scripts.loaded(SCRIPT) as script:
        out = f"--out={tmp_path}/file/x"
        assert scripts.run(script, monkeypatch, "--device=cpu", "--env=pendulum-swingup", out) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}: the folder cannot be written (Not a directory); ")
    assert error.count("\n") == 1
