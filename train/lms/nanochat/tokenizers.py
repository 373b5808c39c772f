"""nanochat's tokenizers: bytes, for the W1 smoke run, and the tiktoken ``Encoding`` in ``tokenizer.pkl``.

Unpickling can run any code. ``tokenizer.pkl`` is therefore read by an unpickler that accepts only one name,
``tiktoken.core.Encoding``, and replaces it by a class without code; the encoding is then built from plain values.
"""

from __future__ import annotations

import pickle
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UserError

if TYPE_CHECKING:
    from tiktoken import Encoding

_CHAT_TOKENS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")


class ByteTokenizer:
    """A tokenizer of 256 bytes and BOS (id 256), which also ends a text: nanochat has no other delimiter."""

    bos: int | None = 256
    eos: int = 256
    ends = frozenset({256})
    now = datetime(1970, 1, 1)  # nothing here shows a date
    vocab_size = 257
    _mark = "<|bos|>"

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the UTF-8 bytes of ``text``; with ``special``, ``<|bos|>`` in the text becomes id 256."""
        pieces = text.split(self._mark) if special else [text]
        ids = list(pieces[0].encode())
        for piece in pieces[1:]:
            ids += [self.eos, *piece.encode()]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of the bytes in ``ids``; invalid UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def chat(self, user: str) -> str:
        """Raise UserError: bytes have no chat template."""
        raise UserError("the byte tokenizer of nanochat has no chat template: set prompt.template to plain or slam")

    def chat_end(self) -> int:
        """Return ``eos``."""
        return self.eos


class TiktokenTokenizer:
    """nanochat's BPE tokenizer. A text ends with ``<|bos|>``, or in a chat model with ``<|assistant_end|>``.

    Raises:
        UserError: the encoding lacks nanochat's special tokens.
    """

    def __init__(self, encoding: Encoding, chat: bool, reference: str) -> None:
        self._encoding, self._reference = encoding, reference
        special = encoding._special_tokens
        if "<|bos|>" not in special or (chat and not set(_CHAT_TOKENS) <= special.keys()):
            raise UserError(f"the tokenizer of '{reference}' lacks nanochat's special tokens ({', '.join(special)})")
        self._special = set(special.values())
        self._has_chat_tokens = set(_CHAT_TOKENS) <= special.keys()
        self.bos: int | None = special["<|bos|>"]
        self.now = datetime(1970, 1, 1)  # nothing here shows a date
        self.eos: int = special["<|assistant_end|>" if chat else "<|bos|>"]
        self.ends = frozenset({self.eos, special["<|bos|>"]})  # as nanochat's own engine
        self._chat_end: int = special.get("<|assistant_end|>", self.eos)
        self.vocab_size: int = encoding.n_vocab

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of ``text``; special tokens in it are recognized only with ``special``."""
        return list(
            self._encoding.encode(text, allowed_special="all") if special else self._encoding.encode_ordinary(text)
        )

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids`` without special tokens and ids that pad the vocabulary."""
        return self._encoding.decode(
            [i for i in ids if i < self.vocab_size and i not in self._special], errors="replace"
        )

    def chat(self, user: str) -> str:
        """Return the user turn ``user`` and the start of the answer.

        Raises:
            UserError: the encoding has no chat tokens.
        """
        if not self._has_chat_tokens:
            raise UserError(f"'{self._reference}' has no chat tokens: set prompt.template to plain or slam")
        return f"<|bos|><|user_start|>{user}<|user_end|><|assistant_start|>"

    def chat_end(self) -> int:
        """Return ``<|assistant_end|>``."""
        return self._chat_end


class _PickledState:
    """Replaces ``tiktoken.core.Encoding`` during unpickling: keeps the state and runs no code."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _PickledState
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_encoding(path: Path) -> Encoding:
    """Read the tiktoken ``Encoding`` in ``tokenizer.pkl``.

    Raises:
        UserError: the file cannot be read or contains anything else.
    """
    import tiktoken

    try:
        with path.open("rb") as file:
            read = _Unpickler(file).load()
    except Exception as error:  # a corrupt pickle can raise almost any exception
        raise UserError(f"'{path}' is not a pickled tiktoken Encoding ({type(error).__name__}: {error})") from None
    state = read.state if isinstance(read, _PickledState) else None
    if not (
        isinstance(state, dict)
        and state.keys() == {"name", "pat_str", "mergeable_ranks", "special_tokens"}
        and isinstance(state["name"], str)
        and isinstance(state["pat_str"], str)
        and _is_id_map(state["mergeable_ranks"], bytes)
        and _is_id_map(state["special_tokens"], str)
    ):
        raise UserError(f"'{path}' is not a tiktoken Encoding that nanochat wrote")
    try:
        return tiktoken.Encoding(**state)
    except Exception as error:  # raised by tiktoken's Rust code
        raise UserError(f"'{path}' has an Encoding that tiktoken rejects ({error})") from None


def _is_id_map(value: Any, key: type) -> bool:
    return isinstance(value, dict) and bool(value) and all(type(k) is key and type(v) is int for k, v in value.items())


def find_tokenizer(model: Path) -> Path | None:
    """Find ``tokenizer.pkl`` next to ``model``, in ``tokenizer/`` next to it, or where nanochat's training puts it."""
    parent = model.resolve().parent
    folders = [parent, parent / "tokenizer", parent.parent.parent / "tokenizer"]
    return next((folder / "tokenizer.pkl" for folder in folders if (folder / "tokenizer.pkl").is_file()), None)
