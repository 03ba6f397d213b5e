"""Plugins: passes and targets of other installed packages. The only place where their code is imported. No torch.

A package offers them as entry points of the groups ``vlexport.passes`` and ``vlexport.targets``, id → class::

    [project.entry-points."vlexport.passes"]
    fold-double-negation = "vlexport_toy.fold_double_negation:FoldDoubleNegation"

The entry points are read when an id is looked up; the code behind one is imported only when that id is named on the
command line or in a recipe, or when passes or targets are listed. The class, or the module that it lies in, says in
words of its own which version of the contract it was written for (``API_VERSION = 1``).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlexport.core.errors import EXIT_INTERNAL, CapabilityError, VlexportError

BUILT_IN = "vlexport"
"""The distribution of what is in a catalogue of ours."""


@dataclass(frozen=True)
class Offer:
    """A pass or target that can be opened.

    Attributes:
        name: Its id.
        value: ``module:class``.
        distribution: Name of the package that brings it.
        version: Of that package; empty for our own.
    """

    name: str
    value: str
    distribution: str = BUILT_IN
    version: str = ""

    @property
    def built_in(self) -> bool:
        """Whether it is ours."""
        return self.distribution == BUILT_IN

    @property
    def origin(self) -> str:
        """Package and version, for messages."""
        return f"{self.distribution} {self.version}".strip()


def offers(group: str, catalogue: Mapping[str, str]) -> dict[str, tuple[Offer, ...]]:
    """Id → everything installed that claims it, ours first; imports nothing of theirs.

    Args:
        group: ``vlexport.`` and the folder's name.
        catalogue: Our own, id → ``module:class``.
    """
    found: dict[str, tuple[Offer, ...]] = {name: (Offer(name, value),) for name, value in catalogue.items()}
    others = importlib.metadata.entry_points(group=group)
    for entry in sorted(others, key=lambda e: (e.name, e.dist.name if e.dist else "")):
        package = (entry.dist.name, entry.dist.version) if entry.dist else ("an unnamed package", "")
        found[entry.name] = (*found.get(entry.name, ()), Offer(entry.name, entry.value, *package))
    return found


def only_one(claims: tuple[Offer, ...]) -> Offer:
    """The one offer of an id.

    Raises:
        CapabilityError: VLX1001 naming the distributions, when several claim it.
    """
    if len(claims) > 1:
        packages = " and ".join(offer.origin for offer in claims)
        raise CapabilityError(
            "VLX1001", f"'{claims[0].name}' is offered by {packages}", where=claims[0].name,
            hint=f"uninstall one of them: pip uninstall {claims[-1].distribution}",
        )  # fmt: skip
    return claims[0]


def load(offer: Offer, *, base: type, api_version: int) -> Any:
    """The class behind an offer; a plugin's is imported and checked against the contract.

    Args:
        offer: What to load.
        base: The class that it must derive from.
        api_version: The version of the contract that this vlexport holds to.

    Raises:
        CapabilityError: VLX1002 when it was written for another version of the contract, VLX1003 when it cannot be
            imported or is no such class; both name the distribution.
    """
    module, _, attribute = offer.value.partition(":")
    if offer.built_in:
        return getattr(importlib.import_module(module), attribute)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # another package's code may raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise unusable(offer, f"importing {offer.value} fails: {type(error).__name__}: {reason}") from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise unusable(offer, f"{offer.value} is no class derived from {base.__module__}.{base.__name__}")
    _require_version(offer, found, base, api_version)
    if inspect.isabstract(found):
        missing = ", ".join(n for n in dir(found) if getattr(getattr(found, n), "__isabstractmethod__", False))
        raise unusable(offer, f"{offer.value} does not say how to {missing}")
    wanted = [name for name in base.__annotations__ if not name.startswith("_")]
    unset = [name for name in wanted if not hasattr(found, name)]
    if unset:
        raise unusable(offer, f"{offer.value} does not set {', '.join(unset)}")
    return found


def _require_version(offer: Offer, found: type, base: type, api_version: int) -> None:
    """What the class says itself counts: ``base`` must not answer for it."""
    own = [each for each in found.__mro__ if not issubclass(base, each)]
    spaces = [vars(each) for each in own] + [vars(sys.modules[each.__module__]) for each in own]
    declared = next((space["API_VERSION"] for space in spaces if "API_VERSION" in space), None)
    if declared == api_version:
        return
    said = "does not say which version of vlexport's interface it was written for"
    hint = f"its author adds `API_VERSION = {api_version}` to the module"
    if declared is not None:
        said = f"was written for version {declared} of vlexport's interface, this vlexport has version {api_version}"
        newer = isinstance(declared, int) and declared > api_version
        hint = "update vlexport" if newer else f"update {offer.distribution}: pip install -U {offer.distribution}"
    raise CapabilityError("VLX1002", f"'{offer.name}' of {offer.origin} {said}", where=offer.name, hint=hint)


def unusable(offer: Offer, reason: str) -> CapabilityError:
    """The error VLX1003 for an offer that breaks the contract."""
    return CapabilityError(
        "VLX1003", f"'{offer.name}' of {offer.origin} cannot be used: {reason}", where=offer.name,
        hint=f"update or uninstall {offer.distribution}",
    )  # fmt: skip


@contextlib.contextmanager
def answering_for(claims: Callable[[], tuple[Offer, ...]]) -> Iterator[None]:
    """Whatever a plugin's code raises, and a contract that it breaks, becomes an error that names its package.

    Errors for the user pass through, and so does everything that is our own.

    Args:
        claims: Who offers what is run; asked for when something is raised.

    Raises:
        CapabilityError: VLX1003.
    """
    try:
        yield
    except Exception as error:  # another package's code may raise anything
        ours = isinstance(error, VlexportError) and error.exit_code != EXIT_INTERNAL
        offer = next((each for each in claims() if not each.built_in), None)
        if ours or offer is None:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        reason = error.message if isinstance(error, VlexportError) else f"{type(error).__name__}: {first}"
        raise unusable(offer, reason) from error
