"""This machine: what is installed, what it can compute on, where it can write, and whether Weights & Biases is in."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

from dejavu_exp import config, provenance
from dejavu_exp.doctor.findings import Examination

DISTRIBUTION = "dejavu_exp"
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss")
"""Builds of FAISS, of which exactly one may be installed: they overwrite each other's files."""
OUTPUTS = Path("outputs")
LOW_GB = 5.0
"""Free disk below which a run of any size fills it."""
SHARED_GB = 1.0
"""Shared memory below which processes that decode images may be killed; containers often have 0.06."""
SHARED = Path("/dev/shm")


def examine(overrides: Sequence[str]) -> Examination:
    """Look at this machine as a run with this configuration would find it.

    Args:
        overrides: as `python -m dejavu_exp` takes them; they name the cache, the device and the tracking.

    Raises:
        ConfigError: the configuration cannot work.
    """
    resolved, _ = config.compose(overrides)
    found = Examination("environment", platform.node() or "this machine")
    _tell_packages(found)
    _tell_faiss(found)
    _tell_processors(found)
    _tell_devices(found)
    _tell_folder(found, "cache", Path(resolved["trainer"]["cache"]), "trainer.cache=PATH or DEJAVU_CACHE")
    _tell_folder(found, "outputs", OUTPUTS, "hydra.run.dir=PATH")
    _tell_shared_memory(found)
    _tell_tracking(found, resolved["tracking"])
    return found


def _tell_packages(found: Examination) -> None:
    """Versions, and those that are not what this package asks for."""
    found.facts |= {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "commit": provenance.commit() or "installed from a wheel",
        "versions": provenance.versions(),
    }
    unmet = []
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version = _version(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                unmet.append(f"{requirement.name}{requirement.specifier}: {version or 'not installed'}")
    found.fault(
        "packages", "Packages are missing or of a version that does not work.", "pip install -U dejavu_exp", unmet
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tell_faiss(found: Examination) -> None:
    """Exactly one FAISS."""
    there = [f"{name} {version}" for name in FAISS if (version := _version(name))]
    found.facts["faiss"] = there
    if not there:
        found.fault(
            "faiss", "FAISS, which searches for neighbours, is not installed.",
            "pip install 'dejavu_exp[cpu]', or 'dejavu_exp[gpu]' for its build for GPUs.",
        )  # fmt: skip
    if len(there) > 1:
        names = " ".join(name.partition(" ")[0] for name in there)
        found.fault(
            "faiss", "Several builds of FAISS are installed, and have overwritten each other's files.",
            f"pip uninstall -y {names}, then pip install 'dejavu_exp[cpu]' or 'dejavu_exp[gpu]'.", there,
        )  # fmt: skip


def _tell_processors(found: Examination) -> None:
    """Cores, threads and memory."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS")
    found.facts |= {"cores": cores, "threads of torch": threads, "OMP_NUM_THREADS": asked or "not set"}
    if threads > cores:
        found.warn(
            "threads", f"torch uses {threads} threads on {cores} cores: they wait for each other.",
            f"Set OMP_NUM_THREADS={cores}, or leave it out.",
        )  # fmt: skip


def _tell_devices(found: Examination) -> None:
    """GPUs, and whether torch and FAISS can use them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_properties(place) for place in range(count)]
    found.facts["gpus"] = [f"{one.name}, {one.total_memory / 1e9:.0f} GB" for one in devices] or "none"
    if not devices and shutil.which("nvidia-smi"):
        found.warn(
            "cuda", f"There is an NVIDIA driver, but torch {torch.__version__} finds no CUDA device.",
            "Install torch's build for this driver (see pytorch.org), and check CUDA_VISIBLE_DEVICES.",
        )  # fmt: skip
    if devices and _version("faiss-cpu"):
        found.note(
            "faiss_cpu", "There is a GPU, and FAISS is its build for CPUs: searches run there, with the same results.",
            "For a large bank: pip uninstall -y faiss-cpu, then pip install 'dejavu_exp[gpu]'.",
        )  # fmt: skip


def _tell_folder(found: Examination, name: str, folder: Path, key: str) -> None:
    """Whether a folder can be written to, and how much there is free."""
    there = folder.expanduser().absolute()
    above = next(path for path in (there, *there.parents) if path.exists())
    try:
        # Written and not asked: permissions do not tell of read-only mounts and full disks.
        with tempfile.NamedTemporaryFile(dir=above) as stream:
            stream.write(b"doctor")
            stream.flush()
    except OSError as error:
        found.fault(
            f"{name}_closed", f"Nothing can be written to {folder}: {error.strerror}.",
            f"Free some space, change its permissions, or name another folder with {key}.",
        )  # fmt: skip
        return
    free = shutil.disk_usage(above).free / 1e9
    found.facts[name] = f"{there}, {free:.1f} GB free"
    if free < LOW_GB:
        found.warn(
            f"{name}_full", f"Only {free:.1f} GB are free where {folder} is; run.plan=true says what a run needs.",
            f"Free some space, or name another folder with {key}.",
        )  # fmt: skip


def _tell_shared_memory(found: Examination) -> None:
    """What processes that decode hand their images over in."""
    if not SHARED.is_dir():
        return
    size = shutil.disk_usage(SHARED).total / 1e9
    found.facts["shared memory"] = f"{size:.2f} GB"
    if size < SHARED_GB:
        found.warn(
            "shared_memory", f"Shared memory is {size:.2f} GB: processes that decode images may be killed.",
            "Start the container with --shm-size=8g or --ipc=host, or set trainer.workers=0.",
        )  # fmt: skip


def _tell_tracking(found: Examination, node: object) -> None:
    """Whether runs would be sent; the key itself is not looked at."""
    from dejavu_exp.tracking import WandbTracking, has_key

    tracking = config.bind(node, "tracking")
    mode = tracking.mode if isinstance(tracking, WandbTracking) else "disabled"
    wanted = os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode
    logged_in = has_key() if wanted in ("auto", "online") else None
    told = {None: "not asked for", True: "logged in", False: "not logged in"}[logged_in]
    found.facts["Weights & Biases"] = f"mode {wanted}, {told}"
    if wanted == "online" and not logged_in:
        found.warn(
            "wandb", "Runs are to be sent to Weights & Biases, but nobody is logged in; they are kept offline.",
            "wandb login, or tracking.mode=offline.",
        )  # fmt: skip
