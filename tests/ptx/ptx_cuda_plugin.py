"""A pytest plug-in: the host tests of the CUDA sources run on the PTX that nvcc makes.

PYTHONPATH=tests/ptx:tests python -m pytest -p ptx_cuda_plugin tests/backends/test_cuda_host.py
"""

import ptx_cuda

ptx_cuda.install()


def pytest_collection_modifyitems(config, items):
    """Without the tests of the host build itself, which build programs of their own."""
    own = [item for item in items if "host" in item.fixturenames]
    config.hook.pytest_deselected(items=[item for item in items if item not in own])
    items[:] = own
