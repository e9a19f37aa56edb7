"""A pytest plug-in: the tests of tests/interpreter run on compiled kernels.

    PYTHONPATH=tests/ptx GSF_PTX=1 python -m pytest -p ptx_triton_plugin tests/interpreter/test_decode.py

GSF_PTX_ARCH=90 compiles for another architecture than sm_80.
"""

import ptx_triton

ptx_triton.install()
