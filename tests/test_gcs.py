"""gs:// through the libraries that people have (gcsfs, tensorstore's own client, orbax), against an emulated service.

Needs the packages gcsfs (extra gcs) and gcp-storage-emulator; test_places.py covers the same paths without them.
"""

import os
import socket
import subprocess
import sys

import compiling
import pytest
import tiny


@pytest.mark.slow
def test_train_resume_and_sample_in_an_emulated_bucket(tmp_path):
    pytest.importorskip("gcsfs", reason="needs pip install 'ogdm_jax[gcs]'")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs pip install gcp-storage-emulator")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://localhost:{port}"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # without tests/strict: gcsfs warns of a lot
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.FLAGS, "GOOGLE_CLOUD_PROJECT": "test"}
    env |= {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}

    def python(*words):
        done = subprocess.run(
            [sys.executable, *words], cwd=tiny.ROOT, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        flags = ("--workdir", "gs://bucket/run", *tiny.flags(tiny.ONE_LEVEL, "methods=", "train.save_every=2 steps"))
        python("train.py", *flags, "--config.train.duration=2 steps")
        assert "resumed from step 2" in python("train.py", *flags, "--config.train.duration=4 steps")
        out = python("sample.py", "--workdir", "gs://bucket/run", "--num", "2", "--out", "gs://bucket/samples.npz")
        assert "wrote 2 images of step 4" in out
    finally:
        server.stop()
