"""A process group of one, as DeepSpeed wants it, for tests that train in the test's own process."""

import socket
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def one_rank() -> Iterator[torch.device]:
    """DeepSpeed on the CPU with one rank; the device of that rank."""
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**place, "MASTER_PORT": str(free.getsockname()[1]), "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(name, value)
        free.close()
        import deepspeed

        # An operator that DeepSpeed would compile here for a minute and training never calls.
        patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        deepspeed.init_distributed("gloo")
        try:
            yield torch.device("cpu")
        finally:
            torch.distributed.destroy_process_group()
            torch.set_num_threads(threads)
