"""Where a study's runs can go: this machine, a Ray cluster, SLURM.

Each place is a generator that hands out jobs, yields every second or so while any is under way, and
ends when none is, or soon after Ctrl-C or SIGTERM.
"""

import collections
import logging
import os
import queue
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from dynajax.launch import status
from dynajax.launch.job import Job, JobRunner
from dynajax.launch.study import Study
from dynajax.runtime.distributed import interruptions
from dynajax.types import UsageError

#: Seconds between two questions to SLURM about a job, and the states in which one is over.
_ASKING = 30.0
_ENDS = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "BOOT_FAIL",
    "OUT_OF_MEMORY",
    "DEADLINE",
)


def here(jobs: Sequence[Job], parallel: int) -> Iterator[None]:
    """`parallel` runs at once as processes of this machine; an interruption saves them."""
    workers = [JobRunner(job) for job in jobs]
    slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for slot in range(parallel):
        slots.put(share(visible_gpus() if parallel > 1 else [], slot, parallel))

    def complete(worker: JobRunner) -> None:
        env = slots.get()
        try:
            worker.complete(env)
        finally:
            slots.put(env)

    with interruptions() as interrupted, ThreadPoolExecutor(parallel) as pool:
        running = [pool.submit(complete, worker) for worker in workers]
        try:
            while wait(running, 0.5).not_done:
                if interrupted():
                    break
                yield
        finally:
            for worker in workers:
                worker.stop()
    for future in running:
        future.result()


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that a process started here would see."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(n) for n, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def share(gpus: Sequence[str], slot: int, slots: int) -> dict[str, str]:
    """The environment in which one of `slots` processes sees its share of the GPUs."""
    if not gpus:
        return {}
    shared = gpus[slot::slots] or [gpus[slot % len(gpus)]]
    env = {"CUDA_VISIBLE_DEVICES": ",".join(shared)}
    if slots > len(gpus):
        # JAX takes three quarters of a GPU's memory for the first process that comes.
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / -(-slots // len(gpus)):.3f}"
    return env


def ray_cluster(jobs: Sequence[Job], study: Study, address: str) -> Iterator[None]:
    """One Ray task a run. A task whose node dies is started again on another."""
    try:
        import ray
    except ImportError:
        raise UsageError("--on=ray: install the extra first: pip install -e '.[ray]'") from None

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        raise UsageError(
            f"--address={address}: no Ray cluster answers there; `ray start --head` begins one"
        ) from None
    asked = {"CPU": study.resources.cpus, "GPU": study.resources.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(k, 0) >= v for k, v in asked.items()) for node in nodes):
        print(f"no node of the cluster has {asked} yet, as the study asks; the runs wait for one")
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
    """What submitit calls, and what it queues again when SLURM says that the time is up."""

    def __init__(self, job: tuple[Any, ...]) -> None:
        self._job = job
        self._worker: JobRunner | None = None

    def __call__(self) -> str:
        self._worker = JobRunner(Job(*self._job))
        return self._worker.complete()

    def checkpoint(self) -> Any:
        """Ends the run, saved; the next start goes on from there."""
        from submitit.helpers import DelayedSubmission

        if self._worker is not None:
            self._worker.end()
        return DelayedSubmission(Resumable(self._job))


def executor(kind: str, study: Study, out: Path) -> Any:
    """Submitit's executor for "slurm", or for "submitit", which is the same without SLURM."""
    try:
        import submitit
    except ImportError:
        raise UsageError(
            f"--on={kind}: install the extra first: pip install -e '.[slurm]'"
        ) from None

    asked = study.resources
    folder = out / "launch" / "jobs"
    common = {
        "timeout_min": max(1, round(asked.hours * 60)),
        "cpus_per_task": asked.cpus,
        "gpus_per_node": int(asked.gpus),
    }
    if asked.gpus != int(asked.gpus):
        raise UsageError(f"--on={kind}: resources.gpus = {asked.gpus}: SLURM gives whole GPUs")
    if kind == "submitit":
        local = submitit.LocalExecutor(folder, max_num_timeout=100)
        local.update_parameters(**common, signal_delay_s=120)
        return local
    try:
        slurm = submitit.SlurmExecutor(folder, max_num_timeout=100)
    except RuntimeError:
        raise UsageError("--on=slurm: there is no srun here; start it on a login node") from None
    names = {"timeout_min": "time"}
    slurm.update_parameters(
        **{names.get(name, name): value for name, value in common.items() if value},
        **({"mem": f"{asked.memory_gb * 1024:.0f}MB"} if asked.memory_gb else {}),
        job_name=study.name,
        signal_delay_s=120,
        additional_parameters={"requeue": True, **study.slurm},
    )
    return slurm


def scheduler(
    kind: str, jobs: Sequence[Job], study: Study, out: Path, parallel: int
) -> Iterator[None]:
    """One submitit job a run: all at once to SLURM, `parallel` at once on this machine.

    An interruption leaves SLURM's jobs where they are; the next start finds them again.
    """
    place = executor(kind, study, out)
    waiting = collections.deque(jobs)
    live: dict[str, tuple[Job, Any]] = {}
    starts: dict[str, int] = collections.defaultdict(int)
    asked = 0.0
    with interruptions() as interrupted:
        while (waiting or live) and not interrupted():
            while waiting and (kind == "slurm" or len(live) < parallel):
                job = waiting.popleft()
                handle = _queued(kind, place, job)
                if handle is None:
                    handle = place.submit(Resumable(tuple(job)))
                    status.write_note(out, job.name, state="queued", job=handle.job_id)
                live[job.name] = job, handle
            # The runs say for themselves when they are over; who is asked about lost jobs is busy.
            ask = kind == "submitit" or time.monotonic() - asked > _ASKING
            asked = time.monotonic() if ask else asked
            for name, (job, handle) in list(live.items()):
                if status.read_note(out, name).get("state") in ("done", "failed"):
                    del live[name]
                elif ask and (end := _end(kind, handle)):
                    del live[name]
                    _lost(job, end, out, starts, waiting)
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


def _queued(kind: str, place: Any, job: Job) -> Any:
    """The job of an earlier start that SLURM still has, or None."""
    number = status.read_note(Path(job.out), job.name).get("job")
    if kind != "slurm" or number is None:
        return None
    handle = place.job_class(folder=place.folder, job_id=number)
    return None if _end(kind, handle) else handle


def _end(kind: str, handle: Any) -> str:
    """How a job ended; empty while it is waiting or running."""
    if kind == "submitit":
        return handle.state if handle.done() else ""
    # Unlike sacct, which submitit asks, scontrol needs no accounting.
    command = ["scontrol", "show", "job", "-o", handle.job_id]
    shown = subprocess.run(command, capture_output=True, text=True)
    if match := re.search(r"JobState=(\w+)", shown.stdout):
        return match[1] if match[1] in _ENDS else ""
    return "GONE" if "Invalid job id" in shown.stderr else ""


def _lost(
    job: Job, end: str, out: Path, starts: dict[str, int], waiting: collections.deque[Job]
) -> None:
    """A job that ended without its run being done or failed is queued again."""
    if status.read_note(out, job.name).get("state") in ("done", "failed"):
        return
    starts[job.name] += 1
    if end == "CANCELLED":
        status.write_note(out, job.name, state="failed", message="its job was cancelled")
    elif starts[job.name] < job.attempts:
        waiting.append(job)
    else:
        message = f"its job was lost {job.attempts} times; see {out / 'launch' / 'jobs'}"
        status.write_note(out, job.name, state="failed", message=message)
