"""Forks runs of ``train`` from a process that has imported everything: a start takes a moment instead of ten seconds.

python -m tests.zygote        reads lines ``CONFIG.toml`` and answers each with the child's pid; a child that ended is
                              answered with ``ended PID STATUS`` before the next line is read
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import traceback
from pathlib import Path

LATE = (
    "pyarrow.parquet", "pyarrow.compute", "tensorboard.compat.proto.event_pb2", "tensorboard.compat.proto.summary_pb2",
    "tensorboard.summary.writer.record_writer", "transformers.models.llama.modeling_llama", "torch._dynamo",
    "tests.trainer.test_resume",
)  # fmt: skip
"""What a run imports only while it goes, its environment's module last: seconds that each child would take anew."""


def child(path: str) -> int:
    from areal_agents import settings
    from areal_agents.errors import Interrupted
    from areal_agents.trainer.loop import train

    log = os.open(Path(path).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setsid()
    try:
        asyncio.run(train(settings.load(path), resume=True, console=True))
    except Interrupted as error:
        print(error)
        return 130
    except BaseException:  # noqa: BLE001 - the child's outermost frame: reported in its log
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    import areal_agents.engines.cpu.engine
    import areal_agents.trainer.loop  # noqa: F401 - imported for the children

    for name in LATE:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = child(line.strip())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(f"ended {pid} {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()
