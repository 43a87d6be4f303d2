"""A process group of one, as DeepSpeed wants it, for tests that train in the test's own process."""

import socket
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def _group() -> Iterator[dict[str, str]]:
    """One group for the whole session, since DeepSpeed keeps the first it sees; the environment that goes with it."""
    import deepspeed

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        # An operator that DeepSpeed would compile here for a minute and training never calls.
        patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        patch.setenv("DS_ACCELERATOR", "cpu")
        deepspeed.init_distributed("gloo")
    yield place
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_rank(_group: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """DeepSpeed on the CPU with one rank of one thread; the device of that rank."""
    for name, value in {**_group, "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.device("cpu")
    torch.set_num_threads(threads)
