"""``transformers serve`` with continuous batching: parameters and a seed for each request.

    python -m llm_sampling.integrations.transformers_serve MODEL --continuous-batching

It takes the arguments of ``transformers serve``. That server gives every request the temperature
and the filters of the first one, and seeds torch with a request's ``seed``, which does not keep its
tokens from depending on the other requests. Here each request has what its body asks for, through
:func:`~llm_sampling.integrations.continuous_batching.fused_continuous_batching`. Processors are
made of the model's generation config, and not of the first request's.

Importing this module does not import transformers.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

from llm_sampling.integrations.continuous_batching import Prompt, fused_continuous_batching
from llm_sampling.integrations.engine import Reliance, find
from llm_sampling.params import SamplingParams

_UTILS = "transformers.cli.serving.utils"
_MANAGER = f"{_UTILS}:CBGenerateManager"
_BUILD = f"{_UTILS}:BaseHandler._build_generation_config"

RELIANCE = Reliance(
    signatures={
        f"{_MANAGER}.generate_streaming": (
            "self model processor inputs gen_config request_id response_parser"
        ),
        f"{_MANAGER}.generate_non_streaming": ("self model processor inputs gen_config request_id"),
        _BUILD: "self body model_generation_config use_cb",
    },
    lookups={
        f"{_MANAGER}.generate_streaming": "_cb add_request",
        f"{_MANAGER}.init_cb": "_cb init_continuous_batching",
        f"{_UTILS}:GenerationState.get_manager": "CBGenerateManager",
    },
)


def replace_names() -> None:
    """Have the servers of this process draw by the kernel, where they batch continuously.

    Raises:
        RuntimeError: this transformers has not what is relied on; the message names it.
    """
    reason = RELIANCE.difference()
    if reason is not None:
        raise RuntimeError(f"llm_sampling: transformers serve keeps its own sampler: {reason}")
    fused_continuous_batching()
    utils = find(_UTILS)
    utils.CBGenerateManager = _manager(utils.CBGenerateManager)
    utils.BaseHandler._build_generation_config = _building(find(_BUILD))


def _building(build: Any) -> Any:
    """A handler's method, with the seed of the request as an attribute of the config."""

    def with_seed(
        self: Any, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        config = build(self, body, model_generation_config, use_cb=use_cb)
        if use_cb:
            config.seed = body.get("seed")
        return config

    return with_seed


def _manager(theirs: Any) -> Any:
    """A subclass of the server's manager that passes a request's config on."""

    class PerRequest(theirs):  # type: ignore[misc]
        """The server's manager, with the parameters of each request."""

        def init_cb(self, model: Any, gen_config: Any) -> None:
            """See transformers; no config of a request counts for another one."""
            if self._cb is None:
                super().init_cb(model, copy.deepcopy(model.generation_config))

        def _with_params(self, inputs: Any, config: Any) -> dict[str, Any]:
            """The ids of a request with its parameters; status 400 where these are wrong."""
            try:
                return {"input_ids": Prompt(inputs["input_ids"], self._params_of(config))}
            except ValueError as error:
                refused = find("fastapi:HTTPException")
                raise refused(status_code=400, detail=str(error)) from error

        def _params_of(self, config: Any) -> SamplingParams:
            seed, bias = getattr(config, "seed", None), config.sequence_bias
            if not isinstance(bias, dict) or any(len(ids) != 1 for ids in bias):
                bias = None  # of sequences, which the manager refuses, or none
            else:
                config = copy.copy(config)
                config.sequence_bias = None
                bias = {ids[0]: value for ids, value in bias.items()}
            params: SamplingParams = self._cb.params_of(config)
            return replace(params, seed=None if seed is None else seed % 2**64, logit_bias=bias)

        def generate_streaming(
            self,
            model: Any,
            processor: Any,
            inputs: Any,
            gen_config: Any,
            request_id: str,
            response_parser: Any = None,
        ) -> Any:
            """See transformers."""
            inputs = self._with_params(inputs, gen_config)
            return super().generate_streaming(
                model, processor, inputs, gen_config, request_id, response_parser
            )

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
        ) -> Any:
            """See transformers."""
            inputs = self._with_params(inputs, gen_config)
            return await super().generate_non_streaming(
                model, processor, inputs, gen_config, request_id
            )

    return PerRequest


def main() -> None:
    """Run ``transformers serve`` with the arguments of this process."""
    replace_names()
    sys.argv[:1] = ["transformers", "serve"]
    find("transformers.cli.transformers:main")()


if __name__ == "__main__":
    main()
