"""The one door for JSON: what is written is valid JSON, and what cannot be read is one sentence.

JSON has no NaN and no infinity. Here they are the words "nan", "inf" and "-inf", which Python's
float() and pandas read: a number that went wrong stays visible.
"""

import json
import math
import os
from typing import Any

from etils import epath

from ogdm_jax import places


class RecordError(ValueError):
    """A JSON file cannot be read, or is another one; the message is one sentence that names it."""


def dumps(value: Any, indent: int | None = None) -> str:
    """Valid JSON of nested dicts, lists, numbers and arrays.

    Args:
      value: what to write. Numbers that are not finite become the words nan, inf, -inf.
      indent: as json.dumps has it.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array, of NumPy or JAX
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write(path: epath.Path, value: Any, indent: int | None = None) -> None:
    """Writes a JSON file: whole, or not at all where the program ends here. See `dumps`."""
    with places.written(path) as new:
        new.write_text(dumps(value, indent) + "\n")


def read(path: str | os.PathLike, kind: type, field: str = "file") -> Any:
    """What a JSON file holds.

    Args:
      path: of the file, local or in a bucket.
      kind: dict or list, which the file has to hold.
      field: the setting that named it, for messages.

    Raises:
      RecordError: no such file, no JSON (the line and the reason are named), or of another kind.
    """
    where = places.place(path, field)
    try:
        value = json.loads(where.read_bytes())  # UTF-8, also with the mark that Notepad writes
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise RecordError(f"{field}: {str(path)!r} cannot be read ({reason})") from None
    except UnicodeDecodeError:
        raise RecordError(f"{field}: {str(path)!r} is no text; expected JSON") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecordError(f"{field}: {str(path)!r} is no JSON ({reason})") from None
    if not isinstance(value, kind):
        words = {dict: "an object {...}", list: "a list [...]"}
        raise RecordError(
            f"{field}: {str(path)!r} holds {type(value).__name__}; expected {words[kind]}"
        )
    return value
