"""unbake doctor: whether this machine can run all of it, and what to do about what it lacks."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from rich.console import Console

from engine.errors import UserError, install
from jobs.options import Parser

GIB = 1 << 30
EXTRAS = {"peft": "adapters", "datasets": "datasets", "s3fs": "s3", "gcsfs": "gcs"}
"""Optional packages and the extra that brings them."""

HUB_SECONDS = 5
DEEPSPEED_SECONDS = 120


@dataclass(frozen=True)
class Check:
    """What was looked at, how it stands, and the remedy where something is to be done."""

    name: str
    state: Literal["ok", "note", "wrong"]
    found: str
    remedy: str = ""


def main(arguments: list[str]) -> int:
    """Look at everything; the exit code: 0 when nothing is wrong, 1 otherwise."""
    options = parser().parse_args(arguments)
    console = Console(highlight=False)
    wrong = 0
    for check in checks(options.run_dir, options.address):
        wrong += check.state == "wrong"
        mark = {"ok": "[green]ok   [/]", "note": "[yellow]note [/]", "wrong": "[red]wrong[/]"}[check.state]
        console.print(f"{mark} [bold]{check.name:<12}[/]", end=" ")
        console.print(check.found, markup=False, soft_wrap=True)
        if check.remedy:
            console.print(f"{'':<19}-> {check.remedy}", markup=False, soft_wrap=True)
    console.print(f"{wrong} wrong" if wrong else "nothing is wrong")
    return 1 if wrong else 0


def parser() -> argparse.ArgumentParser:
    """The options of `unbake doctor`."""
    made = Parser(prog="unbake doctor", description="Look at this machine and say what is amiss.")
    made.add_argument("--run_dir", default=".", help="where runs are to be written (default: this folder)")
    made.add_argument(
        "--address", help="a Ray cluster to join; default: start a private instance, and stop it"
    )
    return made


def checks(run_dir: str, address: str | None) -> Iterator[Check]:
    """All checks, as they are made; one that breaks is itself wrong."""
    looks: list[Callable[[], Check]] = [
        _python, _packages, _extras, _gpu, _cpu, _memory, _shared_memory, _files,
        lambda: _disk(run_dir), lambda: _ray(address), _deepspeed, _builds, _hub,
    ]  # fmt: skip
    for look in looks:
        try:
            yield look()
        except Exception as error:  # whatever a library below raises is what we are here to report
            name = getattr(look, "__name__", "check").strip("_")
            yield Check(
                name, "wrong", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )


def _python() -> Check:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}, in {sys.prefix}"
    if sys.platform != "linux":
        return Check("python", "note", found, "DeepSpeed runs on Linux alone: retraining needs it there")
    return Check("python", "ok", found)


def _packages() -> Check:
    """Installed versions against the bounds that the package itself declares."""
    bad, shown = [], []
    for line in metadata.requires("unbake") or ():
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            bad.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version.split("+")[0], prereleases=True):
            bad.append(f"{wanted.name} {version} is not {wanted.specifier}")
        if wanted.name in ("torch", "transformers", "ray", "deepspeed", "zarr"):
            shown.append(f"{wanted.name} {version}")
    if bad:
        return Check("packages", "wrong", "; ".join(bad), f"{sys.executable} -m pip install unbake")
    return Check("packages", "ok", f"unbake {metadata.version('unbake')}: {', '.join(shown)}")


def _extras() -> Check:
    have = {extra for package, extra in EXTRAS.items() if _installed(package)}
    lacks = sorted(set(EXTRAS.values()) - have)
    if not lacks:
        return Check("extras", "ok", ", ".join(sorted(have)))
    found = f"{', '.join(sorted(have)) or 'none'}; without {', '.join(lacks)}"
    return Check("extras", "note", found, f"where needed: {install(','.join(lacks))}")


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Check("gpu", "ok", ", ".join(f"{d.name}, {d.total_memory / GIB:.0f} GiB" for d in devices))
    if os.path.exists("/dev/nvidiactl"):
        remedy = "install a torch build for this driver's CUDA (pytorch.org/get-started), or mend the driver"
        return Check("gpu", "wrong", f"there is one, and torch {torch.__version__} cannot use it", remedy)
    return Check(
        "gpu", "note", "none: everything runs on the CPU, slowly for models beyond a few hundred million"
    )


def _cpu() -> Check:
    from engine.precision import multiplies_bfloat16

    free, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    found = f"{free} of {there} cores" if free != there else f"{there} cores"
    if multiplies_bfloat16():
        return Check("cpu", "ok", found)
    return Check(
        "cpu", "note", found, "it has no instructions for bfloat16, so `auto` types are float32 here"
    )


def _memory() -> Check:
    memory = psutil.virtual_memory()
    total = min(memory.total, _cgroup_limit() or memory.total)
    found = f"{total / GIB:.1f} GiB, {min(memory.available, total) / GIB:.1f} free"
    if min(memory.available, total) < 4 * GIB:
        return Check(
            "memory", "note", found, "a gradient worker holds one model in bfloat16 and a batch beside it"
        )
    return Check("memory", "ok", found)


def _cgroup_limit() -> int | None:
    """Memory limit of the container, bytes; None without one."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _shared_memory() -> Check:
    if not os.path.isdir("/dev/shm"):
        return Check("shm", "note", "no /dev/shm: Ray keeps its objects in /tmp, more slowly")
    free = shutil.disk_usage("/dev/shm").free
    found = f"{free / GIB:.1f} GiB free in /dev/shm"
    if free < 0.6 * GIB:
        remedy = "in a container: --shm-size=2g; or --ray.object_store_mb 100"
        return Check("shm", "note", f"{found}: less than Ray's object store takes", remedy)
    return Check("shm", "ok", found)


def _files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        return Check(
            "open files", "note", f"at most {soft}: Ray may run out", f"ulimit -n {min(hard, 65536)}"
        )
    return Check("open files", "ok", f"at most {soft:,}")


def _disk(run_dir: str) -> Check:
    if "://" in run_dir:
        from engine.storage import Folder

        folder = Folder(run_dir)
        folder.write_bytes(".doctor", b"")
        folder.remove(".doctor")
        return Check("run_dir", "ok", f"{folder.uri} can be written")
    path = os.path.abspath(run_dir)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    if not os.access(path, os.W_OK):
        return Check(
            "run_dir", "wrong", f"{path} cannot be written", "give another run_dir, or mend its permissions"
        )
    free = shutil.disk_usage(path).free
    found = f"{free / GIB:,.0f} GiB free in {path}"
    if free < 10 * GIB:
        remedy = (
            "a million documents of 4,096 numbers take 8 GB a checkpoint, each retrained model its own size"
        )
        return Check("run_dir", "note", found, remedy)
    return Check("run_dir", "ok", found)


def _ray(address: str | None) -> Check:
    import ray

    from cluster.session import session
    from engine.spec import Ray

    started = time.monotonic()
    try:
        with session(Ray(address=address, object_store_mb=100)):
            answer = ray.get(ray.remote(num_cpus=0)(platform.node).remote(), timeout=60)
            there = ray.cluster_resources()
    except (UserError, ray.exceptions.RayError) as error:
        return Check("ray", "wrong", str(error).splitlines()[0], "see docs/faq.md, 'Ray does not start'")
    had = f"{there.get('CPU', 0):.0f} CPUs, {there.get('GPU', 0):.0f} GPUs"
    return Check("ray", "ok", f"a task ran on {answer} in {time.monotonic() - started:.1f} s; {had}")


def _deepspeed() -> Check:
    if not _installed("deepspeed"):
        return Check(
            "deepspeed", "wrong", "not installed", f"{sys.executable} -m pip install deepspeed (Linux)"
        )
    # In a process of its own: it is never imported beside us.
    done = subprocess.run(
        [sys.executable, "-c", "import deepspeed; print(deepspeed.__version__)"],
        capture_output=True, text=True, timeout=DEEPSPEED_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it breaks"])[-1]
        return Check(
            "deepspeed", "wrong", f"cannot be imported: {last}", "install the version that setup pins"
        )
    return Check(
        "deepspeed", "ok", f"{done.stdout.strip().splitlines()[-1]} can be imported; needs no build here"
    )


def _builds() -> Check:
    """Locks of torch's extension builds: one whose builder was killed would be waited on for ever."""
    from cluster.extension_locks import dead_locks

    if locks := dead_locks():
        found = f"{len(locks)} locks that killed builds of torch extensions left behind"
        return Check("builds", "note", found, f"retraining clears them; by hand: rm {locks[0]}")
    compiler = shutil.which("c++") or shutil.which("g++")
    return Check(
        "builds", "ok", f"no lock left behind; {f'compiler {compiler}' if compiler else 'no compiler'}"
    )


def _hub() -> Check:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Check("hub", "note", "HF_HUB_OFFLINE is set: only what is in the cache can be read by name")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        why = str(getattr(error, "reason", error)).splitlines()[0]
        remedy = "use local folders, a mirror (HF_ENDPOINT), or HF_HUB_OFFLINE=1 with a filled cache"
        return Check("hub", "note", f"{endpoint} cannot be reached ({why})", remedy)
    from huggingface_hub import get_token

    return Check("hub", "ok", f"{endpoint} answers; {'with' if get_token() else 'without'} a token")


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
