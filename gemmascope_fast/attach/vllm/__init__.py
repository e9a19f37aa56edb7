"""SAEs in vLLM: a plugin that observes and steers single requests while the engine serves others.

`engine_config` declares the SAEs when the engine starts, `request` builds what one request asks for, and each
completion then has the attribute `gemmascope`, a `Features`.  This module does not import vLLM.
"""

from gemmascope_fast.attach.vllm.features import Features
from gemmascope_fast.attach.vllm.requests import RequestError, request
from gemmascope_fast.attach.vllm.saes import engine_config

__all__ = ["Features", "RequestError", "engine_config", "request"]
