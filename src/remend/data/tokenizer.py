"""What remend asks of a tokenizer: those of transformers have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol


class AddedToken(Protocol):
    """A token beside the trained vocabulary; a special one steers and is no text."""

    content: str
    special: bool


class Tokenizer(Protocol):
    """A tokenizer of transformers (PreTrainedTokenizerBase)."""

    bos_token_id: int | None
    eos_token_id: int | None
    eos_token: str | None
    pad_token_id: int | None
    chat_template: str | dict[str, str] | None
    """One template, or several by name, of which transformers takes tool_use for tools and else default."""

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def all_special_tokens(self) -> list[str]: ...

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Tokens beside the trained vocabulary, by id."""

    def __len__(self) -> int: ...

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """Token ids of a text, under 'input_ids'."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of token ids."""

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, object]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **context: object,
    ) -> object:
        """Chat messages as text, or as token ids; `context` are tools, and variables of the template."""

    def get_vocab(self) -> dict[str, int]: ...

    def save_pretrained(self, save_directory: str | Path) -> object: ...
