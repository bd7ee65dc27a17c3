"""Tables that translate another library's tensor names to timm's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from mhacut.errors import CheckpointError

_MAX_NAMES = 5
"""Names of tensors in a message."""
_PART = re.compile(r"(.+)#(\d)(.*)")


@dataclass(frozen=True)
class Renaming:
    """Table of tensor names. ``*`` stands for a number; what follows a name (``.weight``) is kept.

    >>> table = Renaming({"encoder.layer.*.norm": "blocks.*.norm1"})
    >>> sorted(table.apply({"encoder.layer.7.norm.bias": torch.zeros(2)}))
    ['blocks.7.norm1.bias']
    """

    names: Mapping[str, str]
    """The other library's names to timm's; the first that fits counts. ``attn.qkv#1`` is the second of the
    parts that are joined, along their first dimension, to ``attn.qkv``."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that the model in timm does not need, and what they are, for the log; those with an
    empty text are not logged."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors for which timm has no place, and the reason why the file is refused."""
    refused_classifier: Mapping[str, str] = field(default_factory=dict)
    """The same for classifiers; the rest can be converted without them."""
    prefixes: tuple[str, ...] = ()
    """Prefixes that names may have in front; the first that fits is taken off."""
    finish: Callable[[dict[str, Tensor]], None] | None = None
    """Function that changes shapes in the dict of renamed tensors, in place."""

    def apply(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under timm's names, in their dtypes; works on the meta device too.

        Raises:
            CheckpointError: a name is not in the table, or parts are missing or do not fit together.
        """
        found: dict[str, Tensor] = {}
        parts: dict[str, dict[int, Tensor]] = {}
        unknown: list[str] = []
        for name, tensor in tensors.items():
            target = self.target(name)
            part = _PART.fullmatch(target) if target else None
            if target is None:
                unknown.append(name)
            elif part is not None:
                parts.setdefault(part[1] + part[3], {})[int(part[2])] = tensor
            elif target in found:
                raise CheckpointError(f"two tensors would be {target!r:.150}, one of them {name!r:.150}")
            elif target:
                found[target] = tensor
        if unknown:
            raise CheckpointError(
                f"{len(unknown)} tensors are not part of the model: "
                f"{', '.join(f'{name!r:.150}' for name in unknown[:_MAX_NAMES])}"
                f"{', ...' if len(unknown) > _MAX_NAMES else ''}"
            )
        try:
            found.update({name: self._joined(name, pieces) for name, pieces in parts.items()})
            if self.finish is not None:
                self.finish(found)
        except (RuntimeError, IndexError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"its tensors do not fit together ({reason:.200})") from None
        return found

    def target(self, name: str) -> str | None:
        """Return timm's name of a tensor, empty if it is left out, None if the table does not have it.

        Raises:
            CheckpointError: timm has no place for it.
        """
        base = self._without_prefix(name)
        for pattern, reason in self._refused:
            if pattern.fullmatch(base):
                raise CheckpointError(f"{name!r:.150} cannot be converted: {reason}")
        if any(pattern.fullmatch(base) for pattern, _ in self._left_out):
            return ""
        for pattern, target in self._names:
            found = pattern.fullmatch(base)
            if found is not None:
                *numbers, rest = found.groups()
                return target.replace("*", "{}").format(*numbers) + (rest or "")
        return None

    def what_is_left_out(self, names: Mapping[str, object]) -> list[str]:
        """Return the descriptions of the tensors that :meth:`apply` leaves out, each once."""
        bases = [self._without_prefix(name) for name in names]
        labels = [text for pattern, text in self._left_out if any(map(pattern.fullmatch, bases))]
        return [text for text in dict.fromkeys(labels) if text]

    def without_classifier(self) -> Renaming:
        """Return a table that leaves out the classifier that this one refuses."""
        left_out = {**self.left_out, **dict.fromkeys(self.refused_classifier, "")}
        return replace(self, left_out=left_out, refused_classifier={})

    def _without_prefix(self, name: str) -> str:
        for prefix in self.prefixes:
            if name.startswith(prefix):
                return name[len(prefix) :]
        return name

    def _joined(self, name: str, parts: Mapping[int, Tensor]) -> Tensor:
        count = max(parts) + 1
        count = max(count, self._parts_of.get(without_numbers(name), count))
        missing = [index for index in range(count) if index not in parts]
        if missing:
            raise CheckpointError(f"{name!r:.150} is joined of {count} tensors, found only {len(parts)}")
        return torch.cat([parts[index] for index in range(count)])

    @cached_property
    def _parts_of(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for target in self.names.values():
            part = _PART.fullmatch(target)
            if part is not None:
                for rest in (part[3], part[3] + ".weight", part[3] + ".bias"):
                    key = part[1] + rest
                    counts[key] = max(counts.get(key, 0), int(part[2]) + 1)
        return counts

    @cached_property
    def _names(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(name), target) for name, target in self.names.items()]

    @cached_property
    def _left_out(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(name), text) for name, text in self.left_out.items()]

    @cached_property
    def _refused(self) -> list[tuple[re.Pattern[str], str]]:
        refused = {**self.refused, **self.refused_classifier}
        return [(_pattern(name), text) for name, text in refused.items()]


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", r"(\d{1,6})") + r"(\..+)?")


def without_numbers(name: str) -> str:
    """Return a name of a tensor with ``*`` for each number inside."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
