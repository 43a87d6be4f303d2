"""What surrounds a rank: its place among the others, the process group, and a stop that loses nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import distributed as dist

from vat_fast.checkpoint import CheckpointError as ModelError
from vat_fast.config import ConfigError
from vat_fast.host_memory import keep_freed_memory
from vat_fast.train.checkpoints import CheckpointError
from vat_fast.train.data.episode import DataError

STOPPED = 75
"""Exit status of a run that was asked to stop and saved itself: "try again" (EX_TEMPFAIL)."""

REFUSED = 2
"""Exit status of a run whose configuration, data, weights or checkpoint cannot be used."""

_PR_SET_PDEATHSIG = 1
_WATCH_SECONDS = 0.5
_stop_signals: list[int] = []


@dataclass(frozen=True)
class Place:
    """Where this process stands: `rank` of `world_size`, `local_rank` on its machine, and its device.

    is_launched: a launcher started it, with a place in its environment.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    is_launched: bool = True


@contextlib.contextmanager
def start(threads: int | None = None) -> Iterator[Place]:
    """Join the other ranks; leave them at the end.

    Works under the launchers `deepspeed` and `torchrun`, and alone, as one rank. The rank dies with the process that
    started it. SIGTERM and SIGINT are noted for `stop_requested`, and so is the end of the `deepspeed` command, whose
    own process does not hand signals on. An error is printed in one line that names the rank; what the user can put
    right has no traceback.

    Args:
        threads: of PyTorch on a CPU; None: the machine's cores divided by its ranks.

    Raises:
        SystemExit: the launcher ended before this rank began; or with `REFUSED`, for input that cannot be used.
    """
    place = _place()
    if sys.platform == "linux" and place.is_launched:
        _die_with_parent()
    if place.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", place.world_size))
        torch.set_num_threads(threads or max(1, cores // ranks_here))
    else:
        torch.cuda.set_device(place.device)
    import deepspeed

    # On a CPU DeepSpeed would compile an operator for a minute that training never calls.
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    if "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by the names they had before; nobody who trains can do anything about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.init_distributed("nccl" if place.device.type == "cuda" else "gloo", verbose=False)
    _stop_signals.clear()
    if sys.platform == "linux" and place.is_launched:
        _stop_with_command()
    before = {number: signal.signal(number, _note_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield place
        dist.barrier()
    except (ConfigError, DataError, ModelError, CheckpointError) as error:
        print(f"train: rank {place.rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(REFUSED)
    except Exception as error:
        print(f"train: rank {place.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    dist.destroy_process_group()


def stop_requested() -> bool:
    """Whether any rank was asked to stop; call it on all ranks together, they get one answer."""
    asked = torch.tensor(float(bool(_stop_signals)))
    if dist.is_initialized() and dist.get_world_size() > 1:
        asked = asked.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    return bool(asked.item())


def _place() -> Place:
    """From the launcher's environment variables, which a process on its own gets here."""
    is_launched = "RANK" in os.environ
    if not is_launched:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Place(int(os.environ["RANK"]), local_rank, int(os.environ["WORLD_SIZE"]), device, is_launched)


def _die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Orphans belong to init; a launcher is Python, and init is not.
    if os.getppid() != parent or (parent == 1 and "python" not in _command_line(1)):
        sys.exit("train: the launcher ended before this rank began")


def _stop_with_command() -> None:
    """Ask for a stop when the `deepspeed` command ends, which its per-machine launcher, our parent, survives."""
    launcher = os.getppid()
    if "deepspeed.launcher.launch" not in _command_line(launcher):
        return
    command = _parent_of(launcher)

    def watch() -> None:
        while _parent_of(launcher) == command:
            time.sleep(_WATCH_SECONDS)
        _stop_signals.append(signal.SIGTERM)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def _parent_of(pid: int) -> int | None:
    """The parent of a process, or None where that process is gone."""
    try:
        # The name in brackets, which may hold spaces, stands before state and parent.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return None


def _note_stop(number: int, _: FrameType | None) -> None:
    _stop_signals.append(number)
