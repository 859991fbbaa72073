"""A fresh test Hub per test, and a huggingface_hub that never leaves this machine."""

import os

# Read by huggingface_hub when it is imported, so they must be set before any test module imports it.
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"

from collections.abc import Iterator
from datetime import timedelta

import pytest

from tests.hub import Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(page_size=3, url_lifetime=timedelta(minutes=5)) as running:
        yield running
