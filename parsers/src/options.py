"""The ways in which a value may be written, as bodies of grammar rules."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from . import ebnf


class Option(Protocol):
    """One alternative of a rule. It knows other rules by their names."""

    def needs(self) -> Iterable[str]:
        """Rules that all texts of it hold."""

    def uses(self) -> Iterable[str]:
        """Rules that some text of it holds."""

    def with_names(self, names: Mapping[str, str]) -> "Option":
        """The same with these rules under other names."""

    def write(self, name: str, finite: set[str], rules: dict[str, str]) -> str:
        """The body. `name` begins the names of further `rules`, `finite` are rules that some text fits."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A grammar that needs no other value."""

    body: str

    def needs(self) -> Iterable[str]:
        return ()

    def uses(self) -> Iterable[str]:
        return ()

    def with_names(self, names: Mapping[str, str]) -> "Leaf":
        return self

    def write(self, name: str, finite: set[str], rules: dict[str, str]) -> str:
        return self.body


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A value between two texts."""

    before: str
    value: str
    after: str

    def needs(self) -> Iterable[str]:
        return (self.value,)

    def uses(self) -> Iterable[str]:
        return (self.value,)

    def with_names(self, names: Mapping[str, str]) -> "Wrapped":
        return replace(self, value=names.get(self.value, self.value))

    def write(self, name: str, finite: set[str], rules: dict[str, str]) -> str:
        return f"{self.before} {self.value} {self.after}"


@dataclass(frozen=True, slots=True)
class Object:
    """Members in order, then those of other names."""

    members: list[tuple[str, str, bool]]
    """What stands before the value, the rule of the value, whether it is required."""
    free: list[tuple[str, str]]
    least: int
    most: int | None
    begin: str
    separator: str
    end: str
    empty: str

    def needs(self) -> Iterable[str]:
        return (value for _, value, required in self.members if required)

    def uses(self) -> Iterable[str]:
        return [*(value for _, value, _ in self.members), *(value for _, value in self.free)]

    def with_names(self, names: Mapping[str, str]) -> "Object":
        members = [(key, names.get(value, value), required) for key, value, required in self.members]
        return replace(self, members=members, free=[(key, names.get(value, value)) for key, value in self.free])

    def write(self, name: str, finite: set[str], rules: dict[str, str]) -> str:
        """Each member knows what may follow it; the first that is there has no separator."""
        members = [(f"{key} {value}", required) for key, value, required in self.members if value in finite]
        free = " | ".join(f"{key} {value}" for key, value in self.free if value in finite)
        least, most = self.least, self.most
        options, rest = [], '""'
        if free and most != 0:
            rules[f"{name}_free"] = free
            again = f"{self.separator} {name}_free"
            rest = ebnf.repeat(f"({again})", least, most)
            first_of_free = ebnf.repeat(f"({again})", max(least - 1, 0), None if most is None else most - 1)
            options.append(f"{name}_free {first_of_free}")
        if not least:
            options.append(self.empty)
        for place in range(len(members))[::-1]:
            member, required = members[place]
            rules[f"{name}_{place}"] = member
            rules[f"{name}_after_{place}"] = rest
            follows = f"{name}_{place} {name}_after_{place}"
            options = [follows] if required else [follows, *options]
            rest = f"{self.separator} {follows}"
            if not required:
                rest = f"({rest}) | {name}_after_{place}"
        return f"{self.begin} ({' | '.join(options)}) {self.end}"


@dataclass(frozen=True, slots=True)
class Array:
    """Items of a rule each, then any number of one rule."""

    prefix: list[str]
    item: str | None
    least: int
    most: int | None

    def needs(self) -> Iterable[str]:
        return [*self.prefix, self.item or ""][: self.least]

    def uses(self) -> Iterable[str]:
        return [*self.prefix, self.item] if self.item else self.prefix

    def with_names(self, names: Mapping[str, str]) -> "Array":
        prefix = [names.get(value, value) for value in self.prefix]
        return replace(self, prefix=prefix, item=names.get(self.item, self.item) if self.item else None)

    def write(self, name: str, finite: set[str], rules: dict[str, str]) -> str:
        prefix = []
        for value in self.prefix:
            if value not in finite:
                break
            prefix.append(value)
        item = self.item if self.item in finite and len(prefix) == len(self.prefix) else None
        most = self.most
        if item is None:
            most = len(prefix) if most is None else min(most, len(prefix))
        if most == 0:
            return '"[]"'
        after = '""'
        if item is not None and (most is None or most > len(prefix)):
            further = None if most is None else most - len(prefix)
            needed = max(self.least - len(prefix), 0)
            if prefix:
                after = ebnf.repeat(f'(", " {item})', needed, further)
            else:
                more = ebnf.repeat(f'(", " {item})', max(needed - 1, 0), None if further is None else further - 1)
                after = f"{item} {more}" if needed else f"({item} {more})?"
        for place in range(len(prefix if most is None else prefix[:most]))[::-1]:
            separator = '", " ' if place else ""
            one = f"{separator}{prefix[place]} {after}"
            after = one if place < self.least else f"({one})?"
        return f'"[" {after} "]"'
