"""Machine, versions and threads beside every figure."""

import platform

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import backends


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["isa"] = backends.isa()
    machine_info["gemmascope_fast"] = gsf.__version__
    machine_info["processor_name"] = platform.processor()
