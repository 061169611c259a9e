"""What a run asks of the server: prompt lengths and depths in tokens, and text that makes so many of them."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from placement.engine.serve import Server
from placement.errors import EngineFailed

_SLOT = re.compile(r"n_ctx_slot = (\d+)|new slot,? n_ctx(?:_slot)? = (\d+)|n_ctx_seq\s*=\s*(\d+)")
_TEXT = (
    "a about after all also and any as at be because before between by call card case change code count "
    "each error file first for from function get given how if in into is it kernel key layer line list load "
    "long memory model more name new not number of on one only open order other over part path place read "
    "result return run same second see set size some state step still string table take test than that the "
    "then there this time to token two type under until use value was when where which while with word write"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Asked:
    """What a visit asks of the server; all in tokens."""

    long_prompt: int = 2000
    canary: int = 0  # 0: a quarter of the slot's context
    repeats: int = 3  # of the short prompt, at least
    least_s: float = 3.0  # each prompt is repeated for so long: a small model is done in no time
    short_prompt: int = 64
    short_generate: int = 128
    long_generate: int = 16
    canary_generate: int = 64
    seed: int = 1

    def text(self) -> str:
        """What measurements must share to be compared; more repeats of the same are the same."""
        return (
            f"short {self.short_prompt}+{self.short_generate}, long {self.long_prompt}+{self.long_generate}, "
            f"canary {self.canary}+{self.canary_generate}, seed {self.seed}"
        )


def prompt_text(n_words: int, seed: int) -> str:
    """Return that many words of plain text: repeatable, and without the repetition that caches would like."""
    choose = random.Random(seed)
    sentences = []
    while n_words > 0:
        length = min(n_words, choose.randint(6, 14))
        sentences.append(" ".join(choose.choices(_WORDS, k=length)).capitalize() + ".")
        n_words -= length
    return " ".join(sentences)


def prompt_tokens(server: Server, n_tokens: int, seed: int) -> list[int]:
    """Return exactly `n_tokens` ids of plain text in the model's own vocabulary.

    Raises:
        EngineError: the server cannot tokenise.
    """
    n_words = n_tokens
    while True:
        tokens = server.tokenize(prompt_text(n_words, seed))
        if len(tokens) >= n_tokens:
            return tokens[:n_tokens]
        if not tokens:
            raise EngineFailed("llama-server makes no tokens of plain text: the model has no vocabulary")
        n_words = n_words * 2


def slot_tokens(text: str) -> int | None:
    """Return the context of one slot as a server's log has it; None if it does not say."""
    results = [next(group for group in match.groups() if group) for match in _SLOT.finditer(text)]
    return int(results[-1]) if results else None
