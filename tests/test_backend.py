"""Settings of JAX, and the choices for a platform."""

import jax
import pytest

from dynajax.types import UsageError
from dynajax.xla import backend


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_default_prng_impl", "rbg"),
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_transfer_guard", "disallow"),
        ("jax_disable_jit", True),
        ("jax_threefry_partitionable", False),
        ("jax_random_seed_offset", 7),
        ("jax_enable_custom_prng", True),
        ("jax_legacy_prng_key", "error"),
        ("jax_transfer_guard_host_to_device", "disallow"),
        ("jax_transfer_guard_device_to_host", "disallow"),
        ("jax_debug_nans", True),
    ],
)
def test_settings_that_change_numbers_are_refused(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(UsageError, match=f"^{name.upper()}=.*unset it"):
            backend.local_devices()
    finally:
        jax.config.update(name, before)
    assert backend.local_devices()


def test_options_of_the_large_functions_are_their_own(monkeypatch):
    monkeypatch.setattr(backend, "processor_features", lambda: frozenset({"avx512f"}))
    monkeypatch.setattr(backend, "_unknown_options", frozenset)
    monkeypatch.setattr(backend, "target_is_cpu", lambda: True)
    width, level = "xla_cpu_prefer_vector_width", "xla_backend_optimization_level"
    emitters = "xla_cpu_use_fusion_emitters"
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        chosen = {name: set(backend.options(name)) for name in ("act", "fit", "init", "learn")}
        assert chosen["learn"] == {*backend.options(), level}
        assert chosen["fit"] - chosen["learn"] == {width}
        assert chosen["act"] - chosen["learn"] == {emitters}
        assert chosen["init"] == {level, emitters}
        assert backend.options("init")[level] == 0 and backend.options("act")[level] == 2
        # A level that the user has chosen stays, and so does the width of other processors.
        jax.config.update("jax_disable_most_optimizations", True)
        monkeypatch.setattr(backend, "processor_features", lambda: frozenset())
        assert backend.options("learn") == backend.options("fit") == backend.options()
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def test_options_that_this_xla_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(backend, "target_is_cpu", lambda: True)
    monkeypatch.setattr(backend, "_CPU", {"xla_cpu_is_a_toaster": True})
    backend._unknown_options.cache_clear()
    try:
        assert backend.options() == {} and backend.options("act")
        assert backend._unknown_options() == {"xla_cpu_is_a_toaster"}
    finally:
        backend._unknown_options.cache_clear()


@pytest.mark.parametrize("value", ["allow", "log"])
def test_transfer_guards_that_refuse_nothing_are_accepted(value):
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", value)
    try:
        assert backend.local_devices()
    finally:
        jax.config.update("jax_transfer_guard", before)


def test_lowering_follows_the_target_platform():
    assert backend.lowering() is backend.CPU
    with backend.compiling_for("cuda"):
        assert backend.lowering() is backend.ACCELERATOR
    assert backend.lowering() is backend.CPU


@pytest.mark.parametrize(("text", "limited"), [("1258291200\n", True), ("max\n", False)])
def test_memory_limit_of_a_container_is_respected(monkeypatch, tmp_path, text, limited):
    unlimited = backend.host_memory()
    path = tmp_path / "memory.max"
    path.write_text(text)
    monkeypatch.setattr(backend, "_memory_limits", lambda: [tmp_path / "missing", path])
    assert backend.host_memory() == (1_258_291_200 if limited else unlimited)
    assert backend.available(2) == backend.host_memory() // 2


@pytest.mark.parametrize(
    ("line", "file", "limited"),
    [
        ("0::/user.slice/job.scope", "v2/user.slice/job.scope/memory.max", True),
        ("0::/user.slice/job.scope", "v2/user.slice/memory.max", True),
        ("4:cpu,memory:/slurm/job_7", "v1/slurm/job_7/memory.limit_in_bytes", True),
        ("4:memory:/slurm/job_7", "v1/memory.limit_in_bytes", True),
        ("3:cpu:/slurm/job_7", "v1/slurm/job_7/memory.limit_in_bytes", False),
        ("0::/other", "v2/user.slice/memory.max", False),
    ],
)
def test_limit_of_the_own_control_group_and_its_parents(monkeypatch, tmp_path, line, file, limited):
    groups = (tmp_path / "v2", "memory.max"), (tmp_path / "v1", "memory.limit_in_bytes")
    monkeypatch.setattr(backend, "_CONTROL_GROUPS", groups)
    monkeypatch.setattr(backend, "_OWN_GROUPS", tmp_path / "cgroup")
    (tmp_path / "cgroup").write_text(line + "\n")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("1000000\n")
    assert (backend.host_memory() == 1_000_000) == limited
