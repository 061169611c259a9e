"""The user's own llama.cpp as a function: found, described, asked for plans, served. Nothing else runs it.

Importing this package starts nothing and loads no slow library. What holds afterwards: every process it
started has ended, whatever ended the call; and the engine saw neither configuration files nor LLAMA_*
and GGML_* variables of the environment.
"""

from __future__ import annotations

from placement.engine.cache import PlanCache
from placement.engine.failures import Failure, classify_failure
from placement.engine.find import Engine, EngineDevice, EngineInfo, describe, find_engine, list_devices
from placement.engine.logs import EngineMemory, PlanReading, read_plan, read_run
from placement.engine.plan import EnginePlan, fit_arguments, model_path, plan, plan_many
from placement.engine.rpc import RpcWorker, rpc_workers
from placement.engine.run import run, run_many
from placement.engine.serve import Server, ServerFailed, ServerHung, Timings, serve

__all__ = [
    "Engine",
    "EngineDevice",
    "EngineInfo",
    "EngineMemory",
    "EnginePlan",
    "Failure",
    "PlanCache",
    "PlanReading",
    "RpcWorker",
    "Server",
    "ServerFailed",
    "ServerHung",
    "Timings",
    "classify_failure",
    "describe",
    "find_engine",
    "fit_arguments",
    "list_devices",
    "model_path",
    "plan",
    "plan_many",
    "read_plan",
    "read_run",
    "rpc_workers",
    "run",
    "run_many",
    "serve",
]
