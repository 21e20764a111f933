"""Execute the runs of a study on this machine, on a Ray cluster, or with SLURM.

Each backend returns a generator that starts jobs, yields about every second while any of them is
running, and ends when none is left, or soon after Ctrl-C or SIGTERM. A cluster that cannot be used is
refused at once, before the first job is started.
"""

import collections
import logging
import os
import queue
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from dynajax.launch import status
from dynajax.launch.job import Job, JobRunner
from dynajax.launch.study import Study
from dynajax.runtime.distributed import interruptions
from dynajax.types import UsageError

#: Seconds between two queries of a job's state in SLURM.
_POLL_INTERVAL = 30.0
#: The states of a SLURM job that has ended.
_END_STATES = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "BOOT_FAIL",
    "OUT_OF_MEMORY",
    "DEADLINE",
)


def local(jobs: Sequence[Job], parallel: int) -> Iterator[None]:
    """Execute `parallel` runs at a time as processes of this machine; they save on interruption."""
    runners = [JobRunner(job) for job in jobs]
    slots: queue.SimpleQueue[tuple[dict[str, str], set[int]]] = queue.SimpleQueue()
    gpus, cores = visible_gpus() if parallel > 1 else [], os.sched_getaffinity(0)
    for slot in range(parallel):
        slots.put((share_gpus(gpus, slot, parallel), share_cores(cores, slot, parallel)))

    def complete(runner: JobRunner) -> None:
        env, cores = slots.get()
        try:
            runner.complete(env, cores)
        except OSError as error:
            raise UsageError(
                f"--out={runner.job.out}: the state of {runner.job.name} cannot be written "
                f"({error.strerror}); the same command continues its run"
            ) from None
        finally:
            slots.put((env, cores))

    with interruptions() as interrupted, ThreadPoolExecutor(parallel) as pool:
        running = [pool.submit(complete, runner) for runner in runners]
        try:
            while wait(running, 0.5).not_done:
                if interrupted():
                    break
                yield
        finally:
            for runner in runners:
                runner.stop()
    for future in running:
        future.result()


def visible_gpus() -> list[str]:
    """Return the NVIDIA GPUs that a process started here would see."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(n) for n, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def share_cores(cores: Iterable[int], slot: int, slots: int) -> set[int]:
    """Return the cores of process `slot` of `slots`; it would otherwise use all of them."""
    ordered = sorted(cores)
    return set(ordered[slot::slots] or [ordered[slot % len(ordered)]])


def share_gpus(gpus: Sequence[str], slot: int, slots: int) -> dict[str, str]:
    """Return the environment in which process `slot` of `slots` sees its share of the GPUs."""
    if not gpus:
        return {}
    shared = gpus[slot::slots] or [gpus[slot % len(gpus)]]
    env = {"CUDA_VISIBLE_DEVICES": ",".join(shared)}
    if slots > len(gpus):
        # By default the first process on a GPU reserves three quarters of its memory.
        env["XLA_CLIENT_MEM_FRACTION"] = f"{0.9 / -(-slots // len(gpus)):.3f}"
        # Its deprecated name; jaxlib refuses both at once.
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = ""
    return env


def ray_cluster(jobs: Sequence[Job], study: Study, address: str) -> Iterator[None]:
    """Execute each run as a Ray task. If its node dies, Ray starts the task on another node.

    Raises:
      UsageError: at once, if Ray is not installed or cannot connect to the cluster.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--on=ray: install the extra first: pip install -e '.[ray]'") from None

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        raise UsageError(
            f"--address={address}: no Ray cluster answers there; `ray start --head` starts one"
        ) from None
    except (ValueError, RuntimeError) as error:  # of an address, and of other versions
        reason = " ".join(str(error).split())
        raise UsageError(
            f"--address={address}: Ray cannot connect ({reason}); give HOST:PORT of the cluster's first "
            "node, or leave it out on a machine of the cluster"
        ) from None
    return _run_on_ray(jobs, study)


def _run_on_ray(jobs: Sequence[Job], study: Study) -> Iterator[None]:
    """Execute jobs on the Ray cluster to which this process is connected."""
    import ray

    needed = {"CPU": study.resources.cpus, "GPU": study.resources.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(k, 0) >= v for k, v in needed.items()) for node in nodes):
        print(f"no node of the cluster has {needed}, as the study requires; the runs wait for one")
    task = ray.remote(_complete).options(
        num_cpus=study.resources.cpus,
        num_gpus=study.resources.gpus,
        memory=study.resources.memory_gb * 2**30 or None,
        max_retries=10,
    )
    running = {task.remote(tuple(job)): job for job in jobs}
    cancelled = False
    try:
        with interruptions() as interrupted:
            while running:
                for ref in ray.wait(list(running), timeout=1)[0]:
                    job = running.pop(ref)
                    try:
                        ray.get(ref)
                    except ray.exceptions.RayError as error:
                        if not cancelled:
                            line = str(error).strip().splitlines()[-1]
                            status.write_note(Path(job.out), job.name, state="failed", message=line)
                if interrupted() and not cancelled:
                    cancelled = True
                    for ref in running:
                        ray.cancel(ref)
                yield
    finally:
        ray.shutdown()


def _complete(job: tuple[Any, ...]) -> str:
    return JobRunner(Job(*job)).complete()


class Resumable:
    """A function for submitit that is queued again when SLURM announces the end of its time."""

    def __init__(self, job: tuple[Any, ...]) -> None:
        self._job = job
        self._runner: JobRunner | None = None

    def __call__(self) -> str:
        self._runner = JobRunner(Job(*self._job))
        return self._runner.complete()

    def checkpoint(self) -> Any:
        """Save and stop the run, and return the job that resumes it."""
        from submitit.helpers import DelayedSubmission

        if self._runner is not None:
            self._runner.end()
        return DelayedSubmission(Resumable(self._job))


def executor(kind: str, study: Study, out: Path) -> Any:
    """Return submitit's executor for "slurm", or for "submitit", which does the same without SLURM.

    Raises:
      UsageError: submitit or SLURM is not installed, or SLURM cannot give the resources.
    """
    try:
        import submitit
    except ImportError:
        raise UsageError(
            f"--on={kind}: install the extra first: pip install -e '.[slurm]'"
        ) from None

    resources = study.resources
    folder = out / "launch" / "jobs"
    common = {
        "timeout_min": max(1, round(resources.hours * 60)),
        "cpus_per_task": resources.cpus,
        "gpus_per_node": int(resources.gpus),
    }
    if resources.gpus != int(resources.gpus):
        raise UsageError(f"--on={kind}: resources.gpus = {resources.gpus}: SLURM gives whole GPUs")
    if kind == "submitit":
        local = submitit.LocalExecutor(folder, max_num_timeout=100)
        local.update_parameters(**common, signal_delay_s=120)
        return local
    try:
        slurm = submitit.SlurmExecutor(folder, max_num_timeout=100)
    except RuntimeError:
        raise UsageError(
            "--on=slurm: there is no srun on this machine; start the study on a login node"
        ) from None
    names = {"timeout_min": "time"}
    slurm.update_parameters(
        **{names.get(name, name): value for name, value in common.items() if value},
        **({"mem": f"{resources.memory_gb * 1024:.0f}MB"} if resources.memory_gb else {}),
        job_name=study.name,
        signal_delay_s=120,
        additional_parameters={"requeue": True, **study.slurm},
    )
    return slurm


def scheduler(
    kind: str, jobs: Sequence[Job], study: Study, out: Path, parallel: int
) -> Iterator[None]:
    """Execute each run as a submitit job: all at once with SLURM, `parallel` at a time without.

    After an interruption the jobs stay in SLURM's queue, and the next start finds them again.

    Raises:
      UsageError: at once, see `executor`.
    """
    return _schedule(kind, executor(kind, study, out), jobs, study, out, parallel)


def _schedule(
    kind: str, pool: Any, jobs: Sequence[Job], study: Study, out: Path, parallel: int
) -> Iterator[None]:
    """Submit jobs to submitit's executor, and submit those again that are lost."""
    waiting = collections.deque(jobs)
    live: dict[str, tuple[Job, Any]] = {}
    lost: dict[str, tuple[int, int]] = {}
    polled = 0.0
    with interruptions() as interrupted:
        while (waiting or live) and not interrupted():
            while waiting and (kind == "slurm" or len(live) < parallel):
                job = waiting.popleft()
                handle = _find_queued(kind, pool, job)
                if handle is None:
                    handle = _submit(kind, pool, job)
                    status.write_note(out, job.name, state="queued", job=handle.job_id)
                live[job.name] = job, handle
            # A run notes its own end. SLURM is queried only for lost jobs, and rarely, since many
            # users share it.
            poll = kind == "submitit" or time.monotonic() - polled > _POLL_INTERVAL
            polled = time.monotonic() if poll else polled
            for name, (job, handle) in list(live.items()):
                if status.read_note(out, name).get("state") in ("done", "failed"):
                    del live[name]
                elif poll and (end := _end_state(kind, handle)):
                    del live[name]
                    _handle_lost(job, end, out, lost, waiting)
            yield
            time.sleep(1)
        if kind == "submitit":
            for _, handle in live.values():
                handle.cancel()
            while not all(handle.done() for _, handle in live.values()):
                time.sleep(0.2)
        elif live:
            print(
                f"{len(live)} jobs stay in SLURM's queue; the same command finds them again, and "
                f"scancel --name={study.name} ends them"
            )


def _submit(kind: str, pool: Any, job: Job) -> Any:
    """Submit a job.

    Raises:
      UsageError: sbatch refuses it.
    """
    from submitit.core.utils import FailedJobError

    try:
        return pool.submit(Resumable(tuple(job)))
    except FailedJobError as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"--on={kind}: {job.name} cannot be queued ({reason}); correct [resources] and [slurm] in the "
            "study"
        ) from None


def _find_queued(kind: str, pool: Any, job: Job) -> Any:
    """Return the job of an earlier start that SLURM still has, or None."""
    number = status.read_note(Path(job.out), job.name).get("job")
    if kind != "slurm" or number is None:
        return None
    handle = pool.job_class(folder=pool.folder, job_id=number)
    return None if _end_state(kind, handle) else handle


def _end_state(kind: str, handle: Any) -> str:
    """Return the state in which a job ended; empty while it is waiting or running."""
    if kind == "submitit":
        return handle.state if handle.done() else ""
    # Submitit uses sacct, which needs SLURM's accounting; scontrol does not.
    command = ["scontrol", "show", "job", "-o", handle.job_id]
    shown = subprocess.run(command, capture_output=True, text=True)
    if match := re.search(r"JobState=(\w+)", shown.stdout):
        return match[1] if match[1] in _END_STATES else ""
    return "GONE" if "Invalid job id" in shown.stderr else ""


def _handle_lost(
    job: Job,
    end: str,
    out: Path,
    lost: dict[str, tuple[int, int]],
    waiting: collections.deque[Job],
) -> None:
    """Queue a job again that ended although its run is neither done nor failed.

    Args:
      lost: by name, how often in a row the job was lost without progress, and the step of the
        newest checkpoint; updated.
    """
    if status.read_note(out, job.name).get("state") in ("done", "failed"):
        return
    count, before = lost.get(job.name, (0, 0))
    saved = status.saved_step(out / job.name)
    lost[job.name] = count, _ = (0 if saved > before else count + 1), saved
    if end == "CANCELLED":
        status.write_note(out, job.name, state="failed", message="its job was cancelled")
    elif count < job.attempts:
        waiting.append(job)
    else:
        message = (
            f"its job was lost {job.attempts} times without progress; see {out / 'launch' / 'jobs'}"
        )
        status.write_note(out, job.name, state="failed", message=message)
