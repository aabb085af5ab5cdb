"""The classes of a model in words, and which label stands for none of them."""

from __future__ import annotations

from collections.abc import Sequence


def null_class(embeddings: int | None, names: Sequence[str] | None, guided: bool = False) -> int | None:
    """The label that stands for no class: the last one, if the model was trained with label dropout.

    That is so under guidance, which needs such a model, and where one class more is embedded than has a name.
    """
    if embeddings is None:
        return None
    return embeddings - 1 if guided or (names and len(names) == embeddings - 1) else None


def classes_text(count: int, names: Sequence[str] | None = None) -> str:
    """Like "3 classes (cat, dog, eel)"; without names "3 classes (0 to 2)"."""
    return f"{count} class{'es' * (count != 1)} ({listed(count, names)})"


def listed(count: int, names: Sequence[str] | None = None) -> str:
    """Like "cat, dog, eel", of many names the first ten; without names "0 to 2"."""
    if not names or all(name == str(i) for i, name in enumerate(names)):
        return f"0 to {count - 1}" if count > 1 else "0"
    return ", ".join(names[:10]) + ", ..." * (len(names) > 10)


def labels_needed(embeddings: int, null: int | None, names: Sequence[str] | None) -> str:
    """What to say where a model with classes is given no label."""
    classes = classes_text(embeddings - (null is not None), names)
    return f"this model has {classes}: pass labels (an int, or one an image; on the command line, --label)"
