"""``--tokens METHOD[:key=value,…]``: which method reduces or freezes a model's tokens, as typed. No torch.

What a key may be is said by the options of the pass behind the method; which keys belong to a method, here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vlexport.core.errors import UsageError, nearest

AUTO = "auto"
"""What is typed to have method and rate searched."""
AUTO_GRID = (
    "tome:r=4", "tome:r=8", "tome:r=13", "evit:keep=0.9", "evit:keep=0.7", "evit:keep=0.5", "mctf:r=8", "mctf:r=16",
)  # fmt: skip
"""What such a search tries, from mild to strong of each method; layers are those that the pass takes by itself."""
_FLAG = "--tokens"
_SHARED = ("component", "unmerge", "min_cosine")


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        pass_name: Id of the pass that does it.
        keys: What may be given; None leaves that to the options of the pass.
        example: As a user would type it.
        preset: Options of the pass that the method itself decides.
    """

    pass_name: str
    keys: tuple[str, ...] | None
    example: str
    preset: Mapping[str, str] = field(default_factory=dict)


def _reduce(name: str, keys: str, example: str) -> Method:
    return Method("reduce-tokens", (*keys.split(), *_SHARED), f"{name}:{example}", {"method": name})


METHODS: dict[str, Method] = {
    "freeze": Method("freeze-tokens", None, "freeze"),
    "evit": _reduce("evit", "keep layers fuse count squeeze", "keep=0.7,layers=4+7+10"),
    "tome": _reduce("tome", "r layers", "r=8"),
    "mctf": _reduce("mctf", "r layers", "r=16"),
    "cls": _reduce("cls", "keep layers", "keep=0.5,layers=9+10+11+12"),
    "random": _reduce("random", "keep layers seed", "keep=0.7,layers=4+7+10"),
}
"""Name → what it does and takes."""


@dataclass(frozen=True)
class TokensRequest:
    """A parsed ``--tokens``.

    Attributes:
        method: Its name.
        pass_name: Id of the pass that does it.
        values: Options of that pass, as texts.
        component: Of several components, the one that is meant; empty where none is named.
    """

    method: str
    pass_name: str
    values: Mapping[str, str]
    component: str = ""


def tokens_from_text(text: str) -> TokensRequest:
    """Parse ``METHOD[:key=value,…]``.

    Raises:
        UsageError: VLX0703 for an unknown method or key, with the nearest one, and for what is no key=value.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if name not in METHODS:
        raise UsageError(
            "VLX0703", f"no token method '{name}'{nearest(name, METHODS)}", where=_FLAG,
            hint=f"known: {', '.join(METHODS)}; as {_FLAG} {METHODS['evit'].example}",
        )  # fmt: skip
    method = METHODS[name]
    values: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (each.strip() for each in part.partition("="))
        if not equals or not key or not value:
            raise UsageError(
                "VLX0703", f"{_FLAG} {name}: '{part.strip()}' is not key=value", where=_FLAG,
                hint=f"as {_FLAG} {method.example}; lists are joined by +",
            )  # fmt: skip
        if method.keys is not None and key not in method.keys:
            raise UsageError(
                "VLX0703", f"{_FLAG} {name} has no key '{key}'{nearest(key, method.keys)}", where=_FLAG,
                hint=f"keys of {name}: {', '.join(method.keys)}",
            )  # fmt: skip
        if key in values:
            raise UsageError("VLX0703", f"{_FLAG} {name}: {key} is given twice", where=_FLAG, hint="give it once")
        values[key] = value
    component = values.pop("component", "")
    return TokensRequest(name, method.pass_name, {**values, **method.preset}, component)


def flag_of(pass_name: str) -> str:
    """The flag that lets a pass run, as an example; empty for a pass that no method names."""
    return next((f"{_FLAG} {each.example}" for each in METHODS.values() if each.pass_name == pass_name), "")
