"""Where the processes that torchrun started meet, also when it starts them again.

torchrun gives its workers one key-value store for as long as it runs. After a restart it still holds the addresses of
the dead, and a new process group reads them and waits for ever (seen with torch 2.13 and gloo). So each attempt
brings a store of its own, on rank 0, and only its address goes through torchrun's.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch import distributed as dist

_ADDRESS, _TOKEN = "ddpm_fast/address", "ddpm_fast/token"
_ATTEMPT = timedelta(seconds=2)  # to reach an address, which may be that of a dead rank 0


def fresh_store(patience: timedelta) -> tuple[dist.Store, int, int]:
    """(an empty store, rank, world size) of this process, by torchrun's environment.

    Raises TimeoutError where rank 0 does not come within ``patience``.
    """
    shared, rank, size = next(dist.rendezvous("env://", timeout=patience))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # not torchrun: rank 0 has just made this store
        return shared, rank, size
    host, token = os.environ["MASTER_ADDR"], uuid.uuid4().hex
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
        store.set(_TOKEN, token)
        shared.set(_ADDRESS, f"{store.port} {token}")
        return store, rank, size
    deadline = time.monotonic() + patience.total_seconds()
    while time.monotonic() < deadline:
        port, token = shared.get(_ADDRESS).decode().split()
        try:
            store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_ATTEMPT)
            if store.get(_TOKEN).decode() == token:
                store.set_timeout(patience)
                return store, rank, size
        except (RuntimeError, dist.DistError):  # of an earlier attempt; rank 0 of this one is not there yet
            time.sleep(0.2)
    raise TimeoutError(f"process {rank} of {size} found no process 0 at {host} within {patience}")
