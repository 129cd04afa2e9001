"""The other end of pool.Process: answers requests on standard input, one JSON line each, until
it is closed.

An answer is a line {"done": dict}; before it there may be lines {"so_far": dict}. Whatever
libraries print goes to standard error. An exception is an answer, too: {"error": one sentence}.
"""

import contextlib
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from accelerator_parts import Options


def sentence(error: BaseException) -> str:
    """The kind of an exception and the first 400 characters of what it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def answer(request: dict[str, Any], report: Callable[[dict], None]) -> dict[str, Any]:
    """Calls the action of a request: {"module", "action", "name", "options"}."""
    try:
        module = importlib.import_module(f"accelerator_parts.{request['module']}")
        return getattr(module, request["action"])(
            request["name"], Options(**request["options"]), report
        )
    except Exception as error:
        traceback.print_exc()
        return {"error": sentence(error)}


def forget() -> None:
    """Gives a finished case's memory back to the next one."""
    if "accelerator_parts.programs" in sys.modules:
        sys.modules["accelerator_parts.programs"].COMPILED.clear()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            done = answer(
                json.loads(line), lambda value: answers.write(json.dumps({"so_far": value}) + "\n")
            )
        answers.write(json.dumps({"done": done}) + "\n")
        forget()


if __name__ == "__main__":
    main()
