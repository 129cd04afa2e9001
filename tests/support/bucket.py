"""gs:// on this machine: a folder stands for Google's storage, everything above it is what people
run.

epath goes through its own fsspec backend (as it does with gcsfs), and orbax and tensorstore write,
list and commit as they do in a bucket; only the last hop differs, which is a folder.
"""

from pathlib import Path

import pytest
from etils import epath
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils

from ogdm_jax import places


class Bucket(DirFileSystem):
    """Names below a folder; like object storage it has no empty folders and no appending, and makes
    what it needs.
    """

    protocol = "gcs"
    root = ""

    def __init__(self, **_):
        super().__init__(path=self.root, fs=LocalFileSystem(auto_mkdir=True))

    @classmethod
    def _strip_protocol(cls, path):
        return (
            path.removeprefix("gs://").rstrip("/")
            if isinstance(path, str)
            else list(map(cls._strip_protocol, path))
        )

    def _join(self, path):
        return super()._join(self._strip_protocol(path))

    def mkdir(self, path, create_parents=True, **more):
        """Nothing: a folder is there once a file is in it."""

    makedirs = mkdir

    def open(self, path, mode="rb", **more):
        assert "a" not in mode, "object storage cannot append"
        return super().open(path, mode, **more)


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lets gs://bucket be a folder of this machine, which is returned, until monkeypatch ends."""
    folder = tmp_path / "storage"
    (folder / "bucket").mkdir(parents=True)
    monkeypatch.setattr(Bucket, "root", str(folder))
    monkeypatch.setitem(places.LIBRARIES, "gs", ("fsspec", "pip install 'ogdm_jax[gcs]'"))
    systems = {"gcs": lambda: Bucket(skip_instance_cache=True), "file": LocalFileSystem}
    monkeypatch.setattr(
        epath.gpath._PREFIX_TO_BACKEND["gs"], "_get_filesystem", lambda name: systems[name]()
    )
    files = lambda path: {"driver": "file", "path": str(folder / str(path).removeprefix("gs://"))}
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", files)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda _: False)
    monkeypatch.setattr(
        gcs_utils,
        "rmtree",
        lambda path, missing_ok=False: epath.Path(path).rmtree(missing_ok=missing_ok),
    )
    return folder / "bucket"
