"""What a written network needs to merge tokens. Beside its weights lies `npprune.core.tokens`
itself, under this name: it needs torch alone."""

from npprune.core.tokens import Tokens, expanded, followed, match, merge

__all__ = ["Tokens", "expanded", "followed", "match", "merge"]
