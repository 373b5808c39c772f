"""nanochat's tokenizers: bytes, for the W1 smoke run, and the tiktoken ``Encoding`` that its training pickles.

In: text, or ``tokenizer.pkl``. Out: token ids. Unpickling runs code that the file names, so the file is read by an
unpickler that knows one name, ``tiktoken.core.Encoding``, and gives it a stand-in; the encoding is then built from the
plain values.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UserError

if TYPE_CHECKING:
    from tiktoken import Encoding

_CHAT_TOKENS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")


class ByteTokenizer:
    """256 bytes and BOS (id 256), which also ends a text: nanochat has no other delimiter."""

    bos: int | None = 256
    eos: int = 256
    vocab_size = 257
    _mark = "<|bos|>"

    def encode(self, text: str, special: bool = False) -> list[int]:
        """UTF-8 bytes; with ``special``, a written ``<|bos|>`` becomes id 256."""
        pieces = text.split(self._mark) if special else [text]
        ids = list(pieces[0].encode())
        for piece in pieces[1:]:
            ids += [self.eos, *piece.encode()]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of the bytes among ``ids``; what is not UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def chat(self, user: str) -> str:
        """None: bytes have no chat template."""
        raise UserError("the byte tokenizer of nanochat has no chat template: set prompt.template to plain or slam")


class TiktokenTokenizer:
    """nanochat's BPE. A text ends with ``<|bos|>``, or in a chat model with ``<|assistant_end|>``."""

    def __init__(self, encoding: Encoding, chat: bool, reference: str) -> None:
        self._encoding, self._reference = encoding, reference
        special = encoding._special_tokens
        if "<|bos|>" not in special or (chat and not set(_CHAT_TOKENS) <= special.keys()):
            raise UserError(f"the tokenizer of '{reference}' lacks nanochat's special tokens ({', '.join(special)})")
        self._special = set(special.values())
        self._has_chat_tokens = set(_CHAT_TOKENS) <= special.keys()
        self.bos: int | None = special["<|bos|>"]
        self.eos: int = special["<|assistant_end|>" if chat else "<|bos|>"]
        self.vocab_size: int = encoding.n_vocab

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids; special tokens written in ``text`` count only with ``special``."""
        return list(
            self._encoding.encode(text, allowed_special="all") if special else self._encoding.encode_ordinary(text)
        )

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``; special tokens and the ids that pad the vocabulary leave no trace."""
        return self._encoding.decode(
            [i for i in ids if i < self.vocab_size and i not in self._special], errors="replace"
        )

    def chat(self, user: str) -> str:
        """One user turn and the opening of the answer."""
        if not self._has_chat_tokens:
            raise UserError(f"'{self._reference}' has no chat tokens: set prompt.template to plain or slam")
        return f"<|bos|><|user_start|>{user}<|user_end|><|assistant_start|>"


class _PickledState:
    """Stands for ``tiktoken.core.Encoding`` while a pickle is read: keeps the state, runs nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _PickledState
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_encoding(path: Path) -> Encoding:
    """The tiktoken ``Encoding`` in ``tokenizer.pkl``.

    Raises:
        UserError: the file holds anything else, or cannot be read.
    """
    import tiktoken

    try:
        with path.open("rb") as file:
            read = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"'{path}' is no pickled tiktoken Encoding ({type(error).__name__}: {error})") from None
    state = read.state if isinstance(read, _PickledState) else None
    if not (
        isinstance(state, dict)
        and state.keys() == {"name", "pat_str", "mergeable_ranks", "special_tokens"}
        and isinstance(state["name"], str)
        and isinstance(state["pat_str"], str)
        and _maps(state["mergeable_ranks"], bytes)
        and _maps(state["special_tokens"], str)
    ):
        raise UserError(f"'{path}' is no tiktoken Encoding of nanochat's own training")
    try:
        return tiktoken.Encoding(**state)
    except Exception as error:  # of tiktoken's Rust part
        raise UserError(f"'{path}' holds an Encoding that tiktoken refuses ({error})") from None


def _maps(value: Any, key: type) -> bool:
    return isinstance(value, dict) and bool(value) and all(type(k) is key and type(v) is int for k, v in value.items())


def find_tokenizer(model: Path) -> Path | None:
    """``tokenizer.pkl`` beside ``model``, in ``tokenizer/`` beside it, or where nanochat's training keeps it."""
    folder = model.resolve().parent
    places = [folder, folder / "tokenizer", folder.parent.parent / "tokenizer"]
    return next((place / "tokenizer.pkl" for place in places if (place / "tokenizer.pkl").is_file()), None)
