"""Adds machine, versions and threads to every result."""

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.dev.bench.machine import describe


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(describe(torch.get_num_threads()), gemmascope_fast=gsf.__version__)
